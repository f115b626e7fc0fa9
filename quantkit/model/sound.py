"""What a block gives its solver: weights that are numbers, and statistics of every linear. Anything else is refused, by its name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, CheckpointError
from quantkit.finite import finite
from quantkit.model.blocks import Skeleton
from quantkit.model.experts import weight_of
from quantkit.types import BlockPlan, InputStats, Linear


def block_weights(plan: BlockPlan, block: nn.Module, skeleton: Skeleton, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views of every linear to be solved, and the block's other tensors, by local name, as the model computes with them.

    Raises:
        CheckpointError: a weight that is not finite.
    """
    weights, checkpoint, device = {}, skeleton.checkpoint, skeleton.device
    for linear in plan.linears:
        if linear.scheme is None:
            continue
        weight = weight_of(block, linear.local)
        # published leftovers that the model does not read (keys and values of layers that borrow them) have no module
        weights[linear.local] = checkpoint.view(linear.source.tensor).to(device, dtype) if weight is None else weight
        check_weight(linear, weights[linear.local])
    return weights, {local: checkpoint.view(name).to(device, dtype) for local, name in plan.kept.items()}


def check_weight(linear: Linear, weight: Tensor) -> None:
    """Refuse a weight that is not finite.

    Raises:
        CheckpointError: NaN or infinity.
    """
    if not finite(weight):
        raise CheckpointError(f"{linear.source.tensor}: holds NaN or infinity; the checkpoint is damaged")


def check_stats(plan: BlockPlan, block: nn.Module, stats: Mapping[str, InputStats]) -> None:
    """Refuse to solve a linear that the model never called.

    Raises:
        CalibrationError: there is one.
    """
    for linear in plan.linears:
        if linear.scheme is not None and linear.local not in stats and weight_of(block, linear.local) is not None:
            raise CalibrationError(f"{linear.name}: the model never called this linear during calibration, so it cannot be solved")
    check_numbers(plan, stats)


def check_numbers(plan: BlockPlan, stats: Mapping[str, InputStats]) -> None:
    """Refuse to solve from what is no number.

    Raises:
        CheckpointError: NaN or infinity in a linear's inputs.
    """
    for linear in plan.linears:
        fed = stats.get(linear.local)
        if fed is not None and not finite(fed.square):
            raise CheckpointError(
                f"{linear.name}: NaN or infinity in the activations that it is fed: a damaged weight, or fp16 that overflows "
                "(convert to bf16)"
            )
