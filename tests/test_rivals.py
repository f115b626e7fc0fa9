"""The rivals' side of the benchmark, as far as it runs without them: dense weights, tokens, the score, results that are kept."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parents[1] / "benchmarks" / "rivals"
NAMES = ("common", "run", "score", "tokens")


@pytest.fixture
def rivals(monkeypatch):
    """The scripts as modules; they stand in no package, as another interpreter runs them."""
    monkeypatch.syspath_prepend(str(HERE))
    modules = {name: importlib.import_module(name) for name in NAMES}
    yield Namespace(**modules)
    for name in NAMES:
        sys.modules.pop(name)


def by_expert(tensors):
    """Fused experts as a rival holds them: a matrix of its own for every projection of every expert."""
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for number, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                yield f"{stem}.{number}.gate_proj.weight", gate
                yield f"{stem}.{number}.up_proj.weight", up
        elif leaf == "down_proj":
            for number, matrix in enumerate(value):
                yield f"{stem}.{number}.down_proj.weight", matrix
        else:
            yield name, value


def rounded(weight, bits=4, group=32):
    groups = weight.float().reshape(-1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    return (torch.clamp((groups / scale).round(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(weight.shape)


@pytest.fixture
def moe(tmp_path):
    folder = tmp_path / "moe"
    tiny.build("gemma4_moe", folder)
    return folder


def test_dense_weights_come_back_in_the_checkpoints_layout(rivals, moe):
    original = rivals.common.checkpoint(moe)
    parameters = {name: value.float() for name, value in by_expert(original)}
    quantized = {name for name in parameters if rivals.common.LINEAR.fullmatch(name.removesuffix(".weight"))}
    assert any(".experts.0.gate_proj" in name for name in quantized)
    assert not any("router" in name or "norm" in name or "embed" in name for name in quantized)
    parameters |= {name: rounded(parameters[name]) for name in quantized}
    arguments = Namespace(model=moe, bits=4, group=32)
    weights = rivals.common.dense(arguments, parameters, quantized)
    for name, weight in weights.items():
        matrix = weight if weight.ndim == 2 else weight.flatten(0, 1)
        assert torch.equal(rounded(original[name]).reshape(matrix.shape), matrix), name
    fused = {name for name in original if name.rpartition(".")[2] in ("gate_up_proj", "down_proj")}
    assert fused
    assert fused <= set(weights)
    assert len(weights) == len(fused) + sum(".experts." not in name for name in quantized)

    left = next(name for name in quantized if ".experts.1.up_proj" in name)
    parameters[left] = dict(by_expert(original))[left].float()
    with pytest.raises(SystemExit, match=r"1 of \d+ matrices are not of 4 bits in groups of 32, .*experts\.1\.up_proj"):
        rivals.common.dense(arguments, parameters, quantized)
    with pytest.raises(SystemExit, match="has no such tensor"):
        rivals.common.dense(arguments, {"model.layers.0.mlp.side_proj.weight": torch.ones(2, 2)}, {"model.layers.0.mlp.side_proj.weight"})


def test_score_is_the_divergence_of_the_weights(rivals, moe, tmp_path):
    original = rivals.common.load_model(moe)
    name = next(name for name in rivals.common.checkpoint(moe) if name.endswith("layers.0.self_attn.q_proj.weight"))
    contender = rivals.common.load_model(moe, weights={name: rounded(rivals.common.checkpoint(moe)[name], bits=2)})
    ids = torch.randint(20, tiny.VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(1))
    file = tmp_path / "ids.safetensors"
    save_file({"ids": ids, "language": torch.tensor([0, 0, 1, 1, 1, 0])}, file, metadata={"languages": json.dumps(["en", "nl"])})
    figures = rivals.score.score(original, contender, file)
    p, q = (rivals.common.logits(model, ids)[:, :-1].log_softmax(-1) for model in (original, contender))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert figures["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert figures["languages"]["nl"]["kl"] == pytest.approx(kl[2:5].mean().item(), rel=1e-4)
    assert figures["languages"]["nl"]["row_kl"] == pytest.approx(kl[2:5].mean(-1).tolist(), rel=1e-4)
    loss = torch.nn.functional.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten())
    assert figures["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    low, high = figures["kl_interval"]
    assert kl.mean(-1).min() < low < figures["kl"] < high < kl.mean(-1).max()
    assert rivals.score.score(original, original, file)["kl"] == 0


def test_the_worst_language_beside_what_chance_alone_would_show(rivals):
    generator = torch.Generator().manual_seed(2)

    def scored(gains, noise):
        """Two contenders on ten rows of each language; the levels of rows differ by far more than what the second gains."""
        both = ({}, {})
        for name, gain in gains.items():
            rounding = torch.exp(torch.randn(10, generator=generator))
            ours = rounding * gain * torch.exp(noise * torch.randn(10, generator=generator))
            for figures, rows in zip(both, (rounding, ours), strict=True):
                figures[name] = {"row_kl": rows.tolist()}
        return [{"languages": figures} for figures in both]

    languages = ("ar", "en", "fr", "hi", "ja", "nl")
    first, figures = scored(dict.fromkeys(languages, 0.5) | {"ja": 0.8}, noise=0.05)
    name, figure, (low, high), chance = rivals.score.worst_language(first, figures)
    sums = [sum(map(sum, (values["row_kl"] for values in f["languages"].values()))) for f in (first, figures)]
    own = [sum(f["languages"]["ja"]["row_kl"]) for f in (first, figures)]
    assert name == "ja"
    assert figure == pytest.approx(own[1] / own[0] * sums[0] / sums[1])
    assert 1 < chance < low < figure < high

    seen = [rivals.score.worst_language(*scored(dict.fromkeys(languages, 0.5), noise=0.3)) for _ in range(200)]
    by_chance = sum(figure > chance for _, figure, _, chance in seen) / len(seen)
    assert min(figure for _, figure, _, _ in seen) > 1
    assert 0.005 < by_chance < 0.15  # one draw in twenty
    assert rivals.score.worst_language(first, first)[1:] == (1, [1, 1], 1)


def test_rows_start_with_a_document(rivals):
    def tokenizer(text, truncation, max_length):
        return {"input_ids": [1, *(ord(letter) for letter in text)][:max_length]}

    found = list(rivals.tokens.rows(tokenizer, ["abc", "defghij", "k", "lm", "nopq", "r"], 5))
    assert found == [[1, *b"abc", 1], [1, *b"k", 1, *b"lm"], [1, *b"nopq"]]
    sources = [iter([[1], [2]]), iter([[3]]), iter([[4], [5], [6]])]
    assert rivals.tokens.evenly(sources, 5, "some") == [[1], [3], [4], [2], [5]]
    with pytest.raises(SystemExit, match="some: the sources hold 1 rows, 2 are wanted"):
        rivals.tokens.evenly([iter([[1]])], 2, "some")


@pytest.mark.parametrize(
    ("language", "line", "its"),
    [
        ("zh", "计算机的 USB 接口\n", True),
        ("zh", "To set up a network, plug in 网线\n", False),
        ("ja", "電源を切る\n", True),
        ("ko", "전원을 끕니다\n", True),
        ("ru", "Нажмите кнопку Backspace\n", True),
        ("ru", "print(42)\n", False),
        ("hi", "पंक्ति की ऊँचाई\n", True),
        ("ar", "ارتفاع الصف\n", True),
        ("nl", "Op de werkbalk klikt u op het teken\n", True),
        ("nl", "This is the list of all the files\n", False),
        ("fr", "La liste des fichiers est dans le dossier\n", True),
        ("es", "The hardware buttons on a tablet can be set\n", False),
        ("en", "x = 42\n", True),
    ],
)
def test_what_is_not_translated_is_no_text_of_its_language(rivals, language, line, its):
    assert rivals.tokens.spoken(line, language) == its


def test_pieces_are_lines_of_the_files_language(rivals, tmp_path):
    line, foreign = "Строка, которая по-русски.\n", "A line that is not.\n"
    texts = [line * 5 + foreign * 9 + line * 15, foreign * 30, line]
    path = tmp_path / "ru_docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = rivals.tokens.pieces(path)
    enough = -(-rivals.tokens.PIECE // len(line))
    assert sorted(found, key=len) == [line, line * (20 - 2 * enough), line * enough, line * enough]


FAKE = """
import json, pathlib, sys
model, ids, output, *words = sys.argv[1:]
if "--fail" in words:
    sys.exit("no such luck")
