"""Rows of tokens as batches: whole samples of like lengths together, or rows filled to one length."""

from collections.abc import Iterable, Sequence

import torch

from quantkit.calibrate.draw import Row
from quantkit.calibrate.render import ROLES, SPEAKERS
from quantkit.errors import CalibrationError
from quantkit.types import Batch

PROMPT = bytes(SPEAKERS.index(role) for role in ROLES if role != "assistant")


def make_batches(rows: Sequence[Row], batch_tokens: int, fill_to: int | None = None, ignore_prompts: bool = False) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens (a longer row stands alone), padded on the right.

    Args:
        fill_to: None keeps a sample a row, like lengths together; a number packs samples of one language and domain end to end into rows
            of that many tokens, which see each other as one text, as packed training rows do.
        ignore_prompts: mark the turns of system, user and tools as left out of the statistics.

    Raises:
        CalibrationError: no row of two tokens, or, where prompts are ignored, none that is more than a prompt.
    """
    rows = [row for row in rows if len(row.ids) > 1]
    if not rows:
        raise CalibrationError("the calibration set is empty: no sample is longer than one token")
    if fill_to:
        rows = _packed(rows, fill_to)
    batches = _batched(rows, batch_tokens, ignore_prompts)
    if not any(bool(batch.counted.any()) for batch in batches):
        raise CalibrationError(
            "no row reaches an assistant's turn, so ignore_prompts leaves nothing to count; give a longer sequence_length"
        )
    return batches


def reserve_batches(rows: Iterable[Row], tokens: int, batch_tokens: int, ignore_prompts: bool = False) -> list[Batch]:
    """Rows in their order until there are `tokens`, as batches of like lengths that come in that order too, some rows at a time."""
    batches: list[Batch] = []
    some: list[Row] = []
    total = size = 0
    for row in rows:
        if total + len(row.ids) > tokens:
            break
        some.append(row)
        total, size = total + len(row.ids), size + len(row.ids)
        if size >= 4 * batch_tokens:
            batches += _batched(some, batch_tokens, ignore_prompts)
            some, size = [], 0
    return batches + _batched(some, batch_tokens, ignore_prompts)


def _batched(rows: Sequence[Row], batch_tokens: int, ignore_prompts: bool) -> list[Batch]:
    rows = sorted(rows, key=lambda row: -len(row.ids))
    batches: list[Batch] = []
    start = 0
    while start < len(rows):
        width = len(rows[start].ids)
        group = rows[start : start + max(1, batch_tokens // width)]
        ids = torch.zeros(len(group), width, dtype=torch.long)
        real = torch.zeros(len(group), width, dtype=torch.bool)
        prompt = torch.zeros(len(group), width, dtype=torch.bool) if ignore_prompts else None
        for number, row in enumerate(group):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            real[number, : len(row.ids)] = True
            if prompt is not None:
                prompt[number, : len(row.ids)] = torch.tensor([speaker in PROMPT for speaker in row.speakers])
        batches.append(Batch(ids, real, tuple(row.labels for row in group), prompt, start))
        start += len(group)
    return batches


def _packed(rows: Sequence[Row], length: int) -> list[Row]:
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.labels["language"], row.labels["domain"]), []).append(row)
    packed = []
    for (language, domain), group in sorted(cells.items()):
        ids = [token for row in group for token in row.ids]
        speakers = b"".join(row.speakers for row in group)
        for start in range(0, len(ids), length):
            labels = {"id": f"{language}-{domain}-{start // length + 1}", "language": language, "domain": domain}
            packed.append(Row(ids[start : start + length], speakers[start : start + length], labels, ""))
    return [row for row in packed if len(row.ids) > 1]
