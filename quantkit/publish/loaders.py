"""Who will load an artefact and who will not: the engines' own limits, as a table.

Rules of vLLM on GPUs are read from its source (0.32: compressed_tensors_moe_wna16, marlin_utils, mixed_precision kernels); those of vLLM
on CPUs, transformers 5.23, llama.cpp and onnxruntime 1.31 were met by running them (docs/publishing.md says which).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.hf import needed
from quantkit.publish.onnx_folder import OnnxFolder
from quantkit.publish.packed import Packed, Stored
from quantkit.types import Json

GPUS = (1, 2, 4, 8)  # tensor-parallel sizes that are asked about
MARLIN_GROUPS = (0, 32, 64, 128)
# Linears that vLLM cuts along their input; all others along their output.
ROW_PARALLEL = ("o_proj", "down_proj", "w2")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One engine's: yes, no, or yes under conditions."""

    engine: str
    loads: str  # "yes", "no", "if"
    why: str


def verdicts(packed: Packed) -> list[Verdict]:
    """Every engine's word on a compressed-tensors folder."""
    linears = packed.stored
    return [
        _vllm_gpu(packed, linears),
        _vllm_cpu(packed, linears),
        _transformers(packed, linears),
        Verdict("llama.cpp", "no", "reads GGUF; quantkit writes one from the same run with --format gguf"),
        Verdict("onnxruntime", "no", "reads ONNX graphs, not safetensors"),
    ]


def parallel_sizes(config: Json, linears: Sequence[Stored]) -> dict[int, str]:
    """Number of GPUs -> why vLLM cannot split the matrices over so many ("" where it can)."""
    return {count: next(_cannot_split(config, linears, count), "") for count in GPUS}


def _cannot_split(config: Json, linears: Sequence[Stored], count: int) -> Iterator[str]:
    return iter([*_heads(config, count), *_widths(linears, count)])


def _heads(config: Json, count: int) -> list[str]:
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and heads % count:
        return [f"{heads} attention heads"]
    shared = [config.get(key) for key in ("num_key_value_heads", "num_global_key_value_heads")]
    layers = config.get("per_layer_config")
    shared += [one.get("num_key_value_heads") for one in (layers.values() if isinstance(layers, dict) else ())]
    return [f"{n} key and value heads" for n in shared if isinstance(n, int) and n % count and count % n]


