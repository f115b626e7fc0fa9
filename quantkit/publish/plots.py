"""A run's report as pictures. One function a picture; each takes plain JSON and returns a figure, or None where there is nothing to show.

Colours are those of Okabe and Ito and the map cividis, which people with any colour blindness tell apart; series differ in shape or
hatching too, so that a page printed in grey says the same.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, whatever the machine
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from quantkit.types import Json

OURS, PLAIN, THIRD = "#0072B2", "#E69F00", "#009E73"
PARTS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")
MAP = "cividis"
WIDE = 10.0  # inches
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "quantkit",
}

Plot = Callable[[], Figure | None]


def kind_of(local: str) -> str:
    """A linear's name without numbers: experts.*.down_proj."""
    return re.sub(r"\b\d+\b", "*", local)


def errors(run: Json) -> Figure | None:
    """Each linear's error, plain rounding beside ours, a panel a kind; of experts the median and the range of all."""
    kinds: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for block in run["blocks"]:
        for local, row in block["linears"].items():
            kinds.setdefault(kind_of(local), {}).setdefault(block["block"], []).append((row["error_rounded"], row["error"]))
    if not kinds:
        return None
    figure, panels = _panels(len(kinds), 2.1)
    for panel, (kind, blocks) in zip(panels, kinds.items(), strict=True):
        places = sorted(blocks)
        for which, (label, colour, marker, hollow) in enumerate((("plain rounding", PLAIN, "s", True), ("this run", OURS, "o", False))):
            values = [sorted(max(pair[which], 1e-12) for pair in blocks[place]) for place in places]
            middle = [one[len(one) // 2] for one in values]
            face = "none" if hollow else colour
            panel.plot(places, middle, color=colour, marker=marker, markerfacecolor=face, markersize=4, linewidth=1, label=label)
            if any(len(one) > 1 for one in values):
                panel.fill_between(places, [one[0] for one in values], [one[-1] for one in values], color=colour, alpha=0.2, linewidth=0)
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(kind)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _outer_labels(figure, panels, "layer", "relative error")
    panels[0].legend(fontsize=8)
    return figure


def experts(run: Json) -> Figure | None:
    """Calibration tokens of every expert over an even share: layers down, experts across."""
    rows = [(block["block"], block["experts"]) for block in run["blocks"] if block["experts"]]
    if not rows:
        return None
    widest = max(len(tokens) for _, tokens in rows)
    table = [[math.nan] * widest for _ in rows]
    for line, (_, tokens) in zip(table, rows, strict=True):
        even = max(sum(tokens) / len(tokens), 1e-9)
        line[: len(tokens)] = [math.log2(max(count / even, 1 / 64)) for count in tokens]
    reach = min(max(2, math.ceil(max(abs(v) for line in table for v in line if not math.isnan(v)))), 4)  # in powers of two
    figure = Figure(figsize=(WIDE, 1.4 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(table, aspect="auto", cmap=MAP, interpolation="nearest", vmin=-reach, vmax=reach)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(rows)), [str(index) for index, _ in rows], fontsize=7)
    axes.grid(False)
    bar = figure.colorbar(shown, ax=axes, extend="both", ticks=range(-reach, reach + 1))
    bar.ax.set_yticklabels([f"1/{2**-n}" if n < 0 else f"{2**n} x" if n else "even" for n in range(-reach, reach + 1)])
    bar.set_label("tokens, of an even share")
    return figure


def experts_by_language(run: Json) -> Figure | None:
    """How many experts of each layer a language or domain uses."""
    blocks = run.get("coverage") or []
    names = [(kind, name) for kind in ("language", "domain") for name in sorted({n for b in blocks for n in b["used"].get(kind, {})})]
    if not names:
        return None
    table = [[block["used"].get(kind, {}).get(name, {}).get("experts", 0) / block["experts"] for block in blocks] for kind, name in names]
    figure = Figure(figsize=(WIDE, 1.3 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(table, aspect="auto", cmap=MAP, interpolation="nearest", vmin=0, vmax=1)
    axes.set(xlabel="layer")
    axes.set_xticks(range(len(blocks)), [str(block["block"]) for block in blocks], fontsize=7)
    axes.set_yticks(range(len(names)), [name for _, name in names], fontsize=8)
    axes.grid(False)
    for line, row in enumerate(table):
        if len(blocks) <= 32:
            for place, share in enumerate(row):
                axes.text(place, line, f"{share:.0%}", ha="center", va="center", fontsize=6, color="black" if share > 0.55 else "white")
    figure.colorbar(shown, ax=axes).set_label("experts used")
    return figure


def scales(run: Json) -> Figure | None:
    """The range of the scales that each fold moved, a panel a producer; identity is one line at 1."""
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for block in run["blocks"]:
        for fold in block["folds"]:
            low, high = fold["scale_range"]
            kinds.setdefault(kind_of(fold["producer"]), []).append((block["block"], low, high))
    if not kinds:
        return None
    figure, panels = _panels(len(kinds), 2.0)
    for panel, (kind, rows) in zip(panels, kinds.items(), strict=True):
        places = sorted({place for place, _, _ in rows})
        lows = [min(low for place, low, _ in rows if place == at) for at in places]
        highs = [max(high for place, _, high in rows if place == at) for at in places]
        panel.vlines(places, lows, highs, color=OURS, linewidth=3)
        panel.plot(places, highs, "^", color=OURS, markersize=4)
        panel.plot(places, lows, "v", color=OURS, markersize=4)
        panel.axhline(1, color="#555555", linewidth=0.8, linestyle="--")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(kind)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _outer_labels(figure, panels, "layer", "scale")
    return figure


def divergence(tables: Mapping[str, Mapping[str, Json]]) -> Figure | None:
    """Mean KL to the original by language and by domain; a whisker where an interval is known.

    Args:
        tables: title of a panel -> name -> {"kl", "bounds" or None}.
    """
    tables = {title: rows for title, rows in tables.items() if rows}
    if not tables:
        return None
    longest = max(len(rows) for rows in tables.values())
    figure = Figure(figsize=(WIDE, 1.2 + 0.24 * longest), layout="constrained")
    for number, (title, rows) in enumerate(tables.items()):
        axes = figure.add_subplot(1, len(tables), number + 1)
        for line, row in enumerate(rows.values()):
            bounds = row.get("bounds")
            if bounds:
                axes.plot(bounds, [line, line], color=OURS, linewidth=2)
                axes.plot(bounds, [line, line], "|", color=OURS, markersize=8)
            axes.plot([row["kl"]], [line], "o", color=OURS, markersize=6)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.08 * max(max((row["kl"], *(row.get("bounds") or ()))) for row in rows.values()) or 1)
        axes.set(xlabel="KL to the original, nats per token", title=title)
    return figure


def sizes(parts: Mapping[str, Mapping[str, int]]) -> Figure | None:
    """Bytes by part of the model, a bar a format."""
    if not any(parts.values()):
        return None
    names = sorted({name for one in parts.values() for name in one}, key=lambda name: -max(one.get(name, 0) for one in parts.values()))
    total = max(sum(one.values()) for one in parts.values())
    unit, divisor = ("GB", 1e9) if total >= 1e8 else ("MB", 1e6)
    figure = Figure(figsize=(WIDE, 1.5 + 0.5 * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(parts)
    for number, name in enumerate(names):
        widths = [one.get(name, 0) / divisor for one in parts.values()]
        colour, hatch = PARTS[number % len(PARTS)], HATCHES[number % len(HATCHES)]
        axes.barh(range(len(parts)), widths, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set(xlabel=unit)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25 if len(parts) > 1 else -0.4))
    return figure


def phases(seconds: Mapping[str, float], memory: Mapping[str, int]) -> Figure | None:
    """Seconds of each phase, and the peak memory by its end."""
    if not seconds:
        return None
    names = list(seconds)
    figure = Figure(figsize=(WIDE, 1.0 + 0.26 * len(names)), layout="constrained")
    columns: Sequence[tuple[str, list[float], str]] = [("seconds", [seconds[name] for name in names], OURS)]
    if memory:
        columns = [*columns, ("peak memory by its end, GiB", [memory.get(name, 0) / 2**30 for name in names], THIRD)]
    for number, (label, values, colour) in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), number + 1)
        bars = axes.barh(range(len(names)), values, color=colour, hatch="" if number == 0 else "//", edgecolor="white", linewidth=0.5)
        axes.bar_label(bars, [f"{value:.1f}" if value >= 0.05 else "" for value in values], fontsize=7, padding=2)
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set(xlabel=label)
        axes.margins(x=0.12)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    columns = min(count, 4)
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDE, height * lines + 0.4), layout="constrained")
    first = figure.add_subplot(lines, columns, 1)  # one scale for all: panels are there to be compared
    return figure, [first, *(figure.add_subplot(lines, columns, number + 1, sharey=first) for number in range(1, count))]


def _outer_labels(figure: Figure, panels: Sequence[Any], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
