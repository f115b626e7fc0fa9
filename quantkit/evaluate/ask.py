"""One engine asked everything that a suite holds: distributions of documents, answers to items, and the same question twice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluate.answers import valid_calls
from quantkit.evaluate.distributions import FLOOR, Difference, Kept, difference, is_finite, keep
from quantkit.evaluate.documents import Rows, Window, begins_with, encode, render
from quantkit.evaluate.engines.engine import Engine
from quantkit.evaluate.items import Item
from quantkit.types import Json

POSITIONS = 256  # whose distributions are taken apart at a time
NOISE_ROWS, NOISE_TOKENS = 4, 48
NOISE = 1e-2  # nats on average between two askings of the same question, beyond which an engine disagrees with itself

Step = Callable[[int], None]  # is told of every row that is done


@dataclass(frozen=True, slots=True)
class Questions:
    """Items as rows of tokens for one tokenizer."""

    items: tuple[Item, ...]
    options: tuple[tuple[tuple[int, ...], int, int], ...]  # a choice's row, the first token of it that is scored, its bytes
    owner: tuple[tuple[int, int], ...]  # (item, choice) of each
    prompts: tuple[tuple[int, ...], ...]  # of answers and calls
    asked: tuple[int, ...]  # the item of each prompt
    forms: dict[str, int]  # how many items the chat template took in which form


def make_questions(items: Sequence[Item], tokenizer: Any) -> Questions:
    """Every item behind the chat template, ending where the model is to speak."""
    start, forms = begins_with(tokenizer), dict[str, int]()
    options, owner, prompts, asked = [], [], [], []
    for number, item in enumerate(items):
        text, how = render(item.messages, item.tools, tokenizer, answer=True)
        forms[how] = forms.get(how, 0) + 1
        front = [] if start is None else [start]
        prompt = front + encode(text, tokenizer, start)[0]
        if item.kind != "choice":
            prompts.append(tuple(prompt))
            asked.append(number)
            continue
        for index, choice in enumerate(item.choices):
            # tokenized together: a choice may join with what stands before it
            whole = front + encode(text + choice, tokenizer, start)[0]
            same = next((at for at, (one, two) in enumerate(zip(prompt, whole, strict=False)) if one != two), min(len(prompt), len(whole)))
            options.append((tuple(whole), max(min(same, len(whole) - 1), 1), len(choice.encode())))
            owner.append((number, index))
    return Questions(tuple(items), tuple(options), tuple(owner), tuple(prompts), tuple(asked), forms)


def baseline(engine: Engine, rows: Rows, tail: float, most: int, step: Step) -> list[Kept]:
    """The distributions of every window, kept small."""
    found: dict[int, Kept] = {}
    for number, log_p in engine.log_probs([window.ids for window in rows.windows]):
        scored, following = _scored(log_p, rows.windows[number])
        parts = [keep(p, f, tail, most) for p, f in zip(scored.split(POSITIONS), following.split(POSITIONS), strict=True)]
        found[number] = Kept(*(torch.cat([getattr(part, name) for part in parts]) for name in Kept.__dataclass_fields__))
        step(1)
    return [found[number] for number in range(len(rows.windows))]


def compare_rows(engine: Engine, rows: Rows, base: Sequence[Kept], step: Step) -> list[Difference]:
    """Every window's distributions beside the baseline's."""
    found: dict[int, Difference] = {}
    highest = max((int(kept.ids.max()) for kept in base if len(kept.ids)), default=0)
    for number, log_q in engine.log_probs([window.ids for window in rows.windows]):
        scored, following = _scored(log_q, rows.windows[number])
        if highest >= scored.shape[1]:
            raise EvaluationError(
                f"{engine.name} gives {scored.shape[1]} tokens, the baseline's likely ones reach {highest}; another vocabulary"
            )
        found[number] = difference(base[number], scored, following)
        step(1)
    return [found[number] for number in range(len(rows.windows))]


def ask_items(engine: Engine, questions: Questions, answer_tokens: int, tokenizer: Any, step: Step) -> list[Json]:
    """What the engine answers to every item, and whether it is right."""
    found: list[Json] = [{"id": item.id, "kind": item.kind, **item.labels} for item in questions.items]
    scores: dict[int, dict[int, float]] = {}
    for number, log_p in engine.log_probs([row for row, _, _ in questions.options]):
        row, first, size = questions.options[number]
        scored, following = log_p[first - 1 : -1], torch.tensor(row[first:])
        owner, choice = questions.owner[number]
        if not bool(is_finite(scored).all()):
            found[owner]["nonfinite"] = True
        scores.setdefault(owner, {})[choice] = max(float(scored.gather(1, following[:, None]).sum(dtype=torch.float64)) / size, FLOOR)
        step(1)
    for number, by_choice in scores.items():
        if "nonfinite" in found[number]:  # whatever choice stands first would win
            found[number] |= {"chosen": None, "right": False}
            continue
        values = [by_choice[choice] for choice in sorted(by_choice)]
        chosen = max(range(len(values)), key=values.__getitem__)
        found[number] |= {"chosen": chosen, "right": chosen == questions.items[number].correct, "scores": [round(v, 6) for v in values]}
    for kind in ("answer", "call"):
        of_kind = [place for place, item in enumerate(questions.asked) if questions.items[item].kind == kind]
        answers = engine.generate([questions.prompts[place] for place in of_kind], answer_tokens)
        for place, ids in zip(of_kind, answers, strict=True):
            item = questions.items[questions.asked[place]]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            found[questions.asked[place]] |= {"text": text, "right": item.judge(text)}
            if kind == "call":
                found[questions.asked[place]]["valid"] = valid_calls(text, item.tools)
            step(1)
    return found


def noise(engine: Engine, windows: Sequence[Window]) -> Json:
    """The same rows asked together and one by one: what the engine's own arithmetic makes of batches, order and padding.

    Raises:
        EvaluationError: the engine disagrees with itself, so nothing that it says of a model can be trusted.
    """
    chosen = sorted(windows, key=lambda window: (len(window.ids), window.document))
    rows = [chosen[len(chosen) * n // NOISE_ROWS].ids[:NOISE_TOKENS] for n in range(min(NOISE_ROWS, len(chosen)))]
    together = dict(engine.log_probs(rows))
    largest, values, same, broken = 0.0, [], [], 0
    for number, row in enumerate(rows):
        alone = next(iter(engine.log_probs([row])))[1]
        broken += int((~is_finite(alone)).sum())
        if not bool(alone.isfinite().any()) or not bool(together[number].isfinite().any()):
            continue  # no numbers, no distance: `nonfinite` tells
        apart = difference(keep(together[number], _next(row), 0.0, engine.vocabulary), alone, _next(row))
        largest = max(largest, float(apart.kl.max()))
        values.append(apart.kl)
        same.append(apart.same_top)
    if not values:
        return {"kl_mean": 0.0, "kl_max": 0.0, "same_top": 1.0, "tokens": 0, "nonfinite": broken}
    kl, top = torch.cat(values), torch.cat(same)
    about = {"kl_mean": float(kl.mean()), "kl_max": largest, "same_top": float(top.double().mean()), "tokens": len(kl), "nonfinite": broken}
    if about["kl_mean"] > NOISE:
        raise EvaluationError(
            f"{engine.name} disagrees with itself: the same tokens asked together and one by one differ by {about['kl_mean']:.2g} nats"
        )
    return about


def rounds(rows: Rows | None, questions: Questions | None) -> Iterator[int]:
    """How many steps each part takes, for a progress bar."""
    yield len(rows.windows) if rows else 0
    yield len(questions.options) + len(questions.prompts) if questions else 0


def _scored(log_p: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    return log_p[window.first - 1 : len(window.ids) - 1], torch.tensor(window.ids[window.first :])


def _next(row: Sequence[int]) -> Tensor:
    return torch.tensor([*row[1:], row[-1]])
