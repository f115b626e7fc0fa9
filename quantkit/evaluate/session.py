"""The story of an evaluation: the files that ship, opened as a stranger opens them, beside the original on the same tokens.

rows, questions   <- suite, the baseline's tokenizer      the artefact's must split every text alike
kept, answers     <- baseline, its engine                 once: from the cache where this model was asked the same before
noise             <- the artefact's engine, asked twice   an engine that disagrees with itself is an error
differences       <- artefact, its engine
figures, pairs    -> gate -> PASS, FAIL, INCONCLUSIVE
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import report
from quantkit.errors import EvaluationError
from quantkit.evaluate import cache as stores
from quantkit.evaluate.ask import Questions, ask_items, baseline, compare_rows, make_questions, noise
from quantkit.evaluate.distributions import Kept
from quantkit.evaluate.documents import Document, Rows, find_files, load_tokenizer, make_rows, read_documents, same_tokens
from quantkit.evaluate.engines import choose, find_artefact, open_engine
from quantkit.evaluate.engines.engine import Engine
from quantkit.evaluate.gate import EXIT_CODES, none_of, verdict_of
from quantkit.evaluate.items import Item, read_items
from quantkit.evaluate.judge import beside_stored, of_items, of_tokens, pairs_by, stored_run
from quantkit.evaluate.metrics import Tokens
from quantkit.recipe import heldout_files, items_folder, load_benchmarks
from quantkit.report import Clock, Listener, silent
from quantkit.suites import Gate, Items, Suite
from quantkit.types import Json


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    verdict: str | None  # None without a gate
    report: Json

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict] if self.verdict else 0


@dataclass(frozen=True, slots=True)
class Asked:
    """Everything that both models are given."""

    suite: Suite
    tokenizer: Any
    rows: Rows | None
    questions: Questions | None

    @property
    def windows(self) -> list[tuple[int, ...]]:
        rows = [window.ids for window in self.rows.windows] if self.rows else []
        return rows + ([row for row, _, _ in self.questions.options] + list(self.questions.prompts) if self.questions else [])


@dataclass(frozen=True, slots=True)
class Answers:
    """What the baseline said."""

    kept: Sequence[Kept]
    items: Sequence[Json]
    harness: Sequence[Json]
    about: Json
    noise: Json
    cached: bool


def made_from(artefact: Path, original: Path) -> bool:
    """Whether an artefact's manifest says that its weights are those of a folder.

    Raises:
        EvaluationError: there is no artefact.
    """
    place, weights = find_artefact(artefact), "model.safetensors"
    manifest = stores.load_json((place if place.is_dir() else place.parent) / "quantkit.json") or {}
    return bool(manifest.get("inputs", {}).get(weights) == f"sha256:{stores.file_digest(original / weights)}")


def evaluate(
    artefact: Path,
    original: Path,
    suite: Suite,
    *,
    gate: Gate | None = None,
    engine: str = "auto",
    baseline_engine: str = "auto",
    limit: int | None = None,
    stored: Json | None = None,
    cache: Path | None = None,
    tell: Listener = silent,
) -> Evaluation:
    """An artefact beside its original.

    Args:
        artefact: a folder, a run's folder, or a .gguf file.
        original: the baseline's folder.
        limit: documents, items of each kind, and items of each task of lm-evaluation-harness at most.
        stored: an older run's result (`stored` of its report): the gate judges by that too.
        cache: of baselines; None: the user's.

    Raises:
        EvaluationError: there is no verdict: another tokenizer, nothing asked, an engine that is missing or disagrees with itself.
    """
    clock, threads = Clock(tell), torch.get_num_threads()
    artefact, original = find_artefact(artefact), find_artefact(original)
    chosen, base_engine = choose(artefact, engine), choose(original, baseline_engine)
    if not original.is_dir():
        raise EvaluationError(f"{original}: the baseline is a folder with config.json and tokenizer")
    with clock.phase("tokenizing"):
        asked = _asked(suite, load_tokenizer(original), limit)
        if artefact.is_dir():  # of a GGUF the engine is asked
            same_tokens(_texts(asked), asked.tokenizer, load_tokenizer(artefact))
    answers = _baseline(asked, original, base_engine, limit, cache or stores.default_folder(), threads, clock)

    with clock.phase(f"opening {chosen}"):
        opened = open_engine(chosen, artefact, original, threads)
    try:
        _same_vocabulary(opened, asked)
        step = _Steps(clock, f"asking {chosen}", asked)
        with clock.phase("asking the engine twice"):
            own = noise(opened, asked.rows.windows if asked.rows else _as_windows(asked))
        tokens, items = None, list[Json]()
        with clock.phase(f"asking {chosen}"):
            if asked.rows:
                tokens = Tokens.of(asked.rows, compare_rows(opened, asked.rows, answers.kept, step))
            if asked.questions:
                items = ask_items(opened, asked.questions, _answer_tokens(suite), asked.tokenizer, step)
        harness = _harness(opened, asked, limit, clock)
        about: Json = {"engine": {"name": opened.name, "whole_vocabulary": opened.whole, **opened.about}}
    finally:
        opened.close()
    broken = int((~tokens.finite_base).sum()) if tokens is not None else answers.noise["nonfinite"]
    broken += sum("nonfinite" in item for item in answers.items)
    if broken:
        raise EvaluationError(f"{original}: the baseline's own logits are no numbers at {broken} tokens or items")

    about = {
        "artefact": artefact.parent.name if artefact.name in ("compressed-tensors", "gguf", "onnx") else artefact.name,
        "baseline": original.name,
        "suite": suite.name,
        **about,
        "versions": report.versions(),
        "baseline_engine": {"name": base_engine, "cached": answers.cached, **answers.about},
        "noise": {"artefact": own, "baseline": answers.noise},
        "convention": _convention(asked),
        "digests": {
            "artefact": stores.model_digest(artefact),
            "baseline": stores.model_digest(original),
            "weights": {path.name: f"sha256:{stores.file_digest(path)}" for path in sorted(original.glob("*.safetensors"))},
        },
        "limit": limit,
    }
    sure = gate.confidence if gate else 0.95
    if tokens is not None:
        about["divergence"] = tokens.as_json(sure)
        for kind in ("language", "domain"):
            about[f"divergence_by_{kind}"] = {name: one.as_json(sure, False) for name, one in tokens.by(kind).items()}
    base_items, all_items = [*answers.items, *answers.harness], [*items, *harness]
    if all_items:
        about["items"] = _item_figures(base_items, all_items, sure)
        about["answers"] = [{"baseline": one, "artefact": two} for one, two in zip(base_items, all_items, strict=True)]
    about["stored"] = stored_run(about, tokens, all_items)
    verdict = None
    if gate is not None:
        with clock.phase("judging"):
            checks = _checks(gate, tokens, base_items, all_items, own["nonfinite"])
            if stored is not None:
                if stored.get("baseline_digest") not in (None, about["digests"]["baseline"]):  # None: stored before it was told
                    raise EvaluationError(f"the stored run was judged beside another baseline ({stored.get('baseline')})")
                checks += beside_stored(gate, stored, tokens, all_items)
        verdict = verdict_of(checks)
        about["gate"] = {"name": gate.name, "confidence": gate.confidence, "verdict": verdict, "checks": [c.as_json() for c in checks]}
        about["gate"]["lines"] = [check.line() for check in checks]
    about["seconds"] = {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()}
    about["peak_memory"] = report.peak_memory()
    return Evaluation(verdict, about)


def _asked(suite: Suite, tokenizer: Any, limit: int | None) -> Asked:
    rows = questions = None
    if suite.documents is not None:
        files = heldout_files() if suite.documents == "held-out" else find_files(Path(suite.documents))
        documents = _spread(read_documents(files, tokenizer), lambda d: d.labels.get("language", ""), limit)
        rows = make_rows(documents, tokenizer, suite.window, suite.bos, suite.document_tokens)
    if suite.items is not None:
        counts = {kind: getattr(suite.items, kind) for kind in ("choice", "answer", "call")}
        items = read_items(Path(suite.items.path) if suite.items.path else items_folder(), counts)
        few: list[Item] = []
        for kind in counts:
            few += _spread([item for item in items if item.kind == kind], lambda item: item.labels["language"], limit)
        questions = make_questions(few, tokenizer)
    return Asked(suite, tokenizer, rows, questions)


def _spread(things: Sequence[Any], language: Any, limit: int | None) -> list[Any]:
    """At most so many, in turn from every language."""
    if limit is None or len(things) <= limit:
        return list(things)
    seen: dict[str, int] = {}
    order = []
    for number, thing in enumerate(things):
        turn = seen[language(thing)] = seen.get(language(thing), 0) + 1
        order.append((turn, number))
    return [things[number] for _, number in sorted(sorted(order)[:limit], key=lambda pair: pair[1])]


def _answer_tokens(suite: Suite) -> int:
    return (suite.items or Items()).answer_tokens


def _baseline(asked: Asked, original: Path, engine: str, limit: int | None, folder: Path, threads: int, clock: Clock) -> Answers:
    """From the cache, or asked now; then it is kept."""
    suite = asked.suite
    with clock.phase("hashing the baseline"):
        key = stores.digest(
            stores.LAYOUT, stores.model_digest(original), engine, report.versions(), threads, asked.windows, suite.tail, suite.most,
            _answer_tokens(suite), [item.id for item in asked.questions.items] if asked.questions else [],
            _harness_key(suite), limit,
        )  # fmt: skip
    results, kept = stores.load_results(folder / f"{key}.json"), stores.load_kept(folder / f"{key}.safetensors") if asked.rows else []
    if results is not None and kept is not None:
        return _rejudged(Answers(kept, results["items"], results["harness"], results["about"], results["noise"], True), asked)
    with clock.phase("opening the baseline"):
        opened = open_engine(engine, original, original, threads)
    try:
        step = _Steps(clock, "asking the baseline", asked)
        with clock.phase("asking the baseline"):
            own = noise(opened, asked.rows.windows if asked.rows else _as_windows(asked))
            kept = baseline(opened, asked.rows, suite.tail, suite.most, step) if asked.rows else []
            items = ask_items(opened, asked.questions, _answer_tokens(suite), asked.tokenizer, step) if asked.questions else []
        harness = _harness(opened, asked, limit, clock)
        about = opened.about
    finally:
        opened.close()
    if asked.rows:
        stores.save_kept(folder / f"{key}.safetensors", kept)
    stores.save_results(folder / f"{key}.json", {"items": items, "harness": harness, "about": about, "noise": own})
    return Answers(kept, items, harness, about, own, False)


def _harness_key(suite: Suite) -> Any:
    """What decides the harness's questions: settings, the window, and every file of a folder of one's own tasks."""
    if suite.harness is None:
        return None
    own = Path(suite.harness.include) if suite.harness.include else None
    files = sorted(path for path in own.rglob("*") if path.is_file()) if own else []
    return [suite.harness.model_dump(), suite.window, [(str(path.relative_to(own)), stores.file_digest(path)) for path in files if own]]


def _rejudged(answers: Answers, asked: Asked) -> Answers:
    """Verdicts of stored answers by today's rules: only what the model said is kept, not what we thought of it."""
    from quantkit.evaluate.answers import valid_calls

    for item, row in zip(asked.questions.items if asked.questions else (), answers.items, strict=True):
        if item.kind == "choice":
            row["right"] = row["chosen"] == item.correct  # None where logits were no numbers
        else:
            row["right"] = item.judge(row["text"])
        if item.kind == "call":
            row["valid"] = valid_calls(row["text"], item.tools)
    return answers


