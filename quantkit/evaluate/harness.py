"""lm-evaluation-harness with our engines as its models, so that what it scores is the artefact itself; its samples pair item by item.

Names on model cards are looked up in eval/benchmarks.yaml. Tasks that bring their own data work offline (`include: FOLDER` in a suite).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluate.distributions import is_finite
from quantkit.evaluate.documents import begins_with, split
from quantkit.evaluate.engines.engine import Engine
from quantkit.suites import Harness
from quantkit.types import Json

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise EvaluationError("tasks of lm-evaluation-harness need it; pip install 'quantkit[lm-eval]'") from None

# of a sample, the first that it has decides whether the item is right
METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "f1", "em", "prompt_level_strict_acc")


class EngineLM(TemplateLM):
    """One of our engines as a model of the harness."""

    backend = "causal"

    def __init__(self, engine: Engine, tokenizer: Any, window: int, answer_tokens: int):
        super().__init__()
        self.engine, self.tokenizer, self.window, self.answer_tokens = engine, tokenizer, window, answer_tokens
        self.start = begins_with(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.start if self.start is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """BOS once, where the model knows one: a chat template may have written it already."""
        ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if self.start is None or add_special_tokens is False or ids[:1] == [self.start] else [self.start, *ids]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for number, log_p in self.engine.log_probs(rows):
            ends = torch.tensor(requests[number][2])
            part = log_p[len(rows[number]) - len(ends) - 1 : -1]
            if not bool(is_finite(part).all()):
                raise EvaluationError(f"{self.engine.name} gives logits that are no numbers; a task's answers would be chance")
            greedy = bool((part.argmax(-1) == ends).all())
            found[number] = float(part.gather(1, ends[:, None]).sum(dtype=torch.float64)), greedy
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows, owner, first = [], [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for row, begin in split(ids, self.window, "document", self.prefix_token_id):
                rows.append(row)
                owner.append(number)
                first.append(begin)
        totals = [0.0] * len(requests)
        for place, log_p in self.engine.log_probs(rows):
            ends = torch.tensor(rows[place][first[place] :])
            totals[owner[place]] += float(log_p[first[place] - 1 : -1].gather(1, ends[:, None]).sum(dtype=torch.float64))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, whatever a task would sample: two models are compared, and chance is no difference between them."""
        texts = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            most = int(request.args[1].get("max_gen_toks", self.answer_tokens))
            by_length.setdefault(most, []).append(number)
        for most, numbers in by_length.items():
            answers = self.engine.generate([self.tok_encode(requests[n].args[0]) for n in numbers], most)
            for number, ids in zip(numbers, answers, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                stops = requests[number].args[1].get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                texts[number] = text
        return texts


def resolve(names: Sequence[str], benchmarks: Mapping[str, str], known: Sequence[str]) -> list[str]:
    """Names of tasks, or those on model cards, as the harness calls them.

    Raises:
        EvaluationError: a benchmark that the harness does not have (with the reason), or a name that nobody knows.
    """
    plain = {_plain(name): task for name, task in benchmarks.items()}
    tasks: list[str] = []
    for name in names:
        found = [name] if name in known else [part.strip() for part in plain.get(_plain(name), "").split(",") if part.strip()]
        if found and found[0].startswith("-"):
            raise EvaluationError(f"{name}: {','.join(found)[1:].strip()}")
        missing = [task for task in found if task not in known]
        if missing or not found:
            raise EvaluationError(f"{name}: lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(missing) or name!r}")
        tasks += [task for task in found if task not in tasks]
    return tasks


def run_harness(
    engine: Engine, tokenizer: Any, settings: Harness, benchmarks: Mapping[str, str], limit: int | None, window: int
) -> list[Json]:
    """Every item of the tasks with the engine's result: {"id", "task", "right", "value", "metric"}.

    Raises:
        EvaluationError: a task that is not there, that needs data which cannot be had, or that scored nothing item by item.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(settings)
    tasks = resolve(settings.tasks, benchmarks, manager.all_tasks)
    try:
        found = lm_eval.simple_evaluate(
            EngineLM(engine, tokenizer, window, settings.answer_tokens), tasks=tasks, num_fewshot=settings.fewshot,
            limit=_least(settings.limit, limit), log_samples=True, bootstrap_iters=0, task_manager=manager,
            apply_chat_template=settings.chat_template, random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        )  # fmt: skip
    except EvaluationError:
        raise
    except Exception as problem:  # data sets that cannot be had, tasks that need code of their own
        raise EvaluationError(f"lm-evaluation-harness cannot run {', '.join(tasks)} ({' '.join(str(problem).split())[:200]})") from None
    return [item for task, samples in sorted(found["samples"].items()) for item in items_of(task, samples)]


def items_of(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Json]:
    """A task's samples as items that pair with another model's: by the task, the document's number and its hash.

    Raises:
        EvaluationError: the task has no result for each item.
    """
    items: dict[str, Json] = {}
    for sample in samples:
        metric = next((name for name in METRICS if isinstance(sample.get(name), (bool, int, float))), None)
        if metric is None:
            raise EvaluationError(
                f"{task}: scores no item by itself ({', '.join(sample.get('metrics', [])) or 'no metric'}); it cannot be paired"
            )
        value = float(sample[metric])
        name = f"{task}:{sample['doc_id']}:{str(sample.get('doc_hash', ''))[:12]}"
        if name not in items or value > items[name]["value"]:  # several filters of one answer: any that finds it counts
            items[name] = {"id": name, "task": task, "metric": metric, "value": value, "right": value > 0.5}
    return list(items.values())


def _manager(settings: Harness) -> Any:
    """The tasks of the folder that was named alone, where that is enough: reading all 14,000 of the harness takes ten seconds and more."""
    own = settings.include and str(Path(settings.include).resolve())
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(settings.tasks) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=own)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+']", "", name.casefold())
