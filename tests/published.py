"""A small run that is done, made once a process and copied for every test; and its base model, with a card of its own."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny

from quantkit import pipeline

BASE_CARD = """---
license: apache-2.0
license_link: LICENSE
language: [en, "no"]
pipeline_tag: image-text-to-text
tags: [tiny, test]
extra_gated_prompt: You agree to nothing.
---

# A tiny base

![banner](img/banner.png) and [its paper](docs/paper.md).
"""
QUICK = (
    "description: quick\nweights: {signed: true}\nformats: [compressed-tensors, gguf]\ncalibration: {samples: 20, sequence_length: 64}\n"
    "score: {samples: 20, sequence_length: 64}\nsearch: {exponents: 2, rows: 16, shrinks: 2}\n"
)


@functools.cache
def _made() -> tuple[Path, Path]:
    home = Path(tempfile.mkdtemp(prefix="quantkit-published-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    model = tiny.build("gemma4_moe", home / "tiny-moe", num_experts=4, num_hidden_layers=2, max_shard_size="300KB")
    (model / "README.md").write_text(BASE_CARD)
    (home / "quick.yaml").write_text(QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.write.compressed_tensors.SHARD_BYTES", 100_000)  # several weight files
        pipeline.quantize(str(model), recipe=str(home / "quick.yaml"), output=home / "run")
    shutil.rmtree(home / "run" / "solved")
    return model, home / "run"


def model() -> Path:
    return _made()[0]


def run(folder: Path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(_made()[1], folder / "run"))


def report() -> dict[str, Any]:
    """What the run said of itself."""
    found: dict[str, Any] = json.loads((_made()[1] / "run.json").read_text())
    return found