def _harness(engine: Engine, asked: Asked, limit: int | None, clock: Clock) -> list[Json]:
    if asked.suite.harness is None:
        return []
    from quantkit.evaluate.harness import run_harness

    with clock.phase(f"lm-evaluation-harness with {engine.name}"):
        return run_harness(engine, asked.tokenizer, asked.suite.harness, load_benchmarks(), limit, asked.suite.window)


def _checks(gate: Gate, tokens: Tokens | None, base: Sequence[Json], items: Sequence[Json], broken: int) -> list[Any]:
    """Fail closed: a demand of the gate must have been asked, or there is no verdict. That logits are numbers is none of its demands."""
    numbers, *demanded = of_tokens(gate, tokens) if tokens is not None else [none_of("logits that are no numbers", broken)]
    demanded += of_items(gate, base, items) if items else []
    if not demanded:
        parts = {"documents": gate.divergence, "items": gate.items}
        wanted = [f"{name} ({', '.join(part.demands)})" for name, part in parts.items() if part.demands]
        raise EvaluationError(f"the gate {gate.name!r} demands {' and '.join(wanted)}, the suite asks nothing of the kind")
    unanswered = sum("nonfinite" in item for item in items)
    return [numbers, *([none_of("items whose logits are no numbers", unanswered)] if items else []), *demanded]


