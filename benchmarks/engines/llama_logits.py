"""Run by the Python that has llama-cpp-python: one GGUF, its token ids of a text and its logits for given ids.

    python llama_logits.py FILE TEXT.txt IDS.npy OUT        writes OUT.npz (ids, logits) or OUT.json with the error

Only the low-level API is used: `llama_decode` with logits at every position. Keys and values are cached in F32 and there is no flash
attention, so that what is left of a difference is the model's.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np

CHUNK = 128  # positions whose logits are kept at a time
said: list[str] = []


@llama.llama_log_callback
def listen(level, text, _):
    if level in (3, 4):  # warnings and errors
        said.append(text.decode(errors="replace").strip())


def main(file: str, text: str, ids: str, out: str) -> None:
    model = Model(file)
    tokens = model.tokenize(Path(text).read_bytes().decode())
    given = np.load(ids).tolist()
    np.savez(out, ids=np.array(tokens), logits=model.logits(given))


class Model:
    def __init__(self, file: str, context: int = 2048):
        llama.llama_log_set(listen, ctypes.c_void_p(0))
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(file.encode(), settings)
        if not self.model:
            raise RuntimeError("; ".join(said[-3:]) or "llama.cpp does not load it and says nothing")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        options.flash_attn_type = 0
        options.swa_full = True
        self.context = llama.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("; ".join(said[-3:]) or "llama.cpp makes no context of it")
        self.vocabulary = llama.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = (llama.llama_token * (len(raw) + 16))()
        count = llama.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """(tokens, vocabulary) float32."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        width, parts = llama.llama_vocab_n_tokens(self.vocabulary), []
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            batch = llama.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
                batch.seq_id[i][0] = 0
            if llama.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed: " + "; ".join(said[-3:]))
            parts.append(np.ctypeslib.as_array(llama.llama_get_logits(self.context), shape=(len(part), width)).copy())
            llama.llama_batch_free(batch)
        return np.concatenate(parts)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        Path(sys.argv[4]).with_suffix(".json").write_text(json.dumps({"error": f"{error}"}))
        sys.exit(1)
