"""The nouns: what flows from room to room. Frozen; every tensor bears its shape.

    Recipe -> Plan{BlockPlan{Linear, Fold}} -> InputStats -> SolvedBlock{Solved{Codes}} -> store -> artefact, report

Names: a tensor of the checkpoint has its full `name` ("model.language_model.layers.3.mlp.up_proj.weight"); inside a block everything
goes by its `local` name ("mlp.up_proj", "experts.17.up_proj"), which is the module path in transformers, whatever the file calls it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int8, Int32, UInt8
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, as its header tells."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is stored: integers of `bits` bits, one scale (and zero point) for `group` columns of a row.

    Another grid than that of integers (grid/superblock.py) fills the three in as well: a search that knows only integers then judges by
    the nearest grid it knows.
    """

    bits: int
    group: int  # 0 = the whole row
    symmetric: bool
    # A symmetric scale may be negative: a group's extreme lies on the lowest code, so every code serves. Engines see no difference.
    signed: bool = field(default=False, compare=False)
    grid: str = "integer"  # or q4_k, q5_k, q6_k

    def width(self, columns: int) -> int:
        """Columns that share a scale in a matrix of that many columns."""
        return self.group or columns

    def __str__(self) -> str:
        if self.grid != "integer":
            return self.grid
        kind = "sym" if self.symmetric else "asym"
        return f"w{self.bits} {kind} {f'g{self.group}' if self.group else 'row'}{' signed' if self.signed else ''}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one matrix lies in the checkpoint: a whole tensor, or rows of one expert in a fused (experts, out, in) one."""

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix and what becomes of it."""

    name: str  # as an artefact names it: model.language_model.layers.3.experts.17.up_proj
    local: str  # inside the block: experts.17.up_proj
    source: Source
    shape: tuple[int, int]  # (out, in)
    scheme: Scheme | None  # None = kept as it is
    why: str = ""  # why it is kept, or has another group than the recipe asks for


@dataclass(frozen=True, slots=True)
class Fold:
    """A scale per channel may leave `producer` and enter `consumers`; the block computes the same.

    The producer is a norm (its gain is divided) or a linear (its rows and bias are); consumers' columns are multiplied.
    """

    producer: str
    consumers: tuple[str, ...]
    head: int = 0  # width of a value head, where the consumer's columns repeat the producer's heads (GQA)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One decoder block: its linears, the folds among them, and the tensors that stay (a fold may still scale one)."""

    index: int
    prefix: str  # of the names in the checkpoint, with the dot: model.layers.3.
    linears: tuple[Linear, ...]
    folds: tuple[Fold, ...]
    kept: Mapping[str, str]  # tensor of the block by its local name ("input_layernorm.weight") -> its name in the checkpoint
    stages: tuple[tuple[str, ...], ...] = ()  # its linears in the order of computation: what is solved together
    residual: Mapping[str, str] = field(default_factory=dict)  # linear that adds to the residual -> the norm that reads it there


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to every tensor. Made from names and shapes alone."""

    family: str
    model_type: str
    norm_offset: float  # a norm of this family multiplies by (offset + weight)
    dtype: torch.dtype  # the checkpoint's precision, that of most of its weights: the model runs in it, scales are stored in it
    blocks: tuple[BlockPlan, ...]
    kept: tuple[str, ...]  # tensors outside the blocks, copied bit for bit
    entries: Mapping[str, Entry]  # every tensor of the checkpoint
    ignore: tuple[str, ...]  # the family's patterns of modules that an artefact's config leaves alone
    fingerprint: str  # of everything above, the recipe and the inputs: a store keeps no other plan's blocks

    def linears(self) -> Iterator[Linear]:
        for block in self.blocks:
            yield from block.linears


def expert_of(local: str) -> int | None:
    """17 of "mlp.experts.17.up_proj"; None of a linear that is no expert's ("mlp.shared_experts.up_proj" is none)."""
    match = re.search(r"(?:^|\.)experts\.(\d+)\.", local)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Batch:
    """Token rows of about one length, padded on the right. Attention is causal, so real tokens never see the padding."""

    ids: Int[Tensor, "rows tokens"]
    real: Bool[Tensor, "rows tokens"]
    labels: tuple[Mapping[str, str], ...] = ()  # a row's sample id, language and domain
    prompt: Bool[Tensor, "rows tokens"] | None = None  # tokens that are read and not counted, where the recipe ignores prompts
    row: int = 0  # rows of the set that come before; a run numbers them

    @property
    def counted(self) -> Bool[Tensor, "rows tokens"]:
        """The tokens that statistics are taken over."""
        return self.real if self.prompt is None else self.real & ~self.prompt

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device."""
        prompt = None if self.prompt is None else self.prompt.to(device)
        return Batch(self.ids.to(device), self.real.to(device), self.labels, prompt, self.row)


@dataclass(frozen=True, slots=True)
class InputStats:
    """Sums over the tokens that one linear was fed during calibration (fp32); an expert's tokens count by their squared routing weight.

    With two streams x is the input behind quantized blocks and x + d that of the original model: what rounding can still mend.
    """

    tokens: int
    abs: Float[Tensor, " in"]  # sum of |x|
    square: Float[Tensor, " in"]  # sum of x^2: the Gram's diagonal
    gram: Float[Tensor, "in in"] | None  # sum of x x^T; None where it cannot be afforded (the experts' shared input)
    drift: Float[Tensor, "in in"] | None = None  # sum of d x^T
    residual: Float[Tensor, "out in"] | None = None  # sum of e x^T, e what the residual stream lacks where the linear adds to it
    held: "InputStats | None" = None  # the same sums over tokens that are kept for judging


@dataclass(frozen=True, slots=True)
class OutputStats:
    """Sums of squares of a random probe's gradient g at one linear's outputs (fp32): how far they move what the block computes."""

    tokens: Int[Tensor, ""]
    square: Float[Tensor, " out"]  # sum of g^2
    gram: Float[Tensor, "heads width width"] | None = None  # sum of g g^T, head by head, where rows are those of attention's heads


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What one block's linears were fed, and how its routers chose."""

    inputs: Mapping[str, InputStats]  # by local name; those of the calibration set itself, the routers' own distribution
    reserve: Mapping[str, InputStats]  # what experts below the floor got beyond it, kept apart
    routing: Mapping[str, Int[Tensor, "cells experts"]]  # experts module -> tokens by (language, domain)
    topped_up: Mapping[str, Int[Tensor, " experts"]]  # experts module -> tokens of the reserve that reached each, fed or not


