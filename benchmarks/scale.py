"""Where the time of a run goes at a real width, how near it is to the floor, and what the whole model would take.

    python benchmarks/scale.py [--shape 26b-a4b] [--blocks 2] [--samples N] [--threads 2] [--recipe awq-w4] [--folder DIR]
    python benchmarks/scale.py --paper [--config docs/gemma-4-26b-a4b.json] [--tokens 65536]

The first generates a checkpoint (benchmarks/wide.py), runs `quantkit quantize` on it in a process of its own with the embedded
calibration set (--samples: a part of it), and prints seconds by phase, operations a second beside this machine's measured rate of products
of the same shapes, the peak from the operating system's account, experts' loads, the ratio to the floor and what --whole blocks would take.
The floor is the calibration set through every block twice, once for statistics and once quantized: the time of the quantized pass in the
same run, doubled.

The second computes, from a config and stated rates, what other machines would need. Nothing is measured there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from operations import Block, count
from wide import SHAPES, config, make

from quantkit.model.blocks import published_entries
from quantkit.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RATE_ROWS = 2048  # a batch of the recipe
WHOLE_SET = 65540  # tokens of the embedded calibration set, by the reference tokenizer
OF_TOKENS = ("observing", "running the quantized block", "running held-out samples")
UNIFIED = 1e18  # one memory: nothing is copied


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that a paper figure stands on, in operations and bytes a second."""

    name: str
    half: float  # bf16 products
    single: float  # fp32 products (tf32 on a GPU)
    double: float  # factorizations
    disk: float
    link: float  # host to device, or between devices where there are several
    bandwidth: float  # of its own memory, or of the caches that passes over weights stay in
    memory: float  # bytes beside the system's own
    devices: int = 1


