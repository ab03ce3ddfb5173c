"""Continue texts by one call of the graph at a time, so that several of them can take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gdn_ops.export.runtime.sampling import Sampling
from gdn_ops.export.runtime.text_run import TextRun

Array = np.ndarray[Any, Any]

STOP, LENGTH = "stop", "length"
"""Tell why a text ends: a token that ends it was drawn, or as many as were asked for."""


class TextGeneration:
    """Continue texts; `ModelSession.begin` makes it, and does not call the graph yet.

    Many of them can be begun with one session and advanced in any order, by one thread. Each has
    states of its own, from its first call to its last or to `close`.

    Args:
        make: makes what holds the states.
        ids: (B, T) int64, the prompts.
        mask: (B, T), 0 for padding before a prompt.
        count: how many tokens are added at most.
        sampling: how they are drawn.
        ends: tokens that end a text.
        chunk: how many tokens of the prompts one call reads.
    """

    def __init__(
        self,
        make: Callable[[], TextRun],
        ids: Array,
        mask: Array,
        count: int,
        sampling: Sampling,
        ends: set[int],
        chunk: int,
    ) -> None:
        self._make, self._ids, self._mask, self._chunk = make, ids, mask, chunk
        self._sampling, self._generators = sampling, sampling.generators(len(ids))
        self._ends, self._left = list(ends), count
        self._going = np.ones(len(ids), bool)
        self._run: TextRun | None = None
        self._start = 0
        self._drawn: Array | None = None
        self._is_closed = not count

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens the longest prompt has."""
        return int(self._ids.shape[1])

    @property
    def is_reading(self) -> bool:
        """Return whether the next call of the graph reads a part of the prompts."""
        return not self._is_closed and self._drawn is None

    @property
    def is_done(self) -> bool:
        """Return whether all texts have ended, or `close` was called."""
        return self._is_closed

    @property
    def reasons(self) -> list[str | None]:
        """Return why each text has ended, "stop" or "length", and None where it goes on."""
        behind = None if self._left else LENGTH
        return [behind if is_on else STOP for is_on in self._going]

    def advance(self) -> list[int | None]:
        """Call the graph once.

        Returns:
            The next token of each text, and None where one has ended; nothing while prompts are
            being read, and once all texts have ended.

        Raises:
            ModelRefusedError: onnxruntime cannot run the graph; the generation is closed.
        """
        if self._is_closed:
            return []
        try:
            logits = self._called()
        except BaseException:
            self.close()
            raise
        return [] if logits is None else self._next(logits[:, -1])

    def _called(self) -> Array | None:
        """Return the logits of one call, or None before the end of the prompts."""
        if self._run is None:
            self._run = self._make()
        if self._drawn is not None:
            return self._run.read(self._drawn[:, None])
        cut = slice(self._start, self._start + self._chunk)
        logits = self._run.read(self._ids[:, cut], self._mask[:, cut])
        self._start = cut.stop
        return logits if self._start >= self._ids.shape[1] else None

    def _next(self, last: Array) -> list[int | None]:
        """Return the tokens that are drawn from logits (B, vocabulary)."""
        self._drawn = self._sampling.draw(last, self._generators)
        self._going &= ~np.isin(self._drawn, self._ends)
        self._left -= 1
        if not self._left or not self._going.any():
            self.close()
        if not self._going.any():
            return []
        pairs = zip(self._drawn, self._going, strict=True)
        return [int(token) if is_on else None for token, is_on in pairs]

    def close(self) -> None:
        """End all texts and free their states; nothing happens the second time."""
        self._is_closed, self._run = True, None

    def __iter__(self) -> Iterator[list[int | None]]:
        """Yield the tokens of each step until all texts have ended, then close."""
        try:
            while not self._is_closed:
                tokens = self.advance()
                if tokens:
                    yield tokens
        finally:
            self.close()
