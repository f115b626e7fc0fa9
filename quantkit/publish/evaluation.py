"""What was measured, as cards and pages show it: the only file that knows how run.json and an evaluation's JSON name their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.publish.artefact import Artefact
from quantkit.types import Json

STREAMED = "Measured while streaming, on held-out samples, with the very integers of the files; without intervals."


def verdict(evaluation: Json | None) -> str | None:
    """PASS, FAIL or INCONCLUSIVE of an evaluation's gate; None where there was none."""
    gate = (evaluation or {}).get("gate")
    found = gate.get("verdict") if isinstance(gate, dict) else (evaluation or {}).get("verdict")
    return str(found) if found is not None else None


def divergence_tables(run: Json, artefacts: Sequence[Artefact]) -> tuple[dict[str, dict[str, Json]], str]:
    """KL by language and by domain, and where it comes from: the evaluation of the first artefact that has one, else the run's own."""
    for artefact in artefacts:
        evaluation = artefact.evaluation
        tables = _tables((evaluation or {}).get("divergence"))
        if tables:
            return tables, f"{artefact.format} in {(evaluation or {}).get('engine', 'its engine')}, with intervals where known."
    held = run["heldout"]
    return _tables(held), STREAMED if held.get("tokens") else "not measured in this run."


def _tables(found: Any) -> dict[str, dict[str, Json]]:
    if not isinstance(found, Mapping):
        return {}
    tables = {}
    for title in ("language", "domain"):
        rows = found.get(f"by_{title}")
        if isinstance(rows, Mapping) and rows:
            tables[f"by {title}"] = {name: {"kl": row["kl"], "bounds": _known(row.get("bounds"))} for name, row in rows.items()}
    return tables


def _known(bounds: Any) -> list[float] | None:
    """An interval whose both ends are numbers."""
    return list(bounds) if isinstance(bounds, Sequence) and len(bounds) == 2 and None not in bounds else None


def measured(run: Json, evaluation: Json | None) -> list[Json]:
    """What a card tells of quality: tables of words, heads and rows, every cell a text. Empty where nothing was measured."""
    return [*_evaluated(evaluation or {}), *_streamed(run["heldout"])]


def _streamed(held: Json) -> list[Json]:
    if not held.get("tokens"):
        return []
    words = f"Measured while streaming, on {held['tokens']:,} held-out tokens that were not calibrated on,"
    words += " with the very integers of these files."
    heads = ("", "KL to the original", "same top token", "perplexity, original", "perplexity, this")
    rows = [("all", held), *held["by_language"].items(), *held["by_domain"].items()]
    cell = lambda row: (f"{row['kl']:.5f}", f"{row['same_top']:.4f}", f"{row['perplexity_base']:.4f}", f"{row['perplexity']:.4f}")  # noqa: E731
    return [{"words": words, "heads": heads, "rows": [(name, *cell(row)) for name, row in rows]}]


def _evaluated(evaluation: Json) -> list[Json]:
    tables = []
    for title, rows in _tables(evaluation.get("divergence")).items():
        cells = [
            (name, f"{row['kl']:.5f}", " to ".join(f"{b:.5f}" for b in row["bounds"] or ()) or "not known") for name, row in rows.items()
        ]
        words = f"KL to the original {title}, measured in {evaluation.get('engine', 'the engine')}."
        tables.append({"words": words, "heads": ("", "KL", "95% interval"), "rows": cells})
    return tables
