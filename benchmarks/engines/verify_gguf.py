"""Does llama.cpp load the GGUFs that quantkit writes, and compute what transformers computes?

    python benchmarks/engines/verify_gguf.py --engine-python .venv-llama/bin/python

Every family is built tiny and written unquantized in F32: llama.cpp's logits against transformers' in fp32 on the same token ids, and its
own token ids of a text in many scripts against the tokenizer's. The tokenizers are byte-level BPE with the patterns of GPT-2, Llama 3,
Qwen 2 and Mistral's tekken, and Gemma's kind in both forms that llama.cpp has for it. Then recipes of each type: there llama.cpp also
rounds activations to 8 bits, so the yardstick is the KL that the weights' own rounding costs.

llama.cpp reads GELU from a table in fp16, so nets with GELU cannot come nearer than about 1e-7. Trained models (docs/measured.md says
which) are added from the folder that --models names. Exit code 1 if any row is not as expected.

Two differences are llama.cpp's own and taken out of the comparison: Gemma 3n's sparsity divides by n - 1 where transformers divides by n
(a part in 2 n; transformers is given n - 1 here), and its tekken splits words at combining marks (the text goes without Hindi there).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import decode
import numpy as np
import torch
import transformers
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

from quantkit.recipe import load_recipe  # noqa: E402
from quantkit.write.gguf.tokenizer import PRE_TOKENIZERS  # noqa: E402

EXACT = 1e-6  # KL of a file in F32
ROUGH = 1e-2  # KL that activations in 8 bits may cost by themselves, routing of tiny experts included
TOKENS = 400
UNQUANTIZED = {"method": "rtn", "targets": [], "formats": ["gguf"], "gguf": {"types": {"*": "f32"}}, "score": {"samples": 0}}
QUICK = {"calibration": {"samples": 20, "sequence_length": 128}, "score": {"samples": 0}}
# sizes that llama.cpp has in its code
GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 22, "num_kv_shared_layers": 2, "laurel_rank": 64, "hidden_size_per_layer_input": 256,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}  # fmt: skip
TEXT = """A small model learns to count: 1, 2, 3, 2048 and 3.14.   Three spaces, a tab\tand