@dataclass(frozen=True, slots=True)
class Statistics:
    """A calibration run's statistics, as they lie in a file."""

    blocks: tuple[BlockStatistics, ...]
    cells: tuple[tuple[str, str], ...]  # (language, domain), the rows of every routing table
    about: Mapping[str, Any]  # model, calibration report, samples, versions


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight on the integer grid: weight ~ (code - zero) * scale.

    Codes are signed, -2^(bits-1) .. 2^(bits-1)-1, and lie packed along the input: 32-bit words, the first code in the lowest bits,
    each with 2^(bits-1) added (the order of compressed-tensors' pack-quantized).
    """

    packed: Int32[Tensor, "out words"]
    scale: Float[Tensor, "out groups"]  # in the plan's dtype; in fp16 where the weight lay on a grid that no other gives back
    zero: Int8[Tensor, "out groups"] | None
    scheme: Scheme
    columns: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight on a grid of ggml's that is not one of integers: rows of bytes as they will be written."""

    rows: UInt8[Tensor, "out bytes"]
    scheme: Scheme
    columns: int


@dataclass(frozen=True, slots=True)
class Solved:
    """One linear, solved. Errors are relative mean squares of its output on the calibration tokens, against the original weight."""

    codes: Codes | Blocks
    error_rounded: float  # plain rounding: what the search had to beat
    error: float
    tokens: int  # calibration tokens that reached it
    fell_back: bool = False  # tokens that were held back liked a simpler solution better than the full search's


@dataclass(frozen=True, slots=True)
class Effort:
    """What the solver may do and how hard it tries; a recipe says so."""

    folds: bool = True  # search AWQ scales; False: every linear on its own
    exponents: int = 20  # steps of the scale grid
    rows: int = 512  # rows of a matrix that a candidate is judged on
    shrinks: int = 10  # clip candidates of a group's range; 1 = its extremes, plain rounding
    expert_floor: int = 128  # an expert with so many tokens weighs its own statistics and the pool alike
    compensate: bool = False  # a column's rounding error is made good by the columns behind it, through the Gram
    damping: float = 0.01  # of the Gram under compensation, in mean diagonals
    sweeps: int = 0  # of coordinate descent over groups after that
    retarget: float = 0.0  # share of the inputs' drift from the original model's that the weights make good
    retarget_damping: float = 0.2  # in mean diagonals

    @property
    def searches(self) -> bool:
        """Whether codes can be other than those of plain rounding."""
        return self.compensate or self.shrinks > 1


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What the search of one fold found."""

    producer: str
    exponents: tuple[float, float] | None  # of mean |x| and of the column magnitude; None = identity won
    scale_range: tuple[float, float]
    loss_ratio: float  # best candidate's loss over the identity's


@dataclass(frozen=True, slots=True)
class SolvedBlock:
    index: int
    linears: Mapping[str, Solved]  # by local name
    folded: Mapping[str, Tensor]  # kept tensors that a fold changed, by local tensor name ("input_layernorm.weight")
    folds: tuple[FoldReport, ...]
    # relative change of the block's output by its folds, in fp32, where it was measured; beyond what fp32 explains they are undone
    proof: float | None = None


Json = dict[str, Any]
