"""Say where the tokens of one segment lie: read them from a call's tensors, and write results.

The rows of a span are the sequences that run it side by side. Each row has a whole number of
chunks; where a sequence ends before its last chunk does, the rest is padding: zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Numbers = NDArray[numpy.int64]
"""Whole numbers, one per sequence."""


@dataclass(frozen=True)
class Span:
    """Describe the tokens of one segment, for some rows of a cohort.

    Attributes:
        rows: which rows of the cohort.
        chunk_size: C, tokens per chunk.
        chunks: n, chunks per row.
    """

    rows: slice
    chunk_size: int
    chunks: int

    def view(self, x: Tensor) -> Tensor | None:
        """Return the tokens in x (B, T, ...) as a view (rows, <= n C, ...), if there is one."""
        raise NotImplementedError

    def read(self, x: Tensor) -> Tensor:
        """Return the tokens of x (B, T, ...) as (rows, n C, ...), padded with zeros."""
        raise NotImplementedError

    def write(self, into: Tensor, x: Tensor) -> None:
        """Write x (rows, n, C, ...), without its padding, into the tokens of (B, T, ...)."""
        raise NotImplementedError


@dataclass(frozen=True)
class EvenSpan(Span):
    """Describe the tokens start..stop of every row, where rows are as long and side by side.

    Attributes:
        start, stop: within a row.
        place: (first token, rows, tokens per row) of packed rows; of those of a batch, which.
    """

    start: int
    stop: int
    place: tuple[int, int, int] | slice

    def view(self, x: Tensor) -> Tensor:
        if isinstance(self.place, slice):
            return x[self.place, self.start : self.stop]
        first, rows, length = self.place
        if rows == 1:
            return x[:, first + self.start : first + self.stop]
        batch: Tensor = x[0, first : first + rows * length].unflatten(0, (rows, length))
        return batch[:, self.start : self.stop]

    def read(self, x: Tensor) -> Tensor:
        x = self.view(x)
        missing = self.chunks * self.chunk_size - x.shape[1]
        if missing:
            x = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x

    def write(self, into: Tensor, x: Tensor) -> None:
        target = self.view(into)
        if self.stop - self.start == self.chunks * self.chunk_size:
            target.unflatten(1, x.shape[1:3]).copy_(x)
        else:
            target.copy_(x.flatten(1, 2)[:, : self.stop - self.start])


@dataclass(frozen=True)
class GatheredSpan(Span):
    """Describe tokens by their indices, for packed rows of any lengths and places.

    Attributes:
        tokens: (rows n C,), the index of every token; any of the call's for padding.
        padding: (rows n C,), whether a token is padding; None where none is.
        kept: indices of the tokens that are no padding.
    """

    tokens: Tensor
    padding: Tensor | None
    kept: Tensor | None

    @staticmethod
    def of(
        rows: slice, starts: Numbers, lengths: Numbers, size: int, chunks: int, device: torch.device
    ) -> GatheredSpan:
        """Return the span of `lengths` tokens from `starts` on, a pair per row."""
        place = numpy.arange(chunks * size)
        tokens = starts[:, None] + numpy.minimum(place, lengths[:, None] - 1)
        padding = (place >= lengths[:, None]).ravel()
        index = torch.from_numpy(tokens.ravel()).to(device)
        if not padding.any():
            return GatheredSpan(rows, size, chunks, index, None, None)
        kept = torch.from_numpy(numpy.flatnonzero(~padding)).to(device)
        return GatheredSpan(rows, size, chunks, index, torch.from_numpy(padding).to(device), kept)

    def view(self, x: Tensor) -> None:
        return None

    def read(self, x: Tensor) -> Tensor:
        found = x[0].index_select(0, self.tokens)
        if self.padding is not None:
            padding = self.padding.view(-1, *(1,) * (found.dim() - 1))
            found = found.masked_fill(padding, 0)
        batch: Tensor = found.unflatten(0, (-1, self.chunks * self.chunk_size))
        return batch

    def write(self, into: Tensor, x: Tensor) -> None:
        tokens, x = self.tokens, x.flatten(0, 2)
        if self.kept is not None:
            tokens, x = tokens[self.kept], x.index_select(0, self.kept)
        into[0].index_copy_(0, tokens, x.to(into.dtype))
