"""How far dense weights are from the original: one measure for every contender, on the same tokens. Runs with quantkit's environment.

    python benchmarks/rivals/score.py MODEL EVALUATION.safetensors RESULT... [--json]

A RESULT is a folder with weights.safetensors, or such a file: dense tensors under the checkpoint's names, which take the place of its own.
The original and the contender run in float32. KL(original || contender) is over the whole vocabulary, a mean over tokens; the interval is
95 % of a bootstrap over rows, as tokens of one row are not independent. Perplexity and KL are of the same tokens.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from common import load_model, logits
from safetensors import safe_open
from safetensors.torch import load_file

BATCH = 8
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true", help="one JSON line a result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = load_model(arguments.model)
    if not arguments.json:
        print(f"{'result':44} {'KL':>8} {'95 % interval':>17} {'same top':>8} {'perplexity':>10} {'original':>8}  KL of every language")
    for path in arguments.results:
        weights = load_file(path / "weights.safetensors" if path.is_dir() else path)
        figures = score(original, load_model(arguments.model, weights=weights), arguments.evaluation)
        if arguments.json:
            print(json.dumps({"result": path.name, **figures}), flush=True)
            continue
        low, high = figures["kl_interval"]
        languages = " ".join(f"{name} {values['kl']:.5f}" for name, values in figures["languages"].items())
        print(
            f"{path.name[:44]:44} {figures['kl']:8.5f} {f'{low:.5f}-{high:.5f}':>17} {figures['same_top']:8.4f} "
            f"{figures['perplexity']:10.4f} {figures['original_perplexity']:8.4f}  {languages}",
            flush=True,
        )


def score(original: Any, contender: Any, evaluation: Path) -> dict[str, Any]:
    """Figures in total and of every language: kl (nats a token), same_top, perplexity, original_perplexity; kl_interval of the total,
    row_kl of each language: of its rows, in order.

    Args:
        original, contender: transformers models in float32.
        evaluation: safetensors with `ids` (rows, tokens), `language` (rows) and the languages' names in its metadata.
    """
    with safe_open(evaluation, "pt") as file:
        ids, language = file.get_tensor("ids"), file.get_tensor("language")
        names = json.loads(file.metadata()["languages"])
    rows = torch.cat([_sums(original, contender, batch) for batch in ids.split(BATCH)])
    draws = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    resampled = rows[draws].sum(1)
    interval = torch.quantile(resampled[:, 1] / resampled[:, 0], ends).tolist()
    languages = {}
    for number, name in enumerate(names):
        own = rows[language == number]
        languages[name] = {**_figures(own), "row_kl": (own[:, 1] / own[:, 0]).tolist()}
    return {**_figures(rows), "kl_interval": interval, "languages": languages}


def worst_language(first: dict[str, Any], figures: dict[str, Any]) -> tuple[str, float, list[float], float]:
    """The language that gains least beside `first`, by its KL ratio to `first` over the ratio of all rows.

    Args:
        first, figures: what `score` returned of two contenders on the same rows, all of one length.

    Returns:
        Its name; the figure; the 95 % interval of this language's figure, rows drawn anew within every language and the same for both
        contenders; what chance alone makes of the largest figure in one draw of twenty, were all languages alike.
    """
    names = list(figures["languages"])
    kls = [torch.tensor([f["languages"][name]["row_kl"] for f in (first, figures)], dtype=torch.float64) for name in names]
    found = _beside_mean(torch.stack([kl.sum(1) for kl in kls], dim=-1))
    generator = torch.Generator().manual_seed(0)
    draws = []
    for kl in kls:
        count = kl.shape[1]
        size = max(1, count - 1)  # `count` rows drawn of so few would scatter less than others of their kind do
        draws.append(kl[:, torch.randint(count, (RESAMPLES, size), generator=generator)].sum(-1))
    drawn = _beside_mean(torch.stack(draws, dim=-1))
    worst = int(found.argmax())
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    chance = torch.quantile((drawn / found).amax(-1), 0.95)  # each language levelled to the mean keeps the scatter of its rows
    return names[worst], found[worst].item(), torch.quantile(drawn[:, worst], ends).tolist(), chance.item()


def _beside_mean(kl: torch.Tensor) -> torch.Tensor:
    """(..., languages): each language's ratio over that of all together, from (2, ..., languages) sums of KL."""
    together = kl.sum(-1, keepdim=True)
    return kl[1] / kl[0] * together[0] / together[1]


def _sums(original: Any, contender: Any, ids: torch.Tensor) -> torch.Tensor:
    """(rows, 5) float64: tokens, KL, same top token, and the negative log likelihood by the contender and by the original."""
    p, q = (logits(model, ids)[:, :-1].log_softmax(-1) for model in (original, contender))
    targets = ids[:, 1:, None]
    per_token = (
        torch.ones_like(targets[..., 0]),
        (p.exp() * (p - q)).sum(-1),
        p.argmax(-1) == q.argmax(-1),
        -q.gather(-1, targets)[..., 0],
        -p.gather(-1, targets)[..., 0],
    )
    return torch.stack([values.double().sum(-1) for values in per_token], dim=-1)


def _figures(rows: torch.Tensor) -> dict[str, float]:
    tokens, kl, same, own, reference = rows.sum(0).tolist()
    return {
        "kl": kl / tokens,
        "same_top": same / tokens,
        "perplexity": math.exp(own / tokens),
        "original_perplexity": math.exp(reference / tokens),
    }


if __name__ == "__main__":
    main()