count = pathlib.Path(model) / "runs"
count.write_text(str(int(count.read_text()) + 1) if count.exists() else "1")
pathlib.Path(output, "weights.safetensors").write_bytes(b"")
pathlib.Path(output, "result.json").write_text(json.dumps({"words": words, "run": int(count.read_text())}))
"""


def test_a_result_is_kept_until_something_changes(rivals, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals.run, "HERE", tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "common.py").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    ids = tmp_path / "ids.safetensors"

    def ask(*options, **changes):
        keys = {"rival": "fake", "method": "awq", "bits": 4, "symmetric": True} | changes
        return rivals.run.run(Path(sys.executable), tmp_path / "model", ids, tmp_path / "cache", *options, **keys)

    save_file({"ids": torch.ones(2, 3, dtype=torch.int64)}, ids)
    weights, result = ask()
    assert weights.is_file()
    assert result == {"words": ["--bits=4", "--group=32", "--symmetric", "--method=awq"], "run": 1}
    assert ask()[1]["run"] == 1
    assert ask(bits=3)[1]["run"] == 2
    assert ask("--all-experts")[1]["words"][-1] == "--all-experts"
    save_file({"ids": torch.zeros(2, 3, dtype=torch.int64)}, ids)
    assert ask()[1]["run"] == 4
    for _ in range(2):  # a failure is no result
        with pytest.raises(RuntimeError, match=r"fake .*--fail: exit code 1, no such luck \(log: .*log\.txt\)"):
            ask("--fail")
    assert load_file(ids)["ids"].sum() == 0
