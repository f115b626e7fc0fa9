"""The command line. Results go to stdout, progress to stderr; an error of ours becomes one line and an exit code.

Exit codes: 0 done, 1 bad input (one line), 2 usage, 3 gate failed, 4 gate inconclusive, 130 interrupted (the same command goes on).
Commands import the pipeline when they run, so that --help needs no torch.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from quantkit import __version__
from quantkit.cli.common import ADAPTER, JSON, first, one_line_errors, progress, quiet
from quantkit.cli.families import families
from quantkit.cli.release import COMMANDS
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from pathlib import Path

    from quantkit.pipeline import Result

MODEL = click.argument("model", required=False)
RECIPE = click.option("--recipe", default="awq-w4", show_default=True, help="A shipped recipe (see `quantkit recipes`) or a YAML file.")
FORMATS = click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["compressed-tensors", "gguf", "onnx"]),
    help="In place of the recipe's; may be given more than once.",
)


def _bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from quantkit.recipe import size_in_bytes

    try:
        return size_in_bytes(value)
    except ValueError as problem:
        raise click.BadParameter(str(problem)) from None


MAX_MEMORY = click.option(
    "--max-memory", metavar="SIZE", callback=_bytes, help="Activations beyond it lie in mapped files, with the same result: 8GiB."
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Where blocks are run and solved: auto (CUDA if there is one), cpu, cuda."
)
TARGET_SIZE = click.option(
    "--target-size", metavar="SIZE", callback=_bytes, help="Of the weight files, 14GB: each linear's scheme is picked by what it costs."
)
TARGET_BITS = click.option(
    "--target-bits", type=click.FloatRange(2, 16), help="The same by bits a weight of what is quantized, scales counted: 4.25."
)
FAMILY = click.option(
    "--family",
    metavar="TABLE",
    help="In place of a shipped table: `discovered`, a file that `quantkit families discover` wrote, or `names` (plain rounding only).",
)
FEW_TOKENS = 4096  # below, a run says so


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Quantize language models one decoder block at a time, with activation-aware scales, and export what engines serve."""


