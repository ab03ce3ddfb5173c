"""Propose tokens that a language model may say next, for it to check them in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.nn.values import check_counts, check_tensor
from gdn_ops.spec.errors import SpecError, SpecTypeError

Draft = Callable[[Tensor], Tensor | Sequence[int]]
"""Map the tokens of one row so far, (length,) int64, to those that may follow."""


class Proposals(NamedTuple):
    """Hold what a draft proposes for every row.

    Attributes:
        tokens: (B, n) int64, what stands behind the count of a row being any token.
        counts: how many of them are proposed in each row.
        chances: (B, n, vocab_size) float32, with which the tokens were drawn; None where they were
            not drawn.
    """

    tokens: Tensor
    counts: list[int]
    chances: Tensor | None = None


class PromptLookup:
    """Propose what followed the last words of a text where they stood before.

    It needs no second model, and is right where a text repeats itself: code, summaries, answers
    that quote their question.

    Args:
        num_tokens: how many tokens are proposed at most.
        longest: of how many tokens the words are at most; shorter ones are looked for when longer
            ones do not stand before.

    Raises:
        SpecError: an argument is no positive integer.

    Source:
        Saxena, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding

    Example:
        >>> import torch
        >>> from gdn_ops.nn import PromptLookup
        >>> PromptLookup(3)(torch.tensor([7, 1, 2, 3, 4, 5, 1, 2]))
        tensor([3, 4, 5])
    """

    def __init__(self, num_tokens: int = 4, longest: int = 3) -> None:
        check_counts("PromptLookup", num_tokens=num_tokens, longest=longest)
        self.num_tokens, self.longest = int(num_tokens), int(longest)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return what may follow the tokens of one row.

        Args:
            tokens: (length,) integers.

        Returns:
            (n,), at most `num_tokens`, none where the last token is a new one.

        Raises:
            SpecError: tokens are not of one row.
        """
        check_tensor("PromptLookup", "tokens", tokens)
        if tokens.dim() != 1:
            raise SpecError(
                f"PromptLookup: tokens has shape {tuple(tokens.shape)}, should be (length,)"
            )
        length = len(tokens)
        for size in range(min(self.longest, length - 1), 0, -1):
            windows = tokens[:-1].unfold(0, size, 1)
            ends = (windows == tokens[-size:]).all(1).nonzero()[:, 0] + size
            if len(ends):
                # The latest with enough behind it, or the one with the most.
                whole = ends[ends <= length - self.num_tokens]
                end = int(whole[-1] if len(whole) else ends[0])
                return tokens[end : end + self.num_tokens]
        return tokens[:0]


def proposed(
    owner: str, draft: Draft, texts: Sequence[Tensor], limits: Sequence[int], most: int, size: int
) -> Proposals:
    """Return what a function proposes for every row, checked.

    Args:
        owner: what a message starts with.
        draft: the function.
        texts: the tokens of each row, (length,).
        limits: how many tokens there is still room for in each row.
        most: how many tokens the function may propose.
        size: vocab_size.

    Raises:
        SpecError: it proposes something else than tokens, or too many.
    """
    pairs = zip(texts, limits, strict=True)
    rows = [_checked(owner, draft(x), most, size)[:n] if n else x[:0] for x, n in pairs]
    counts = [len(row) for row in rows]
    tokens = texts[0].new_zeros(len(rows), max(counts))
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row.to(to.device)
    return Proposals(tokens, counts)


def _checked(owner: str, tokens: Any, most: int, size: int) -> Tensor:
    """Return the tokens that a function proposed for one row, as a tensor."""
    try:
        row = torch.as_tensor(tokens, dtype=None, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(tokens).__name__
        raise SpecTypeError(
            f"{owner}: the draft returned a {kind}, should return a list or a tensor of tokens"
        ) from error
    if row.dim() != 1 or (len(row) and (row.is_floating_point() or row.dtype == torch.bool)):
        dtype = str(row.dtype).removeprefix("torch.")
        raise SpecError(
            f"{owner}: the draft returned {dtype} of shape {tuple(row.shape)}, should return "
            f"integers of shape (n,)"
        )
    if len(row) > most:
        raise SpecError(
            f"{owner}: the draft returned {len(row)} tokens, should return at most {most}"
        )
    if len(row):
        low, high = (int(x) for x in row.aminmax())
        if low < 0 or high >= size:
            raise SpecError(
                f"{owner}: the draft returned tokens in [{low}, {high}], should return tokens in "
                f"[0, vocab_size - 1] = [0, {size - 1}]"
            )
    return row.long()
