"""What happened, as JSON beside the weights: everything that a card, a gate or a person asks of a run later."""

import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantkit import __version__
from quantkit.types import BlockPlan, Json, Plan, SolvedBlock, expert_of

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "compressed-tensors", "numpy", "huggingface_hub")


@dataclass(frozen=True, slots=True)
class Event:
    """Where a run stands, for whoever draws its progress."""

    phase: str
    block: int | None = None  # None before the first
    blocks: int = 0
    tokens: int = 0  # of the calibration set
    seconds_left: float | None = None
    memory: int = 0  # peak so far, bytes
    unit: str = "block"  # what is counted


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of a script."""


@dataclass
class Clock:
    """Seconds by phase, for the report and for the time that is left."""

    tell: Listener
    blocks: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # the peak so far at each phase's end, bytes
    by_block: dict[int, dict[str, float]] = field(default_factory=dict)  # seconds again, of the phases that are a block's
    _block_seconds: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, block: int | None = None) -> Iterator[None]:
        left = None
        if self._block_seconds:
            left = sum(self._block_seconds) / len(self._block_seconds) * (self.blocks - (block or 0))
        self.tell(Event(name, block, self.blocks, self.tokens, left, peak_memory()))
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if block is not None:
                own = self.by_block.setdefault(block, {})
                own[name] = own.get(name, 0.0) + seconds
            self.memory[name] = peak_memory()

    @contextmanager
    def block(self, counts: bool) -> Iterator[None]:
        """A block's time; one that an earlier run solved says nothing of those to come."""
        began = time.perf_counter()
        yield
        if counts:
            self._block_seconds.append(time.perf_counter() - began)


def peak_memory() -> int:
    """The largest resident set of this process so far, bytes (mapped pages of the checkpoint included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> Json:
    """Of quantkit, Python and the libraries that decide the output."""
    found: Json = {"quantkit": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def block_report(plan: BlockPlan, solved: SolvedBlock, observed: bool) -> Json:
    """Per linear: its scheme, the error of plain rounding beside ours, the tokens that reached it; per fold: what the search found.

    Without calibration (`observed` false) every input channel counts the same, so errors are those of the weights.
    """
    linears = {}
    for linear in plan.linears:
        if linear.scheme is None:
            continue
        one = solved.linears[linear.local]
        linears[linear.local] = {
            "scheme": str(linear.scheme),
            "error_rounded": _short(one.error_rounded),
            "error": _short(one.error),
            "tokens": one.tokens,
            "fell_back": one.fell_back,
        }
    folds = [
        {
            "producer": fold.producer,
            "exponents": fold.exponents,
            "scale_range": [_short(v) for v in fold.scale_range],
            "loss_ratio": _short(fold.loss_ratio),
        }
        for fold in solved.folds
    ]
    experts = expert_tokens(solved) if observed else []
    proof = None if solved.proof is None else _short(solved.proof)
    return {"block": plan.index, "linears": linears, "folds": folds, "proof": proof, "experts": experts}


def expert_tokens(solved: SolvedBlock) -> list[int]:
    """Calibration tokens that each expert of a block saw, in order; empty where there are none."""
    counts = {expert: one.tokens for local, one in solved.linears.items() if (expert := expert_of(local)) is not None}
    return [counts[expert] for expert in sorted(counts)]


def summary(blocks: Iterable[Json], expert_floor: int) -> Json:
    """Totals that fit on a screen: mean relative errors, and the least-fed expert (None without experts or calibration).

    `expert_floor`: tokens with which an expert weighs its own statistics and the pool alike; with fewer it counts as shrunk.
    """
    blocks = list(blocks)
    rows = [row for block in blocks for row in block["linears"].values()]
    fed = [tokens for block in blocks for tokens in block["experts"]]
    mean = lambda key: sum(row[key] for row in rows) / max(len(rows), 1)  # noqa: E731
    return {
        "linears": len(rows),
        "mean_error_rounded": mean("error_rounded"),
        "mean_error": mean("error"),
        "worse_than_rounded": sum(row["error"] > row["error_rounded"] for row in rows),
        "largest_fold_change": max((block["proof"] for block in blocks if block["proof"] is not None), default=None),
        "fell_back": sum(row["fell_back"] for row in rows),
        "experts_shrunk": sum(tokens < expert_floor for tokens in fed),
        "experts_without_tokens": sum(tokens == 0 for tokens in fed),
        "fewest_expert_tokens": min(fed, default=None),
    }


def plan_report(plan: Plan, sizes: Json) -> Json:
    """A plan as JSON: each tensor's fate, and the exact bytes of each format."""
    linears = [
        {"name": linear.name, "shape": list(linear.shape), "scheme": str(linear.scheme) if linear.scheme else None, "why": linear.why}
        for linear in plan.linears()
    ]
    kept = [name for block in plan.blocks for name in block.kept.values()] + list(plan.kept)
    return {
        "family": plan.family,
        "model_type": plan.model_type,
        "blocks": len(plan.blocks),
        "parameters": parameters(plan),
        "bytes": sizes,
        "linears": linears,
        "kept": kept,
    }


