"""Whole evaluations of the embedded model: identical, rounded to 2 bits, few items; caches, refusals, files, the command line."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.cli import main
from quantkit.errors import EvaluationError
from quantkit.evaluate import engines, session
from quantkit.evaluate.engines.engine import Engine, batches, cut, end_tokens, padded
from quantkit.model.checkpoint import file_digest
from quantkit.recipe import load_gate, load_suite, reference_model, shipped
from quantkit.suites import Suite

REFERENCE = reference_model()
ITEMS = [
    {"id": "en-choice-01", "language": "en", "domain": "stem", "kind": "choice", "messages": [{"role": "user", "content": "2 + 2?"}],
     "choices": ["three", "four", "five", "nine"], "correct": 1},
    {"id": "en-answer-01", "language": "en", "domain": "stem", "kind": "answer", "messages": [{"role": "user", "content": "3 + 4?"}],
     "answer": "7", "extract": "number"},
    {"id": "fr-call-01", "language": "fr", "domain": "agentic", "kind": "call", "messages": [{"role": "user", "content": "Réserve."}],
     "tools": [{"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}],
     "calls": [{"name": "book", "arguments": {}}]},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item) for item in ITEMS))
    (folder / "tiny.yaml").write_text("description: x\ndocument_tokens: 48\nwindow: 48\nitems: {path: items.jsonl, answer_tokens: 6}\n")
    return str(folder / "tiny.yaml")


def rounded(folder: Path, bits: int) -> Path:
    """The reference with every matrix of its blocks rounded plainly, in groups of 32, written unquantized."""
    shutil.copytree(REFERENCE, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim >= 2 and weight.shape[-1] % 32 == 0 and "router" not in name:
            groups = weight.float().unflatten(-1, (-1, 32))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 0.5)
            codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            weights[name] = (codes * scale).flatten(-2).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory) -> Path:
    return rounded(tmp_path_factory.mktemp("two") / "rtn2", 2)


def run(artefact: Path, suite: str, cache: Path, gate: str = "default", **options) -> session.Evaluation:
    return session.evaluate(artefact, REFERENCE, load_suite(suite), gate=load_gate(gate), cache=cache, **options)


def test_an_identical_model_is_exactly_itself(suite, cache):
    found = run(REFERENCE, suite, cache, "smoke")
    kl, flips = found.report["divergence"]["kl"], found.report["divergence"]["flips"]
    assert (kl["mean"], kl["max"], kl["p99"]) == (0.0, 0.0, 0.0)
    assert flips == {"right_to_wrong": 0, "wrong_to_right": 0}
    assert found.report["divergence"]["same_top"] == 1.0
    assert found.report["divergence"]["perplexity"] == found.report["divergence"]["perplexity_base"]
    assert found.report["items"]["all"]["right_to_wrong"] == 0
    assert found.report["divergence"]["documents"] == 20
    verdicts = {check["name"]: check["verdict"] for check in found.report["gate"]["checks"]}
    assert verdicts["accuracy of items"] == "INCONCLUSIVE", "three items prove nothing, whoever answers them"
    divergence = [v for name, v in verdicts.items() if "items" not in name and "calls" not in name]
    assert set(divergence) == {"PASS"}
    json.dumps(found.report, allow_nan=False)


@pytest.mark.parametrize("kind", ["choice", "answer"])
def test_items_alone_do_not_pass_by_chance_without_numbers(kind, monkeypatch, cache, tmp_path):
    real = session.open_engine
    monkeypatch.setattr(session, "open_engine", lambda name, a, b, threads: Broken() if a != b else real(name, a, b, threads))
    first = {**ITEMS[0], "correct": 0} if kind == "choice" else ITEMS[1]  # the first choice is what NaN would choose
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({**first, "id": f"n-{n}"}) for n in range(3)))
    (tmp_path / "s.yaml").write_text("description: x\ndocuments: null\nitems: {path: items.jsonl, answer_tokens: 2}\n")
    found = run(REFERENCE.parent / "reference" / ".." / "reference", str(tmp_path / "s.yaml"), cache, "smoke")
    assert found.verdict == "FAIL"
    checks = {check["name"]: check["verdict"] for check in found.report["gate"]["checks"]}
    assert checks["logits that are no numbers"] == "FAIL"
    assert checks["items whose logits are no numbers"] == ("FAIL" if kind == "choice" else "PASS")
    json.dumps(found.report, allow_nan=False)


def test_a_baseline_without_numbers_is_an_error(monkeypatch, tmp_path):
    real = session.open_engine
    monkeypatch.setattr(session, "open_engine", lambda name, a, b, threads: Broken() if a == b else real(name, a, b, threads))
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEMS[0]))
    (tmp_path / "s.yaml").write_text("description: x\ndocuments: null\nitems: {path: items.jsonl}\n")
    with pytest.raises(EvaluationError, match="baseline's own logits"):
        run(REFERENCE.parent / "reference" / ".." / "reference", str(tmp_path / "s.yaml"), tmp_path)


@pytest.mark.parametrize("demand", ["items: {call_margin: 0.02}", "divergence: {kl_mean_group: 0.1}"])
def test_a_demand_that_nothing_asked_answers_is_an_error(demand, cache, tmp_path):
    """Documents without labels and items without tools are there, and say nothing of what is demanded."""
    (tmp_path / "gate.yaml").write_text(f"description: x\n{demand}\n")
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEMS[0]))
    (tmp_path / "texts.jsonl").write_text('{"text": "a text in no language"}')
    (tmp_path / "s.yaml").write_text("description: x\ndocuments: texts.jsonl\nitems: {path: items.jsonl}\n")
    with pytest.raises(EvaluationError, match="asks nothing of the kind"):
        run(REFERENCE, str(tmp_path / "s.yaml"), cache, str(tmp_path / "gate.yaml"))


def test_an_artefact_without_its_tokenizer_is_an_error(cache, tmp_path):
    folder = Path(shutil.copytree(REFERENCE, tmp_path / "bare"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(EvaluationError, match="tokenizer"):
        run(folder, "divergence", cache, limit=2)


def test_a_run_stored_beside_another_baseline_is_refused(cache):
    stored = run(REFERENCE, "divergence", cache, limit=2).report["stored"]
    assert "stored run" in str([c["name"] for c in run(REFERENCE, "divergence", cache, limit=2, stored=stored).report["gate"]["checks"]])
    with pytest.raises(EvaluationError, match="another baseline"):
        run(REFERENCE, "divergence", cache, limit=2, stored={**stored, "baseline_digest": "0"})


def test_an_edited_task_of_ones_own_is_another_question(tmp_path):
    task = tmp_path / "ours.yaml"
    task.write_text("task: ours\n")
    suite = Suite(name="x", description="", documents=None, harness={"tasks": ["ours"], "include": str(tmp_path)})
    first = session._harness_key(suite)
    task.write_text("task: ours\ndoc_to_text: other\n")
    assert session._harness_key(suite) != first


def test_an_identical_model_passes_on_documents_alone(cache):
    found = run(REFERENCE, "divergence", cache, "strict", limit=4)
    assert (found.verdict, found.exit_code) == ("PASS", 0)


def test_two_bits_fail(two_bits, cache):
    found = run(two_bits, "divergence", cache, limit=4)
    assert (found.verdict, found.exit_code) == ("FAIL", 3)
    assert found.report["divergence"]["kl"]["mean"] > 0.5
    assert found.report["baseline_engine"]["cached"] is True, "the pass of the test above"
    failed = {check["name"] for check in found.report["gate"]["checks"] if check["verdict"] == "FAIL"}
    assert {"mean KL", "99% KL", "same top token"} <= failed


def test_the_baseline_is_asked_once_and_answers_the_same_from_disk(two_bits, suite, tmp_path):
    first, second = run(two_bits, suite, tmp_path), run(two_bits, suite, tmp_path)
    assert (first.report["baseline_engine"]["cached"], second.report["baseline_engine"]["cached"]) == (False, True)
    for key in ("divergence", "items", "answers", "gate"):
        assert first.report[key] == second.report[key]
    assert len(list(tmp_path.iterdir())) == 2
    other = load_suite(suite).model_copy(update={"window": 40})
    third = session.evaluate(two_bits, REFERENCE, other, gate=load_gate("default"), cache=tmp_path)
    assert third.report["baseline_engine"]["cached"] is False, "other windows are other questions"


def test_an_other_tokenizer_is_an_error(two_bits, cache, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(two_bits, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, two = [token for token in vocabulary if len(token) == 3][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(EvaluationError, match="tokenizer"):
        run(folder, "divergence", cache, limit=2)


def test_a_gate_without_its_questions_is_an_error(cache):
    asks_items = load_gate("default").model_copy(update={"divergence": type(load_gate("default").divergence)()})
    with pytest.raises(EvaluationError, match="asks nothing of the kind"):
        session.evaluate(REFERENCE, REFERENCE, load_suite("divergence"), gate=asks_items, cache=cache, limit=2)


class Moody(Engine):
    """An engine whose answers depend on how often it was asked."""

    name, vocabulary, whole = "moody", 2560, True

    def __init__(self):
        self.about, self.asked = {}, 0

    def log_probs(self, rows):
        for number, row in enumerate(rows):
            self.asked += 1
            generator = torch.Generator().manual_seed(self.asked)
            yield number, torch.randn(len(row), self.vocabulary, generator=generator).log_softmax(-1)

    def generate(self, prompts, most):
        return [[] for _ in prompts]


class Broken(Moody):
    """An engine that gives no numbers."""

    def log_probs(self, rows):
        for number, row in enumerate(rows):
            yield number, torch.full((len(row), self.vocabulary), torch.nan)


def test_an_engine_that_disagrees_with_itself_is_an_error(monkeypatch, cache):
    real = session.open_engine
    monkeypatch.setattr(session, "open_engine", lambda name, a, b, threads: Moody() if a != b else real(name, a, b, threads))
    with pytest.raises(EvaluationError, match="disagrees with itself"):
        run(REFERENCE.parent / "reference" / ".." / "reference", "divergence", cache, limit=4)


def test_logits_that_are_no_numbers_fail(monkeypatch, cache):
    real = session.open_engine
    monkeypatch.setattr(session, "open_engine", lambda name, a, b, threads: Broken() if a != b else real(name, a, b, threads))
    found = run(REFERENCE.parent / "reference" / ".." / "reference", "divergence", cache, limit=4)
    assert found.verdict == "FAIL"
    assert found.report["divergence"]["nonfinite"] == found.report["divergence"]["tokens"]
    json.dumps(found.report, allow_nan=False)


def test_perplexity_is_the_plain_definition(two_bits, tmp_path):
    """Against the model's own loss, one document at a time."""
    import transformers

    text = "The river is twelve kilometres long, and nobody swims in it."
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "d", "text": text}) + "\n" + json.dumps({"id": "e", "text": text[:30]}))
    suite = Suite(name="x", description="", documents=str(tmp_path), window=512)
    found = session.evaluate(two_bits, REFERENCE, suite, cache=tmp_path / "cache").report["divergence"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(two_bits)
    model = transformers.AutoModelForCausalLM.from_pretrained(two_bits, dtype=torch.float32)
    losses, count = 0.0, 0
    for part in (text, text[:30]):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(part, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(torch.tensor(losses / count).exp().item(), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(losses / 0.6931472 / len((text + text[:30]).encode()), rel=1e-4)


@pytest.mark.parametrize("path", sorted(shipped("eval").glob("baselines/*.json")), ids=lambda path: path.stem)
def test_stored_runs_are_of_what_is_shipped(path):
    """A stored run that asks for other documents than its suite's could be compared with nothing."""
    stored = json.loads(path.read_text())
    asked = session._asked(load_suite(stored["suite"]), session.load_tokenizer(REFERENCE), None)
    assert {d.id: n for d, n in zip(asked.rows.documents, asked.rows.tokens, strict=True)} == {
        name: row["tokens"] for name, row in stored["documents"].items()
    }
    assert path.stat().st_size < 20_000


# --- What an artefact is, and which engine opens it --------------------------------------------------------------------------------


def test_a_runs_folder_is_its_artefact(tmp_path):
    (tmp_path / "run" / "compressed-tensors").mkdir(parents=True)
    (tmp_path / "run" / "compressed-tensors" / "config.json").write_text("{}")
    assert engines.find_artefact(tmp_path / "run").name == "compressed-tensors"
    (tmp_path / "run" / "gguf").mkdir()
    with pytest.raises(EvaluationError, match="name one of them"):
        engines.find_artefact(tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"neither config\.json"):
        engines.find_artefact(tmp_path / "run" / "gguf")
    (tmp_path / "run" / "gguf" / "a.gguf").touch()
    assert engines.find_artefact(tmp_path / "run" / "gguf").name == "a.gguf"
    (tmp_path / "run" / "gguf" / "b.gguf").touch()
    with pytest.raises(EvaluationError, match=r"2 \.gguf files"):
        engines.find_artefact(tmp_path / "run" / "gguf")
    with pytest.raises(EvaluationError, match="no such file"):
        engines.find_artefact(tmp_path / "nothing")


def test_the_engine_follows_from_what_the_folder_holds(tmp_path):
    assert engines.choose(tmp_path) == "transformers"
    assert engines.choose(tmp_path, "vllm") == "vllm"
    assert engines.choose(tmp_path / "m.gguf") == "llama.cpp"
    assert engines.choose(tmp_path / "m.gguf", "dequantized") == "dequantized"
    (tmp_path / "model.onnx").touch()
    assert engines.choose(tmp_path) == "onnxruntime"
    with pytest.raises(EvaluationError, match="does not read it"):
        engines.choose(tmp_path, "llama.cpp")


@pytest.mark.parametrize("name, extra", [("vllm", "vllm"), ("llama.cpp", "llama"), ("onnxruntime", "onnxruntime"), ("dequantized", "gguf")])
def test_a_missing_engine_names_its_extra(monkeypatch, name, extra):
    def missing(module, *_):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(engines, "import_module", missing)
    with pytest.raises(EvaluationError, match=rf"pip install 'quantkit\[{extra}\]'"):
        engines.open_engine(name, Path("x"), REFERENCE)


def test_batches_hold_every_row_once_and_no_more_than_fits():
    rows = [[1] * n for n in (5, 100, 7, 7, 3000, 1)]
    found = list(batches(rows, 1000, tokens=200))
    assert sorted(number for batch in found for number in batch) == list(range(6))
    assert found[0] == [4], "what is too long alone goes alone"
    assert all(max(len(rows[n]) for n in batch) * len(batch) <= 200 for batch in found[1:])


def test_padding_stands_where_it_is_asked():
    right, left = padded([[1, 2], [3]]), padded([[1, 2], [3]], left=True)
    assert right[0].tolist() == [[1, 2], [3, 0]]
    assert left[0].tolist() == [[1, 2], [0, 3]]
    assert left[1].tolist() == [[1, 1], [0, 1]]


def test_an_answer_ends_where_the_config_says(tmp_path):
    assert end_tokens(REFERENCE) == {1, 5}
    assert end_tokens(tmp_path) == frozenset()
    assert cut([7, 8, 5, 9], frozenset({5})) == [7, 8]


def test_greedy_answers_do_not_depend_on_the_batch():
    engine = engines.open_engine("transformers", REFERENCE, REFERENCE)
    prompts = [[2, 4, 30, 31, 32], [2, 4, 50], [2, 4, 60, 61, 62, 63, 64, 65]]
    together = engine.generate(prompts, 8)
    assert together == [engine.generate([prompt], 8)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        if answer:
            assert answer[0] == int(next(iter(engine.log_probs([prompt])))[1][-1].argmax())


# --- The command line --------------------------------------------------------------------------------------------------------------


def test_the_command_line_writes_what_is_asked(two_bits, suite, cache, tmp_path):
    command = ["eval", str(two_bits), "--baseline", str(REFERENCE), "--suite", suite, "--gate", "smoke", "--cache", str(cache)]
    command += ["--junit", str(tmp_path / "j.xml"), "--store", str(tmp_path / "s.json"), "--output", str(tmp_path / "o.json")]
    result = CliRunner().invoke(main, [*command, "--threads", "1"])
    assert result.exit_code == 3, result.output
    assert "FAIL: gate smoke" in result.stdout
    assert "KL mean" in result.stdout
    junit = ElementTree.parse(tmp_path / "j.xml").getroot()
    whole = json.loads((tmp_path / "o.json").read_text())
    assert int(junit.get("failures")) == sum(check["verdict"] == "FAIL" for check in whole["gate"]["checks"]) > 0
    assert len(junit.findall("testcase")) == len(whole["gate"]["checks"])
    assert len(whole["answers"]) == 3
    again = CliRunner().invoke(main, [*command, "--json", "--against", str(tmp_path / "s.json")])
    found = json.loads(again.stdout)
    assert "answers" not in found
    stored = [check for check in found["gate"]["checks"] if "stored" in check["name"]]
    assert [check["verdict"] for check in stored] == ["PASS", "PASS"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["nothing-there"], "no such file or folder"),
        (["{two_bits}"], "name its original with --baseline"),
        (["{two_bits}", "--baseline", "{reference}", "--suite", "unheard"], "neither a shipped one"),
        (["{two_bits}", "--baseline", "{reference}", "--gate", "unheard"], "neither a shipped one"),
        (["{two_bits}", "--baseline", "{reference}", "--engine", "llama.cpp"], "does not read it"),
        (["{two_bits}", "--baseline", "{reference}", "--gate", "smoke", "--junit", "/no/such/folder/j.xml"], "no such folder"),
        (["{two_bits}", "--baseline", "{reference}", "--against", "{reference}/config.json"], "needs a gate"),
        (["{two_bits}", "--baseline", "{reference}", "--gate", "smoke", "--against", "{reference}/config.json"], "not what"),
    ],
)
def test_bad_input_is_one_line(two_bits, command, message):
    command = [part.format(two_bits=two_bits, reference=REFERENCE) for part in command]
    result = CliRunner().invoke(main, ["eval", *command])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_junit_without_a_gate_is_a_usage_error(two_bits):
    assert CliRunner().invoke(main, ["eval", str(two_bits), "--junit", "j.xml"]).exit_code == 2


def test_an_artefact_of_the_embedded_model_knows_its_baseline(two_bits, tmp_path, cache):
    """The manifest says what it was made from; another's weights need a name."""
    folder = tmp_path / "mine"
    shutil.copytree(two_bits, folder)
    digest = file_digest(REFERENCE / "model.safetensors")
    (folder / "quantkit.json").write_text(json.dumps({"inputs": {"model.safetensors": digest}}))
    found = quantkit.evaluate(str(folder), suite="divergence", limit=2, cache=cache)
    assert found.verdict is None
    assert found.exit_code == 0
    assert found.report["baseline"] == "reference"
    (folder / "quantkit.json").write_text(json.dumps({"inputs": {"model.safetensors": "sha256:0"}}))
    with pytest.raises(EvaluationError, match="--baseline"):
        quantkit.evaluate(str(folder), suite="divergence", limit=2, cache=cache)


def test_commands_keep_the_names_of_their_rooms():
    """Importing anything of quantkit.evaluate binds that package in quantkit; it has to stay what the README calls."""
    import quantkit.calibrate.samples
    import quantkit.evaluate.metrics

    assert callable(quantkit.evaluate)
    assert callable(quantkit.calibrate)
    assert quantkit.evaluate.metrics.Tokens
    with pytest.raises(EvaluationError, match="no such file"):
        quantkit.evaluate("nothing-there", baseline=str(REFERENCE))
