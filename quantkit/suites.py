"""What a suite asks and what a gate demands: the forms of the YAML in eval/, which recipe.py reads."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Items(_Strict):
    """Questions with one right answer: how many of each kind and language. None: all there are; 0: none."""

    path: str | None = None  # a .jsonl file or a folder of them, beside the suite's YAML; None: our own items
    choice: Annotated[int, Field(ge=0)] | None = None
    answer: Annotated[int, Field(ge=0)] | None = None
    call: Annotated[int, Field(ge=0)] | None = None
    answer_tokens: Annotated[int, Field(ge=1, le=32768)] = 256  # generated at most, for an answer or a call


class Harness(_Strict):
    """Tasks of lm-evaluation-harness, by its names or by those on model cards."""

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = None  # items of each task
    fewshot: Annotated[int, Field(ge=0)] | None = None  # None: the task's own
    chat_template: bool = False
    include: str | None = None  # a folder of task files of one's own
    answer_tokens: Annotated[int, Field(ge=1, le=32768)] = 256  # generated at most, where the task says nothing


class Suite(_Strict):
    """What both models are asked: documents for KL and perplexity, items, tasks of lm-evaluation-harness."""

    name: str
    description: str
    documents: str | None = "held-out"  # our held-out samples; or a .jsonl or .txt file or a folder of them; null: none
    document_tokens: Annotated[int, Field(ge=8)] | None = None  # of a document at most; None: whole
    window: Annotated[int, Field(ge=8, le=131072)] = 512  # tokens of context at most
    bos: Literal["window", "document"] = "window"  # stands in front of every window, or of a document's first one alone
    items: Items | None = None
    harness: Harness | None = None
    tail: Annotated[float, Field(ge=0, le=0.1)] = 1e-4  # probability of a distribution that a stored baseline may lump together
    most: Annotated[int, Field(ge=1)] = 8192  # tokens of a distribution that it keeps, however much is left

    @model_validator(mode="after")
    def _asks_something(self) -> "Suite":
        if self.documents is None and self.items is None and self.harness is None:
            raise ValueError("an empty suite: give documents, items or harness")
        return self


Portion = Annotated[float, Field(ge=0, le=1)]


class _Demands(_Strict):
    @property
    def demands(self) -> list[str]:
        """What is demanded, by name."""
        return [name for name, value in self.model_dump().items() if value is not None]


class DivergenceGate(_Demands):
    """Budgets, in nats; an upper bound from a bootstrap over documents must keep them."""

    kl_mean: Annotated[float, Field(ge=0)] | None = None
    kl_99: Annotated[float, Field(ge=0)] | None = None  # of the 99th percentile over tokens
    kl_mean_group: Annotated[float, Field(ge=0)] | None = None  # no language and no domain may be shown to exceed it
    same_top: Portion | None = None  # at least so often both models put the same token first
    bits_per_byte: Annotated[float, Field(ge=0)] | None = None  # at most so many more than the baseline's


class ItemsGate(_Demands):
    """Non-inferiority on items that both models answered."""

    margin: Portion | None = None  # of accuracy, all items together
    group_margin: Portion | None = None  # no language, domain, kind or task may be shown to lose more
    flips: Portion | None = None  # share of items whose verdict may change, either way
    call_margin: Portion | None = None  # tool calls that a parser and their schema accept: how much less often than the baseline's


class Gate(_Strict):
    """What an artefact must reach. PASS: all of it is shown; FAIL: something is shown to be missed; else INCONCLUSIVE."""

    name: str
    description: str
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95  # of every one-sided bound; families of groups share it (Holm)
    divergence: DivergenceGate = DivergenceGate()
    items: ItemsGate = ItemsGate()

    @model_validator(mode="after")
    def _demands_something(self) -> "Gate":
        if not self.divergence.demands + self.items.demands:
            raise ValueError("an empty gate: give divergence or items")
        return self
