"""An importance matrix as `llama-quantize --imatrix` takes it (a GGUF file), from our statistics and back.

For every weight NAME of the model: NAME.in_sum2, F32 (matrices, in), the sums of x^2 over tokens, and NAME.counts, F32 (matrices, 1),
those tokens; one matrix, or one for each expert of a fused tensor. Source: llama.cpp, tools/imatrix and tools/quantize.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from quantkit.disk import replacing
from quantkit.errors import CalibrationError
from quantkit.families.family import Gguf
from quantkit.types import BlockStatistics, InputStats, Statistics

GENERAL_TYPE = "imatrix"


def entry_of(table: Gguf, index: int, local: str) -> tuple[str, int] | None:
    """("blk.3.ffn_down_exps.weight", 17) of experts.17.down_proj in block 3; matrix 0 of a linear that is no expert's."""
    name = table.called(local)
    expert = int(local.split("experts.")[1].split(".")[0]) if "experts." in local else 0
    return (f"blk.{index}.{name}.weight", expert) if name else None


def write_imatrix(path: Path, statistics: Statistics, table: Gguf, datasets: Sequence[str], chunk: int) -> int:
    """Every linear that llama.cpp knows; experts with what the reserve added. Returns how many tensors it covers.

    Args:
        table: what llama.cpp calls the linears.
        datasets: what the statistics were taken on, for whoever reads the file.
        chunk: the longest row, which llama.cpp calls a chunk.
    """
    matrices: dict[str, dict[int, tuple[Any, float]]] = {}
    for index, block in enumerate(statistics.blocks):
        for local, stats in block.inputs.items():
            if (entry := entry_of(table, index, local)) is None:
                continue
            name, expert = entry
            square, tokens = stats.square.numpy(), float(stats.tokens)
            if more := block.reserve.get(local):
                square, tokens = square + more.square.numpy(), tokens + more.tokens
            matrices.setdefault(name, {})[expert] = square, tokens
    rows = int(statistics.about.get("calibration", {}).get("tokens", 0))
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, GENERAL_TYPE)
        writer.add_type(GENERAL_TYPE)
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", max(rows // max(chunk, 1), 1))
        writer.add_uint32("imatrix.chunk_size", chunk)
        for name, experts in matrices.items():
            sums = np.stack([experts[number][0] for number in sorted(experts)]).astype(np.float32)
            counts = np.array([[experts[number][1]] for number in sorted(experts)], dtype=np.float32)
            several = len(experts) > 1
            writer.add_tensor(f"{name}.in_sum2", sums if several else sums[0])
            writer.add_tensor(f"{name}.counts", counts if several else counts[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return len(matrices)


def read_imatrix(path: Path, table: Gguf, widths: Sequence[Mapping[str, int]]) -> Statistics:
    """An importance matrix, ours or llama.cpp's, as statistics.

    It holds no |x| and no Gram: |x| is taken as the root mean square, and there is no second moment off the diagonal.

    Args:
        widths: for each block, its linears by local name and how many inputs each has; those that the file lacks are left out.

    Raises:
        CalibrationError: not an importance matrix, one of another model, or impossible values.
    """
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        kind = reader.get_field("general.type")
        told = kind.contents() if kind is not None else None
        sets = reader.get_field("imatrix.datasets")
        names = list(sets.contents()) if sets is not None else []
    except (ValueError, OSError, KeyError, IndexError, OverflowError) as problem:
        raise CalibrationError(f"{path}: cannot be read as GGUF ({' '.join(str(problem).split())[:120]})") from None
    if told != GENERAL_TYPE:
        raise CalibrationError(f"{path}: not an importance matrix (general.type is {told!r}); llama-imatrix or quantkit calibrate make one")
    blocks = []
    for index, linears in enumerate(widths):
        inputs: dict[str, InputStats] = {}
        for local, width in linears.items():
            if (entry := entry_of(table, index, local)) is None:
                continue
            name, expert = entry
            sums, counts = tensors.get(f"{name}.in_sum2"), tensors.get(f"{name}.counts")
            if sums is None or counts is None:
                continue
            sums, counts = np.atleast_2d(sums), counts.reshape(-1)
            if sums.shape[1] != width or len(counts) != len(sums) or expert >= len(sums):
                raise CalibrationError(f"{path}: {name} is {sums.shape}, the model's {local} has {width} inputs; of another model?")
            square, tokens = torch.from_numpy(sums[expert].copy()), float(counts[expert])
            if not bool((square.isfinite() & (square >= 0)).all()) or not 0 <= tokens < 2**53:
                raise CalibrationError(f"{path}: {name} holds negative or infinite sums, which no run leaves")
            inputs[local] = InputStats(round(tokens), (square * tokens).sqrt(), square, None)
        blocks.append(BlockStatistics(inputs, {}, {}, {}))
    if not any(block.inputs for block in blocks):
        raise CalibrationError(f"{path}: holds no tensor of this model ({', '.join(sorted(tensors)[:2]) or 'it is empty'}, ...)")
    return Statistics(tuple(blocks), (), {"imatrix": path.name, "datasets": names})