def gigabytes(count: int) -> str:
    """A size as people compare them: decimal GB, megabytes where that would be nothing."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def sizes_report(sizes: Json, plan: Plan) -> Json:
    """Format -> its bytes and bits per weight, or why it refuses (a text in place of a number)."""
    return {
        name: {"refused": size} if isinstance(size, str) else {"bytes": size, "bits_per_weight": bits_per_weight(size, plan)}
        for name, size in sizes.items()
    }


def other_lines(sizes: Json, chosen: Iterable[str]) -> Iterator[str]:
    """What the same recipe gives in the formats that were not written, for people."""
    for name, row in sizes.items():
        if name not in chosen:
            told = row.get("refused") or f"{gigabytes(row['bytes'])} ({row['bytes']:,} bytes), {row['bits_per_weight']:.3f} bits per weight"
            yield f"the same recipe as {name}: {told}"


def today() -> str:
    """The day, in UTC: SOURCE_DATE_EPOCH's where a build is to come out the same."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(seconds) if seconds.isdigit() else time.time(), UTC).date().isoformat()


def kept_report(plan: Plan) -> Json:
    """Linears that a family's table would quantize and this plan keeps: kind -> how many, and why."""
    kept: Json = {}
    for linear in plan.linears():
        if linear.scheme is None:
            row = kept.setdefault(re.sub(r"\b\d+\b", "*", linear.local), {"linears": 0, "why": linear.why})
            row["linears"] += 1
    return kept


def plan_lines(plan: Plan, sizes: Json) -> Iterator[str]:
    """A plan for people: equal fates of equal tensors in one line, blocks counted."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for block in plan.blocks:
        for linear in block.linears:
            local = re.sub(r"\b\d+\b", "*", linear.local)
            fate = str(linear.scheme) if linear.scheme else "kept"
            key = (local, f"{linear.shape[0]} x {linear.shape[1]}", f"{fate}  {linear.why}".rstrip())
            rows.setdefault(key, []).append(block.index)
    yield f"family {plan.family} ({plan.model_type}), {len(plan.blocks)} blocks, {parameters(plan):,} weights"
    for (local, shape, fate), found in rows.items():
        yield f"  {local:34} {shape:>16}  {fate:28}  {len(found)} in {len(set(found))} blocks"
    kept: dict[str, list[str]] = {}
    for name in (*(n for block in plan.blocks for n in block.kept.values()), *plan.kept):
        kept.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    for pattern, names in kept.items():
        size = sum(plan.entries[name].bytes for name in names)
        yield f"  {pattern:60} kept, {len(names)} tensors, {size:,} bytes"
    for name, size in sizes.items():
        bits = size * 8 / parameters(plan)
        yield f"{name}: {size:,} bytes = {gigabytes(size)} = {size / 2**30:.2f} GiB, {bits:.3f} bits per weight"


def calibration_lines(about: Json) -> Iterator[str]:
    """What a calibration run fed, for people: tokens by language and domain, how many experts each uses, the least-fed of each block."""
    fed = about.get("calibration")
    if fed is None:
        yield f"statistics of {about['imatrix']}, taken on {', '.join(about['datasets']) or 'what it does not say'}"
        return
    table, coverage = fed["by_language_and_domain"], about["coverage"]
    domains = sorted({domain for row in table.values() for domain in row})
    uses = lambda kind, name: _mean(block["used"][kind].get(name, {}).get("experts", 0) for block in coverage)  # noqa: E731
    yield f"{'language':12}" + "".join(f"{domain:>12}" for domain in domains) + f"{'tokens':>12}" + (f"{'experts':>9}" if coverage else "")
    for language, row in table.items():
        counts = "".join(f"{row.get(domain, 0):>12,}" for domain in domains)
        yield f"{language:12}{counts}{sum(row.values()):>12,}" + (f"{uses('language', language):>9.1f}" if coverage else "")
    totals = "".join(f"{sum(row.get(domain, 0) for row in table.values()):>12,}" for domain in domains)
    yield f"{'all':12}{totals}{fed['tokens']:>12,}"
    if coverage:
        yield (
            f"{'experts':12}"
            + "".join(f"{uses('domain', domain):>12.1f}" for domain in domains)
            + "  used by a language or domain, mean of blocks"
        )
    for block in coverage:
        least = block["least_fed"][0]
        most = max(least["by"], key=least["by"].get, default="nobody")
        line = f"block {block['block']}: of {block['experts']} experts the least fed is {least['expert']}, {least['tokens']:,} tokens"
        line += f" ({least['of_even_share']:.2f} of an even share, most from {most})"
        if sum(block["reserve_tokens"]):
            line += f"; {block['below_floor']} were below the floor, {block['below_floor_with_reserve']} are with the reserve"
        if block["shrunk"]:
            line += f"; {block['shrunk']} would lean on their pool, {block['fell_back']} have nothing else"
        yield line
    if fed["reserve_tokens"]:
        yield f"reserve: {fed['reserve_tokens']:,} tokens, kept apart"
    yield f"digest of all token ids: {fed['digest']}"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(len(found), 1)


def parameters(plan: Plan) -> int:
    """Weights in the checkpoint, every tensor counted."""
    return sum(entry.bytes // entry.dtype.itemsize for entry in plan.entries.values())


def bits_per_weight(size: int, plan: Plan) -> float:
    """Bits of `size` bytes over every weight of the checkpoint."""
    return round(size * 8 / parameters(plan), 4)


def write_json(path: Path, value: Json) -> None:
    """Beside and renamed, so that a reader never meets half a report."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
