"""Move the tokens of padded rows to the front of their rows, and back again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Hold how the tokens of a batch of rows are moved to the front, padding behind.

    Then the convolution finds the token before, or the state, right in front of every token.

    Attributes:
        is_token: (B, T) bool, in the caller's order.
        order: (B, T) the caller's index of each place.
        lengths: (B,) number of tokens.
    """

    is_token: Tensor
    order: Tensor
    lengths: Tensor

    @staticmethod
    def of(mask: Tensor) -> Padding:
        """Return the padding that a mask (B, T) describes, 0 or False where a token is padding."""
        is_token = mask.ne(0)
        order = torch.argsort(is_token.logical_not().byte(), dim=1, stable=True)
        return Padding(is_token, order, is_token.sum(1))

    def front(self, x: Tensor) -> Tensor:
        """Move the tokens of (B, T, width) to the front, with 0 at the padding."""
        moved = x.gather(1, self.order[..., None].expand_as(x))
        # Padding may hold anything, NaN too.
        return moved.masked_fill(self.behind(), 0)

    def back(self, y: Tensor) -> Tensor:
        """Move the tokens of (B, T, width) back to their places, with 0 at the padding."""
        moved = torch.empty_like(y).scatter(1, self.order[..., None].expand_as(y), y)
        return moved.masked_fill(self.is_token.logical_not()[..., None], 0)

    def behind(self) -> Tensor:
        """Return a mask (B, T, 1), True at the padding, in the order of `front`."""
        place = torch.arange(self.order.shape[1], device=self.order.device)
        return (place >= self.lengths[:, None]).unsqueeze(-1)
