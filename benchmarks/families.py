"""A census of the causal language models of the installed transformers, each built small from its config on a CPU.

    python benchmarks/families.py                                   # every model type; goes on where it stopped
    python benchmarks/families.py --types olmo2,phi3                # some, anew
    python benchmarks/families.py --table docs/families.md          # what is known so far, between the page's two marks

For each type, a random twin of the default config:

streams     largest relative change of the logits, one block at a time against the whole model
folds       how many are found on it
KL          of AWQ with the table found, and of plain rounding: 4 bits, a scale a row, held-out samples
opens       relative change of the logits, the folder opened by transformers against the original class with weights decoded apart from it

A type runs in a process of its own, with limits on time and memory; its row is a JSON file in the folder of results.
"""

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BYTES = 12 << 30  # for one type
EQUAL = 1e-4  # relative change of logits that fp32 explains
WORSE = 2.0  # times the KL of plain rounding: more is a wrong fold, not an unlucky search on random weights
TELLS = 0.02  # of the KL that the run told, on the same tokens
MARKS = "<!-- census: made by benchmarks/families.py -->", "<!-- end of the census -->"
RECIPE = """description: census
method: {method}
weights: {{bits: 4, group: row}}
calibration: {{mix: smoke, samples: 6, sequence_length: 96}}
score: {{samples: 6, sequence_length: 96}}
"""
STEPS = ("builds", "streams", "folds", "kl_rounded", "kl", "opens")


class Wrong(Exception):
    """A figure that is out of bounds and that nothing refused: what the census is for."""


