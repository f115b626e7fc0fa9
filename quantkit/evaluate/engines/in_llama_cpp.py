"""llama.cpp, through the low-level API of llama-cpp-python: the one package whose releases pin the llama.cpp that its structures were
written for. Before anything is computed the structures are checked against values that llama.cpp is known to put there, because a library
of another version (LLAMA_CPP_LIB_PATH) would read its options from the wrong places and answer nonsense without a word.

Keys and values are cached in fp32 and there is no flash attention; on a CPU llama.cpp still rounds activations to 8 bits in front of
quantized weights, which is part of what a user of that file gets.
"""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluate.engines.engine import Engine, Row, cut, end_tokens, versions

CHUNK = 128  # positions whose logits are in memory at a time
_said: list[str] = []


@llama.llama_log_callback
def _listen(level: int, text: bytes, _: Any) -> None:
    if level in (3, 4):  # warnings and errors
        _said.append(text.decode(errors="replace").strip())


class LlamaCpp(Engine):
    """A GGUF file in llama.cpp."""

    name = "llama.cpp"

    def __init__(self, file: Path, ends: frozenset[int], context: int, threads: int):
        llama.llama_log_set(_listen, ctypes.c_void_p(0))
        llama.llama_backend_init()
        check_layouts()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise EvaluationError(f"{file}: llama.cpp does not load it ({'; '.join(_said[-2:])[:160] or 'it says nothing'})")
        self.words = llama.llama_model_get_vocab(self.model)
        self.vocabulary = int(llama.llama_vocab_n_tokens(self.words))
        self.threads, self.context, self.room = threads, None, 0
        self._open(context)
        eot = {int(llama.llama_vocab_eos(self.words)), int(llama.llama_vocab_eot(self.words))} - {-1}
        self.ends = ends or frozenset(eot)
        self.about = {**versions("llama-cpp-python"), "precision": "fp32 cache, no flash attention", "threads": threads}

    def _open(self, room: int) -> None:
        if self.context:
            llama.llama_free(self.context)
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = room, CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = self.threads
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        options.flash_attn_type = 0
        options.swa_full = True
        self.context = llama.llama_init_from_model(self.model, options)
        fits = self.context and room <= llama.llama_n_ctx(self.context) < room + 1024 and llama.llama_n_batch(self.context) == CHUNK
        if not fits:  # what was asked for is what it has: the structures fit in this direction too
            raise EvaluationError(f"llama.cpp makes no context of {room} tokens ({'; '.join(_said[-2:])[:160]})")
        self.room = room

    def log_probs(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        for number, row in enumerate(rows):
            yield number, torch.cat([part.log_softmax(-1) for part in self._parts(row)])

    def generate(self, prompts: Sequence[Row], most: int) -> list[list[int]]:
        return [self._answer(prompt, most) for prompt in prompts]

    def _answer(self, prompt: Row, most: int) -> list[int]:
        answer: list[int] = []
        *_, part = self._parts(prompt, most)
        for at in range(most):
            token = int(part[-1].argmax())
            if token in self.ends:
                break
            answer.append(token)
            if at < most - 1:
                part = self._decode([token], len(prompt) + at)
        return cut(answer, self.ends)

    def _parts(self, row: Row, more: int = 0) -> Iterator[Tensor]:
        if len(row) + more > self.room:
            self._open(len(row) + more)
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        for start in range(0, len(row), CHUNK):
            yield self._decode(row[start : start + CHUNK], start)

    def _decode(self, part: Row, start: int) -> Tensor:
        batch = llama.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        failed = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise EvaluationError(f"llama.cpp: llama_decode fails ({'; '.join(_said[-2:])[:160]})")
        values = np.ctypeslib.as_array(llama.llama_get_logits(self.context), shape=(len(part), self.vocabulary))
        return torch.from_numpy(values.copy())

    def tokenize(self, text: str) -> list[int] | None:
        raw = text.encode()
        room = (llama.llama_token * (len(raw) + 16))()
        count = llama.llama_tokenize(self.words, raw, len(raw), room, len(room), False, True)
        return list(room[: max(count, 0)])

    def close(self) -> None:
        if self.context:
            llama.llama_free(self.context)
            llama.llama_model_free(self.model)
        self.context = self.model = None


def check_layouts() -> None:
    """Structures as llama.cpp fills them in must read as llama.cpp means them.

    Raises:
        EvaluationError: they do not: llama-cpp-python's Python files and its library are of different versions.
    """
    options, settings = llama.llama_context_default_params(), llama.llama_model_default_params()
    batch = llama.llama_batch_init(4, 0, 1)
    known = (
        (options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max) == (512, 2048, 512, 1)
        and (options.type_k, options.type_v) == (1, 1)  # GGML_TYPE_F16, near the structure's end
        and options.yarn_ext_factor == -1.0 and bool(options.offload_kqv) and not options.embeddings and 0 < options.n_threads <= 4096
        and settings.main_gpu == 0 and not settings.vocab_only and not settings.check_tensors
        and bool(batch.token) and not batch.embd and bool(batch.logits)
    )  # fmt: skip
    llama.llama_batch_free(batch)
    if not known:
        raise EvaluationError(
            "llama-cpp-python does not fit the llama.cpp library that it loads (its structures read wrong); "
            "reinstall it and unset LLAMA_CPP_LIB_PATH"
        )


def open_artefact(artefact: Path, like: Path, threads: int | None = None) -> LlamaCpp:
    """A .gguf file; its context grows with the rows that it is given."""
    return LlamaCpp(artefact, end_tokens(like), 1024, threads or torch.get_num_threads())