def _widths(linears: Sequence[Stored], count: int) -> list[str]:
    found = {}
    for one in linears:
        out, columns = one.shape
        leaf = one.kind.rpartition(".")[2]
        if leaf in ROW_PARALLEL:
            part = columns / count
            if part % (one.group or 1):
                found[one.kind] = f"{one.kind}: {columns}/{count} = {_number(part)} columns are no whole groups of {one.group or 1}"
        elif out % count:
            found[one.kind] = f"{one.kind}: {out} rows"
        elif one.of_expert and not one.symmetric and (2 * out // count) % 8:
            found[one.kind] = f"{one.kind}: {out} rows with zero points, 2 x {out}/{count} is no multiple of 8"
    return list(found.values())


def _vllm_gpu(packed: Packed, linears: Sequence[Stored]) -> Verdict:
    engine = "vLLM, NVIDIA GPUs"
    if not linears:
        return Verdict(engine, "yes", "nothing is quantized")
    for one in linears:
        if one.bits not in (4, 8):
            return Verdict(engine, "no", f"{one.kind} in {one.bits} bits: Marlin has kernels for 4 and 8")
        if one.group not in MARLIN_GROUPS:
            return Verdict(engine, "no", f"{one.kind} in groups of {one.group}: Marlin takes 32, 64, 128 or a whole row")
        if one.bits == 8 and not one.symmetric:
            return Verdict(engine, "no", f"{one.kind} in 8 bits with zero points: Marlin takes them for 4 bits only")
    experts = [one for one in linears if one.of_expert]
    hidden = packed.text_config.get("hidden_size")
    notes = []
    if experts and isinstance(hidden, int):
        groups = {one.group for one in experts if one.kind.endswith(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")) and one.group}
        if any(hidden % group for group in groups):
            return Verdict(engine, "no", f"experts: the width {hidden} is no whole number of groups of {max(groups)}")
        if hidden % 128:
            notes.append(f"experts not by Marlin (the width {hidden} is no multiple of 128), by a slower kernel")
    sizes = parallel_sizes(packed.text_config, linears)
    fits = [count for count, why in sizes.items() if not why]
    if not fits:
        return Verdict(engine, "no", sizes[1])
    notes.insert(0, f"compute capability 7.5 or later; tensor-parallel {', '.join(map(str, fits))}")
    notes += [f"not {count} ({why})" for count, why in sizes.items() if why][:1]
    if packed.signed():
        notes.append("with VLLM_MARLIN_INPUT_DTYPE unset: int8 activations read signed scales as unsigned")
    return Verdict(engine, "yes", "; ".join(notes))


def _vllm_cpu(packed: Packed, linears: Sequence[Stored]) -> Verdict:
    engine = "vLLM, CPU"
    if any(one.of_expert for one in linears):
        return Verdict(engine, "no", "has no kernel for these packed experts (NotImplementedError: No WNA16 MoE backend)")
    for one in linears:
        out, columns = one.shape
        if one.bits != 4:
            return Verdict(engine, "no", f"{one.kind} in {one.bits} bits: the CPU kernel takes 4")
        if columns % 32 or out % 32:
            return Verdict(engine, "no", f"{one.kind}: {out} x {columns} is no multiple of 32 both ways")
    return Verdict(engine, "yes", "one process" if linears else "nothing is quantized")


def _transformers(packed: Packed, linears: Sequence[Stored]) -> Verdict:
    engine = "transformers"
    schemes = {(one.bits, one.group, one.symmetric) for one in linears if one.of_expert}
    if schemes and needed(str(packed.text_config.get("model_type"))):
        return Verdict(
            engine, "if", "opened by quantkit.hf.load_model; plain from_pretrained leaves the experts random with only a warning"
        )
    if any(not one.symmetric for one in linears if one.of_expert):
        return Verdict(engine, "no", "cannot decode zero points in these experts")
    if len(schemes) > 1:
        return Verdict(engine, "no", "decodes all experts by one scheme, these have several")
    if any(one.fused for one in linears):
        return Verdict(engine, "no", "knows no fused packed experts of this family")
    if any(not one.symmetric for one in linears) and not packed.quantization.get("dequantize"):
        return Verdict(engine, "no", 'zero points need "dequantize": true in quantization_config (5.23 fails on them otherwise)')
    return Verdict(engine, "yes", "with compressed-tensors installed" if linears else "nothing is quantized")


def gguf_verdicts(architecture: str, types: Iterable[str]) -> list[Verdict]:
    """Every engine's word on a GGUF."""
    kinds = ", ".join(sorted(types))
    return [
        Verdict("llama.cpp", "yes", f"architecture {architecture}; {kinds}"),
        Verdict("Ollama, LM Studio", "yes", "stand on llama.cpp; a version that knows the architecture (not run here)"),
        Verdict("vLLM", "no", "its GGUF reader is another project's; use the compressed-tensors folder"),
        Verdict("transformers", "no", "would decode it to full precision, where it knows the architecture (not run here)"),
        Verdict("onnxruntime", "no", "reads ONNX graphs, not GGUF"),
    ]


def onnx_verdicts(graph: OnnxFolder) -> list[Verdict]:
    """Every engine's word on an ONNX folder."""
    kinds = sorted({f"{bits} bits in blocks of {block}" for _, bits, block in graph.quantized()})
    needs = f"1.31 or later; MatMulNBits, {', '.join(kinds)}" if kinds else "nothing is quantized"
    return [
        Verdict("onnxruntime", "yes", f"{needs}; on CPUs (other providers not run here)"),
        Verdict("onnxruntime-genai", "yes", "0.18 or later"),
        Verdict("vLLM", "no", "reads safetensors; use the compressed-tensors folder"),
        Verdict("transformers", "no", "reads safetensors; use the compressed-tensors folder"),
        Verdict("llama.cpp", "no", "reads GGUF; quantkit writes one from the same run with --format gguf"),
    ]


def _number(value: float) -> str:
    return f"{value:g}"
