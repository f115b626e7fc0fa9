"""Run by the Python that has llama-cpp-python: KL of some GGUFs to a first one, sample by sample, in llama.cpp.

python llama_kl.py IDS.json OUT.json BASE OTHER...      IDS: a list of lists of token ids; OUT: {file: [[KL sum, tokens] a sample]}
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_logits import Model


def main(ids: str, out: str, base: str, *others: str) -> None:
    samples, first = json.loads(Path(ids).read_text()), Model(base)
    found = {}
    for other in others:
        model, found[other] = Model(other), []
        for sample in samples:
            found[other].append([float(divergence(first.logits(sample), model.logits(sample)).sum()), len(sample)])
    Path(out).write_text(json.dumps(found))


def divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = (log_softmax(logits.astype(np.float64)) for logits in (base, other))
    return (np.exp(p) * (p - q)).sum(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