def _item_figures(base: Sequence[Json], items: Sequence[Json], confidence: float) -> Json:
    figures: Json = {"all": pairs_by(base, items, lambda item: "all")["all"].as_json(confidence)}
    for kind in ("kind", "language", "domain", "task"):
        found = pairs_by(base, items, lambda item, kind=kind: item.get(kind, ""))  # type: ignore[misc]
        if set(found) != {""}:
            figures[f"by_{kind}"] = {name: pairs.as_json(confidence) for name, pairs in found.items() if name}
    calls = [(one["valid"], two["valid"]) for one, two in zip(base, items, strict=True) if "valid" in one]
    if calls:
        figures["valid_calls"] = {"items": len(calls), "baseline": sum(b for b, _ in calls), "artefact": sum(a for _, a in calls)}
    return figures


def _convention(asked: Asked) -> Json:
    suite = asked.suite
    forms: dict[str, int] = dict(asked.questions.forms) if asked.questions else {}
    for document in asked.rows.documents if asked.rows else ():
        forms[document.how] = forms.get(document.how, 0) + 1
    return {
        "window": suite.window,
        "bos": suite.bos,
        "document_tokens": suite.document_tokens,
        "kept": {"tail": suite.tail, "most": suite.most},
        "forms": forms,
        "unit": "nats a token; bits per byte of UTF-8 text",
    }


