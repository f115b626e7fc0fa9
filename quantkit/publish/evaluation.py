"""What was measured, as cards and pages show it: the only file that knows how run.json and an evaluation's JSON name their figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.publish.artefact import Artefact
from quantkit.types import Json

STREAMED = "Measured while streaming, on held-out samples, with the very integers of the files; without intervals."
PASS = "PASS"


def verdict(evaluations: Sequence[Json]) -> str | None:
    """The worst of the gates that were asked, with its name and what it demands more than was shown; None where none was."""
    gates = [gate for one in evaluations if isinstance(gate := one.get("gate"), dict)]
    if not gates:
        return None
    worst = next((gate for gate in gates if gate.get("verdict") != PASS), gates[0])
    return f"{worst.get('verdict')} (gate {worst.get('name')})"


def passed(evaluations: Sequence[Json]) -> bool:
    """No gate that was asked says anything but PASS."""
    return all(gate.get("verdict") == PASS for one in evaluations if isinstance(gate := one.get("gate"), dict))


def divergence_tables(run: Json, artefacts: Sequence[Artefact]) -> tuple[dict[str, dict[str, Json]], str]:
    """KL by language and by domain, and where it comes from: the first evaluation that has it, else the run's own score."""
    for artefact in artefacts:
        for one in artefact.evaluations:
            tables = {f"by {kind}": rows for kind in ("language", "domain") if (rows := _rows(one.get(f"divergence_by_{kind}")))}
            if tables:
                return tables, f"{artefact.format} in {_engine(one)}, with intervals where there are documents enough."
    held = run["heldout"]
    if not held.get("tokens"):
        return {}, "not measured in this run."
    return {
        f"by {kind}": {n: {"kl": r["kl"], "bounds": None} for n, r in held[f"by_{kind}"].items()} for kind in ("language", "domain")
    }, STREAMED


def _rows(found: Any) -> dict[str, Json]:
    """Name -> mean KL and its interval, of an evaluation's table."""
    if not isinstance(found, Mapping):
        return {}
    return {name: {"kl": row["kl"]["mean"], "bounds": _known(row["kl"].get("bounds"))} for name, row in found.items()}


def _known(bounds: Any) -> list[float] | None:
    """An interval whose both ends are numbers."""
    return list(bounds) if isinstance(bounds, Sequence) and len(bounds) == 2 and None not in bounds else None


def _engine(one: Json) -> str:
    engine = one.get("engine", {})
    version = engine.get("version") or one.get("versions", {}).get(engine.get("name"), "")
    return f"{engine.get('name', 'its engine')}{f' {version}' if version else ''}"


# --- Tables of a card ----------------------------------------------------------------------------------------------------------------


def measured(run: Json, evaluations: Sequence[Json]) -> list[Json]:
    """What a card tells of quality: tables of words, heads and rows, every cell a text. Empty where nothing was measured."""
    return [*(table for one in evaluations for table in _evaluated(one)), *_streamed(run["heldout"])]


def _evaluated(one: Json) -> Iterator[Json]:
    total = one.get("divergence")
    if isinstance(total, Mapping):
        words = (
            f"These files in {_engine(one)} beside the original in {one.get('baseline_engine', {}).get('name')}, suite {one.get('suite')}: "
        )
        words += f"{total['documents']:,} documents, {total['tokens']:,} tokens."
        flips = total["flips"]
        words += f" Next tokens lost {flips['right_to_wrong']:,}, won {flips['wrong_to_right']:,}."
        heads = ("", "KL to the original", "interval", "KL 99%", "same top token", "perplexity, original", "perplexity, this")
        rows = [("all", total), *((name, row) for kind in ("language", "domain") for name, row in one[f"divergence_by_{kind}"].items())]
        yield {"words": words, "heads": heads, "rows": [(name, *_divergence(row)) for name, row in rows if name != "unknown"]}
    items = one.get("items")
    if isinstance(items, Mapping):
        heads = ("", "items", "original", "this", "lost", "won", "McNemar p")
        tables = [items[f"by_{kind}"] for kind in ("kind", "language", "domain", "task") if items.get(f"by_{kind}")]
        rows = [("all", items["all"]), *(pair for table in tables for pair in table.items())]
        yield {"words": f"Answers to the same items in {_engine(one)}.", "heads": heads, "rows": [(n, *_answers(row)) for n, row in rows]}


def _divergence(row: Json) -> tuple[str, ...]:
    kl, bounds = row["kl"], _known(row["kl"].get("bounds"))
    told = f"{bounds[0]:.5f} to {bounds[1]:.5f}" if bounds else "not known"
    return (
        f"{kl['mean']:.5f}",
        told,
        f"{kl['p99']:.4f}",
        f"{row['same_top']:.4f}",
        f"{row['perplexity_base']:.4f}",
        f"{row['perplexity']:.4f}",
    )


def _answers(row: Json) -> tuple[str, ...]:
    counts = (f"{row['right_to_wrong']:,}", f"{row['wrong_to_right']:,}")
    return (f"{row['items']:,}", f"{row['accuracy_base']:.2%}", f"{row['accuracy']:.2%}", *counts, f"{row['mcnemar']:.3g}")


def _streamed(held: Json) -> list[Json]:
    if not held.get("tokens"):
        return []
    words = f"Measured while streaming, on {held['tokens']:,} held-out tokens that were not calibrated on,"
    words += " with the very integers of these files."
    heads = ("", "KL to the original", "same top token", "perplexity, original", "perplexity, this")
    rows = [("all", held), *held["by_language"].items(), *held["by_domain"].items()]
    cell = lambda row: (f"{row['kl']:.5f}", f"{row['same_top']:.4f}", f"{row['perplexity_base']:.4f}", f"{row['perplexity']:.4f}")  # noqa: E731
    return [{"words": words, "heads": heads, "rows": [(name, *cell(row)) for name, row in rows]}]
