"""Open one artefact in vLLM on the CPU and write down what it computes; run by verify.py with the engines' own Python.

    python generate.py ARTEFACT TOKENS.npy OUTPUT [--dtype bfloat16]

OUTPUT.npz gets `logprobs` (prompts, length - 1, vocabulary): every token's log-probability at every position but the first; `greedy`
(prompts, 8): the tokens that follow; and the experts' weights as vLLM holds them. OUTPUT.json gets the text, the seconds, and the error
if there was one; the exit code is then 1.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, so an error arrives here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
NEW_TOKENS = 8


def run(artefact: Path, tokens, dtype: str):
    """(arrays for the npz, facts for the json)"""
    import gemma3n_text
    import numpy as np
    import reference_experts
    from vllm import LLM, SamplingParams

    config = json.loads((artefact / "config.json").read_text())
    reference_experts.install()
    gemma3n_text.install()
    text = config.get("text_config", config)
    # prompts are text only: no room is kept for anything else
    media = ("image", "video", "audio") if config["model_type"] == "gemma4" else ("image",)
    options = {"limit_mm_per_prompt": dict.fromkeys(media, 0)} if "vision_config" in config else {}
    llm = LLM(
        str(artefact),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=len(tokens),
        max_num_batched_tokens=128 * len(tokens),
        max_logprobs=-1,
        gpu_memory_utilization=0.2,
        disable_log_stats=True,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=-1, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], sampling, use_tqdm=False)
    logprobs = np.full((len(tokens), tokens.shape[1] - 1, text["vocab_size"]), np.nan, np.float32)
    for prompt, answer in enumerate(answers):
        for position, candidates in enumerate(answer.prompt_logprobs[1:]):
            for token, candidate in candidates.items():
                logprobs[prompt, position, token] = candidate.logprob
    arrays = {"logprobs": logprobs, "greedy": np.array([answer.outputs[0].token_ids for answer in answers])}
    arrays |= {name: weight.float().numpy() for name, weight in reference_experts.LOADED.items()}
    facts = {
        "text": [answer.outputs[0].text for answer in answers],
        "experts_refused": sorted(reference_experts.REFUSALS),
        "added": gemma3n_text.USED,
    }
    return arrays, facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artefact", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)

    import numpy as np

    start, arrays = time.monotonic(), None
    try:
        arrays, facts = run(options.artefact, np.load(options.tokens), options.dtype)
        np.savez(options.output.with_suffix(".npz"), **arrays)
    except Exception as error:
        traceback.print_exc()
        facts = {"error": f"{type(error).__name__}: {error}"}
    facts["seconds"] = round(time.monotonic() - start, 1)
    options.output.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    return 0 if arrays else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine's threads do not always end by themselves
