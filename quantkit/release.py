"""The story's end: what becomes of a run that is done.

card      <- run.json, the base model's card, what only the publisher knows
verified  <- the artefact's files; the original weights, where they are at hand
the Hub   <- an artefact that is verified, has a card, and whose gate did not fail
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from quantkit import pipeline, report
from quantkit.errors import PublishError
from quantkit.model.checkpoint import TensorSource, file_digest
from quantkit.model.hub import fetch_card
from quantkit.plan import make_plan
from quantkit.publish import upload as hub
from quantkit.publish import verify as checks
from quantkit.publish.artefact import Artefact, open_artefact, open_artefacts
from quantkit.publish.card import Options, write_card
from quantkit.publish.manifest import write_manifest
from quantkit.recipe import Recipe
from quantkit.types import Linear


def card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    base_card: str | None = None,
    repo_id: str | None = None,
    contact: str | None = None,
    calibration_link: str | None = None,
    template: str | Path | None = None,
) -> dict[str, list[str]]:
    """Write the cards of a run's artefacts anew, or of one; the manifest lists them again, and nothing else anew.

    Returns:
        Each card's path, and what its publisher should know (one line each).

    Raises:
        QuantkitError: no run.json beside it, a base card or a template that cannot be read.
    """
    made = {}
    for artefact in open_artefacts(folder):
        if artefact.run is None:
            raise PublishError(f"{artefact.folder}: no run.json above it; a card is made of the run's report, so keep the two together")
        text = fetch_card(base_card) if base_card else None
        if text is None and base_model and not artefact.run.get("base_card"):
            text = fetch_card(base_model)
        options = Options(base_model, text, repo_id, contact, calibration_link, Path(template) if template else None)
        files = artefact.manifest["files"]
        try:
            notes = write_card(artefact.folder, artefact.run, artefact.format, files, artefact.evaluations, options)
            write_manifest(artefact.folder, artefact.run, artefact.format, files)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            line = f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
            raise PublishError(f"{artefact.folder}: run.json above it is damaged, or another version's ({line}); run again") from None
        made[str(artefact.folder / "README.md")] = notes
    return made


def verify(folder: str | Path, *, base_model: str | None = None, adapter: str | None = None) -> list[tuple[Artefact, checks.Verified]]:
    """Check a run's artefacts, or one; with the original at hand, a sample of linears too.

    Raises:
        QuantkitError: not an artefact, or an original that cannot be read.
    """
    checkpoint = pipeline.open_checkpoint(base_model, adapter) if base_model else None
    found = []
    for artefact in open_artefacts(folder):
        base, inputs = None, None
        if checkpoint is not None:
            base = _weights(checkpoint, artefact)
            paths = sorted(checkpoint.folder.glob("*.safetensors"))
            inputs = {path.name: file_digest(path) for path in paths}
        try:
            found.append((artefact, checks.verify(artefact, base, inputs)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            line = f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
            raise PublishError(f"{artefact.folder}: its files contradict themselves, or run.json above it is damaged ({line})") from None
    return found


def _weights(checkpoint: TensorSource, artefact: Artefact) -> dict[str, Callable[[], Tensor]]:
    """The original of each linear, by the name that the artefact gives it."""
    try:
        recipe = Recipe.model_validate(artefact.manifest["recipe"])
    except (ValueError, KeyError):
        raise PublishError(f"{artefact.folder}: its manifest holds a recipe of another version of quantkit") from None
    plan = make_plan(recipe, checkpoint.config, checkpoint.entries)

    def reader(linear: Linear) -> Callable[[], Tensor]:
        def read() -> Tensor:
            source, tensor = linear.source, checkpoint.view(linear.source.tensor)
            tensor = tensor if source.expert is None else tensor[source.expert]
            return tensor if source.rows is None else tensor[source.rows[0] : source.rows[1]]

        return read

    return {linear.name: reader(linear) for linear in plan.linears()}


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    collection: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Verify an artefact and put it on the Hub; says what it does, line by line.

    Args: as for `quantkit.publish.upload.upload`; `force` goes on although a check or the gate failed, `dry_run` ends before the Hub.

    Raises:
        QuantkitError: a folder that should not be published, or an upload that broke off (the same call goes on).
    """
    hub.check_name(repo_id)  # before many gigabytes are read
    artefact = open_artefact(folder)
    refusals = hub.refusals(artefact, checks.verify(artefact))
    if refusals and dry_run:
        yield from (f"refused: {line}" for line in refusals)
    elif refusals and (not force or not (artefact.folder / "README.md").is_file()):
        more = f" (and {len(refusals) - 1} more; quantkit verify lists them)" if len(refusals) > 1 else ""
        raise PublishError(f"{artefact.folder}: not published: {refusals[0]}{more}")
    package = hub.package(artefact)
    bits = artefact.manifest["bits_per_weight"]
    yield f"{artefact.format}: {report.gigabytes(artefact.bytes)} ({artefact.bytes:,} bytes), {bits:.3f} bits per weight"
    yield from report.other_lines(artefact.manifest.get("sizes", {}), [artefact.format])
    if dry_run:
        yield from package.lines()
        yield f"would go to {repo_id}{f', branch {revision}' if revision else ''}; nothing was sent"
        return
    yield hub.upload(package, repo_id, private=private, revision=revision, collection=collection, endpoint=endpoint, token=token, tell=tell)