def _same_vocabulary(engine: Engine, asked: Asked) -> None:
    """An engine that brings its own tokenizer must split our texts as the baseline's does."""
    highest = max((max(row) for row in asked.windows if row), default=0)
    if highest >= engine.vocabulary:
        raise EvaluationError(f"{engine.name}: a vocabulary of {engine.vocabulary}, the baseline's tokenizer makes token {highest}")
    for document in _texts(asked):
        text = document.text
        theirs = engine.tokenize(text)
        ours = list(asked.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if theirs is not None and theirs != ours:
            raise EvaluationError(f"{engine.name} tokenizes {document.id!r} otherwise than the baseline; a baseline of another tokenizer?")


def _texts(asked: Asked) -> Sequence[Document]:
    """What two tokenizers must split alike: the documents, or where there are none the questions."""
    if asked.rows:
        return asked.rows.documents
    return [Document(f"question {number}", str(asked.tokenizer.decode(row)), {}) for number, row in enumerate(asked.windows)]


def _as_windows(asked: Asked) -> list[Any]:
    from quantkit.evaluate.documents import Window

    found = [Window(0, tuple(row), 1) for row in asked.windows if len(row) > 1]
    return found or [Window(0, tuple(asked.tokenizer("2 + 2 = 4, 3 + 3 = 6", verbose=False)["input_ids"]), 1)]


class _Steps:
    """Rows that are done, for whoever draws a bar."""

    def __init__(self, clock: Clock, phase: str, asked: Asked):
        self.clock, self.phase, self.done = clock, phase, 0
        self.all = len(asked.windows)

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.done % max(1, self.all // 100) == 0:
            self.clock.tell(report.Event(self.phase, min(self.done, self.all - 1), self.all, 0, None, report.peak_memory(), "row"))
