"""The tasks of niah.py: needles in a haystack, and those of `gdn-ops bench ablation`."""

from __future__ import annotations

import torch

from gdn_ops.bench.ablation.tasks import (
    FILLERS,
    FIRST_FILLER,
    FIRST_VALUE,
    KEYS,
    NEEDLE,
    PAIRS,
    QUERY,
    SILENT,
    VALUES,
    Batch,
)

NEEDLES = ("needle 1", "needle 2", "needle 3")
SENTENCE = torch.arange(8) * 4 % FILLERS + FIRST_FILLER
COUNT = 8
"""Keys of the tasks that have no needle."""


def needles(task: str, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return tokens (rows, length) and targets, SILENT but for the answer."""
    span = 4 if task == "needle 3" else 1
    filler = length - 2 * span - 4
    if task == "needle 1":
        hay = SENTENCE.repeat(filler // len(SENTENCE) + 1)[:filler].expand(rows, -1)
    else:
        hay = torch.randint(FILLERS, (rows, filler), generator=random) + FIRST_FILLER
    key = torch.randint(KEYS, (rows, 1), generator=random)
    value = torch.randint(VALUES, (rows, span), generator=random) + FIRST_VALUE
    needle = torch.cat([torch.full((rows, 1), NEEDLE), key, value], 1)
    depth = torch.randint(filler + 1, (rows, 1), generator=random)
    # The needle stands at depth ... depth + span + 1; the hay flows around it.
    place = torch.arange(filler + span + 2) - depth
    inside = (place >= 0) & (place < span + 2)
    source = torch.where(place < 0, place, place - span - 2) + depth
    text = torch.where(
        inside,
        needle.gather(1, place.clamp(0, span + 1)),
        hay.gather(1, source.clamp(0, max(filler - 1, 0))),
    )
    asked = torch.cat([torch.full((rows, 1), QUERY), key, value], 1)
    tokens = torch.cat([text, asked], 1)
    targets = torch.full_like(tokens, SILENT)
    targets[:, -span - 1 : -1] = value
    # Ask nothing of what follows the last token of the answer.
    return tokens, targets


def draw(task: str, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return tokens and targets of a task; the length is that of needles."""
    if task in NEEDLES:
        return needles(task, rows, length, random)
    return PAIRS[task](rows, random, COUNT)
