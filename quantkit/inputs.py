"""What a job reads before it begins: recipe, checkpoint and samples, and the digests by which a folder knows them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import recipe as recipes
from quantkit.calibrate.batches import make_batches, reserve_batches
from quantkit.calibrate.coverage import cells_of
from quantkit.calibrate.draw import Drawn, Row, draw, make_row, manifest
from quantkit.calibrate.draw import report as calibration_report
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.samples import choose
from quantkit.calibrate.sources import read_samples
from quantkit.errors import CalibrationError, RecipeError
from quantkit.model.adapter import Adapted
from quantkit.model.checkpoint import Checkpoint, TensorSource, file_digest
from quantkit.model.hub import find_folder
from quantkit.plan import text_config
from quantkit.recipe import Calibration, Recipe
from quantkit.types import Batch, Json
from quantkit.write.compressed_tensors import PASSED_ON


@dataclass(frozen=True, slots=True)
class Samples:
    """What is fed: the calibration set, what experts may get beyond it, and the held-out samples that score the run."""

    calibration: Sequence[Batch]
    reserve: Sequence[Batch]
    heldout: Sequence[Batch]
    about: Json  # the calibration set's report; its "digest" is of the very tokens
    manifest: Any  # which samples, by name and digest

    @classmethod
    def read(cls, recipe: Recipe, checkpoint: TensorSource, calibrated: bool, scored: bool) -> "Samples":
        """What the recipe asks for, in the checkpoint's tokens: a calibration set and its reserve, held-out samples, or both.

        Raises:
            CalibrationError: sources or samples that cannot be fed, or tokens beyond the vocabulary.
        """
        tokenizer, settings = load_tokenizer(checkpoint.folder), recipe.calibration
        drawn = draw(recipes.load_mix(settings.mix), settings, tokenizer) if calibrated else Drawn([], iter(()), None, None)
        calibration = _batches(drawn.rows, settings) if calibrated else []
        reserve = _reserve(drawn, settings)
        heldout = _heldout(recipe, tokenizer) if scored else []
        _check_vocabulary([*calibration, *heldout, *reserve], checkpoint)
        return cls(calibration, reserve, heldout, calibration_report(drawn, tokenizer, settings.thinking), manifest(drawn.rows))

    @property
    def tokens(self) -> int:
        """Of the calibration set, padding not counted."""
        return _tokens(self.calibration)

    @property
    def reserve_tokens(self) -> int:
        return _tokens(self.reserve)

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every (language, domain) of what may be calibrated on."""
        return cells_of([*self.calibration, *self.reserve])


def load_recipe(
    name: str,
    calibration: str | None = None,
    formats: Sequence[str] = (),
    target_size: int | None = None,
    target_bits: float | None = None,
    solved: bool = True,
) -> Recipe:
    """A recipe, with another calibration mix, other formats or a target where they are asked for.

    Raises:
        RecipeError: they do not go together, or the recipe asks for a reserve that nothing would draw. `solved`: False where the
            recipe's `calibration` alone counts, whose reserve statistics of their own always draw.
    """
    recipe = recipes.load_recipe(name)
    changed: Json = {"formats": list(dict.fromkeys(formats))} if formats else {}
    if target_size is not None or target_bits is not None:
        changed |= {"target_size": target_size, "target_bits": target_bits}
    if calibration is not None:
        changed["calibration"] = recipe.calibration.model_copy(update={"mix": calibration})
    recipe = recipes.changed(recipe, changed)
    if solved and recipe.method == "awq" and recipe.calibration.expert_tokens and not recipe.search.stages:
        raise RecipeError(
            f"recipe {recipe.name}: calibration.expert_tokens {recipe.calibration.expert_tokens} needs search.stages, without which "
            "`quantize` draws nothing from the reserve; leave one of them out"
        )
    return recipe


def name_of(model: str | None) -> str:
    """What a run calls its model: the folder's own name, wherever one stands, or the Hub's."""
    if model is None:
        return "reference"
    return Path(model).resolve().name if Path(model).is_dir() else Path(model.partition("@")[0]).name


def open_checkpoint(model: str | None, adapter: str | None = None) -> TensorSource:
    """A model's headers: the embedded reference model, a folder or a Hub id, with an adapter merged on the way."""
    folder = recipes.reference_model() if model is None else find_folder(model)
    checkpoint: TensorSource = Checkpoint(folder)
    return Adapted(checkpoint, Path(adapter)) if adapter else checkpoint


def input_hashes(checkpoint: TensorSource, recipe: Recipe, adapter: str | None) -> dict[str, str]:
    """Digests of all that a run reads; a store refuses blocks that were solved from other inputs."""
    files = [p for p in sorted(checkpoint.folder.iterdir()) if p.suffix in (".safetensors", *PASSED_ON)]
    hashes = {path.name: file_digest(path) for path in files if path.is_file()}
    if recipe.method != "rtn":
        hashes |= {f"calibration/{path.name}": file_digest(path) for path in recipes.load_mix(recipe.calibration.mix).files()}
    if adapter:
        hashes |= {f"adapter/{p.name}": file_digest(p) for p in sorted(Path(adapter).iterdir()) if p.suffix in (".safetensors", ".json")}
    return hashes


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch.real.sum()) for batch in batches)


def _heldout(recipe: Recipe, tokenizer: Any) -> list[Batch]:
    """Our held-out samples as batches; none where the recipe scores nothing."""
    if recipe.score.samples == 0:
        return []
    samples = choose(read_samples(recipes.heldout_files()), recipe.score.samples, recipe.calibration.seed)
    rows = [make_row(sample, tokenizer, recipe.score.sequence_length, recipe.calibration.thinking) for sample in samples]
    return make_batches(rows, recipe.calibration.batch_tokens)


def _reserve(drawn: Drawn, settings: Calibration) -> list[Batch]:
    """What experts may get beyond the set; nothing where no floor is asked for."""
    tokens = sum(len(row.ids) for row in drawn.rows) * settings.reserve if settings.expert_tokens else 0
    return reserve_batches(drawn.reserve, int(tokens), settings.batch_tokens, settings.ignore_prompts)


def _batches(rows: Sequence[Row], settings: Calibration) -> list[Batch]:
    fill_to = settings.sequence_length if settings.packing == "fixed" else None
    return make_batches(rows, settings.batch_tokens, fill_to, settings.ignore_prompts)


def _check_vocabulary(batches: Sequence[Batch], checkpoint: TensorSource) -> None:
    size = text_config(checkpoint.config).get("vocab_size")
    highest = max((int(batch.ids.max()) for batch in batches), default=0)
    if isinstance(size, int) and highest >= size:
        raise CalibrationError(
            f"{checkpoint.folder}: its tokenizer makes token {highest}, its vocabulary ends at {size - 1}; another model's?"
        )
