"""What can go wrong, as a user meets it.

QuantkitError            exit 1, one line: what, where, what to do
├── CheckpointError      the model folder: missing, truncated, unsafe or not a number
├── AdapterError         the LoRA adapter cannot be merged exactly
├── FamilyError          an architecture or a tensor that no family table knows
├── RecipeError          the recipe: unknown key, impossible group, nothing left to quantize
├── CalibrationError     the calibration set: empty, unreadable, or an expert or linear that it never reached
├── RankError            ranks that do not meet, a rank that is gone, a device that is not there
├── StoreError           the output folder holds another run, or this run's blocks are damaged
├── WriteError           an artefact cannot be written as asked for
├── EvaluationError      artefact and baseline cannot be compared: another tokenizer, an empty suite, an engine that is missing or errs
└── PublishError         a card, a report page or an upload cannot be made of this folder
"""

GONE = "another rank of this run is gone; the same command goes on where it stopped"


class QuantkitError(Exception):
    """Base of all errors that are the input's fault. The message is one line for people."""

    exit_code = 1


class CheckpointError(QuantkitError):
    """The model folder cannot be read as a bf16/fp16/fp32 safetensors checkpoint."""


class AdapterError(QuantkitError):
    """The adapter cannot be merged exactly, so it is not merged at all."""


class FamilyError(QuantkitError):
    """No family table knows this architecture or this tensor."""


class RecipeError(QuantkitError):
    """The recipe asks for something unknown or impossible."""


class CalibrationError(QuantkitError):
    """The calibration set cannot be used."""


class RankError(QuantkitError):
    """The processes of a run cannot work together, or one cannot have its device."""


class StoreError(QuantkitError):
    """The output folder cannot take this run."""


class WriteError(QuantkitError):
    """A writer cannot express the plan in its format."""


class EvaluationError(QuantkitError):
    """An artefact and its baseline cannot be compared, so there is no verdict."""


class PublishError(QuantkitError):
    """A card, a report page or an upload cannot be made of this folder."""
