"""Our GGUFs beside llama-quantize's with llama-imatrix: same calibration text, same type for every tensor, same size, KL in llama.cpp.

    python benchmarks/llama_quantize.py --tools DIR --engine-python .venv-llama/bin/python [MODEL ...] [--recipes gguf-q4_k_m gguf-q4_0]

DIR holds llama-quantize and llama-imatrix (of the llama.cpp that llama-cpp-python was built from, or any near it). The calibration text is
our own mix, as our run tokenizes it; the importance matrix is collected on that text, special tokens parsed, in chunks of 512. Scored are
our held-out samples. The ratio of mean KLs has a 95% interval from 2000 draws of samples with replacement, the same draw for both files.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml

from quantkit import recipe as recipes
from quantkit.calibrate.draw import draw, make_row
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.sources import read_samples

HERE = Path(__file__).resolve().parent
UNQUANTIZED = {"description": "F32", "method": "rtn", "targets": [], "formats": ["gguf"], "gguf": {"types": {"*": "f32"}}}
SCORED = 256  # tokens of a held-out sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=[str(recipes.reference_model())])
    parser.add_argument("--recipes", nargs="+", default=["gguf-q4_k_m", "gguf-q4_0"])
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--engine-python", type=Path, default=HERE.parent / ".venv-llama/bin/python")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = [f"{head:>{width}}" for head, width in (("bytes", 12), ("theirs", 12), ("KL", 9), ("theirs", 9), ("ratio", 6))]
    print(f"{'model':20} {'recipe':12} {' '.join(heads)}  95%             CPU s theirs")
    for model in options.models:
        for recipe in options.recipes:
            with tempfile.TemporaryDirectory() as home:
                compare(Path(model), recipe, Path(home), options)


def compare(model: Path, recipe: str, home: Path, options: argparse.Namespace) -> None:
    (home / "f32.yaml").write_text(yaml.safe_dump({**UNQUANTIZED, "score": {"samples": 0}}))
    plain, _ = ours(model, str(home / "f32.yaml"), home / "plain")
    file, seconds = ours(model, recipe, home / "out")
    theirs, their_seconds = rival(model, recipe, plain, file, home, options.tools)
    tokenizer = load_tokenizer(model)
    ids = [make_row(sample, tokenizer, SCORED).ids for sample in read_samples(recipes.heldout_files())]
    (home / "ids.json").write_text(json.dumps(ids))
    command = [str(options.engine_python), str(HERE / "engines" / "llama_kl.py"), str(home / "ids.json"), str(home / "kl.json")]
    subprocess.run([*command, str(plain), str(file), str(theirs)], check=True)
    found = json.loads((home / "kl.json").read_text())
    mine, other = (np.array(found[str(path)]) for path in (file, theirs))
    draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    ratios = mine[draws, 0].sum(1) / other[draws, 0].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    kl, their_kl = mine[:, 0].sum() / mine[:, 1].sum(), other[:, 0].sum() / other[:, 1].sum()
    sizes = f"{file.stat().st_size:12,} {theirs.stat().st_size:12,}"
    print(
        f"{model.name[:20]:20} {recipe[:12]:12} {sizes} {kl:9.5f} {their_kl:9.5f} {kl / their_kl:6.3f}  {low:.3f} to {high:.3f}"
        f"  {seconds:5.0f} {their_seconds:6.1f}",
        flush=True,
    )


def ours(model: Path, recipe: str, out: Path) -> tuple[Path, float]:
    """(file, CPU seconds), through the command line."""
    began = os.times()
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", recipe, "--output", str(out), "--threads", "1"]
    subprocess.run(command, check=True, capture_output=True)
    ended = os.times()
    (file,) = (out / "gguf").glob("*.gguf")
    return file, ended.children_user - began.children_user


def rival(model: Path, recipe: str, plain: Path, file: Path, home: Path, tools: Path) -> tuple[Path, float]:
    """llama-imatrix and llama-quantize, with each tensor's type told one by one: (file, seconds)."""
    tokenizer, settings = load_tokenizer(model), recipes.load_recipe(recipe).calibration
    rows = [row.ids for row in draw(recipes.load_mix(settings.mix), settings, tokenizer).rows]
    (home / "text.txt").write_text("\n".join(tokenizer.decode(row[1:]) for row in rows), encoding="utf-8")
    began = time.perf_counter()
    imatrix, quantized = home / "imatrix.gguf", home / "theirs.gguf"
    command = [tools / "llama-imatrix", "-m", plain, "-f", home / "text.txt", "-o", imatrix, "--parse-special", "--no-ppl", "-t", "1"]
    run([*command, "-c", "512", "-ngl", "0"], tools)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors}
    told = [part for name, kind in types.items() for part in ("--tensor-type", f"^{re.escape(name)}$={kind}")]
    embedding = types["token_embd.weight"]
    ends = ["--token-embedding-type", embedding, "--output-tensor-type", types.get("output.weight", embedding)]
    run([tools / "llama-quantize", "--imatrix", imatrix, *told, *ends, plain, quantized, "Q4_K_M", "1"], tools)
    made = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(quantized).tensors}
    if wrong := {name: (kind, made.get(name)) for name, kind in types.items() if made.get(name) != kind}:
        raise SystemExit(f"llama-quantize took other types: {dict(list(wrong.items())[:3])}")
    return quantized, time.perf_counter() - began


def run(command: list, tools: Path) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tools)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name}: {(done.stderr or done.stdout)[-400:]}")


if __name__ == "__main__":
    main()
