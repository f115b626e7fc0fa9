"""Make the embedded reference model: a tiny, trained Gemma-4-shaped mixture of experts.

Quantization cannot be judged on random weights: their activations have no structure to be aware of,
and Gemma 4's attention (scale 1.0) makes untrained nets chaotic. So quantkit carries a model of its
own that is small enough to sit in the repository (under 4 MB, tokenizer included), shaped like the
large ones (fused experts beside a shared MLP, sliding and full attention, k = v on the full layers,
tied embeddings, softcapped logits), and trained until its perplexity means something.

It learns from what any machine has: the Python standard library, its sources and its language
reference, and this repository's calibration samples in ten languages. It never sees `eval/heldout`
nor HELD_OUT_MODULES, on which it is judged below and in `tests/test_reference.py`.

    OMP_NUM_THREADS=1 python scripts/make_reference.py --output reference

The defaults made the folder in the repository: 3,600 steps of 2,048 tokens on one core of a busy machine
with Python 3.11, 1,724 seconds of training and under a minute around it. One thread is no loss: on matrices
this small, two that wait for each other are slower. The same seed on another Python (another library
to read) or another processor gives a sibling, not the same bytes. (So does this script now, by one rare
character in the vocabulary: the folder was made when a tie for the last of the ALPHABET fell by chance.)

    perplexity on unseen text    uniform    unigram    model
    code (five modules)             2560        355       24
    chats in ten languages          2560        468       33

It read each calibration sample some fifteen times and half knows them by heart (perplexity 6.5), so they are
good for calibrating and useless for judging.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "calibration" / "samples"
HELD_OUT = ROOT / "eval" / "heldout"

# --- The text -------------------------------------------------------------------------------------

HELD_OUT_MODULES = ("fractions", "graphlib", "heapq", "shlex", "textwrap")
SKIPPED_FOLDERS = {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
LONGEST_DOCUMENT = 64_000  # characters; so that no single module dominates


def stdlib_source(module: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")


def stdlib_documents() -> list[str]:
    """Every module's source, and the language reference that `help()` prints, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    wanted = (path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts) and str(path.with_suffix("")) not in HELD_OUT_MODULES)
    sources = [(root / path).read_text(encoding="utf-8", errors="replace") for path in wanted]
    return [text[:LONGEST_DOCUMENT] for text in sources + [topics[name] for name in sorted(topics)] if text.strip()]