two line breaks.\r\n def f(x): return x**2  # it's done, WE'LL see; don't
今天天气很好，我们去公园散步吧。人工智能正在改变世界。 यह एक परीक्षण वाक्य है। الطقس جميل اليوم، هيا نذهب إلى الحديقة.
Сегодня хорошая погода 🚀🦙. 今日は天気がいいので、公園を散歩しましょう。 오늘은 날씨가 좋으니 공원에 가자. Il fait beau aujourd'hui, señor!
<|turn>user\nHoe gaat het?<turn|>\n"""


@dataclass(frozen=True)
class Case:
    family: str  # of tests/tiny.py, or a folder of a trained model
    tokenizer: str = "gpt-2"
    recipe: str = "F32"
    changes: dict[str, Any] = field(default_factory=dict)
    tokens: int = TOKENS


CASES = [
    *(Case(family) for family in tiny.FAMILIES if not family.startswith("gemma3n") and family != "mistral"),
    Case("gemma3n_text", changes=GEMMA3N),
    Case("gemma3n", changes=GEMMA3N),
    Case("mistral", "tekken", tokens=tiny.WINDOW),  # beyond its window llama.cpp does not slide
    Case("llama", "llama-bpe", changes={"tie_word_embeddings": True}),
    Case("llama", changes={"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        "rope_theta": 10000.0}}),
    Case("qwen3", "qwen2", changes={"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}}),
    Case("gemma3_vision", "gemma", changes={"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    Case("gemma4_e", "gemma"),
    Case("reference"),
    *(Case(family, recipe=recipe) for recipe in ("awq-w4", "awq-w4-asym", "awq-w8") for family in ("llama", "gemma3_text", "reference")),
    *(Case(family, recipe="awq-w4") for family in ("gemma4_e", "qwen3_moe", "mixtral", "qwen2")),
]  # fmt: skip
TRAINED = [Case("g4moe-s"), Case("stories260K"), Case("g4moe-s", recipe="awq-w4")]


@dataclass
class Row:
    family: str
    tokenizer: str
    recipe: str
    verdict: str = ""
    kl: float | None = None  # of llama.cpp to transformers with the same weights
    kl_max: float | None = None
    loss: float | None = None  # of those weights to the source's
    same_ids: bool | None = None
    tokens: int = 0
    good: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine-python", type=Path, default=ROOT / ".venv-llama/bin/python", help="the Python that has llama-cpp-python")
    parser.add_argument("--models", type=Path, help="a folder of trained models, g4moe-s and stories260K, whose rows are added")
    parser.add_argument("--only", nargs="+", help="these families, not all")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if not options.engine_python.exists():
        raise SystemExit(f"{options.engine_python}: no such Python; `make llama` makes it, or name another with --engine-python")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    trained = [case for case in TRAINED if options.models and (options.models / case.family).is_dir()]
    if options.models and not trained:
        raise SystemExit(f"{options.models}: holds none of {', '.join(sorted({case.family for case in TRAINED}))}")
    rows = []
    print(f"{'family':14} {'tokenizer':10} {'recipe':12} {'KL mean':>9} {'KL max':>9} {'weights':>9}  {'ids':5} verdict")
    for case in [case for case in CASES + trained if not options.only or case.family in options.only]:
        with tempfile.TemporaryDirectory() as home:
            row = check(case, Path(home), options)
        rows.append(row)
        numbers = " ".join(f"{'' if value is None else f'{value:.1e}':>9}" for value in (row.kl, row.kl_max, row.loss))
        ids = {True: "equal", False: "OTHER", None: ""}[row.same_ids]
        print(f"{row.family:14} {row.tokenizer:10} {row.recipe:12} {numbers}  {ids:5} {row.verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if rows and all(row.good for row in rows) else 1


def check(case: Case, home: Path, options: argparse.Namespace) -> Row:
    row = Row(case.family, case.tokenizer if case.family in tiny.FAMILIES else "its own", case.recipe)
    try:
        source = build(case, home / "source", options.models)
        file, plain = quantize(source, case, home)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        text = TEXT if case.tokenizer != "tekken" else re.sub("[\u0900-\u097f]+", "", TEXT)
        ids = tokenizer(text)["input_ids"]
        given = ids[: case.tokens]
        found = in_llama_cpp(file, text, given, home, options.engine_python)
        logits = torch.from_numpy(found["logits"])
        original = logits_of(source, given)
        same = logits_of(plain, given) if plain else original
        width = same.shape[1]
        apart = divergence(same, logits[:, :width])
    except Exception as problem:
        row.verdict = f"fails: {' '.join(str(problem).split())[-160:]}"
        return row
    row.kl, row.kl_max, row.tokens = apart.mean().item(), apart.max().item(), len(given)
    row.same_ids = found["ids"].tolist() == ids
    row.loss = divergence(original, same).mean().item() if plain else None
    near = row.kl < EXACT if row.loss is None else row.kl < max(0.2 * row.loss, ROUGH)
    row.good = bool(near and row.same_ids)
    row.verdict = "ok" if row.good else "other logits" if not near else "other tokens"
    return row


def build(case: Case, folder: Path, trained: Path) -> Path:
    if case.family == "reference":
        return ROOT / "reference"
    if case.family not in tiny.FAMILIES:
        return trained / case.family
    changes = dict(case.changes)
    tokenizer = ROOT / "reference" / "tokenizer.json" if case.tokenizer == "gemma" else None
    if case.tokenizer != "gpt-2":
        changes["vocab_size"] = 2560 if tokenizer else 600
        if case.family.startswith(("gemma4_e", "gemma3n")):
            changes["vocab_size_per_layer_input"] = changes["vocab_size"]
    tiny.build(case.family, folder, **changes)
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    elif case.tokenizer != "gpt-2":
        (folder / "tokenizer.json").write_text(byte_level(case.tokenizer))
    return folder


def byte_level(name: str) -> str:
    """A tokenizer that splits by the pattern of that name."""
    pattern = next(pattern for pattern, known in PRE_TOKENIZERS.items() if known == name)
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(tiny.SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*tiny.SENTENCES, TEXT], trainer)
    opened = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tiny.IDS["<bos>"])])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), opened])
    return tokenizer.to_str()


def quantize(source: Path, case: Case, home: Path) -> tuple[Path, Path | None]:
    """(file, its weights as an unquantized checkpoint), through the command line; None where nothing is quantized."""
    out, recipe, formats = home / "out", home / f"{case.recipe}.yaml", ["gguf", "compressed-tensors"]
    keys: dict[str, Any] = {"description": "F32", **UNQUANTIZED}
    if case.recipe == "F32":
        formats = ["gguf"]
    else:
        keys = {**load_recipe(case.recipe).model_dump(mode="json", exclude={"name"}), **QUICK}
    recipe.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "quantkit", "quantize", str(source), "--recipe", str(recipe), "--output", str(out)]
    command += [part for name in formats for part in ("--format", name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    (file,) = (out / "gguf").glob("*.gguf")
    if len(formats) == 1:
        return file, None
    decode.plain(out / "compressed-tensors", home / "plain")
    return file, home / "plain"


def in_llama_cpp(file: Path, text: str, ids: list[int], home: Path, python: Path) -> Any:
    """Token ids of the text, and logits of the given ids."""
    np.save(home / "ids.npy", np.array(ids))
    (home / "text.txt").write_bytes(text.encode())
    command = [str(python), str(HERE / "llama_logits.py"), str(file), str(home / "text.txt"), str(home / "ids.npy"), str(home / "said")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if (home / "said.json").exists():
        raise RuntimeError(json.loads((home / "said.json").read_text())["error"])
    if not (home / "said.npz").exists():
        raise RuntimeError(f"llama.cpp's process ended with {done.returncode}: {done.stderr[-200:]}")
    return np.load(home / "said.npz")


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gemma3n":  # its tiny towers are invented
        with tempfile.TemporaryDirectory() as text:
            return logits_of(decode.text_part(folder, Path(text) / "text"), ids)
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "_gaussian_topk"):
            module._gaussian_topk = types.MethodType(_unbiased_topk, module)
            module.act_fn = _TableGelu()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


class _TableGelu(torch.nn.Module):
    """GELU from ggml's table: fp16 values at fp16 places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def _unbiased_topk(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's sparse activation as llama.cpp computes it."""
    multiplier = torch.distributions.Normal(0, 1).icdf(torch.tensor(mlp.activation_sparsity, dtype=torch.float32))
    return (inputs - inputs.mean(-1, keepdim=True) - inputs.std(-1, keepdim=True) * multiplier).relu()


def divergence(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL at every position."""
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


if __name__ == "__main__":
    sys.exit(main())
