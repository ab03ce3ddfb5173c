"""Choose the next tokens from logits, with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gdn_ops.export.node.arguments import check_integer
from gdn_ops.spec.errors import SpecError, SpecTypeError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: how many of the most likely tokens are drawn from; 0 for all.
        top_p: the smallest set of most likely tokens with this probability is drawn from.
        seed: of the draws; row i of a call has the seed (seed, i), whatever rows are beside it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self, label: str) -> None:
        """Check the numbers.

        Raises:
            SpecError: one is out of range.
        """
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
                kind = type(value).__name__
                raise SpecTypeError(f"{label}: {name} has type {kind}, should be a number")
        if not 0 <= self.temperature < float("inf"):
            raise SpecError(f"{label}: temperature is {self.temperature}, should be 0 or more")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"{label}: top_p is {self.top_p}, should be above 0 and at most 1")
        check_integer(label, "top_k", self.top_k, 0)
        check_integer(label, "seed", self.seed, 0)

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Return a generator for each row."""
        return [np.random.default_rng((self.seed, row)) for row in range(rows)]

    def draw(self, logits: Array, generators: list[np.random.Generator]) -> Array:
        """Draw a token for each row.

        Args:
            logits: (B, vocabulary).
            generators: of the rows.

        Returns:
            (B,) int64.
        """
        if not self.temperature:
            return np.asarray(logits.argmax(-1), np.int64)
        pairs = zip(logits, generators, strict=True)
        return np.array([self._draw(row, generator) for row, generator in pairs], np.int64)

    def _draw(self, logits: Array, generator: np.random.Generator) -> int:
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        kept = logits[order].astype(np.float64)
        # Divided by a tiny number they may be infinite: weights of 0.
        with np.errstate(over="ignore"):
            weights = np.exp((kept - kept[0]) / self.temperature)
        weights /= weights.sum()
        if self.top_p < 1:
            # The first token is always kept, and every one before the mass is reached.
            count = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            weights = weights[:count] / weights[:count].sum()
        return int(order[generator.choice(len(weights), p=weights)])
