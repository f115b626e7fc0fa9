"""ggml's K-quants: 256 weights of a row share one or two fp16 scales, their groups have integer scales of 6 or 8 bits below those.

    Q4_K, Q5_K   f16 d; f16 e; 8 x (6-bit s, 6-bit m) in 12 bytes; (Q5_K: 32 bytes of fifth bits;) 128 bytes of the lower four
                 groups of 32: w = d s q - e m, q of 4 or 5 bits: 4.5 and 5.5 bits a weight
    Q6_K         128 bytes of the lower four bits; 64 of the upper two; 16 x int8 s; f16 d
                 groups of 16: w = d s (q - 32), q of 6 bits: 6.5625 bits a weight
    IQ4_NL       f16 d; 16 bytes: i[j] | i[j + 16] << 4, for rows that 256 does not divide
                 32 weights, no smaller groups: w = d q, q one of 16 levels that lie denser about 0: 4.5 bits a weight

Once d, e, s and m are chosen, every group is an affine grid of its own, `grid_of`: a solver that rounds column by column needs no more,
and puts its codes back with `with_codes`. Byte orders: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.

The search minimises the squared error weighted by each column's importance. ggml weights it by the size of the weight too and never fits
d and e again after rounding the small scales; here both are refitted, in turns with the small scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SUPER = 256
SIZES = {"Q4_K": (SUPER, 144), "Q5_K": (SUPER, 176), "Q6_K": (SUPER, 210), "IQ4_NL": (32, 18)}  # weights, bytes
LIMITS = {"Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31), "IQ4_NL": (-127, 113)}
GROUP = {"Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "IQ4_NL": 32}
SMALL = {"Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127), "IQ4_NL": (1, 1)}  # scales of groups
SYMMETRIC = ("Q6_K", "IQ4_NL")  # no minima
LEVELS = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # kvalues_iq4nl of ggml-common.h
# The level next to every half: those that lie between two levels are halves, too.
_NEXT = LEVELS[torch.bucketize(torch.arange(-254, 227) / 2 + 0.25, (LEVELS[1:] + LEVELS[:-1]) / 2)]
CHUNK = 1 << 17  # weights that are searched at a time: temporaries stay in the cache
STEPS = 20  # first guesses of a group's scale
ROUNDS = 2  # refits; a third gains less than .003 of the error
FLOOR = 1e-6  # of the mean importance: columns that were never fed still get the nearest code


@dataclass(frozen=True, slots=True)
class Superblocks:
    """A matrix on such a grid, (out, in / 256) superblocks (IQ4_NL: in / 32). Floats hold whole numbers but for the fp16 values d and e."""

    kind: str
    d: Float[Tensor, "out blocks"]
    e: Float[Tensor, "out blocks"]  # zeros where there are no minima
    s: Float[Tensor, "out blocks groups"]
    m: Float[Tensor, "out blocks groups"]  # zeros where there are no minima
    q: Float[Tensor, "out in"]  # 0 .. 2^bits-1; in Q6_K -32 .. 31; in IQ4_NL the level itself


def fit(weight: Float[Tensor, "out in"], kind: str, importance: Float[Tensor, " in"] | None = None, rounds: int = ROUNDS) -> Superblocks:
    """The nearest matrix on the grid that the search finds.

    Args:
        weight: fp32; whole superblocks divide its columns.
        importance: of each column's squared error, such as the Gram's diagonal; None: all alike.
        rounds: refits; 0 is a plain rounding whose groups each have their best scale.

    Raises:
        ValueError: a width that superblocks do not divide, or weights beyond fp16.
    """
    out, columns = weight.shape
    if columns % SIZES[kind][0]:
        raise ValueError(f"{columns} columns are not whole superblocks of {SIZES[kind][0]}")
    w = torch.ones(columns, device=weight.device)
    if importance is not None and bool((importance > 0).any()):
        w = importance.float().clamp(min=0)
    w = w / w.mean() + FLOOR
    step = max(1, CHUNK // columns)
    parts = [_fit(weight[start : start + step].float(), w, kind, rounds) for start in range(0, out, step)]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("d", "e", "s", "m", "q")}
    if not bool(whole["d"].isfinite().all() & whole["e"].isfinite().all()):
        raise ValueError(f"a weight of {float(weight.abs().max()):.3g} is beyond {kind}")
    return Superblocks(kind, **whole)


def grid_of(blocks: Superblocks) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """(scale, minimum) of every group: a weight is scale x code + minimum."""
    out = len(blocks.d)
    return (blocks.d[..., None] * blocks.s).view(out, -1), -(blocks.e[..., None] * blocks.m).view(out, -1)


def decode(blocks: Superblocks) -> Float[Tensor, "out in"]:
    """What the blocks stand for, fp32, in ggml's order of operations."""
    scale, minimum = grid_of(blocks)
    q = blocks.q.view(len(blocks.q), -1, GROUP[blocks.kind])
    return (q * scale[..., None] + minimum[..., None]).view(blocks.q.shape)


