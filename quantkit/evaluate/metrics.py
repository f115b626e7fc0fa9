"""Figures over scored tokens, for everything, each language and each domain, with bounds from whole documents drawn anew.

kl            KL(base || artefact) in nats a token: mean, median, 95, 99, 99.9%, maximum; `truncation` is how much more the mean may be
              because a stored baseline keeps only the likeliest tokens
same_top      how often both put the same token first
flips         tokens that the baseline predicts and the artefact does not, and the reverse
perplexity    exp of the mean negative log-likelihood of a token; comparable under one tokenizer and one convention only
bits_per_byte the same in bits per byte of UTF-8 text: comparable across tokenizers
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.evaluate.distributions import Difference, joined
from quantkit.evaluate.documents import Rows
from quantkit.evaluate.significance import mean_bounds, quantile_bounds
from quantkit.types import Json

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Every scored token of some documents."""

    kl: np.ndarray
    bound: np.ndarray
    nll_base: np.ndarray
    nll: np.ndarray
    same_top: np.ndarray
    right_base: np.ndarray
    right: np.ndarray
    finite_base: np.ndarray
    finite: np.ndarray
    owner: np.ndarray  # the document of each, 0 upwards without gaps
    bytes: np.ndarray  # of each document
    names: tuple[str, ...]
    labels: tuple[Mapping[str, str], ...]

    @classmethod
    def of(cls, rows: Rows, differences: Sequence[Difference]) -> "Tokens":
        whole = joined(differences)
        owner = np.repeat([window.document for window in rows.windows], [len(one.kl) for one in differences])
        values = {name: getattr(whole, name).numpy() for name in Difference.__dataclass_fields__}
        names, labels = tuple(d.id for d in rows.documents), tuple(d.labels for d in rows.documents)
        made = cls(**values, owner=owner, bytes=np.array(rows.bytes), names=names, labels=labels)
        return made.of_documents([number for number, tokens in enumerate(rows.tokens) if tokens])

    def of_documents(self, chosen: Sequence[int]) -> "Tokens":
        """These documents alone."""
        place = np.full(len(self.names), -1)
        place[list(chosen)] = np.arange(len(chosen))
        taken = place[self.owner] >= 0
        per_token = {name: getattr(self, name)[taken] for name in Difference.__dataclass_fields__}
        return replace(
            self,
            **per_token,
            owner=place[self.owner][taken],
            bytes=self.bytes[list(chosen)],
            names=tuple(self.names[n] for n in chosen),
            labels=tuple(self.labels[n] for n in chosen),
        )

    def by(self, kind: str) -> dict[str, "Tokens"]:
        """By language or domain; documents that say nothing of it stand under `unknown`."""
        groups: dict[str, list[int]] = {}
        for number, label in enumerate(self.labels):
            groups.setdefault(label.get(kind, "unknown"), []).append(number)
        return {name: self.of_documents(numbers) for name, numbers in sorted(groups.items())}

    def sums(self, values: np.ndarray) -> np.ndarray:
        """By document."""
        return np.bincount(self.owner, values.astype(float), minlength=len(self.names))

    @property
    def counts(self) -> np.ndarray:
        return self.sums(np.ones(len(self.owner)))

    @property
    def nonfinite(self) -> int:
        return int((~self.finite).sum())

    def kl_bounds(self, confidence: float) -> tuple[float, float]:
        return mean_bounds(self.sums(self.kl), self.counts, confidence)

    def as_json(self, confidence: float = 0.95, quantile_bounds_too: bool = True) -> Json:
        bits = (self.sums(self.nll) - self.sums(self.nll_base)) / math.log(2)
        size, total = max(float(self.bytes.sum()), 1.0), len(self.kl)
        kl: Json = {"mean": float(self.kl.mean()), "bounds": _finite(self.kl_bounds(confidence))}
        kl |= {name: float(np.quantile(self.kl, q)) for name, q in QUANTILES.items()}
        if quantile_bounds_too:
            kl["p99_bounds"] = _finite(quantile_bounds(self.kl, self.owner, 0.99, confidence))
        kl |= {"max": float(self.kl.max()), "truncation": float(self.bound.mean())}
        return {
            "documents": len(self.names),
            "tokens": total,
            "bytes": int(size),
            "kl": kl,
            "same_top": float(self.same_top.mean()),
            "same_top_bounds": _finite(mean_bounds(self.sums(self.same_top), self.counts, confidence)),
            "flips": {
                "right_to_wrong": int((self.right_base & ~self.right).sum()),
                "wrong_to_right": int((self.right & ~self.right_base).sum()),
            },
            "accuracy_base": float(self.right_base.mean()),
            "accuracy": float(self.right.mean()),
            "perplexity_base": _exp(float(self.nll_base.mean())),
            "perplexity": _exp(float(self.nll.mean())),
            "bits_per_byte_base": float(self.nll_base.sum()) / math.log(2) / size,
            "bits_per_byte": float(self.nll.sum()) / math.log(2) / size,
            "bits_per_byte_more_bounds": _finite(mean_bounds(bits, self.bytes.astype(float), confidence)),
            "nonfinite_base": int((~self.finite_base).sum()),
            "nonfinite": self.nonfinite,
        }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # JSON has no infinity


def _finite(bounds: tuple[float, float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in bounds]
