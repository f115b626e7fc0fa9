"""AutoRound on our tokens, its result as dense weights. Runs in the rival's environment (`make rivals`), which has no quantkit.

    python benchmarks/rivals/autoround.py MODEL IDS.safetensors OUTPUT --method signround --bits 4 --symmetric --iterations 200

It learns rounding and ranges block by block, with the signs of gradients; README.md tells what it costs on a CPU. It leaves out matrices
with a side that 32 does not divide, as its export has no place for them; here they are quantized, as by every other contender.
"""

from collections.abc import Iterable
from importlib.metadata import version

import torch
from auto_round import AutoRound, special_model_handler
from auto_round.compressors import layer_config_resolver
from auto_round.utils import model as kinds
from common import Meter, dense, finish, linears, load_model, logits, parser
from safetensors.torch import load_file
from transformers import AutoTokenizer


def main() -> None:
    options = parser(__doc__.splitlines()[0], ("signround",))
    options.add_argument("--iterations", type=int, default=200, help="steps of a block; 200 is its own default, 1000 its best recipe")
    options.add_argument("--extension", action="store_true", help="its experimental enable_alg_ext")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    kinds.detect_model_type = lambda model: "llm"  # its way for models with a vision tower wants an image processor
    ids = load_file(arguments.ids)["ids"]
    model = load_model(arguments.model, torch.float32 if arguments.precision == "float32" else "auto")
    if model.config.model_type == "gemma4_text":  # what it does for a Gemma 4 with a vision tower: rotary angles by the kind of layer
        special_model_handler.SPECIAL_SHARED_CACHE_KEYS[type(model).__name__] = ("position_ids",)
        special_model_handler._attach_gemma4_rotary_emb(model)
    widths = {name: module.in_features for name, module in linears(model).items()}
    quantize_every(widths, arguments.bits)
    by_row = [name for name, width in widths.items() if width % arguments.group]
    with Meter() as meter:
        rival = AutoRound(
            model,
            AutoTokenizer.from_pretrained(arguments.model),
            scheme="W4A16",
            bits=arguments.bits,
            group_size=arguments.group,
            sym=arguments.symmetric,
            layer_config={name: {"group_size": -1} for name in by_row},
            dataset=list(ids.split(arguments.batch)),
            iters=arguments.iterations,
            seqlen=ids.shape[1],
            nsamples=len(ids),
            batch_size=arguments.batch,
            device_map="cpu",
            amp=arguments.precision != "float32",
            enable_torch_compile=False,
            low_cpu_mem_usage=False,
            enable_alg_ext=arguments.extension,
        )
        quantized, _ = rival.quantize()
    quantized.eval()
    own = logits(quantized, ids[:4])
    parameters = dict(quantized.named_parameters())
    targets = {f"{name}.weight" for name in linears(quantized)}
    settings = {
        "iterations": arguments.iterations,
        "extension": arguments.extension,
        "batch": arguments.batch,
        "rows": list(ids.shape),
        "dtype": str(next(iter(quantized.parameters())).dtype),
        "one_scale_a_row": sorted({name.split(".", 3)[-1] for name in by_row}),
    }
    result = {"rival": "AutoRound", "version": version("auto-round"), **meter.figures, "settings": settings}
    finish(arguments, dense(arguments, parameters, targets), own, ids[:4], result)


def quantize_every(names: Iterable[str], bits: int) -> None:
    """No rule of shapes for these linears."""
    rules = layer_config_resolver.apply_layer_config_special_cases

    def without_shapes(config, *args, **kwargs):
        config, *rest = rules(config, *args, **kwargs)
        for name in names:
            if name in config:
                config[name] |= {"bits": bits, "data_type": "int"}
        return config, *rest

    layer_config_resolver.apply_layer_config_special_cases = without_shapes


if __name__ == "__main__":
    main()
