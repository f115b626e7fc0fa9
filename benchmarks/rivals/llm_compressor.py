"""llm-compressor on our tokens, its result as dense weights. Runs in the rival's environment (`make rivals`), which has no quantkit.

    python benchmarks/rivals/llm_compressor.py MODEL IDS.safetensors OUTPUT --method awq+gptq --bits 4 --symmetric

It gets what is best for it (README.md has the figures): a correct mapping for Gemma 4, which it has none of; statistics of all tokens for
the scale that all experts share; a calibration pass of its own for GPTQ, so that its Hessians are of the scaled inputs.
"""

import argparse
from importlib.metadata import version

import torch
from common import Meter, dense, finish, linears, load_model, logits, parser
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoTokenizer

OBSERVERS = ("memoryless_mse", "memoryless_minmax", "imatrix_mse")  # the second is its own default


def main() -> None:
    options = parser(__doc__.splitlines()[0], ("awq", "awq+gptq", "gptq", "rtn"))
    options.add_argument("--all-experts", action="store_true", help="every token through every expert, as it does by default")
    options.add_argument("--observer", choices=OBSERVERS, default=OBSERVERS[0], help="how it finds the range of a group")
    options.add_argument("--duo", choices=("on", "off", "both"), default="on", help="AWQ scales from activations and weights")
    options.add_argument("--pipeline", choices=("sequential", "independent"), help="default: independent for awq+gptq")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not torch.accelerator.is_available():  # 0.14.0.1 pins memory even where no device could use it, and dies of it
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    ids = load_file(arguments.ids)["ids"]
    model = load_model(arguments.model, torch.float32 if arguments.precision == "float32" else "auto")
    linearize_moe(model)
    targets = linears(model)
    pipeline = arguments.pipeline or ("independent" if arguments.method == "awq+gptq" else "sequential")
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    with Meter() as meter:
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            tokenizer=AutoTokenizer.from_pretrained(arguments.model),  # else it builds a processor, which for Gemma 4 wants torchvision
            recipe=recipe(arguments, model, targets),
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            batch_size=arguments.batch,
            shuffle_calibration_samples=False,
            moe_calibrate_all_experts=arguments.all_experts,
            pipeline=pipeline,
        )
    model.eval()
    own = logits(model, ids[:4])
    quantized = {f"{name}.weight" for name in targets}
    parameters = dict(model.named_parameters()) | {f"{name}.weight": dequantized(module) for name, module in targets.items()}
    settings = {
        "mapping": "ours for Gemma 4" if is_gemma4(model) else "its own",
        "experts": "all" if arguments.all_experts else "routed",
        "observer": arguments.observer,
        "duo_scaling": arguments.duo,
        "pipeline": pipeline,
        "batch": arguments.batch,
        "rows": list(ids.shape),
        "one_scale_a_row": sorted({name.split(".", 3)[-1] for name, module in targets.items() if by_row(module, arguments.group)}),
    }
    result = {"rival": "llm-compressor", "version": version("llmcompressor"), **meter.figures, "settings": settings}
    finish(arguments, dense(arguments, parameters, quantized), own, ids[:4], result)


def recipe(arguments: argparse.Namespace, model: torch.nn.Module, targets: dict[str, torch.nn.Linear]) -> list[object]:
    """Its modifiers. One config group for widths that `--group` divides, another with a scale a row for the rest."""
    groups: dict[str, QuantizationScheme] = {}
    for name, whole_row in (("grouped", False), ("by_row", True)):
        chosen = [target for target, module in targets.items() if by_row(module, arguments.group) == whole_row]
        weights = QuantizationArgs(
            num_bits=arguments.bits,
            type="int",
            symmetric=arguments.symmetric,
            strategy="channel" if whole_row else "group",
            group_size=None if whole_row else arguments.group,
            observer=arguments.observer,
        )
        if chosen:
            groups[name] = QuantizationScheme(targets=chosen, weights=weights)
    duo = {"on": True, "off": False, "both": "both"}[arguments.duo]
    awq = AWQModifier(mappings=gemma4_mappings(targets) if is_gemma4(model) else None, duo_scaling=duo)
    return {
        "awq": [awq, QuantizationModifier(config_groups=groups)],
        "awq+gptq": [awq, GPTQModifier(config_groups=groups)],
        "gptq": [GPTQModifier(config_groups=groups)],
        "rtn": [QuantizationModifier(config_groups=groups)],
    }[arguments.method]


def by_row(module: torch.nn.Linear, group: int) -> bool:
    return module.in_features % group != 0


def is_gemma4(model: torch.nn.Module) -> bool:
    return model.config.get_text_config().model_type == "gemma4_text"


def gemma4_mappings(targets: dict[str, torch.nn.Linear]) -> list[AWQMapping]:
    """Which layer takes up which linears' scale: what the function of a Gemma 4 allows. v_norm keeps v_proj and o_proj apart."""
    attention: dict[tuple[str, ...], list[str]] = {}  # the projections that a block has -> blocks: values may be the keys, or borrowed
    blocks: dict[str, set[str]] = {}
    for name in targets:
        block, _, projection = name.partition(".self_attn.")
        if projection:
            blocks.setdefault(block, set()).add(projection)
    for block, present in blocks.items():
        attention.setdefault(tuple(p for p in ("q_proj", "k_proj", "v_proj") if p in present), []).append(block)
    mappings = []
    for projections, where in attention.items():
        here = "re:^(" + "|".join(block.replace(".", r"\.") for block in where) + r")\."
        mappings.append(AWQMapping(f"{here}input_layernorm$", [rf"{here}self_attn\.{projection}$" for projection in projections]))
    here = "re:^(" + "|".join(block.replace(".", r"\.") for block in blocks) + r")\."
    mappings.append(AWQMapping(f"{here}pre_feedforward_layernorm$", [rf"{here}mlp\.gate_proj$", rf"{here}mlp\.up_proj$"]))
    mappings.append(AWQMapping(rf"{here}mlp\.up_proj$", [rf"{here}mlp\.down_proj$"]))
    if any(".experts." in name for name in targets):
        gate_up = [rf"{here}experts\.\d+\.gate_proj$", rf"{here}experts\.\d+\.up_proj$"]
        # hooked at the experts as a whole: by itself it would take the tokens of expert 0 for all
        mappings.append(AWQMapping(f"{here}pre_feedforward_layernorm_2$", gate_up, activation_hook_target="experts"))
        mappings.append(AWQMapping(rf"{here}experts\.\d+\.up_proj$", [rf"{here}experts\.\d+\.down_proj$"]))
    return mappings


def dequantized(module: torch.nn.Linear) -> torch.Tensor:
    """(out, in) float32: the integers that it would write, times their scales."""
    scheme = module.quantization_scheme.weights
    scale, zero = module.weight_scale, getattr(module, "weight_zero_point", None)
    integers = quantize(module.weight, scale, zero, scheme, dtype=torch.int8)
    return dequantize(integers, scale.float(), zero, scheme, dtype=torch.float32)


if __name__ == "__main__":
    main()
