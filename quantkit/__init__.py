"""quantkit: activation-aware weight quantization and export, one decoder block at a time.

import quantkit
result = quantkit.quantize("path/or/hub-id", recipe="awq-w4", output="out")
found = quantkit.evaluate("out", baseline="path/or/hub-id", gate="default")
"""

from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


def quantize(model: str | None = None, **options: Any) -> Any:
    """See `quantkit.pipeline.quantize`; imported when called, so that `import quantkit` stays light."""
    from quantkit import pipeline

    return pipeline.quantize(model, **options)


class _Command(ModuleType):
    """A room that is a command by the same name: Python binds the room here as soon as anything in it is imported."""

    def __call__(self, *values: Any, **options: Any) -> Any:
        """See the function of this name in `quantkit.pipeline`."""
        from quantkit import pipeline

        return getattr(pipeline, self.__name__.rpartition(".")[2])(*values, **options)


for _room in ("calibrate", "evaluate"):
    import_module(f"quantkit.{_room}").__class__ = _Command