def nearest(weight: Tensor, scale: Tensor, minimum: Tensor, kind: str) -> Tensor:
    """The codes next to some weights, on grids that broadcast against them."""
    q = (weight - minimum) / _not_zero(scale)
    q = _NEXT.to(q.device)[q.mul_(2).floor_().clamp_(-254, 226).add_(254).int()] if kind == "IQ4_NL" else q.round_().clamp_(*LIMITS[kind])
    return torch.where(scale == 0, torch.full_like(q, float(kind == "IQ4_NL")), q)  # the level 1 is the nearest to nothing


def with_codes(blocks: Superblocks, q: Float[Tensor, "out in"]) -> Superblocks:
    """The same grid, other codes: those of a rounding that looked at more than one weight at a time."""
    return replace(blocks, q=q.clamp(*LIMITS[blocks.kind]))


def joined(parts: Sequence[Superblocks]) -> Superblocks:
    """Superblocks side by side, as the columns of one matrix."""
    whole = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("d", "e", "s", "m", "q")}
    return Superblocks(parts[0].kind, **whole)


# --- The search ------------------------------------------------------------------------------------------------------------------


def _fit(weight: Tensor, importance: Tensor, kind: str, rounds: int) -> Superblocks:
    out, columns = weight.shape
    x = weight.view(-1, SIZES[kind][0] // GROUP[kind], GROUP[kind])  # (superblocks, groups, width)
    w = importance.view(1, -1, *x.shape[1:]).expand(out, -1, -1, -1).reshape(x.shape)
    d, e, s, m, q = _refined(*(_first_symmetric if kind in SYMMETRIC else _first_affine)(x, w, kind), x, w, kind, rounds)
    return Superblocks(
        kind, d.view(out, -1), e.view(out, -1), s.view(out, -1, x.shape[1]), m.view(out, -1, x.shape[1]), q.view(out, columns)
    )


def _first_affine(x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, e, s, m): each group's own best scale and minimum, then the 6-bit codes nearest to them."""
    top = LIMITS[kind][1]
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    reach = (high - low).clamp(min=1e-30)
    total, sum_x = w.sum(-1), (w * x).sum(-1)
    scale, minimum = reach / top, low.clone()
    best = torch.full_like(scale, torch.inf)
    for step in range(STEPS + 2):
        # first a grid of scales with the minimum at the lowest weight, then twice the codes of the best so far
        guess, base = (reach / (top - 1 + 2 * step / STEPS), low) if step < STEPS else (scale, minimum)
        q = ((x - base[..., None]) / _not_zero(guess)[..., None]).round_().clamp_(0, top)
        wq = w * q
        sum_q, sum_qq, sum_qx = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1)
        det = total * sum_qq - sum_q.square()
        fit_scale = (total * sum_qx - sum_q * sum_x) / _not_zero(det)
        fit_low = (sum_qq * sum_x - sum_q * sum_qx) / _not_zero(det)
        flat = (det <= 0) | (fit_low > 0)  # the minimum may not be above 0
        fit_scale = torch.where(flat, sum_qx / _not_zero(sum_qq), fit_scale).clamp(min=0)
        fit_low = torch.where(flat, torch.zeros_like(low), fit_low)
        error = (w * (q * fit_scale[..., None] + fit_low[..., None] - x).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, fit_scale, scale), torch.where(better, fit_low, minimum)
    d, s = _small(scale, total, 63)
    e, m = _small(-minimum, total, 63)
    return d, e, s, m