# H100 SXM: half of the published dense peaks (989 bf16, 495 tf32), a tenth of 67 TFLOP/s in fp64, as factorizations of these widths
# go, .7 of 3.35 TB/s; link: PCIe 5 x16, or NVLink between eight; disk: an NVMe drive. Laptop: half of eight times a core as docs/scale.md
# measured one (200, 98, 48 GFLOP/s): eight share heat and memory.
MACHINES = (
    Machine("one H100 (80 GB)", 490e12, 245e12, 6.7e12, 3e9, 50e9, 2.3e12, 75e9),
    Machine("eight H100", 490e12, 245e12, 6.7e12, 3e9, 300e9, 2.3e12, 75e9, 8),
    Machine("a laptop (8 cores, 16 GB)", 8e11, 4e11, 1.9e11, 2e9, UNIFIED, 2e11, 12e9),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--whole", type=int, default=30, help="blocks that are reckoned with at the end")
    parser.add_argument("--samples", type=int, help="of the embedded set; left out: all of it")
    parser.add_argument("--length", type=int, help="tokens of a sample at most; left out: the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies while it is needed (10 GB for 2 blocks of 26b-a4b)")
    parser.add_argument("--paper", action="store_true", help="other machines, computed")
    parser.add_argument("--config", type=Path, default=ROOT / "docs" / "gemma-4-26b-a4b.json")
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration set, for --paper")
    arguments = parser.parse_args()
    if arguments.paper:
        about = json.loads(arguments.config.read_text())
        print("\n".join(paper(count(about, published_entries(about), 512), about, arguments.tokens)))
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print("\n".join(measured(arguments, Path(name))))


def measured(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Generate, run, and tell."""
    shape, model, out = SHAPES[arguments.shape], folder / "model", folder / "out"
    largest = make(model, arguments.blocks, shape)
    chosen = load_recipe(arguments.recipe)
    fields = chosen.model_dump(mode="json", exclude={"name"})
    fields["calibration"] |= {"samples": arguments.samples} | ({"sequence_length": arguments.length} if arguments.length else {})
    fields["score"] |= {"samples": arguments.samples and max(1, arguments.samples // 8)}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    rates = {"before": matrix_rates(shape.hidden, shape.mlp)}
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", str(recipe), "--output", str(out)]
    began = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, "--threads", str(arguments.threads)], stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"quantize ended with {process.returncode}: {(folder / 'log').read_text()[-300:]}")
    rates["after"] = matrix_rates(shape.hidden, shape.mlp)
    run = json.loads((out / "run.json").read_text())
    shutil.rmtree(out)
    lines = [
        f"{arguments.shape}, {arguments.blocks} blocks, largest {largest:,} bytes; vocabulary {shape.vocabulary:,}; {arguments.recipe}, "
        f"{run['calibration']['tokens']:,} calibration tokens in {run['calibration']['rows']} rows, {arguments.threads} threads",
        f"held-out KL {run['heldout']['kl']:.5f} on {run['heldout']['tokens']:,} tokens; mean error {run['summary']['mean_error']:.3e}, "
        f"plain rounding {run['summary']['mean_error_rounded']:.3e}",
        f"wall {wall:.0f} s, processor {usage.ru_utime + usage.ru_stime:.0f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB, "
        f"written {sum(run['bytes'].values()):,} bytes",
    ]
    for when, one in rates.items():
        lines.append(f"products of this shape, {when} the run: " + ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in one.items()))
    entries = published_entries(about := config(arguments.blocks, shape.vocabulary, shape))
    rows = run["calibration"]
    blocks = count(about, entries, min(rows["tokens"] / max(rows["rows"], 1), about["max_position_embeddings"]))
    return lines + told(run, blocks, rates["before"], wall, arguments.whole)


def told(run: dict[str, Any], blocks: list[Block], rates: dict[str, float], wall: float, whole: int) -> list[str]:
    """The tables of one run: phases, rates, loads, the floor, the whole model."""
    by_block, tokens, beside = run["seconds_by_block"], run["calibration"]["tokens"], run["heldout"]["tokens"]
    lines = [
        "",
        f"{'phase':28}"
        + "".join(f"{f'block {n}' + (' full' if b.kind.startswith('full') else ''):>14}" for n, b in enumerate(blocks))
        + f"{'all':>10}",
    ]
    for phase, total in run["seconds"].items():
        lines.append(f"{phase:28}" + "".join(f"{of.get(phase, 0):14.1f}" for of in by_block) + f"{total:10.1f}")
    passes = [of["running the quantized block"] for of in by_block]
    lines += ["", f"{'one pass of the set':28}" + "".join(f"{one:14.1f}" for one in passes) + f"{sum(passes):10.1f}"]
    forward = [tokens * block.forward / one / 1e9 for block, one in zip(blocks, passes, strict=True)]
    lines.append(f"{'  GFLOP/s (bf16)':28}" + "".join(f"{rate:14.1f}" for rate in forward))
    lines.append(f"{'  of the matrix rate':28}" + "".join(f"{rate / rates['bf16']:14.2f}" for rate in forward))
    due = [tokens * (b.observe_forward / rates["bf16"] + b.grams / rates["fp32"]) / 1e9 for b in blocks]
    lines.append(f"{'observing, at matrix rates':28}" + "".join(f"{one:14.1f}" for one in due) + f"{sum(due):10.1f}")
    due = [(b.solve / rates["fp32"] + b.factor / rates["fp64"]) / 1e9 for b in blocks]
    lines.append(f"{'solving, at matrix rates':28}" + "".join(f"{one:14.1f}" for one in due) + f"{sum(due):10.1f}")
    for block in run["blocks"]:
        if fed := sorted(block["experts"]):
            even = sum(fed) / len(fed)
            lines.append(
                f"block {block['block']}: {len(fed)} experts, tokens of an even share ({even:.0f}): least {fed[0] / even:.2f}, "
                f"a tenth below {fed[len(fed) // 10] / even:.2f}, half below {fed[len(fed) // 2] / even:.2f}, most {fed[-1] / even:.2f}"
            )
    own = [sum(of.values()) for of in by_block]
    total = sum(run["seconds"].values())
    fixed = total - sum(own)
    lines += [
        "",
        f"the floor, two passes: {2 * sum(passes):.0f} s; all phases {total:.0f} s = {total / (2 * sum(passes)):.2f} times; blocks alone "
        f"{sum(own) / (2 * sum(passes)):.2f} times; the process {wall:.0f} s ({beside:,} held-out tokens run beside and are scored)",
    ]
    full = [block.kind.startswith("full") for block in blocks]
    for told_tokens in sorted({tokens, WHOLE_SET}):
        grown = [sum(spent * (told_tokens / tokens if phase in OF_TOKENS else 1) for phase, spent in of.items()) for of in by_block]
        floor = 2 * sum(passes) * told_tokens / tokens
        how = "as measured" if told_tokens == tokens else f"phases that see tokens x {told_tokens / tokens:.1f}, not measured"
        lines.append(f"{told_tokens:,} tokens ({how}): blocks {sum(grown):.0f} s = {sum(grown) / floor:.2f} times the floor")
        if any(full) and not all(full):
            slow, fast = (sum(s for s, f in zip(grown, full, strict=True) if f is which) / full.count(which) for which in (True, False))
            many = whole // 6
            seconds = (whole - many) * fast + many * slow + fixed
            lines.append(
                f"  {whole} blocks: {whole - many} sliding x {fast:.0f} s + {many} full x {slow:.0f} s + {fixed:.0f} s beside blocks = "
                f"{seconds / 3600:.2f} h"
            )
    return lines


def matrix_rates(hidden: int, width: int) -> dict[str, float]:
    """GFLOP/s of this machine: a batch through a linear of the model in bf16 and fp32, a factorization's product in fp64."""

    def rate(operations: float, work: Callable[[], object]) -> float:
        work()
        began, times = time.perf_counter(), 0
        while times < 3 or time.perf_counter() - began < 1:
            work()
            times += 1
        return operations * times / (time.perf_counter() - began) / 1e9

    x, w = torch.randn(RATE_ROWS, hidden), torch.randn(width, hidden)
    half, square = (x.bfloat16(), w.bfloat16()), torch.randn(min(hidden, 1024), min(hidden, 1024), dtype=torch.float64)
    return {
        "bf16": rate(2.0 * RATE_ROWS * hidden * width, lambda: torch.nn.functional.linear(*half)),
        "fp32": rate(2.0 * RATE_ROWS * hidden * width, lambda: torch.nn.functional.linear(x, w)),
        "fp64": rate(2.0 * len(square) ** 3, lambda: square @ square),
    }


def paper(blocks: list[Block], about: dict[str, Any], tokens: int) -> list[str]:
    """Hours, bytes and where they lie on machines that nobody measured: operations over stated rates, bytes over stated bandwidths."""
    text = about.get("text_config") or about
    hidden = text["hidden_size"]
    size, largest = sum(b.bytes for b in blocks), max(b.bytes for b in blocks)
    forward = tokens * sum(b.forward for b in blocks)
    observe, grams = tokens * sum(b.observe_forward for b in blocks), tokens * sum(b.grams for b in blocks)
    solve, factor, search = (sum(getattr(b, of) for b in blocks) for of in ("solve", "factor", "search"))
    handed, shared = tokens * sum(b.handed for b in blocks), sum(b.all_gram_bytes for b in blocks)
    stream, sums, kept = tokens * hidden * 2, max(b.gram_bytes for b in blocks), tokens * 2 * max(b.kept_width for b in blocks)
    lines = [
        f"computed, not measured: {len(blocks)} blocks of {largest / 1e9:.2f} GB at most, {size / 1e9:.1f} GB in all, "
        f"{sum(b.active for b in blocks) / 1e9:.2f} G active parameters in quantized linears; {tokens:,} tokens",
        f"two passes: {2 * forward / 1e15:.2f} PFLOP bf16 (the floor); what stages run: {observe / 1e15:.2f} PFLOP bf16; sums "
        f"{grams / 1e15:.2f} PFLOP fp32; compensation and targets {solve / 1e15:.2f} PFLOP fp32; factors {factor / 1e15:.3f} PFLOP fp64",
        f"held: one stream of activations {stream / 1e9:.2f} GB (two are), kept inputs of o_proj and down_proj {kept / 1e9:.2f} GB, "
        f"sums of the largest stage {sums / 1e9:.2f} GB, a block and its twin {2 * largest / 1e9:.2f} GB",
        "",
        f"{'':28}" + "".join(f"{m.name:>28}" for m in MACHINES),
    ]
    bill: list[tuple[str, Callable[[Machine], float]]] = [
        ("stages' runs, bf16", lambda m: observe / m.half / m.devices),
        ("the quantized pass, bf16", lambda m: forward / m.half / m.devices),
        ("sums, fp32", lambda m: grams / m.single / m.devices),
        ("solving, fp32", lambda m: solve / m.single / m.devices),
        ("factors, fp64", lambda m: factor / m.double / m.devices),
        ("range search, bytes", lambda m: search / m.bandwidth / m.devices),
        ("reading blocks", lambda m: size / m.disk),
        ("copying blocks", lambda m: size / m.link),
        ("handing inputs over", lambda m: handed / m.devices * (m.devices - 1) / m.devices / m.link),
        ("sharing sums", lambda m: shared * (m.devices - 1) / m.devices / m.link),
    ]
    totals = dict.fromkeys((m.name for m in MACHINES), 0.0)
    for name, seconds in bill:
        spent = {m.name: seconds(m) for m in MACHINES}
        totals = {key: totals[key] + value for key, value in spent.items()}
        lines.append(f"{name:28}" + "".join(f"{value:26.1f} s" for value in spent.values()))
    lines.append(f"{'one after the other':28}" + "".join(f"{_told(value):>28}" for value in totals.values()))
    need = lambda m: 2 * largest + sums + (2 * stream + kept) / m.devices  # noqa: E731
    lines.append(f"{'memory, GB (of)':28}" + "".join(f"{f'{need(m) / 1e9:.1f} ({m.memory / 1e9:.0f})':>28}" for m in MACHINES))
    return lines


def _told(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main()
