"""The tasks of niah.py: token sequences, and the targets where an answer is due."""

from __future__ import annotations

import torch
from torch import Tensor

KEYS, VALUES, FILLERS = 32, 16, 32
FIRST_VALUE = KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
NEEDLE, QUERY, SEPARATOR, NONE = range(FIRST_FILLER + FILLERS, FIRST_FILLER + FILLERS + 4)
VOCABULARY = NONE + 1
SILENT = -100
"""The target of a token after which nothing is asked."""

NEEDLES = ("needle 1", "needle 2", "needle 3")
SENTENCE = torch.arange(8) * 4 % FILLERS + FIRST_FILLER


def needles(task: str, rows: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
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
    # What follows the last token of the answer is never asked.
    return tokens, targets


def distinct(rows: int, count: int, random: torch.Generator) -> Tensor:
    """Return `count` different keys per row."""
    return torch.rand(rows, KEYS, generator=random).argsort(1)[:, :count]


def recall(rows: int, random: torch.Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    """Write pairs, ask for all of them."""
    keys = distinct(rows, count, random)
    values = torch.randint(VALUES, (rows, count), generator=random) + FIRST_VALUE
    order = torch.rand(rows, count, generator=random).argsort(1)
    text = torch.stack([keys, values], 2).flatten(1)
    return question(text, keys.gather(1, order), values.gather(1, order))


def overwrite(rows: int, random: torch.Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    """Write every key twice, in any order; ask for all of them."""
    keys = distinct(rows, count, random)
    order = torch.rand(rows, 2 * count, generator=random).argsort(1)
    written = keys.repeat(1, 2).gather(1, order)
    values = torch.randint(VALUES, (rows, 2 * count), generator=random) + FIRST_VALUE
    # The last write of a key is the one with the largest place.
    asked = distinct(rows, KEYS, random)
    asked = keys.gather(1, asked.masked_select(asked < count).view(rows, count))
    place = torch.arange(2 * count)
    last = ((written[:, None] == asked[..., None]) * (place + 1)).argmax(-1)
    return question(torch.stack([written, values], 2).flatten(1), asked, values.gather(1, last))


def switch(rows: int, random: torch.Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    """Write pairs, a separator, other pairs; ask for old keys and new ones."""
    keys = distinct(rows, 2 * count, random)
    values = torch.randint(VALUES, (rows, 2 * count), generator=random) + FIRST_VALUE
    pairs = torch.stack([keys, values], 2).flatten(1)
    cut = torch.full((rows, 1), SEPARATOR)
    text = torch.cat([pairs[:, : 2 * count], cut, pairs[:, 2 * count :]], 1)
    order = torch.rand(rows, 2 * count, generator=random).argsort(1)
    answers = torch.where(order < count, NONE, values.gather(1, order))
    return question(text, keys.gather(1, order), answers)


def question(text: Tensor, asked: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Put the keys that are asked for behind a text; each answer is the target at its key."""
    tokens = torch.cat([text, torch.full_like(asked[:, :1], QUERY), asked], 1)
    targets = torch.full_like(tokens, SILENT)
    targets[:, -asked.shape[1] :] = answers
    return tokens, targets


OTHERS = {"recall": recall, "overwrite": overwrite, "switch": switch}


def draw(task: str, rows: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    if task in NEEDLES:
        return needles(task, rows, length, random)
    return OTHERS[task](rows, random)
