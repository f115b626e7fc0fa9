"""A gate's demands, one by one, on what was measured."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from quantkit.errors import EvaluationError
from quantkit.evaluate.gate import Check, Pairs, alarms, at_least, at_most, budget_alarms, few_flips, none_of, not_inferior
from quantkit.evaluate.metrics import Tokens
from quantkit.evaluate.significance import mean_bounds, quantile_bounds
from quantkit.suites import Gate
from quantkit.types import Json

WORSE_THAN_STORED = 0.1  # of a stored run's mean KL: what a new run may be more
Verdicts = Mapping[str, Sequence[tuple[bool, bool]]]  # group -> (baseline right, artefact right) of its items


def pairs_by(base: Sequence[Json], other: Sequence[Json], of: Callable[[Json], str]) -> dict[str, Pairs]:
    """Items' verdicts, counted by group."""
    groups: dict[str, tuple[list[bool], list[bool]]] = {}
    for one, two in zip(base, other, strict=True):
        if one["id"] != two["id"]:
            raise EvaluationError(f"items do not pair: {one['id']!r} beside {two['id']!r}")
        both = groups.setdefault(of(one), ([], []))
        both[0].append(one["right"])
        both[1].append(two["right"])
    return {name: Pairs.of(*both) for name, both in sorted(groups.items())}


def of_tokens(gate: Gate, tokens: Tokens) -> list[Check]:
    """What a gate demands of distributions. Numbers that are none fail any gate."""
    ask, sure = gate.divergence, gate.confidence
    documents = len(tokens.names)
    checks = [none_of("logits that are no numbers", tokens.nonfinite)]
    if ask.kl_mean is not None:
        low, high = tokens.kl_bounds(sure)
        more = float(tokens.bound.mean())  # what the stored baseline left out counts against the artefact
        checks.append(at_most("mean KL", float(tokens.kl.mean()), ask.kl_mean, (low, high + more), documents))
    if ask.kl_99 is not None:
        bounds = quantile_bounds(tokens.kl, tokens.owner, 0.99, sure)
        checks.append(at_most("99% KL", float(np.quantile(tokens.kl, 0.99)), ask.kl_99, bounds, documents))
    if ask.same_top is not None:
        bounds = mean_bounds(tokens.sums(tokens.same_top), tokens.counts, sure)
        checks.append(at_least("same top token", float(tokens.same_top.mean()), ask.same_top, bounds, documents))
    if ask.bits_per_byte is not None:
        bits, size = (tokens.sums(tokens.nll) - tokens.sums(tokens.nll_base)) / np.log(2), tokens.bytes.astype(float)
        found = float(bits.sum() / max(size.sum(), 1.0))
        checks.append(at_most("bits per byte more", found, ask.bits_per_byte, mean_bounds(bits, size, sure), documents))
    if ask.kl_mean_group is not None:
        groups = {f"{kind} {name}": one for kind in ("language", "domain") for name, one in tokens.by(kind).items() if name != "unknown"}
        if groups:
            shared = 1 - (1 - sure) / len(groups)
            found_by = {name: (float(one.kl.mean()), one.kl_bounds(shared)[0]) for name, one in groups.items()}
            checks.append(budget_alarms("mean KL by group", found_by, ask.kl_mean_group))
    return checks


def of_items(gate: Gate, base: Sequence[Json], other: Sequence[Json]) -> list[Check]:
    """What a gate demands of items. Each has id, right, and labels to group by: language, domain, kind, task."""
    ask, sure, checks = gate.items, gate.confidence, list[Check]()
    whole = pairs_by(base, other, lambda item: "all")["all"]
    if ask.margin is not None:
        checks.append(not_inferior("accuracy of items", whole, ask.margin, sure))
    if ask.flips is not None:
        checks.append(few_flips("items flipped", whole, ask.flips, sure))
    if ask.group_margin is not None:
        groups: dict[str, Pairs] = {}
        for kind in ("language", "domain", "kind", "task"):
            found = pairs_by(base, other, lambda item, kind=kind: item.get(kind, ""))  # type: ignore[misc]
            groups |= {f"{kind} {name}": one for name, one in found.items() if name}
        if groups:
            checks.append(alarms("accuracy by group", groups, ask.group_margin, sure))
    calls = [(one, two) for one, two in zip(base, other, strict=True) if "valid" in one]
    if ask.call_margin is not None and calls:
        valid = Pairs.of([bool(one["valid"]) for one, _ in calls], [bool(two["valid"]) for _, two in calls])
        checks.append(not_inferior("valid tool calls", valid, ask.call_margin, sure))
    return checks


def beside_stored(gate: Gate, stored: Json, tokens: Tokens | None, items: Sequence[Json]) -> list[Check]:
    """A run beside an older one of the same suite: alarms where it is shown to be worse.

    Raises:
        EvaluationError: the stored run asked something else.
    """
    checks = []
    if tokens is not None:
        old, now = stored.get("documents", {}), dict(zip(tokens.names, tokens.counts, strict=True))
        try:
            if old.keys() != now.keys() or any(int(old[name]["tokens"]) != int(now[name]) for name in now):
                raise EvaluationError("the stored run scored other documents or tokens; store one of this suite, model and limit")
            before = np.array([float(old[name]["kl"]) for name in tokens.names])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EvaluationError("the stored run's documents are not what `quantkit eval --store` writes") from None
        if not np.isfinite(before).all():  # beside them nothing would be worse
            raise EvaluationError("the stored run's KL are no numbers")
        more = tokens.sums(tokens.kl) - before * tokens.counts
        mean = float((before * tokens.counts).sum() / tokens.counts.sum())
        low, high = mean_bounds(more, tokens.counts, gate.confidence)
        limit = WORSE_THAN_STORED * mean + 1e-6
        found = float(more.sum() / tokens.counts.sum())
        verdict = "FAIL" if low > limit else "PASS"
        checks.append(Check("mean KL more than the stored run's", verdict, found, limit, (low, high), None, "documents"))
    if items:
        old_items = stored.get("items", {})
        if not isinstance(old_items, Mapping) or old_items.keys() != {item["id"] for item in items}:
            raise EvaluationError("the stored run asked other items; store one of this suite and limit")
        pairs = Pairs.of([bool(old_items[item["id"]]) for item in items], [bool(item["right"]) for item in items])
        checks.append(alarms("accuracy beside the stored run", {"all items": pairs}, 0.0, gate.confidence))
    return checks


def stored_run(about: Json, tokens: Tokens | None, items: Sequence[Json]) -> Json:
    """What a later run is compared with: small enough for a repository."""
    stored: Json = {key: about[key] for key in ("artefact", "baseline", "suite", "engine", "versions")}
    stored["baseline_digest"] = about["digests"]["baseline"]
    if tokens is not None:
        kl = tokens.sums(tokens.kl) / tokens.counts
        rows = zip(tokens.names, tokens.counts, kl, strict=True)
        stored["documents"] = {name: {"tokens": int(count), "kl": round(float(value), 8)} for name, count, value in rows}
    if items:
        stored["items"] = {item["id"]: bool(item["right"]) for item in items}
    return stored