def measure(model_type: str, place: Path) -> dict[str, Any]:
    """One row of the census; the step that fails says so in the place of its figure, and is the last."""
    import tiny
    import torch
    import transformers

    from quantkit.discover import as_yaml, discover
    from quantkit.errors import FamilyError
    from quantkit.evaluate.divergence import Scores, compare
    from quantkit.hf import load_model
    from quantkit.inputs import Samples, load_recipe
    from quantkit.model.blocks import Skeleton
    from quantkit.model.checkpoint import Checkpoint
    from quantkit.model.streams import Stream
    from quantkit.model.twin import build_twin
    from quantkit.pipeline import quantize
    from quantkit.types import Batch

    ids = torch.randint(20, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    folder = place / "model"

    def build() -> bool:
        config = transformers.AutoConfig.for_model(model_type).to_dict()
        try:
            model, _ = build_twin(config, torch.float32)
        except FamilyError:
            model, _ = build_twin(filled(config), torch.float32)
        model.save_pretrained(folder)
        tiny.save_tokenizer(folder)
        return True

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    def change(ours: Any, theirs: Any) -> float:
        moved = float((ours - theirs).abs().max() / theirs.abs().max())
        if not moved < EQUAL:
            raise Wrong(f"logits moved by {moved:.1e}")
        return moved

    def stream() -> float:
        skeleton = Skeleton(Checkpoint(folder), torch.float32)
        flow = Stream(skeleton, [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
        state = flow.start()
        for index in range(len(skeleton.blocks)):
            with skeleton.block(index) as block, torch.no_grad():
                flow.advance(block, state)
        return change(flow.logits(state, 0, slice(None)), logits(load_model(folder, dtype=torch.float32)))

    def folds() -> int:
        found = discover(Checkpoint(folder).config)
        (place / "table.yaml").write_text(as_yaml(found))
        return len(found.family.folds)

    def kl(method: str) -> float:
        recipe = place / f"{method}.yaml"
        recipe.write_text(RECIPE.format(method=method))
        made = quantize(str(folder), recipe=str(recipe), output=place / method, family=str(place / "table.yaml"))
        found = float(made.scores["kl"])
        if method == "awq" and not 0 < found < WORSE * row["kl_rounded"]:
            raise Wrong(f"KL {found:.2e}, plain rounding has {row['kl_rounded']:.2e}")
        return found

    def opens() -> float:
        packed = place / "awq" / "compressed-tensors"
        opened, original = load_model(packed, dtype=torch.float32), load_model(folder, dtype=torch.float32)
        moved = change(logits(opened), logits(decoded(folder, packed, place / "decoded")))
        scores = Scores()
        samples = Samples.read(load_recipe(str(place / "awq.yaml")), Checkpoint(folder), calibrated=False, scored=True)
        for batch in samples.heldout:
            with torch.no_grad():
                theirs, ours = (one(input_ids=batch.ids, use_cache=False).logits for one in (original, opened))
            for one in range(len(batch.ids)):
                scores.add(compare(theirs[one, :-1], ours[one, :-1], batch.ids[one, 1:], batch.real[one, 1:]), {})
        if abs(scores.total.as_json()["kl"] - row["kl"]) > TELLS * row["kl"]:
            raise Wrong(f"KL {scores.total.as_json()['kl']:.2e} once opened, the run told {row['kl']:.2e}")
        return moved

    row: dict[str, Any] = {"model_type": model_type, "transformers": transformers.__version__}
    todo: dict[str, Callable[[], Any]] = dict(zip(STEPS, (build, stream, folds, lambda: kl("rtn"), lambda: kl("awq"), opens), strict=True))
    for step, figure in todo.items():
        try:
            row[step] = figure()
        except Exception as problem:
            row[step] = f"{type(problem).__name__}: {' '.join(str(problem).replace(str(place), '').split())[:240]}"
            break
    return row


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A default config with what only published ones say."""
    heads = config.get("num_attention_heads")
    usual = {"head_dim": 128, "num_key_value_heads": heads, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1}
    usual |= {"n_group": 1, "topk_group": 1, "moe_topk": 2, "num_experts": 8, "moe_intermediate_size": 512}
    left_out = {key: value for key, value in usual.items() if key in config and config[key] is None}
    return {**config, **left_out}


def decoded(original: Path, packed: Path, into: Path) -> Any:
    """The original's class with a folder's weights, decoded one by one and written out as a checkpoint that nothing has quantized."""
    import shutil

    from safetensors.torch import load_file, save_file

    from quantkit.hf import load_model
    from quantkit.publish.packed import PER_LINEAR, Packed

    reader = Packed(packed)
    tensors = {name: reader.read(name) for name in reader.places if not name.endswith(PER_LINEAR)}
    tensors |= {f"{one.name}.weight": reader.decode(one) for one in reader.stored}
    like = load_file(original / "model.safetensors")
    for name, tensor in like.items():  # experts that the original holds in one tensor
        if name not in tensors and tensor.ndim == 3 and (made := _experts(name, tensor, tensors)) is not None:
            tensors[name] = made
    if set(like) - set(tensors):
        raise Wrong(f"the folder holds nothing for {sorted(set(like) - set(tensors))[0]}")
    into.mkdir()
    save_file({name: tensors[name].contiguous().to(tensor.dtype) for name, tensor in like.items()}, into / "model.safetensors")
    shutil.copy(original / "config.json", into)
    return load_model(into)


def _experts(name: str, like: Any, tensors: dict[str, Any]) -> Any:
    """All experts' gate and up, or their down, of the block of a tensor (experts, out, in): what fits its shape."""
    import torch

    block = re.match(r".*?layers\.\d+\.", name)
    for parts in (("gate_proj", "up_proj"), ("down_proj",)):
        made = []
        for expert in range(len(like)):
            wanted = [rf"{re.escape(block[0])}.*experts\.{expert}\.{part}\.weight" for part in parts] if block else []
            found = [tensors[one] for pattern in wanted for one in tensors if re.fullmatch(pattern, one)]
            made.append(torch.cat(found) if found else torch.empty(0))
        if made[0].shape == like.shape[1:]:
            return torch.stack(made)
    return None


def _child(model_type: str, results: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        row = measure(model_type, Path(place))
    keep(row | {"seconds": round(time.monotonic() - started, 1)}, results)


def keep(row: dict[str, Any], results: Path) -> None:
    (results / f"{row['model_type']}.json").write_text(json.dumps(row, indent=1) + "\n")


def take(model_type: str, results: Path, seconds: int) -> dict[str, Any]:
    """A type's row, measured in a process forked from this one, which has imported everything."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, results))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    if child.exitcode:
        said = f"more than {seconds} s" if child.exitcode == -9 else f"the process ended with {child.exitcode}"
        keep({"model_type": model_type, "builds": said}, results)
    return read(model_type, results)


def read(model_type: str, results: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((results / f"{model_type}.json").read_text())
    return row


def told(row: dict[str, Any]) -> str:
    """What stopped a type; "" where nothing did."""
    return next((row[step] for step in STEPS if isinstance(row.get(step), str)), "")


def totals(rows: list[dict[str, Any]]) -> str:
    streams, folds = (sum(step in row and not isinstance(row[step], str) for row in rows) for step in ("streams", "folds"))
    done = sum(isinstance(row.get("opens"), float) for row in rows)
    wrong = sum(told(row).startswith(Wrong.__name__) for row in rows)
    return (
        f"{len(rows)} model types: {streams} stream with equal logits, a table is found for {folds}, {done} quantize and open again with "
        f"the logits of their decoded weights, {wrong} are wrong and not refused."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row for each model type, totals first."""
    versions = ", ".join(sorted({row["transformers"] for row in rows if "transformers" in row}))
    lines = [f"transformers {versions}. {totals(rows)}", ""]
    lines += ["| model type | streams | folds | KL | plain rounding | opens | what stops it |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda one: str(one["model_type"])):
        figures = [f"{row[key]:.1e}" if isinstance(row.get(key), float) else "" for key in ("streams", "kl", "kl_rounded", "opens")]
        count = str(row["folds"]) if isinstance(row.get("folds"), int) else ""
        said = (told(row).partition(": ")[2] or told(row)).replace("|", "/").replace("<", "&lt;")
        lines.append(f"| {row['model_type']} | {figures[0]} | {count} | {figures[1]} | {figures[2]} | {figures[3]} | {said} |")
    return "\n".join(lines)


def between_marks(page: str, made: str) -> str:
    """The page with the census that it held exchanged."""
    before, first, rest = page.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not first or not last:
        raise SystemExit(f"the page holds no {MARKS[0]} and {MARKS[1]}")
    return f"{before}{first}\n{made}\n{last}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--types", help="comma-separated, measured anew; default: all causal language models of transformers not yet measured"
    )
    parser.add_argument("--results", type=Path, default=Path("census"), help="a folder, a JSON file a type")
    parser.add_argument("--seconds", type=int, default=120, help="for one type")
    parser.add_argument("--table", type=Path, help="measure nothing; write what is known into this page")
    options = parser.parse_args()
    if options.table is None:
        sys.path.insert(0, str(HERE.parent / "tests"))
        import torch
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        import quantkit.pipeline  # noqa: F401  # before the fork, once for all

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options.results.mkdir(exist_ok=True)
        for model_type in options.types.split(",") if options.types else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            if options.types or not (options.results / f"{model_type}.json").exists():
                row = take(model_type, options.results, options.seconds)
                print(f"{model_type}: {told(row) or 'good'}", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    if options.table is not None:
        options.table.write_text(between_marks(options.table.read_text(), table(rows)))
    print(totals(rows))


if __name__ == "__main__":
    main()
