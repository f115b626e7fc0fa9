"""quantkit: activation-aware weight quantization and export, one decoder block at a time.

import quantkit
result = quantkit.quantize("path/or/hub-id", recipe="awq-w4", output="out")
"""

from typing import Any

__version__ = "0.1.0"


def quantize(model: str | None = None, **options: Any) -> Any:
    """See `quantkit.pipeline.quantize`; imported when called, so that `import quantkit` stays light."""
    from quantkit import pipeline

    return pipeline.quantize(model, **options)


def calibrate(model: str | None = None, **options: Any) -> Any:
    """See `quantkit.pipeline.calibrate`; imported when called."""
    from quantkit import pipeline

    return pipeline.calibrate(model, **options)


def evaluate(artefact: str, **options: Any) -> Any:
    """See `quantkit.pipeline.evaluate`; imported when called."""
    from quantkit import pipeline

    return pipeline.evaluate(artefact, **options)
