"""Show a layer's padding mask to its functions, and guard a cache against right padding."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.compat.transformers import left_padding, packing
from gdn_ops.compat.transformers.positions import PADDED, check_positions
from gdn_ops.spec.errors import SpecError

_current = threading.local()
"""`mask`, `sequences`: what the layer that runs in this thread was given, for its functions."""

MASK = "attention_mask"


def mask_for(query: Tensor) -> Tensor | None:
    """Return the padding mask of the running layer if it fits these tokens, else None."""
    mask: Tensor | None = getattr(_current, "mask", None)
    return mask if mask is not None and mask.shape == query.shape[:2] else None


def sequences() -> Tensor | None:
    """Return the `seq_idx` of the running layer."""
    return getattr(_current, "sequences", None)


Advance = Callable[[nn.Module, dict[str, Any]], Tensor | None]
"""Compute a layer's forward from its arguments by name, or return None for another call."""


def with_context(
    forward: Callable[..., Any],
    names: tuple[str, ...],
    holds_functions: bool,
    advance: Advance | None = None,
) -> Callable[..., Any]:
    """Return a layer's forward, wrapped so that its functions see its mask and `seq_idx`.

    Its parameters have these names, in order. A layer that holds its functions, as attributes of
    its own, has to keep packed sequences apart in its convolution. `advance` computes some calls,
    after the same checks.
    """

    @functools.wraps(forward)
    def forward_with_context(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        # torch.compile of torch 2.8 cannot trace `strict=False`, which is the default.
        named = dict(zip(names, arguments)) | keywords  # noqa: B905
        mask = named.get(MASK)
        if not torch.compiler.is_compiling():
            cache = next((x for x in named.values() if hasattr(x, "has_previous_state")), None)
            packing.check_arguments(named, cache)
            check_positions(named)
            if cache is not None:
                _check_padding(self, cache, mask)
        mixes = holds_functions and getattr(self, "causal_conv1d_fn", None) is None
        if mixes and packing.is_packed(named):
            text = packing.WITHOUT_CONVOLUTION.format(layer=type(self).__name__)
            raise SpecError(f"accelerate: {text}")
        if advance is not None:
            y = advance(self, named)
            if y is not None:
                return y
        outer = getattr(_current, "mask", None), getattr(_current, "sequences", None)
        _current.mask, _current.sequences = mask, named.get("seq_idx")
        try:
            return forward(self, *arguments, **keywords)
        finally:
            _current.mask, _current.sequences = outer

    return forward_with_context


def _check_padding(layer: nn.Module, cache: Any, mask: Tensor | None) -> None:
    """Refuse to continue from a cache that was filled from rows padded on the right.

    Its memory is right, since padding is the identity, but its convolution would go on from the
    padding. Filling such a cache is fine: training and scoring do, and never read it again.
    """
    index: Any = getattr(layer, "layer_idx", None)
    padded: dict[Any, int] = vars(cache).setdefault(PADDED, {})
    if not left_padding.continues(cache, index):
        padded.pop(index, None)
        left_padding.note(cache, index, mask)
    elif index in padded:
        raise SpecError(
            f"accelerate: attention_mask of the call that filled the cache has padding on the "
            f"right in row {padded[index]}, should have it on the left: the short convolution "
            f"would continue from the padding; tokenizer.padding_side = 'left'"
        )
    if mask is not None and mask.dim() == 2:
        kept = mask.ne(0)
        rows = (kept[:, :-1] & ~kept[:, 1:]).any(1).nonzero()
        if len(rows):
            padded[index] = int(rows[0])
