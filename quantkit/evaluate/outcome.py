"""An evaluation for people (lines), for CI (JUnit XML) and for later runs (JSON)."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from quantkit.disk import write_whole
from quantkit.evaluate.gate import FAIL, INCONCLUSIVE
from quantkit.report import write_json
from quantkit.types import Json


def lines(about: Json) -> Iterator[str]:
    """The figures on a screen."""
    engine, base = about["engine"], about["baseline_engine"]
    own = about["noise"]["artefact"]
    yield (
        f"{about['artefact']} in {engine['name']} beside {about['baseline']} in {base['name']}"
        f"{' (stored)' if base['cached'] else ''}; suite {about['suite']}"
    )
    yield f"asked twice, {engine['name']} differs from itself by KL {own['kl_mean']:.1e} (max {own['kl_max']:.1e})"
    if not engine["whole_vocabulary"]:
        yield f"{engine['name']} gave top tokens alone: probability beyond them is spread evenly, KL is an estimate"
    if "divergence" in about:
        yield from _divergence(about)
    if "items" in about:
        yield from _items(about["items"])
    if "gate" in about:
        yield from about["gate"]["lines"]
        yield f"{about['gate']['verdict']}: gate {about['gate']['name']}"


def _divergence(about: Json) -> Iterator[str]:
    total = about["divergence"]
    kl, flips = total["kl"], total["flips"]
    yield f"{total['documents']} documents, {total['tokens']:,} tokens, {total['bytes']:,} bytes"
    bounds = "" if None in kl["bounds"] else f" [{kl['bounds'][0]:.5f}, {kl['bounds'][1]:.5f}]"
    yield (
        f"KL mean {kl['mean']:.5f}{bounds}, median {kl['median']:.5f}, 95% {kl['p95']:.4f}, 99% {kl['p99']:.4f}, "
        f"99.9% {kl['p99.9']:.3f}, max {kl['max']:.3f}; kept distributions hide at most {kl['truncation']:.1e}"
    )
    yield (
        f"same top token {total['same_top']:.2%}; next tokens lost {flips['right_to_wrong']}, won {flips['wrong_to_right']}; "
        f"perplexity {total['perplexity']:.4f} (baseline {total['perplexity_base']:.4f}), "
        f"bits per byte {total['bits_per_byte']:.4f} ({total['bits_per_byte_base']:.4f})"
    )
    if total["nonfinite"]:
        yield f"{total['nonfinite']} tokens whose logits are no numbers"
    for kind in ("language", "domain"):
        table = about[f"divergence_by_{kind}"]
        if set(table) == {"unknown"}:
            continue
        yield f"{kind:10} {'tokens':>8} {'KL mean':>9} {'KL 99%':>8} {'same top':>9} {'perplexity':>11} {'bits/byte':>10}"
        for name, row in table.items():
            yield (
                f"{name:10} {row['tokens']:>8,} {row['kl']['mean']:>9.5f} {row['kl']['p99']:>8.4f} {row['same_top']:>9.2%} "
                f"{row['perplexity']:>11.3f} {row['bits_per_byte']:>10.4f}"
            )


def _items(figures: Json) -> Iterator[str]:
    yield f"{'items':22} {'n':>6} {'baseline':>9} {'artefact':>9} {'lost':>5} {'won':>5} {'McNemar p':>10}"
    for kind in ("", "kind", "language", "domain", "task"):
        for name, row in (figures.get(f"by_{kind}") or {}).items() if kind else [("all", figures["all"])]:
            yield (
                f"{name:22} {row['items']:>6} {row['accuracy_base']:>9.2%} {row['accuracy']:>9.2%} "
                f"{row['right_to_wrong']:>5} {row['wrong_to_right']:>5} {row['mcnemar']:>10.3g}"
            )
    if "valid_calls" in figures:
        calls = figures["valid_calls"]
        yield f"valid tool calls: {calls['artefact']} of {calls['items']} (baseline {calls['baseline']})"


def write_files(about: Json, store: str | None, output: str | None, junit_xml: str | None) -> None:
    """What was asked for: a run for later ones, the whole report, the gate's checks."""
    if store:
        write_json(Path(store), about["stored"])
    if output:
        write_json(Path(output), about)
    if junit_xml:
        write_whole(Path(junit_xml), junit(about))


def junit(about: Json) -> str:
    """Every check of the gate as a test case: FAIL is a failure, INCONCLUSIVE an error, so that neither passes unseen."""
    checks = about["gate"]["checks"]
    counts = {verdict: sum(check["verdict"] == verdict for check in checks) for verdict in (FAIL, INCONCLUSIVE)}
    seconds = f"{sum(about['seconds'].values()):.2f}"
    suite = ElementTree.Element(
        "testsuite", name=f"quantkit eval {about['artefact']}", tests=str(len(checks)), failures=str(counts[FAIL]),
        errors=str(counts[INCONCLUSIVE]), time=seconds,
    )  # fmt: skip
    for check, line in zip(checks, about["gate"]["lines"], strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=f"quantkit.gate.{about['gate']['name']}", name=check["name"], time="0")
        if check["verdict"] in counts:
            ElementTree.SubElement(case, "failure" if check["verdict"] == FAIL else "error", message=line, type=check["verdict"])
        ElementTree.SubElement(case, "system-out").text = line
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