def read_conversations(folder: Path) -> dict[str, list[dict]]:
    """The samples of a folder by language: each has `messages` and perhaps `tools`."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def render(tokenizer: PreTrainedTokenizerFast, sample: dict) -> str:
    return tokenizer.apply_chat_template(sample["messages"], tools=sample.get("tools"), tokenize=False)


# --- The tokenizer --------------------------------------------------------------------------------

VOCABULARY = 2560
ALPHABET = 700  # distinct characters with a token of their own; the rest is spelled in bytes
PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
END_OF_TURN = "<turn|>"
CONTROLS = [
    *(PAD, EOS, BOS, UNK),
    *("<|turn>", END_OF_TURN),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *("<|channel>", "<channel|>"),
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# What a token may span while merges are learned: a run of spaces, a word with at most one space
# before it, one digit, a run of signs, a run of newlines. Tokens therefore never cross words, and
# the finished tokenizer needs no such pattern (Gemma's has none).
WORDS = Regex(r"▁{2,}|▁?[\p{L}\p{M}]+|\p{N}|▁?[^\p{L}\p{M}\p{N}▁\n]+|\n+|▁")

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- else -%}{%- for part in content or [] if part.type == 'text' -%}{{ part.text | trim }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro as_json(value) -%}{{ value if value is string else value | tojson }}{%- endmacro -%}

{{- bos_token -}}
{%- set system = messages and messages[0].role in ('system', 'developer') -%}
{%- if system or tools -%}
    {{- '<|turn>system\\n' -}}
    {%- if system -%}{{ text(messages[0].content) }}{%- endif -%}
    {%- for tool in tools or [] -%}{{ '<|tool>' ~ tool | tojson ~ '<tool|>' }}{%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if system else messages) -%}
    {{- '<|turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' -}}
    {%- if message.reasoning_content -%}
        {{- '<|channel>thought\\n' ~ text(message.reasoning_content) ~ '<channel|>' -}}
    {%- endif -%}
    {%- if message.role == 'tool' -%}{{ '<|tool_response>' ~ text(message.content) ~ '<tool_response|>' }}
    {%- else -%}{{ text(message.content) }}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- '<|tool_call>call:' ~ call.function.name ~ as_json(call.function.arguments) ~ '<tool_call|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Gemma's kind of BPE: spaces become ▁, unseen characters fall back to bytes, BOS comes first."""
    spaces_to_marks = normalizers.Replace(" ", "▁")

    learner = Tokenizer(models.BPE())
    learner.normalizer = spaces_to_marks
    learner.pre_tokenizer = pre_tokenizers.Split(WORDS, behavior="isolated")
    pieces = VOCABULARY - len(CONTROLS) - len(BYTES)
    # Counted here, because the trainer lets chance settle ties for the last places in its alphabet.
    characters = Counter(chain.from_iterable(text.replace(" ", "▁") for text in texts))
    alphabet = [character for character, _ in characters.most_common(ALPHABET)]
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=alphabet, limit_alphabet=ALPHABET, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]

    vocabulary = [*CONTROLS, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    tokenizer.normalizer = spaces_to_marks
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = (BOS, CONTROLS.index(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Written by hand: compact, and in the form that every version of transformers reads."""
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "bos_token": BOS,
            "unk_token": UNK,
            "additional_special_tokens": CONTROLS[4:],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "padding_side": "left",
        },
    )


# --- The model ------------------------------------------------------------------------------------

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,  # groups of 32 divide it, groups of 64 do not: experts meet the awkward case
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "global_head_dim": 64,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
    "pad_token_id": CONTROLS.index(PAD),
    "eos_token_id": CONTROLS.index(EOS),
    "bos_token_id": CONTROLS.index(BOS),
}


def save_model(model: nn.Module, output: Path) -> None:
    model.generation_config.eos_token_id = [CONTROLS.index(EOS), CONTROLS.index(END_OF_TURN)]
    model.to(torch.bfloat16).save_pretrained(output)
    # transformers 5.23 writes the full layers' heads as `per_layer_config`; older ones, and vLLM, read these two.
    config = json.loads((output / "config.json").read_text())
    config.pop("per_layer_config", None)
    config |= {name: CONFIG[name] for name in ("global_head_dim", "num_global_key_value_heads")}
    write_json(output / "config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- The training ---------------------------------------------------------------------------------

LENGTH = 256  # tokens of a training window
ROWS = {"stdlib": 6, "samples": 2}  # windows of a step; the samples are few, so each is seen often
RATE, WARMUP, DECAY = 6e-3, 100, 0.1
BALANCE = 0.01  # weight of the loss that keeps every expert in work


def windows(stream: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Random crops of one long token stream, each made to begin as a prompt does: with BOS."""
    starts = torch.randint(len(stream) - LENGTH, (count, 1), generator=rng)
    crops = stream[starts + torch.arange(LENGTH)]
    crops[:, 0] = CONFIG["bos_token_id"]
    return crops


def batches(streams: dict[str, Tensor], steps: int, seed: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.cat([windows(stream, ROWS[name], rng) for name, stream in streams.items()])


class RouterWatch:
    """Hooks on the routers: who was chosen (`load`), and the loss that evens it out (`imbalance`)."""

    def __init__(self, model: Gemma4ForCausalLM):
        self.load = torch.zeros(CONFIG["num_hidden_layers"], CONFIG["num_experts"])
        self.losses: list[Tensor] = []
        for index, layer in enumerate(model.model.layers):
            layer.router.register_forward_hook(lambda _, __, out, index=index: self._see(index, out))

    def _see(self, index: int, routed: tuple[Tensor, Tensor, Tensor]) -> None:
        probabilities, _, chosen = routed
        counts = torch.bincount(chosen.flatten(), minlength=CONFIG["num_experts"])
        self.load[index] += counts
        share = counts / counts.sum()
        self.losses.append(CONFIG["num_experts"] * (share * probabilities.mean(0)).sum())

    def imbalance(self) -> Tensor:
        """1 where all experts get the same, up to the number of experts where one gets all (Switch)."""
        mean = torch.stack(self.losses).mean()
        self.losses.clear()
        return mean


def learning_rate(step: int, steps: int) -> float:
    """A short warm-up, then a cosine down to nothing."""
    return RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def next_token_loss(model: Gemma4ForCausalLM, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def fresh_model(seed: int) -> Gemma4ForCausalLM:
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG))
    for layer in model.model.layers:
        # Gemma 4 divides no attention score by sqrt(head_dim); its norms learn to. Begin there: it saves
        # the hundreds of steps in which attention is too sharp to learn from.
        nn.init.constant_(layer.self_attn.k_norm.weight, layer.self_attn.head_dim**-0.5)
    return model


def train(streams: dict[str, Tensor], steps: int, seed: int) -> Gemma4ForCausalLM:
    model = fresh_model(seed).train()
    watch = RouterWatch(model)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    started, shown = time.monotonic(), []
    for step, tokens in enumerate(batches(streams, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the weights stay fp32
            loss = next_token_loss(model, tokens)
        (loss + BALANCE * watch.imbalance()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown.append(loss.item())
        if len(shown) == 100:
            print(f"step {step + 1:5d}  loss {sum(shown) / 100:.3f}  {time.monotonic() - started:5.0f} s", flush=True)
            shown.clear()
    return model.eval()


# --- The judgement --------------------------------------------------------------------------------


@torch.no_grad()
def perplexities(model: Gemma4ForCausalLM, documents: list[Tensor]) -> dict[str, float]:
    """Perplexity of the model, beside a uniform guess and the best possible guess without context.

    The unigram is counted on the very tokens it is judged on: no real one could be as good.
    """
    targets = [document[1:] for document in documents]
    tokens = sum(map(len, targets))
    loss = sum(next_token_loss(model, document[None]).item() * (len(document) - 1) for document in documents)
    counts = torch.tensor(list(Counter(torch.cat(targets).tolist()).values())) / tokens
    return {
        "tokens": tokens,
        "uniform": float(VOCABULARY),
        "unigram": math.exp(-(counts * counts.log()).sum()),
        "model": math.exp(loss / tokens),
    }


def held_out_documents(tokenizer: PreTrainedTokenizerFast, longest: int = 1024) -> dict[str, list[Tensor]]:
    """What the model never saw, cut to `longest` tokens a document: code, and one entry per language."""
    texts = {"code": [BOS + stdlib_source(module) for module in HELD_OUT_MODULES]}
    texts |= {language: [render(tokenizer, sample) for sample in samples] for language, samples in read_conversations(HELD_OUT).items()}
    return {
        name: [torch.tensor(tokenizer.encode(text, add_special_tokens=False, truncation=True, max_length=longest)) for text in rendered]
        for name, rendered in texts.items()
    }


def report(output: Path) -> None:
    """Judge the folder as a stranger would: loaded from disk, on text it has not seen."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = Gemma4ForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    watch = RouterWatch(model)
    held_out = held_out_documents(tokenizer)
    held_out["ten languages"] = [document for name, documents in held_out.items() if name != "code" for document in documents]
    print(f"{'perplexity':14} {'tokens':>7} {'uniform':>8} {'unigram':>8} {'model':>8}")
    for name, documents in held_out.items():
        if documents:
            row = perplexities(model, documents)
            print(f"{name:14} {row['tokens']:7d} {row['uniform']:8.0f} {row['unigram']:8.1f} {row['model']:8.1f}")
    for index, load in enumerate(watch.load / watch.load.mean(1, keepdim=True)):
        print(f"layer {index}: expert load {load.min():.2f} to {load.max():.2f} of uniform")
    print(f"{sum(path.stat().st_size for path in output.iterdir()):,} bytes in {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "reference")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    sources = stdlib_documents()
    samples = [sample for language in read_conversations(SAMPLES).values() for sample in language]
    save_tokenizer(train_tokenizer(sources + 20 * list(strings(samples))), args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)

    texts = {
        "stdlib": [BOS + source + EOS for source in sources],
        "samples": [render(tokenizer, sample) for sample in samples],
    }
    streams = {
        name: torch.tensor(list(chain.from_iterable(tokenizer(documents, add_special_tokens=False, verbose=False).input_ids)))
        for name, documents in texts.items()
    }
    print(", ".join(f"{name}: {len(stream):,} tokens" for name, stream in streams.items()))

    save_model(train(streams, args.steps, args.seed), args.output)
    report(args.output)


if __name__ == "__main__":
    main()
