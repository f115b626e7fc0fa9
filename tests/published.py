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
from quantkit.publish.artefact import open_artefact

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


def weights(folder: Path) -> dict[str, str]:
    """Digests of the weights that were quantized, as an evaluation beside them tells."""
    return {name: digest for name, digest in open_artefact(folder).manifest["inputs"].items() if name.endswith(".safetensors")}


def evaluate(folder: Path, verdict: str = "PASS", name: str = "eval.json", **changes: Any) -> dict[str, Any]:
    """An evaluation of these very files, in the form of `quantkit eval --output`, beside the run's report."""
    row = {
        "documents": 9,
        "tokens": 1234,
        "kl": {"mean": 0.012, "bounds": [0.011, 0.013], "p99": 0.2},
        "same_top": 0.95,
        "flips": {"right_to_wrong": 7, "wrong_to_right": 5},
        "perplexity_base": 30.5,
        "perplexity": 30.75,
    }
    alone = {**row, "kl": {"mean": 0.02, "bounds": [None, None], "p99": 0.4}}
    item = {"items": 40, "accuracy_base": 0.5, "accuracy": 0.475, "right_to_wrong": 2, "wrong_to_right": 1, "mcnemar": 0.87}
    about = {
        "artefact": "run",
        "baseline": "tiny-moe",
        "suite": "quick",
        "engine": {"name": "transformers"},
        "versions": {"transformers": "5.23.0"},
        "baseline_engine": {"name": "transformers"},
        "digests": {"artefact": open_artefact(folder).digest, "weights": weights(folder)},
        "divergence": row,
        "divergence_by_language": {"en": row, "fr": alone},
        "divergence_by_domain": {"stem": row},
        "items": {"all": item, "by_kind": {"choice": item}, "by_language": {}},
        "gate": {"name": "default", "verdict": verdict},
        **changes,
    }
    (folder.parent / name).write_text(json.dumps(about))
    return about
