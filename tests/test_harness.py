"""lm-evaluation-harness with our engines: its figures are ours, names of benchmarks resolve, local tasks work offline."""

import json
import math
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from quantkit.errors import EvaluationError  # noqa: E402
from quantkit.evaluate import harness, session  # noqa: E402
from quantkit.evaluate.documents import Document, load_tokenizer, make_rows  # noqa: E402
from quantkit.evaluate.engines import open_engine  # noqa: E402
from quantkit.recipe import load_benchmarks, load_gate, reference_model  # noqa: E402
from quantkit.suites import Harness, Suite  # noqa: E402

TEXT = Path(__file__).read_text()  # some 3,000 tokens
WINDOW = 256


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return open_engine("transformers", reference_model(), reference_model())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(reference_model())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A task of multiple choice and one of generation, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} + 1?", "choices": ["one", "two", "six"], "label": n % 3} for n in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    (folder / "pick.yaml").write_text(
        f"task: own_pick\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}} Answer:'\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "say.yaml").write_text(
        f"task: own_say\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}} Answer:'\n"
        "doc_to_target: '{{choices[label]}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


class Request:
    """What the harness hands over, as far as a model looks at it."""

    def __init__(self, *args):
        self.args = args


def test_perplexity_is_the_harness_own_rolling_log_likelihood(engine, tokenizer):
    """Against lm-eval's own model class on the same text and window: equal to 1e-3 and far nearer."""
    from lm_eval.models.huggingface import HFLM

    # left to itself it sets BOS twice with a tokenizer that sets one too: its prefix stands in front of the tokenizer's
    theirs = HFLM(pretrained=engine.model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4, device="cpu", add_bos_token=False)
    theirs_total = theirs.loglikelihood_rolling([Request(TEXT)], disable_tqdm=True)[0]
    ours_total = harness.EngineLM(engine, tokenizer, WINDOW, 8).loglikelihood_rolling([Request(TEXT)])[0]
    suite_rows = make_rows([Document("d", TEXT, {})], tokenizer, WINDOW, "document")
    nll = 0.0
    for number, log_p in engine.log_probs([window.ids for window in suite_rows.windows]):
        window = suite_rows.windows[number]
        following = torch.tensor(window.ids[window.first :])
        nll -= float(log_p[window.first - 1 : -1].gather(1, following[:, None]).double().sum())
    tokens = sum(suite_rows.tokens)
    perplexity = math.exp(nll / tokens)
    assert tokens > 5 * WINDOW
    assert math.exp(-theirs_total / tokens) == pytest.approx(perplexity, rel=1e-5)
    assert math.exp(-ours_total / tokens) == pytest.approx(perplexity, rel=1e-5)


def test_log_likelihoods_are_the_harness_own(engine, tokenizer):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=engine.model, tokenizer=tokenizer, max_length=512, batch_size=2, device="cpu", add_bos_token=True)
    pairs = [("The river is", " long"), ("2 + 2 =", " 4"), ("", "alone"), ("spaces ", "move")]
    requests = [Request(*pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = harness.EngineLM(engine, tokenizer, 512, 8).loglikelihood(requests, disable_tqdm=True)
    for (one, greedy_one), (two, greedy_two) in zip(found, expected, strict=True):
        assert one == pytest.approx(two, abs=1e-3)
        assert greedy_one == greedy_two


def test_a_chat_template_writes_bos_once(engine, tokenizer):
    model = harness.EngineLM(engine, tokenizer, 512, 8)
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert model.tok_encode(text).count(tokenizer.bos_token_id) == 1
    assert model.tok_encode("Hello")[0] == tokenizer.bos_token_id


def test_generation_stops_where_a_task_says(engine, tokenizer):
    model = harness.EngineLM(engine, tokenizer, 512, 12)
    free = model.generate_until([Request("The river", {"until": []})])[0]
    stop = free[len(free) // 2]
    assert model.generate_until([Request("The river", {"until": [stop]})])[0] == free.split(stop)[0]
    assert len(model.generate_until([Request("The river", {"max_gen_toks": 2})])[0]) < len(free)


def test_names_on_cards_resolve():
    known = ["mmlu_pro", "arc_easy", "arc_challenge", "gsm8k"]
    benchmarks = load_benchmarks()
    assert harness.resolve(["MMLU-Pro", "ARC", "gsm8k", "ARC-c"], benchmarks, known) == ["mmlu_pro", "arc_easy", "arc_challenge", "gsm8k"]
    with pytest.raises(EvaluationError, match="its own harness"):
        harness.resolve(["LiveCodeBench"], benchmarks, known)
    with pytest.raises(EvaluationError, match="has no task"):
        harness.resolve(["made-up-bench"], benchmarks, known)


def test_local_tasks_pair_item_by_item_through_the_gate(tasks, tmp_path):
    asked = Harness(tasks=["own_pick", "own_say"], include=str(tasks), answer_tokens=4)
    suite = Suite(name="own", description="", documents=None, harness=asked, window=256)
    found = session.evaluate(reference_model(), reference_model(), suite, gate=load_gate("smoke"), limit=4, cache=tmp_path)
    items = found.report["items"]
    assert {name: row["items"] for name, row in items["by_task"].items()} == {"own_pick": 4, "own_say": 4}
    assert items["all"]["right_to_wrong"] == items["all"]["wrong_to_right"] == 0
    assert found.verdict == "INCONCLUSIVE"
    again = session.evaluate(reference_model(), reference_model(), suite, gate=load_gate("smoke"), limit=4, cache=tmp_path)
    assert again.report["baseline_engine"]["cached"] is True
    assert again.report["answers"] == found.report["answers"]


def test_samples_become_items():
    samples = [
        {"doc_id": 0, "doc_hash": "a" * 64, "acc": 1.0, "acc_norm": 0.0},
        {"doc_id": 1, "doc_hash": "b" * 64, "acc": 1.0, "acc_norm": 1.0},
    ]
    found = harness.items_of("t", samples)
    assert [item["right"] for item in found] == [False, True], "acc_norm is the one that counts"
    twice = [{"doc_id": 0, "doc_hash": "a", "exact_match": value} for value in (0.0, 1.0)]
    assert [item["right"] for item in harness.items_of("t", twice)] == [True], "either filter may find the answer"
    with pytest.raises(EvaluationError, match="cannot be paired"):
        harness.items_of("t", [{"doc_id": 0, "word_perplexity": (1.0, 2), "metrics": ["word_perplexity"]}])
