"""Weights that lie on a grid already: a checkpoint that was trained quantized and published unquantized loses nothing, if it is seen.

Such a weight is code x scale, rounded once to the checkpoint's dtype (Google's Q4_0 checkpoints: 4 bits, groups of 32, an fp16 scale,
published in bf16). The extreme of a group stands on one of the few codes; each choice gives a scale, a scale gives all codes, and each
code gives an interval of scales that round to the stored weight. A scale in all intervals that can be stored, and that gives back every
bit, is the answer; weights that were never on the grid pass by a chance of about 2^-100.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.grid import integer
from quantkit.grid.integer import encode, limits, to_codes
from quantkit.types import Codes, Scheme

WIDEST = 5  # bits; a grid of 8 is hardly coarser than bf16 itself
FIRST = 4  # rows that are looked at before all are
CHUNK = 1 << 20  # weights at a time
PATTERN = {2: torch.int16, 4: torch.int32}  # a float's bits, by its bytes


def find_scale(weight: Float[Tensor, "out in"], scheme: Scheme, stored: torch.dtype) -> Float[Tensor, "out groups"] | None:
    """The scales (fp32, representable in `stored`) by which every weight is code x scale to the bit, or None.

    Negative ones only where the scheme is signed. Groups of zeros have the scale 1.

    Args:
        weight: in the checkpoint's dtype, which products were rounded to.
        stored: what scales will be stored in: the checkpoint's dtype in compressed-tensors and ONNX, fp16 in GGUF.
    """
    if scheme.bits > WIDEST:
        return None
    rows = len(weight)
    step = max(1, CHUNK // weight.shape[1])
    found = []
    for start, stop in [(0, min(FIRST, rows)), *((at, min(at + step, rows)) for at in range(FIRST, rows, step))]:
        scale = _of_groups(weight[start:stop].reshape(-1, scheme.width(weight.shape[1])), scheme, stored)
        if scale is None:
            return None
        found.append(scale.view(stop - start, -1))
    return torch.cat(found)


def _of_groups(weight: Float[Tensor, "groups width"], scheme: Scheme, stored: torch.dtype) -> Float[Tensor, " groups"] | None:
    exact = weight.double()
    extreme = exact.gather(1, exact.abs().argmax(1, keepdim=True))
    scale = torch.where(extreme[:, 0] == 0, 1.0, torch.nan).float()
    # what rounds to a weight: half the way to its two neighbours
    inner_end, outer_end = ((exact + _next(weight, step).double()) / 2 for step in (-1, 1))
    bottom, top = limits(scheme.bits)
    for code in (code for code in range(bottom, top + 1) if code):
        open_ = scale.isnan()
        if not bool(open_.any()):
            break
        w = exact[open_]
        codes = (w / (extreme[open_] / code)).round()
        used = codes != 0
        ends = torch.stack([inner_end[open_] / codes, outer_end[open_] / codes])
        low = torch.where(used, ends.amin(0), -torch.inf).amax(1)
        high = torch.where(used, ends.amax(0), torch.inf).amin(1)
        middle = ((low + high) / 2).to(stored)
        for candidate in (middle, _next(middle, 1), _next(middle, -1)):
            tried = candidate.float()
            sound = tried.isfinite() & ((tried != 0) if scheme.signed else (tried > 0))
            tried = torch.where(sound, tried, 1.0)
            back = (encode(w.float(), tried, None, scheme.bits) * tried[:, None]).to(weight.dtype)
            hit = sound & (back == weight[open_]).all(1)
            still = scale[open_]
            scale[open_] = torch.where(hit & still.isnan(), tried, still)
    return None if bool(scale.isnan().any()) else scale


def _next(value: Float[Tensor, "*shape"], step: int) -> Float[Tensor, "*shape"]:
    """The neighbours away from zero (1) or towards it (-1), whose bits count up and down; of zero nothing of use."""
    return (value.view(PATTERN[value.element_size()]) + step).view(value.dtype)


def on_grid(weight: Float[Tensor, "out in"], scheme: Scheme) -> Codes | None:
    """The codes that give this weight back to the last bit, where it lies on a grid already; None where it does not, or is all zeros.

    Scales are looked for in the weight's dtype, which every format stores, and in fp16, which GGUF does (the others round such a scale);
    zero points other than 0 last, and with scales in the weight's dtype alone.
    """
    ordered = weight[:FIRST].float().reshape(-1, scheme.width(weight.shape[1])).sort(1).values
    if int((ordered.diff() != 0).sum(1).max()) >= 1 << scheme.bits:
        return None  # more values in a group than codes: nearly every weight that was never on a grid is told off here
    if not bool(weight.any()):
        return None  # zeros lie on any grid, folded or not
    either_sign = replace(scheme, signed=scheme.signed or not scheme.symmetric)
    for stored in sorted({weight.dtype, torch.float16}, key=lambda dtype: -torch.finfo(dtype).eps):  # the coarsest that holds them
        scale = find_scale(weight, either_sign, stored)
        if scale is not None:
            # beside zero points scales are positive: the codes of a negative one are mirrored about -1/2, and -1 stands for 0
            zero = None if scheme.symmetric else torch.where(scale < 0, -1.0, 0.0)
            return to_codes(weight.float(), scale if zero is None else scale.abs(), zero, scheme, stored)
    return integer.on_grid(weight, scheme, weight.dtype)
