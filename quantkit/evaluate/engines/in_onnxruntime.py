"""onnxruntime: a folder with model.onnx, as ONNX exports of decoders name things.

input_ids, attention_mask, position_ids, past_key_values.N.key|value -> logits, present.N.key|value. Layers that borrow another's keys and
values have none of their own, and layers may differ in heads and head width: both are read from the graph.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluate.engines.engine import Engine, Row, batches, cut, end_tokens, padded, versions

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
KNOWN = ("input_ids", "attention_mask", "position_ids")


class OnnxRuntime(Engine):
    """A session of onnxruntime."""

    name = "onnxruntime"

    def __init__(self, session: Any, ends: frozenset[int], about: dict[str, Any]):
        self.session, self.ends = session, ends
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        strange = [one.name for one in self.inputs.values() if one.name not in (*KNOWN, *self.past) or one.type not in TYPES]
        if "input_ids" not in self.inputs or "logits" not in self.outputs or strange:
            raise EvaluationError(f"the graph is no decoder that is known here (its inputs: {', '.join(self.inputs)[:160]})")
        self.vocabulary = int(next(one for one in session.get_outputs() if one.name == "logits").shape[-1])
        self.about = {**versions("onnxruntime"), **about}

    def log_probs(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        for batch in batches(rows, self.vocabulary):
            ids, real = padded([rows[number] for number in batch])
            logits, _ = self._run(ids.numpy(), real.numpy(), 0, self._empty(len(batch)))
            for place, number in enumerate(batch):
                yield number, torch.from_numpy(logits[place, : len(rows[number])].astype(np.float32)).log_softmax(-1)

    def generate(self, prompts: Sequence[Row], most: int) -> list[list[int]]:
        return [self._answer(prompt, most) for prompt in prompts]

    def _answer(self, prompt: Row, most: int) -> list[int]:
        answer: list[int] = []
        ids, past = np.array([list(prompt)], dtype=np.int64), self._empty(1)
        for at in range(most):
            before = len(prompt) + at - ids.shape[1]
            logits, past = self._run(ids, np.ones((1, before + ids.shape[1]), dtype=np.int64), before, past)
            token = int(logits[0, -1].argmax())
            if token in self.ends:
                break
            answer.append(token)
            ids = np.array([[token]], dtype=np.int64)
        return cut(answer, self.ends)

    def _run(self, ids: np.ndarray, mask: np.ndarray, before: int, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        positions = np.broadcast_to(np.arange(before, before + ids.shape[1], dtype=np.int64), ids.shape)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {name: value.astype(TYPES[self.inputs[name].type]) for name, value in given.items() if name in self.inputs}
        try:
            made = self.session.run(None, {**feed, **past})
        except Exception as problem:
            raise EvaluationError(f"onnxruntime cannot run the graph ({' '.join(str(problem).split())[:160]})") from None
        found = dict(zip(self.outputs, made, strict=True))
        return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in self.past}

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        shapes = {name: self.inputs[name].shape for name in self.past}  # (batch, heads, past, width)
        return {name: np.zeros((rows, shape[1], 0, shape[3]), TYPES[self.inputs[name].type]) for name, shape in shapes.items()}

    def close(self) -> None:
        self.session = None


def open_artefact(artefact: Path, like: Path, threads: int | None = None) -> OnnxRuntime:
    """A folder with model.onnx and its external data.

    Raises:
        EvaluationError: onnxruntime cannot open the graph.
    """
    options = onnxruntime.SessionOptions()
    count = threads or torch.get_num_threads()
    options.intra_op_num_threads = options.inter_op_num_threads = count
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(artefact / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return OnnxRuntime(session, end_tokens(artefact) or end_tokens(like), {"precision": "as the graph says", "threads": count})
    except EvaluationError:
        raise
    except Exception as problem:  # its exceptions have no common base that is documented
        raise EvaluationError(f"{artefact}: onnxruntime cannot open model.onnx ({' '.join(str(problem).split())[:160]})") from None
