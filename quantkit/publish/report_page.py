"""report.html: a run's report as one page that needs nothing else, and the same pictures as PNGs beside it.

The page holds its pictures, has no script and loads nothing; every picture has a text beside it and its figures in a table.
"""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from quantkit.disk import replacing, write_whole
from quantkit.errors import PublishError
from quantkit.publish.artefact import PAGE, RUN, Artefact, open_artefacts, read_json
from quantkit.publish.evaluation import divergence_tables
from quantkit.publish.parts import bytes_by_part
from quantkit.report import gigabytes
from quantkit.types import Json

FOLDER = "report"  # of the PNGs
DPI = 144
Cells = list[list[str]]


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture with what is said of it."""

    name: str
    title: str
    caption: str
    alt: str
    png: str  # base64
    width: int
    height: int
    heads: Sequence[str]
    rows: Cells


def write_report(folder: Path | str) -> Path:
    """The page of the run in `folder` (or of the run that the artefact in `folder` is of).

    Raises:
        PublishError: no run.json there, or matplotlib is not installed.
    """
    try:
        import matplotlib

        from quantkit.publish import plots
    except ImportError:
        raise PublishError("a report's pictures are drawn by matplotlib; pip install 'quantkit[report]'") from None
    home = Path(folder) if (Path(folder) / RUN).is_file() else Path(folder).absolute().parent
    if not (home / RUN).is_file():
        raise PublishError(f"{folder}: no {RUN} here or above; give the folder of a run that is done")
    run, artefacts = read_json(home / RUN), open_artefacts(home)
    (home / FOLDER).mkdir(exist_ok=True)
    shown: list[Shown] = []
    missing: list[str] = []
    with matplotlib.rc_context(plots.STYLE):
        for name, title, figure, caption, alt, heads, rows in _pictures(plots, run, artefacts):
            if figure is None:
                missing.append(f"{title}: {caption}")
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            png = buffer.getvalue()
            with replacing(home / FOLDER / f"{name}.png") as temporary:
                temporary.write_bytes(png)
            width, height = struct.unpack(">II", png[16:24])
            shown.append(
                Shown(name, title, caption, alt, base64.b64encode(png).decode(), width * 96 // DPI, height * 96 // DPI, heads, rows)
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.publish", "."), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        title=f"{run['model']} {run['recipe']['name']}",
        subtitle=run["recipe"]["description"],
        facts=_facts(run, artefacts),
        plots=shown,
        missing=missing,
    )
    write_whole(home / PAGE, text)
    return home / PAGE


def _facts(run: Json, artefacts: Sequence[Artefact]) -> list[tuple[str, str]]:
    total, tokens = run["summary"], run["calibration"]["tokens"]
    facts = [
        (one.format, f"{one.bytes:,} bytes = {gigabytes(one.bytes)}, {one.manifest['bits_per_weight']:.3f} bits per weight")
        for one in artefacts
    ]
    facts.append(("calibration", f"{tokens:,} tokens in {run['calibration']['rows']} rows" if tokens else "none (plain rounding)"))
    if total["linears"]:
        kind = "output" if tokens else "weight"
        told = f"{total['mean_error']:.3e}, plain rounding {total['mean_error_rounded']:.3e}, over {total['linears']:,} linears"
        facts.append((f"mean relative {kind} error", told))
    held = run["heldout"]
    if held.get("tokens"):
        told = f"KL {held['kl']:.5f}, same top token {held['same_top']:.2%}, perplexity {held['perplexity']:.4f} "
        facts.append(("held-out", f"{told} (original {held['perplexity_base']:.4f}), {held['tokens']:,} tokens"))
    facts.append(("peak memory", f"{run['peak_memory'] / 2**30:.2f} GiB"))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())))
    return facts


def _pictures(plots: Any, run: Json, artefacts: Sequence[Artefact]) -> list[tuple[str, str, Any, str, str, Sequence[str], Cells]]:
    """Name, title, figure, caption, words for who cannot see it, and the figures as a table; in the order of the page."""
    calibrated = bool(run["calibration"]["tokens"])
    tables, where = divergence_tables(run, artefacts)
    parts = {one.format: bytes_by_part(one) for one in artefacts}
    memory = run.get("memory", {})
    measure = "of the output on calibration tokens" if calibrated else "of the weights (no calibration)"
    return [
        (
            "errors",
            "Error of every linear",
            plots.errors(run),
            f"Relative mean square {measure}, against the original weight. Of experts: the median, and the range of all."
            if run["blocks"]
            else "nothing was quantized.",
            "Error of each linear by layer, a panel for each kind: plain rounding (hollow squares) and this run (filled circles).",
            ("kind", "linears", "plain rounding", "this run"),
            _error_rows(plots, run),
        ),
        (
            "experts",
            "Expert coverage",
            plots.experts(run),
            "Calibration tokens that each expert saw, of an even share; dark is unfed."
            if run["summary"]["fewest_expert_tokens"] is not None
            else "no experts, or no calibration.",
            "Heat map of calibration tokens by layer and expert.",
            ("layer", "experts", "fewest tokens", "most tokens", "unfed"),
            [
                [str(b["block"]), str(len(b["experts"])), f"{min(b['experts']):,}", f"{max(b['experts']):,}", str(b["experts"].count(0))]
                for b in run["blocks"]
                if b["experts"]
            ],
        ),
        (
            "languages",
            "Experts that each language and domain uses",
            plots.experts_by_language(run),
            "Share of a layer's experts that get at least a fair part of the language's or domain's tokens."
            if run.get("coverage")
            else "routing by language is watched by recipes that solve in stages.",
            "Heat map of the share of experts used, by language or domain and layer.",
            (),
            [],
        ),
        (
            "scales",
            "Scales that folds moved",
            plots.scales(run),
            "Smallest and largest factor by which a channel was scaled; 1 (dashed) leaves it alone."
            if any(b["folds"] for b in run["blocks"])
            else "no folds were searched.",
            "Range of the channel scales of each fold by layer, a panel for each producer.",
            (),
            [],
        ),
        (
            "divergence",
            "Distance from the original",
            plots.divergence(tables),
            where,
            "Mean KL to the original by language and by domain, with intervals where they are known.",
            ("", "KL", "interval"),
            [
                [name, f"{row['kl']:.5f}", "not known" if not row.get("bounds") else " to ".join(f"{b:.5f}" for b in row["bounds"])]
                for rows in tables.values()
                for name, row in rows.items()
            ],
        ),
        (
            "sizes",
            "Size by part",
            plots.sizes({name: one for name, one in parts.items() if one}),
            "Bytes of the weight files." if any(parts.values()) else "these files cannot be looked into here.",
            "Stacked bars of bytes by part of the model, one for each format.",
            ("part", *parts),
            [[part, *(f"{one.get(part, 0):,}" for one in parts.values())] for part in sorted({p for one in parts.values() for p in one})],
        ),
        (
            "phases",
            "Time and memory",
            plots.phases(run["seconds"], memory),
            f"On {run['threads']} thread{'s' if run['threads'] > 1 else ''}; peak memory {run['peak_memory'] / 2**30:.2f} GiB.",
            "Bars of seconds and of peak memory by phase.",
            ("phase", "seconds", "peak memory by its end, bytes"),
            [[name, f"{seconds:.2f}", f"{memory[name]:,}" if name in memory else ""] for name, seconds in run["seconds"].items()],
        ),
    ]


def _error_rows(plots: Any, run: Json) -> Cells:
    kinds: dict[str, list[Json]] = {}
    for block in run["blocks"]:
        for local, row in block["linears"].items():
            kinds.setdefault(plots.kind_of(local), []).append(row)
    mean = lambda rows, key: f"{sum(row[key] for row in rows) / len(rows):.3e}"  # noqa: E731
    return [[kind, str(len(rows)), mean(rows, "error_rounded"), mean(rows, "error")] for kind, rows in kinds.items()]
