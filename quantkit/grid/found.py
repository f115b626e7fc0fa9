"""Weights that lie on a grid already: a checkpoint that was trained quantized and published unquantized loses nothing, if it is seen.

Such a weight is code x scale, rounded once to the checkpoint's dtype (Google's Q4_0 checkpoints: 4 bits, groups of 32, an fp16 scale,
published in bf16). The extreme of a group stands on one of the few codes; each choice gives a scale, a scale gives all codes, and each
code gives an interval of scales that round to the stored weight. A scale in all intervals that the target can store, and that gives back
every bit, is the answer; weights that were never on the grid pass by a chance of about 2^-100.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.grid import integer
from quantkit.grid.integer import encode, limits, to_codes
from quantkit.types import Codes, Scheme

WIDEST = 5  # bits; a grid of 8 is hardly coarser than bf16 itself
FIRST = 4  # rows that are looked at before all are
CHUNK = 1 << 20  # weights at a time


def find_scale(weight: Float[Tensor, "out in"], scheme: Scheme, stored: torch.dtype) -> Float[Tensor, "out groups"] | None:
    """The scales (fp32, representable in `stored`) by which every weight is code x scale to the bit, or None.

    With zero points in the scheme they are all 0. Groups of zeros have the scale 1.

    Args:
        weight: in the checkpoint's dtype, which products were rounded to.
        stored: what scales will be stored in: bf16 in compressed-tensors, fp16 in GGUF.
    """
    if scheme.bits > WIDEST:
        return None
    rows = len(weight)
    step = max(1, CHUNK // weight.shape[1])
    found = []
    for start, stop in [(0, min(FIRST, rows)), *((at, min(at + step, rows)) for at in range(FIRST, rows, step))]:
        scale = _of_groups(weight[start:stop].reshape(-1, scheme.width(weight.shape[1])), scheme.bits, stored)
        if scale is None:
            return None
        found.append(scale.view(stop - start, -1))
    return torch.cat(found)


def _of_groups(weight: Float[Tensor, "groups width"], bits: int, stored: torch.dtype) -> Float[Tensor, " groups"] | None:
    exact = weight.double()
    extreme = exact.gather(1, exact.abs().argmax(1, keepdim=True))
    scale = torch.where(extreme[:, 0] == 0, 1.0, torch.nan).float()
    # what rounds to a weight: half the way to its two neighbours
    low_end, high_end = ((exact + torch.nextafter(weight, torch.full_like(weight, to)).double()) / 2 for to in (-torch.inf, torch.inf))
    bottom, top = limits(bits)
    for code in (code for code in range(bottom, top + 1) if code):
        open_ = scale.isnan()
        if not bool(open_.any()):
            break
        w = exact[open_]
        codes = (w / (extreme[open_] / code)).round()
        used = codes != 0
        ends = torch.stack([low_end[open_] / codes, high_end[open_] / codes])
        low = torch.where(used, ends.amin(0), -torch.inf).amax(1)
        high = torch.where(used, ends.amax(0), torch.inf).amin(1)
        middle = ((low + high) / 2).to(stored)
        up = torch.nextafter(middle, torch.full_like(middle, torch.inf))
        down = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        for candidate in (middle, up, down):
            tried = candidate.float()
            sound = tried.isfinite() & (tried != 0)
            tried = torch.where(sound, tried, 1.0)
            back = (encode(w.float(), tried, None, bits) * tried[:, None]).to(weight.dtype)
            hit = sound & (back == weight[open_]).all(1)
            still = scale[open_]
            scale[open_] = torch.where(hit & still.isnan(), tried, still)
    return None if bool(scale.isnan().any()) else scale


def on_grid(weight: Float[Tensor, "out in"], scheme: Scheme, stored: torch.dtype) -> Codes | None:
    """The codes that give this weight back to the last bit, where it lies on a grid already; zero points are looked for last."""
    ordered = weight[:FIRST].float().reshape(-1, scheme.width(weight.shape[1])).sort(1).values
    if int((ordered.diff() != 0).sum(1).max()) >= 1 << scheme.bits:
        return None  # more values in a group than codes: nearly every weight that was never on a grid is told off here
    scale = find_scale(weight, scheme, stored)
    if scale is None:
        return integer.on_grid(weight, scheme, stored)
    return to_codes(weight.float(), scale, None if scheme.symmetric else torch.zeros_like(scale), scheme, stored)
