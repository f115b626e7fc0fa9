"""The same integers in several engines: does each find the same distance to the original, and how far are they from each other?

    python benchmarks/engines/agreement.py --baseline MODEL ARTEFACT[=ENGINE]...

ARTEFACT is what `quantkit eval` takes; all should come from one solve (`quantkit quantize --format compressed-tensors --format gguf ...`).
Printed: each engine's KL to the original with its interval, its own noise (the same rows asked together and one by one), and the KL of
every engine to the first one, which is the engines' numeric noise between them.
"""

import argparse
from pathlib import Path

import torch
import transformers

from quantkit.evaluate.ask import baseline, compare_rows, noise
from quantkit.evaluate.documents import load_tokenizer, make_rows, read_documents
from quantkit.evaluate.engines import choose, find_artefact, open_engine
from quantkit.evaluate.metrics import Tokens
from quantkit.recipe import heldout_files, reference_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artefacts", nargs="+", metavar="ARTEFACT[=ENGINE]")
    parser.add_argument("--baseline", type=Path, default=reference_model())
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="of a document at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(options.baseline)
    rows = make_rows(read_documents(heldout_files(), tokenizer)[: options.documents], tokenizer, options.tokens, most=options.tokens)
    still = lambda done: None  # noqa: E731
    original = open_engine("transformers", options.baseline, options.baseline)
    whole = {"tail": 0.0, "most": original.vocabulary}
    base, first = baseline(original, rows, step=still, **whole), None
    print(f"{'engine':14} {'KL to original':>15} {'bounds':>20} {'same top':>9} {'own noise':>10} {'KL to the first':>16} {'its max':>9}")
    for given in options.artefacts:
        place, _, name = given.partition("=")
        artefact = find_artefact(Path(place))
        engine = open_engine(choose(artefact, name or "auto"), artefact, options.baseline, 1)
        own = noise(engine, rows.windows)
        found = Tokens.of(rows, compare_rows(engine, rows, base, still))
        apart = Tokens.of(rows, compare_rows(engine, rows, first, still)) if first is not None else None
        if first is None:
            first = baseline(engine, rows, step=still, **whole)
        engine.close()
        low, high = found.kl_bounds(0.95)
        beside = f"{apart.kl.mean():>16.2e} {apart.kl.max():>9.2e}" if apart is not None else f"{'-':>16} {'-':>9}"
        bounds = f"[{low:.5f}, {high:.5f}]"
        print(
            f"{engine.name:14} {found.kl.mean():>15.5f} {bounds:>20} {found.same_top.mean():>9.2%} {own['kl_mean']:>10.1e} {beside}",
            flush=True,
        )


if __name__ == "__main__":
    main()
