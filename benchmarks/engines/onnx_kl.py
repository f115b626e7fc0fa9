"""One solve in two engines: KL to the original of the compressed-tensors folder in transformers and of the ONNX folder in onnxruntime.

    quantkit quantize MODEL --format compressed-tensors --format onnx --output RUN
    python benchmarks/engines/onnx_kl.py MODEL RUN [--samples 60] [--length 256]

Held-out samples are fed whole. Everything computes in fp32; transformers decodes a weight into bf16,
onnxruntime multiplies its integers by their scales, so that much is engine noise. Beside them the same folder at accuracy level 4, where
onnxruntime rounds activations to 8 bits. Exit code 1 where the KLs of the first two differ by more than 2 %.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import quantkit.hf
from quantkit import recipe as recipes
from quantkit.calibrate.draw import make_row
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.samples import choose
from quantkit.calibrate.sources import read_samples
from quantkit.evaluate.divergence import Scores, compare

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import onnx_runs  # noqa: E402

EQUAL = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("run", type=Path, help="the run's folder, with both formats")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(Path(options.model))
    chosen = choose(read_samples(recipes.heldout_files()), options.samples, 0)
    rows = [torch.tensor([make_row(sample, tokenizer, options.length).ids]) for sample in chosen]
    architecture = transformers.AutoConfig.from_pretrained(options.model).architectures[0]
    original = getattr(transformers, architecture).from_pretrained(options.model, dtype=torch.float32).eval()
    packed = quantkit.hf.load_model(options.run / "compressed-tensors", dtype=torch.float32).eval()
    began = time.perf_counter()
    session = onnx_runs.session(options.run / "onnx")
    print(f"onnxruntime opened the folder in {time.perf_counter() - began:.1f} s")
    rough = at_level(options.run / "onnx", 4)
    scores = {"transformers": Scores(), "onnxruntime": Scores(), "level 4": Scores()}
    largest = 0.0
    for ids in rows:
        with torch.no_grad():
            base, theirs = original(input_ids=ids).logits[0, :-1], packed(input_ids=ids).logits[0, :-1]
        ours, less = (torch.from_numpy(whole(one, ids.numpy()))[0, :-1] for one in (session, rough))
        largest = max(largest, float((ours - theirs).abs().max()))
        counted = torch.ones(len(base), dtype=torch.bool)
        for name, logits in (("transformers", theirs), ("onnxruntime", ours), ("level 4", less)):
            scores[name].add(compare(base, logits, ids[0, 1:], counted), {})
    found = {name: score.as_json() for name, score in scores.items()}
    for name, score in found.items():
        numbers = f"KL {score['kl']:.6f}, perplexity {score['perplexity']:.4f}, same top {score['same_top']:.4f}"
        print(f"{name:14} {score['tokens']} tokens: {numbers}")
    apart = found["onnxruntime"]["kl"] / found["transformers"]["kl"] - 1
    print(f"KL of onnxruntime over transformers: {apart:+.3%}; logits differ by {largest:.1e} at most")
    return int(abs(apart) > EQUAL)


def at_level(folder: Path, level: int):
    """The same graph with another attribute, over the same data."""
    import onnx
    import onnxruntime

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    path = folder / f".level-{level}.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()


def whole(session, ids: np.ndarray) -> np.ndarray:
    """Logits of one row, fed at once."""
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions, **past}
    return session.run(["logits"], fed)[0]


if __name__ == "__main__":
    sys.exit(main())
