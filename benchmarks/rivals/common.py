"""What the rivals' scripts share: reading the model and the tokens, the meter, dense weights under the checkpoint's own names.

Runs in a rival's environment and in quantkit's alike: torch, transformers and safetensors only.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"(?:^|.*\.)layers\.\d+\..*\b(?:q|k|v|o|gate|up|down)_proj")  # of a decoder block; routers and adapters are none
TOWER = re.compile(r"vision|audio|multi_modal")
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
FAR = 2e-3  # in logits; dense float32 weights and a rival's own float32 model differ by the order of additions only


def parser(description: str, methods: tuple[str, ...]) -> argparse.ArgumentParser:
    """The command line that every rival has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("ids", type=Path, help="safetensors with `ids` (rows, tokens) int64: what to calibrate on")
    parser.add_argument("output", type=Path, help="a folder for weights.safetensors and result.json")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32, help="columns of a scale; widths that it does not divide get one scale a row")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--precision", choices=("float32", "checkpoint"), default="float32", help="of the model while it is quantized")
    parser.add_argument("--batch", type=int, default=8, help="rows of a calibration batch")
    return parser


def load_model(folder: Path, dtype: Any = torch.float32, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The transformers model of a checkpoint, in evaluation mode; `weights` take the place of its tensors of these names.

    Raises:
        SystemExit: a weight that the checkpoint does not have.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    if not weights:
        return kind.from_pretrained(folder, dtype=dtype).eval()
    original = checkpoint(folder)
    for name, weight in weights.items():
        if name not in original or original[name].shape != weight.shape:
            raise SystemExit(f"{name} {tuple(weight.shape)}: {folder} has no such tensor")
    return kind.from_pretrained(None, config=config, state_dict={**original, **weights}, dtype=dtype).eval()


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the names in its files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise SystemExit(f"{folder}: no .safetensors file")
    return tensors


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """What is quantized, by every contender alike: the projections of the text decoder's blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and LINEAR.fullmatch(name) and not TOWER.search(name)
    }


def dense(arguments: argparse.Namespace, parameters: Mapping[str, torch.Tensor], quantized: set[str]) -> dict[str, torch.Tensor]:
    """What a rival changed, float32, under the checkpoint's names and in its layout: experts that it fuses are stacked again.

    Args:
        arguments: the command line: the original checkpoint, bits and group.
        parameters: the rival's parameters after quantization, quantized ones dequantized, by module path.
        quantized: the names of those that must be in the checkpoint; others (scales, tied heads) are passed over where they are not.

    Raises:
        SystemExit: a quantized parameter that the checkpoint has no place for, or that has more values in a group than its bits allow:
            it was left as it was, or its groups are not those that were asked for.
    """
    folder = arguments.model
    original = checkpoint(folder)
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, value in parameters.items():
        expert = EXPERT.fullmatch(name)
        if name in original:
            found[name] = value
        elif expert and f"{expert['experts']}.gate_up_proj" in original:
            stacks.setdefault(expert["experts"], {})[int(expert["number"]), expert["part"]] = value
        elif name in quantized:
            raise SystemExit(f"{name}: {folder} has no such tensor")
    for name, parts in stacks.items():
        count = 1 + max(number for number, _ in parts)
        gate_up = [torch.cat([parts[number, "gate_proj"], parts[number, "up_proj"]]) for number in range(count)]
        found[f"{name}.gate_up_proj"] = torch.stack(gate_up)
        found[f"{name}.down_proj"] = torch.stack([parts[number, "down_proj"] for number in range(count)])
    wide = {name for name in quantized if levels(parameters[name].float(), arguments.group) > 2**arguments.bits}
    if wide:
        asked = f"{arguments.bits} bits in groups of {arguments.group}"
        raise SystemExit(f"{len(wide)} of {len(quantized)} matrices are not of {asked}, {min(wide)} among them")
    found = {name: value.detach().float().cpu().contiguous() for name, value in found.items()}
    return {name: value for name, value in found.items() if not torch.equal(value, original[name].float())}


def levels(weight: torch.Tensor, group: int) -> int:
    """The most distinct values that share a scale in a matrix (out, in)."""
    columns = group if weight.shape[1] % group == 0 else weight.shape[1]
    ordered = weight.detach().reshape(-1, columns).sort(-1).values
    return 1 + int((ordered.diff() != 0).sum(-1).max())


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, vocabulary) float32."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def finish(arguments: argparse.Namespace, weights: dict[str, torch.Tensor], own: torch.Tensor, ids: torch.Tensor, result: Any) -> None:
    """Check the dense weights against the rival's `own` logits on `ids`, then write both files; result.json last.

    Raises:
        SystemExit: in float32 the dense weights do not compute what the rival's own model computes.
    """
    far = (logits(load_model(arguments.model, weights=weights), ids) - own).abs().max().item()
    result = {
        "rival": result.pop("rival"),
        "version": result.pop("version"),
        "method": arguments.method,
        "bits": arguments.bits,
        "group": arguments.group,
        "symmetric": arguments.symmetric,
        "precision": arguments.precision,
        **result,
        "changed_tensors": len(weights),
        "max_logit_difference": far,
        "max_logit": own.abs().max().item(),
    }
    print(json.dumps(result, indent=1))
    if arguments.precision == "float32" and far > FAR:
        raise SystemExit(f"the dense weights are not the rival's model: their logits differ by up to {far:.3g}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.output / "weights.safetensors")
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


class Meter:
    """Processor time (children included), wall time and peak memory of a `with` block."""

    def __enter__(self) -> "Meter":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._wall, self._cpu = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.figures = {
            "cpu_seconds": round(sum(os.times()[:4]) - self._cpu, 2),
            "wall_seconds": round(time.perf_counter() - self._wall, 2),
            "peak_rss_bytes": _peak(),
        }


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
