"""Refuse to continue from a cache without the padding that its rows have on the left.

Linear attention needs it only while a cache is filled. Attention layers need it in every call:
without it they take the padding in the cache for tokens, in silence.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor

from gdn_ops.nn.values import has_values
from gdn_ops.spec.errors import SpecError

PADDED = "_gdn_ops_left_padded"
"""Attribute of a cache: what its first layer was told when it was filled."""


class Filled(NamedTuple):
    """Hold what a layer was told of padding on the left."""

    layer: Any
    length: int
    padding: list[int]
    """Tokens of padding that each row begins with."""


def note(cache: Any, layer: Any, mask: Tensor | None) -> None:
    """Note on a cache what the first layer that fills it is told of padding, by its index."""
    before: Filled | None = getattr(cache, PADDED, None)
    if before is not None and before.layer != layer:
        return
    filled = Filled(layer, 0, [])
    if mask is not None and mask.dim() == 2 and has_values(mask):
        filled = Filled(layer, mask.shape[1], _padding(mask))
    vars(cache)[PADDED] = filled


def check(cache: Any, mask: Any, tokens: int) -> None:
    """Check the mask of a model that continues from a cache with this many tokens.

    Raises:
        SpecError: the mask does not begin with the padding of the tokens in the cache.
    """
    filled: Filled = getattr(cache, PADDED)
    layer, length, padding = filled
    if not any(padding) or not continues(cache, layer):
        return
    if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return  # `generate` makes masks of other forms from the whole mask.
    row = next(row for row, count in enumerate(padding) if count)
    if mask is None:
        given = "is None"
    elif mask.shape[1] < length + tokens:
        given = f"has shape {tuple(mask.shape)}"
    elif not has_values(mask):
        return
    else:
        found = _padding(mask[:, :length])
        # Beams are reordered, and rows that have ended are left out.
        if sorted(found) == sorted(padding) or (
            len(found) != len(padding) and set(found) <= set(padding)
        ):
            return
        pairs = zip(found, padding, strict=False)
        row = next((row for row, (a, b) in enumerate(pairs) if a != b), row)
        given = f"begins with {found[row] if row < len(found) else 0} tokens of padding"
    raise SpecError(
        f"accelerate: attention_mask {given} in a call that continues from a cache, should be that "
        f"of all tokens, whose row {row} begins with {padding[row]} tokens of padding: attention "
        f"layers would take the padding in the cache for tokens"
    )


def _padding(mask: Tensor) -> list[int]:
    """Return how many tokens of padding each row begins with."""
    counts: list[int] = mask.ne(0).cumsum(1).eq(0).sum(1).tolist()
    return counts


def continues(cache: Any, index: Any) -> bool:
    """Return whether a cache holds the state of a layer; only some caches take its index."""
    has_previous = cache.has_previous_state
    if not callable(has_previous):
        return bool(has_previous)
    takes_index = bool(inspect.signature(has_previous).parameters)
    return bool(has_previous(index) if takes_index else has_previous())