def _first_symmetric(x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
    for reach in _reaches(kind):
        guess = extreme / reach
        q = nearest(x, guess[..., None], torch.zeros(()), kind)
        wq = w * q
        sum_qx, sum_qq = (wq * x).sum(-1), (wq * q).sum(-1)
        gain = sum_qx.square() / _not_zero(sum_qq)  # the error that this saves
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, sum_qx / _not_zero(sum_qq), scale)
    widest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))[..., 0]
    lowest, highest = SMALL[kind]
    d = _half(widest / (-128 if kind == "Q6_K" else 1))
    s = (scale / _not_zero(d)[..., None]).round().clamp(lowest, highest)
    return d, torch.zeros_like(d), s, torch.zeros_like(s)


def _reaches(kind: str) -> list[float]:
    """The codes that a group's extreme may lie on, whatever its sign."""
    bottom, top = LIMITS[kind]
    if kind == "IQ4_NL":  # its two ends differ
        return [end * (0.75 + step / STEPS) for end in (bottom, top) for step in range(STEPS // 2)]
    return [bottom + 1 - 2 * step / STEPS for step in range(STEPS)]


def _small(value: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """One fp16 scale for a superblock's non-negative values, and their codes 0 .. top."""
    highest = value.amax(-1)
    best = torch.full_like(highest, torch.inf)
    found = torch.zeros_like(highest)
    for share in (1.0, 0.98, 0.96, 0.94, 1.02):
        d = _half(highest * share / top)
        codes = (value / _not_zero(d)[..., None]).round().clamp(0, top)
        error = (weight * (codes * d[..., None] - value).square()).sum(-1)
        found, best = torch.where(error < best, d, found), torch.minimum(error, best)
    return found, (value / _not_zero(found)[..., None]).round().clamp(0, top) * (found != 0)[..., None]


def _refined(d: Tensor, e: Tensor, s: Tensor, m: Tensor, x: Tensor, w: Tensor, kind: str, rounds: int) -> tuple[Tensor, ...]:
    """In turns: the small scales by one step up or down, group by group; d and e by least squares. The best of all is kept."""
    symmetric = kind in SYMMETRIC
    lowest, highest = SMALL[kind]
    steps = (-1, 0, 1) if lowest < highest else (0,)
    moves = [(i, j) for i in steps for j in ((0,) if symmetric else (-1, 0, 1)) if (i, j) != (0, 0)]
    q, error = _codes(d, e, s, m, x, w, kind)
    best: tuple[Tensor, ...] = (d, e, s, m, q)
    least = error.sum(-1)
    for _ in range(rounds):
        for up, down in moves:
            s2, m2 = (s + up).clamp(lowest, highest), (m + down).clamp(0, highest)
            q2, error2 = _codes(d, e, s2, m2, x, w, kind)
            better = error2 < error
            s, m, error = torch.where(better, s2, s), torch.where(better, m2, m), torch.where(better, error2, error)
            q = torch.where(better[..., None], q2, q)
        best, least = _better(best, least, (d, e, s, m, q), error.sum(-1))
        a, c = s[..., None] * q, -m[..., None].expand_as(q)
        wa, wc = w * a, w * c
        aa, ac, cc = (wa * a).sum((1, 2)), (wa * c).sum((1, 2)), (wc * c).sum((1, 2))
        ax, cx = (wa * x).sum((1, 2)), (wc * x).sum((1, 2))
        det = aa * cc - ac.square()
        both = (det > 1e-9 * aa * cc) & (cc > 0)
        new_d = torch.where(both, (ax * cc - cx * ac) / _not_zero(det), (ax - ac * e) / _not_zero(aa))
        new_e = torch.where(both, (aa * cx - ac * ax) / _not_zero(det), e)
        sound = (aa > 0) & (symmetric | ((new_d > 0) & (new_e >= 0)))
        d, e = torch.where(sound, _half(new_d), d), torch.where(sound, _half(new_e), e)
        q, error = _codes(d, e, s, m, x, w, kind)
        best, least = _better(best, least, (d, e, s, m, q), error.sum(-1))
    return best


def _better(best: tuple[Tensor, ...], least: Tensor, other: tuple[Tensor, ...], error: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    wins = error < least
    chosen = tuple(torch.where(wins.view(-1, *[1] * (b.ndim - 1)), o, b) for b, o in zip(best, other, strict=True))
    return chosen, torch.minimum(error, least)


def _codes(d: Tensor, e: Tensor, s: Tensor, m: Tensor, x: Tensor, w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The nearest codes on a chosen grid, and each group's weighted error."""
    scale, minimum = (d[:, None] * s)[..., None], -(e[:, None] * m)[..., None]
    q = nearest(x, scale, minimum, kind)
    return q, (w * (q * scale + minimum - x).square()).sum(-1)


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value == 0, torch.ones_like(value), value)


def _half(value: Tensor) -> Tensor:
    return value.half().float()


# --- Bytes -----------------------------------------------------------------------------------------------------------------------


def pack(blocks: Superblocks) -> UInt8[Tensor, "out bytes"]:
    """Rows of bytes as ggml reads them."""
    out, kind = len(blocks.d), blocks.kind
    count = blocks.d.numel()
    d, e = (value.reshape(-1, 1).half().view(torch.uint8).view(count, 2) for value in (blocks.d, blocks.e))
    if kind == "IQ4_NL":
        level = torch.searchsorted(LEVELS.to(blocks.q.device), blocks.q.view(count, 32)).to(torch.uint8)
        return torch.cat([d, level[:, :16] | level[:, 16:] << 4], 1).view(out, -1)
    if kind == "Q6_K":
        q = (blocks.q.view(count, 2, 4, 32) + 32).to(torch.uint8)  # halves of 128, quarters of 32
        low = torch.cat([(q[:, :, 0] & 15) | ((q[:, :, 2] & 15) << 4), (q[:, :, 1] & 15) | ((q[:, :, 3] & 15) << 4)], -1)
        high = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
        small = blocks.s.view(count, 16).to(torch.int8).view(torch.uint8)
        return torch.cat([low.view(count, 128), high.view(count, 64), small, d], 1).view(out, -1)
    s, m = blocks.s.view(count, 8).to(torch.uint8), blocks.m.view(count, 8).to(torch.uint8)
    # groups 0 to 3 lie whole in the lower six bits; 4 to 7 lend their upper two to the free bits of those
    scales = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    q = blocks.q.view(count, 4, 2, 32).to(torch.uint8)
    low = (q[:, :, 0] & 15) | (q[:, :, 1] & 15) << 4
    parts = [d, e, *scales]
    if kind == "Q5_K":
        fifth = (blocks.q.view(count, 8, 32).to(torch.uint8) >> 4) << torch.arange(8, dtype=torch.uint8, device=blocks.q.device)[:, None]
        parts.append(fifth.sum(1).to(torch.uint8))
    return torch.cat([*parts, low.view(count, 128)], 1).view(out, -1)


def unpack(rows: UInt8[Tensor, "out bytes"], kind: str) -> Superblocks:
    """The inverse of `pack`."""
    out, size = len(rows), SIZES[kind][1]
    raw = rows.reshape(-1, size)
    count = len(raw)

    def half(at: int) -> Tensor:
        return raw[:, at : at + 2].contiguous().view(torch.float16).float().view(out, -1)

    if kind == "IQ4_NL":
        q = LEVELS.to(raw.device)[torch.cat([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1).int()].view(out, -1)
        d = half(0)
        return Superblocks(kind, d, torch.zeros_like(d), torch.ones_like(d)[..., None], torch.zeros_like(d)[..., None], q)
    if kind == "Q6_K":
        low, high = raw[:, :128].view(count, 2, 2, 32), raw[:, 128:192].view(count, 2, 32)
        quarters = [low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
        q = torch.stack([part | ((high >> 2 * i) & 3) << 4 for i, part in enumerate(quarters)], 2).float() - 32
        s = raw[:, 192:208].contiguous().view(torch.int8).float().view(out, -1, 16)
        zero = s.new_zeros(out, count // out)
        return Superblocks(kind, half(208), zero, s, torch.zeros_like(s), q.view(out, -1))
    a, b, c = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    s = torch.cat([a & 63, (c & 15) | a >> 6 << 4], 1).float().view(out, -1, 8)
    m = torch.cat([b & 63, c >> 4 | b >> 6 << 4], 1).float().view(out, -1, 8)
    low = raw[:, -128:].view(count, 4, 32)
    q = torch.stack([low & 15, low >> 4], 2).view(count, 8, 32)
    if kind == "Q5_K":
        q = q | ((raw[:, 16:48].view(count, 1, 32) >> torch.arange(8, dtype=torch.uint8, device=raw.device)[:, None]) & 1) << 4
    return Superblocks(kind, half(0), half(2), s, m, q.float().view(out, -1))