@main.command()
@MODEL
@RECIPE
@click.option("--output", metavar="DIR", help="The run's folder; a killed run goes on there. [default: MODEL-RECIPE]")
@click.option("--calibration", metavar="MIX", help="A mix, or data: a .jsonl, .parquet or .txt file, a folder.")
@ADAPTER
@FORMATS
@TARGET_SIZE
@TARGET_BITS
@FAMILY
@MAX_MEMORY
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="Threads of the matrix library. One is best on cores that others use too.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier run left in the folder and start anew.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact bytes, read no weight. The same as `quantkit plan`.")
@JSON
def quantize(
    model: str | None,
    recipe: str,
    output: str | None,
    calibration: str | None,
    adapter: str | None,
    formats: tuple[str, ...],
    target_size: int | None,
    target_bits: float | None,
    family: str | None,
    max_memory: int | None,
    device: str,
    threads: int | None,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL, a folder or a Hub id (owner/name); left out: the embedded reference model.

    Several ranks share the work: torchrun --nproc-per-node N -m quantkit quantize ...
    """
    with one_line_errors():
        if dry_run:
            if calibration:
                from quantkit.recipe import load_mix

                load_mix(calibration)  # a plan does not need it, yet a wrong name is better told now
            _print_plan(model, recipe, adapter, formats, target_size, target_bits, family, as_json)
            return
        from quantkit import pipeline

        quiet()
        if threads:
            import torch

            torch.set_num_threads(threads)
        with progress() as tell:
            result = pipeline.quantize(
                model,
                recipe=recipe,
                output=output,
                calibration=calibration,
                adapter=adapter,
                formats=formats,
                target_size=target_size,
                target_bits=target_bits,
                family=family,
                fresh=fresh,
                max_memory=max_memory,
                device=device,
                tell=tell,
            )
        if first():
            click.echo(_as_json(result) if as_json else _describe(result))


@main.command()
@click.argument("model", required=False)
@RECIPE
@ADAPTER
@FORMATS
@TARGET_SIZE
@TARGET_BITS
@FAMILY
@JSON
def plan(
    model: str | None,
    recipe: str,
    adapter: str | None,
    formats: tuple[str, ...],
    target_size: int | None,
    target_bits: float | None,
    family: str | None,
    as_json: bool,
) -> None:
    """Every tensor's fate and the exact bytes of the output, from headers alone.

    MODEL is a folder, a Hub id (only headers are fetched; with --adapter the model is), or a config.json alone.
    """
    with one_line_errors():
        _print_plan(model, recipe, adapter, formats, target_size, target_bits, family, as_json)


@main.command()
@MODEL
@click.option("--output", required=True, metavar="FILE", help="The file of statistics, .safetensors (docs/statistics.md).")
@click.option("--imatrix", metavar="FILE", help="Write them as an importance matrix for llama-quantize too, .gguf.")
@click.option("--from", "imported", metavar="FILE", help="Turn an importance matrix of llama.cpp into statistics; nothing is run.")
@click.option("--grams", is_flag=True, help="Keep x x^T of every linear, several times the model's size.")
@RECIPE
@click.option("--calibration", metavar="MIX", help="A mix, or data: a .jsonl, .parquet or .txt file, a folder.")
@ADAPTER
@FAMILY
@MAX_MEMORY
@click.option("--threads", type=click.IntRange(1), help="Threads of the matrix library. One is best on cores that others use too.")
@JSON
def calibrate(
    model: str | None,
    output: str,
    imatrix: str | None,
    imported: str | None,
    grams: bool,
    recipe: str,
    calibration: str | None,
    adapter: str | None,
    family: str | None,
    max_memory: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Statistics of MODEL alone: what its linears are fed, and which experts the calibration set reaches."""
    with one_line_errors():
        from quantkit import pipeline

        quiet()
        if threads:
            import torch

            torch.set_num_threads(threads)
        with progress() as tell:
            about = pipeline.calibrate(
                model,
                output=output,
                imatrix=imatrix,
                imported=imported,
                grams=grams,
                recipe=recipe,
                calibration=calibration,
                adapter=adapter,
                family=family,
                max_memory=max_memory,
                tell=tell,
            )
        if as_json:
            click.echo(json.dumps({"output": output, "imatrix": imatrix, **about}, ensure_ascii=False))
            return
        from quantkit.report import calibration_lines

        seconds, spilled = round(sum(about["seconds"].values())), about["spilled"]
        cost = f"{seconds} s, peak memory {about['peak_memory'] / 2**30:.2f} GiB" + (f", {spilled:,} bytes spilled" if spilled else "")
        click.echo("\n".join([*calibration_lines(about), *_fed(about.get("calibration")), cost, *filter(None, (output, imatrix))]))


ENGINES = ("auto", "transformers", "vllm", "llama.cpp", "onnxruntime", "dequantized")


@main.command("eval")
@click.argument("artefact")
@click.option("--baseline", metavar="MODEL", help="The original: a folder or a Hub id. [default: the embedded model, if made from it]")
@click.option("--suite", default="quick", show_default=True, help="quick, full, divergence, a YAML file, or lm-eval:TASK,TASK.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What opens ARTEFACT.")
@click.option("--baseline-engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What opens the original.")
@click.option("--gate", metavar="GATE", help="default, strict, smoke, or a YAML file: exit code 0 PASS, 3 FAIL, 4 INCONCLUSIVE.")
@click.option("--limit", type=click.IntRange(1), help="So many documents, items of each kind and of each lm-eval task at most.")
@click.option("--against", metavar="FILE", help="An earlier run's --store: the gate also fails where this one is shown to be worse.")
@click.option("--store", metavar="FILE", help="Write this run for a later --against, small.")
@click.option("--output", metavar="FILE", help="Write the whole report as JSON, every answer included.")
@click.option("--junit", metavar="FILE", help="Write the gate's checks as JUnit XML.")
@click.option("--cache", metavar="DIR", help="Where baselines are kept. [default: $QUANTKIT_CACHE or the user's cache folder]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine. One is best on cores that others use too.")
@JSON
def evaluate(
    artefact: str,
    baseline: str | None,
    suite: str,
    engine: str,
    baseline_engine: str,
    gate: str | None,
    limit: int | None,
    against: str | None,
    store: str | None,
    output: str | None,
    junit: str | None,
    cache: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Judge ARTEFACT, the files that ship, beside their original: KL, flips, perplexity, tasks, and a gate.

    ARTEFACT is an artefact's folder, a run's folder that holds one, or a .gguf file.
    """
    if junit and not gate:
        raise click.UsageError("--junit reports a gate's checks; give --gate too")
    with one_line_errors("a baseline that was answered is kept"):
        quiet()  # before anything brings its progress bars
        from quantkit import pipeline
        from quantkit.evaluate import outcome

        if threads:
            import torch

            torch.set_num_threads(threads)
        for path in filter(None, (store, output, junit)):
            if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
                raise QuantkitError(f"{path}: there is no such folder to write to")
        with progress() as tell:
            result = pipeline.evaluate(
                artefact,
                baseline=baseline,
                suite=suite,
                engine=engine,
                baseline_engine=baseline_engine,
                gate=gate,
                limit=limit,
                against=against,
                cache=cache,
                tell=tell,
            )
        outcome.write_files(result.report, store, output, junit)
        if as_json:
            short = {key: value for key, value in result.report.items() if key not in ("answers", "stored")}
            click.echo(json.dumps(short, ensure_ascii=False))
        else:
            click.echo("\n".join(outcome.lines(result.report)))
    sys.exit(result.exit_code)


for command in (*COMMANDS, families):
    main.add_command(command)


@main.command()
def recipes() -> None:
    """The recipes that are shipped."""
    from quantkit.recipe import load_recipe, shipped_recipes

    with one_line_errors():
        for name in shipped_recipes():
            click.echo(f"{name:16} {load_recipe(name).description}")


def _print_plan(
    model: str | None,
    recipe: str,
    adapter: str | None,
    formats: tuple[str, ...],
    target_size: int | None,
    target_bits: float | None,
    family: str | None,
    as_json: bool,
) -> None:
    from quantkit import pipeline, report

    quiet()
    made, sizes, others = pipeline.plan_and_others(model, recipe, adapter, formats, target_size, target_bits, family)
    if as_json:
        click.echo(json.dumps({**report.plan_report(made, sizes), "other_formats": others}, ensure_ascii=False))
        return
    for line in (*report.plan_lines(made, sizes), *report.other_lines(others, sizes)):
        click.echo(line)


def _as_json(result: "Result") -> str:
    """The run's report without its tables of linears and samples, and where everything lies."""
    report = {key: value for key, value in result.report.items() if key not in ("blocks", "samples", "base_card", "adapter_card")}
    places = {name: str(folder) for name, folder in result.artefacts.items()}
    return json.dumps({"output": str(result.output), "artefacts": places, **report}, ensure_ascii=False)


def _describe(result: "Result") -> str:
    from quantkit.report import gigabytes, other_lines

    about, scores = result.report, result.scores
    lines: list[str] = []
    for name, folder in result.artefacts.items():
        size = result.bytes[name]
        bits = about["bits_per_weight"][name]
        lines.append(f"{name}: {folder}  {size:,} bytes = {gigabytes(size)}, {bits:.3f} bits per weight")
    lines += other_lines(about["sizes"], result.artefacts)
    if scores.get("tokens"):
        lines.append(
            f"held-out, {scores['tokens']:,} tokens: KL to the original {scores['kl']:.5f}, perplexity {scores['perplexity']:.4f} "
            f"(original {scores['perplexity_base']:.4f}), same top token {scores['same_top']:.2%}"
        )
    total = about["summary"]
    tokens = about["calibration"]["tokens"]
    if not total["linears"]:
        lines.append("nothing was quantized")
    elif tokens:
        lines.append(f"mean relative output error {total['mean_error']:.3e} (plain rounding {total['mean_error_rounded']:.3e})")
    else:
        lines.append(f"mean relative weight error {total['mean_error']:.3e} (plain rounding, no calibration)")
    if total["fewest_expert_tokens"] is not None:
        lines.append(
            f"experts: the least fed saw {total['fewest_expert_tokens']} tokens, {total['experts_without_tokens']} saw none; "
            f"{total['experts_shrunk']} lean on their pool more than on themselves"
        )
    if total["fell_back"]:
        lines.append(f"{total['fell_back']} of {total['linears']} linears took a simpler solution, which held-back tokens liked better")
    if 0 < tokens < FEW_TOKENS:
        lines.append(f"only {tokens} calibration tokens: statistics of so few are noise; give a larger set")
    lines += _fed(about["calibration"])
    minutes, seconds = divmod(round(sum(about["seconds"].values())), 60)
    lines.append(f"{minutes} min {seconds:02d} s, peak memory {about['peak_memory'] / 2**30:.2f} GiB; report: {result.output / 'run.json'}")
    rounded = about.get("gguf") or {"scales": 0, "minima": 0}
    if rounded["scales"] or rounded["minima"]:
        of = f"{rounded['scales']:,} scales and {rounded['minima']:,} minima of {rounded['groups']:,} groups"
        lines.append(f"gguf: 16-bit floats hold {of} only rounded")
    for name, folder in result.artefacts.items():
        lines.append(f"serve: {_serving(name, folder)}")
    return "\n".join(lines)


def _serving(format: str, folder: "Path") -> str:
    if format == "gguf":
        return f"llama-server -m {next(folder.glob('*.gguf'))}"
    return f"onnxruntime-genai, {folder}" if format == "onnx" else f"vllm serve {folder}"


def _fed(calibration: dict[str, Any] | None) -> list[str]:
    """What a person should know of the calibration set: a budget that could not be filled, what the chat template did not take."""
    lines: list[str] = []
    if calibration is None:
        return lines
    if calibration["asked"] and calibration["limited_by"]:
        short = f"{calibration['tokens']:,} of {calibration['asked']:,} tokens"
        lines.append(f"calibration: {short}, for more of {calibration['limited_by']} the mix does not hold and the shares are kept")
    for how, samples in calibration["fallbacks"].items():
        lines.append(f"calibration: {len(samples)} of {calibration['rows']} samples: {how}")
    if isinstance(calibration["thinking"], str):
        lines.append(f"calibration: thinking is asked for, {calibration['thinking']}")
    return lines
