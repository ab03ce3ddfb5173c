"""Draw the tasks of keys and values, and pieces of text: tokens, and targets where one is due."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdn_ops.environment.text import shipped_text

KEYS, VALUES, FILLERS = 32, 16, 32
FIRST_VALUE = KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
NEEDLE, QUERY, SEPARATOR, NONE = range(FIRST_FILLER + FILLERS, FIRST_FILLER + FILLERS + 4)
VOCABULARY = NONE + 1
SILENT = -100
"""The target of a token after which nothing is asked."""

BYTES = 256
HELD_OUT = 0.1
"""Share of the text, at its end, that is not trained on."""

Batch = tuple[Tensor, Tensor]
"""Tokens (rows, T) int64 and targets of the same shape."""


_CPU = torch.device("cpu")


def distinct(rows: int, count: int, random: torch.Generator) -> Tensor:
    """Return `count` different keys per row, (rows, count)."""
    return _uniform(rows, KEYS, random).argsort(1)[:, :count]


def _uniform(rows: int, count: int, random: torch.Generator) -> Tensor:
    return torch.rand(rows, count, generator=random, dtype=torch.float32, device=_CPU)


def _values(rows: int, count: int, random: torch.Generator) -> Tensor:
    drawn = torch.randint(VALUES, (rows, count), generator=random, device=_CPU)
    return drawn + FIRST_VALUE


def recall(rows: int, random: torch.Generator, count: int = 8) -> Batch:
    """Write pairs, ask for all of them."""
    keys = distinct(rows, count, random)
    values = _values(rows, count, random)
    order = _uniform(rows, count, random).argsort(1)
    text = torch.stack([keys, values], 2).flatten(1)
    return question(text, keys.gather(1, order), values.gather(1, order))


def overwrite(rows: int, random: torch.Generator, count: int = 8) -> Batch:
    """Write every key twice, in any order; ask for all of them."""
    keys = distinct(rows, count, random)
    order = _uniform(rows, 2 * count, random).argsort(1)
    written = keys.repeat(1, 2).gather(1, order)
    values = _values(rows, 2 * count, random)
    # The last write of a key is the one with the largest place.
    asked = distinct(rows, KEYS, random)
    asked = keys.gather(1, asked.masked_select(asked < count).view(rows, count))
    place = torch.arange(2 * count, device=_CPU)
    last = ((written[:, None] == asked[..., None]) * (place + 1)).argmax(-1)
    return question(torch.stack([written, values], 2).flatten(1), asked, values.gather(1, last))


def switch(rows: int, random: torch.Generator, count: int = 8) -> Batch:
    """Write pairs, a separator, other pairs; ask for old keys and new ones."""
    keys = distinct(rows, 2 * count, random)
    values = _values(rows, 2 * count, random)
    pairs = torch.stack([keys, values], 2).flatten(1)
    cut = torch.full((rows, 1), SEPARATOR, dtype=torch.int64, device=_CPU)
    text = torch.cat([pairs[:, : 2 * count], cut, pairs[:, 2 * count :]], 1)
    order = _uniform(rows, 2 * count, random).argsort(1)
    answers = torch.where(order < count, NONE, values.gather(1, order))
    return question(text, keys.gather(1, order), answers)


def question(text: Tensor, asked: Tensor, answers: Tensor) -> Batch:
    """Put the keys that are asked for behind a text; each answer is the target at its key."""
    tokens = torch.cat([text, torch.full_like(asked[:, :1], QUERY), asked], 1)
    targets = torch.full_like(tokens, SILENT)
    targets[:, -asked.shape[1] :] = answers
    return tokens, targets


PAIRS: dict[str, Callable[[int, torch.Generator, int], Batch]] = {
    "recall": recall,
    "overwrite": overwrite,
    "switch": switch,
}
"""The tasks of keys and values, by name; their last argument is the number of keys."""


class Text:
    """Hold the demo's text as bytes, (T,) int64: what is trained on, and what is held out."""

    def __init__(self) -> None:
        whole = torch.frombuffer(bytearray(shipped_text()), dtype=torch.uint8).long()
        cut = int(len(whole) * (1 - HELD_OUT))
        self.trained, self.held_out = whole[:cut], whole[cut:]

    def draw(self, rows: int, length: int, random: torch.Generator) -> Batch:
        """Return pieces of what is trained on, and the byte behind each of theirs."""
        last = len(self.trained) - length
        starts = torch.randint(last, (rows, 1), generator=random, device=_CPU)
        pieces = self.trained[starts + torch.arange(length + 1, device=_CPU)]
        return pieces[:, :-1], pieces[:, 1:]

    def held_out_pieces(self, length: int) -> Batch:
        """Return what is held out in pieces, one behind the other, without the incomplete last."""
        count = (len(self.held_out) - 1) // length
        pieces = self.held_out[: count * length + 1].unfold(0, length + 1, length)
        return pieces[:, :-1], pieces[:, 1:]

    def bits_by_frequency(self) -> float:
        """Return the bits per byte of what is held out by the frequencies of what is trained on."""
        # One more of each: a byte that was never seen costs no infinity.
        counts = torch.bincount(self.trained, minlength=BYTES).double() + 1
        return float(-(counts / counts.sum()).log2()[self.held_out].mean())
