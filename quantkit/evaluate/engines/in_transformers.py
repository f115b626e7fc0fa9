"""transformers: compressed-tensors artefacts through quantkit.hf, and unquantized folders.

On a CPU everything is computed in fp32, whatever the files' precision: what differs is then the weights. On a GPU in the checkpoint's own
precision, as it would be served.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import CompressedTensorsConfig

from quantkit.errors import CheckpointError, EvaluationError
from quantkit.evaluate.engines.engine import Engine, Row, batches, cut, end_tokens, padded, versions
from quantkit.hf import load_model

PROMPTS = 16  # answered at a time


class Transformers(Engine):
    """A model of transformers in memory."""

    name = "transformers"

    def __init__(self, model: Any, ends: frozenset[int], about: dict[str, Any]):
        self.model, self.ends = model, ends
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.about = {**versions("transformers", "torch", "compressed-tensors"), "threads": torch.get_num_threads(), **about}

    def log_probs(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        for batch in batches(rows, self.vocabulary):
            ids, _ = padded([rows[number] for number in batch])
            # causal: nothing sees the padding behind it, so rows need no mask, and models build none that they could get wrong
            with torch.no_grad():
                logits = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
            for place, number in enumerate(batch):
                yield number, logits[place, : len(rows[number])].float().log_softmax(-1).cpu()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Row], most: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), PROMPTS):
            batch = order[start : start + PROMPTS]
            ids, real = padded([prompts[number] for number in batch], left=True)
            found = self.model.generate(
                ids.to(self.model.device), attention_mask=real.to(self.model.device), max_new_tokens=most, do_sample=False, num_beams=1,
                eos_token_id=sorted(self.ends) or None, pad_token_id=0, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
            for place, number in enumerate(batch):
                answers[number] = cut(found[place, ids.shape[1] :].tolist(), self.ends)
        return answers

    def close(self) -> None:
        self.model = None


def open_artefact(artefact: Path, like: Path, threads: int | None = None) -> Transformers:
    """A folder as the class that its config names.

    Raises:
        EvaluationError: transformers cannot open it, or not as it is on disk.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        try:
            model = load_model(artefact, dtype=dtype)
        except CheckpointError:  # zero points: transformers 5.23 opens them only when it decodes as it reads
            model = load_model(artefact, dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True))
    except CheckpointError as problem:
        raise EvaluationError(str(problem)) from None
    except Exception as problem:  # from_pretrained fails in as many ways as there are configs
        raise EvaluationError(f"{artefact}: transformers cannot open it ({' '.join(str(problem).split())[:160]})") from None
    about = {"precision": str(next(model.parameters()).dtype).removeprefix("torch."), "device": device.type}
    return Transformers(model.to(device), end_tokens(artefact) or end_tokens(like), about)
