"""Any grid's codes -> the weight that they stand for."""

from jaxtyping import Float
from torch import Tensor

from quantkit.grid import superblock
from quantkit.grid.integer import from_codes
from quantkit.types import Blocks, Codes


def decoded(codes: Codes | Blocks) -> Float[Tensor, "out in"]:
    """In fp32."""
    if isinstance(codes, Blocks):
        return superblock.decode(superblock.unpack(codes.rows, codes.scheme.grid.upper()))
    return from_codes(codes)
