"""Set a cache of transformers back to where it was, for every kind of layer whose states are known.

Attention layers replace their keys and values by longer ones in every call, so that a fork holds
the old tensors and copies nothing. Linear attention advances its states in place: a fork copies
these, which do not grow with the text.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.spec.errors import SpecError

REPLACED = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")
"""Layers that replace their tensors when they read."""

ADVANCED = ("LinearAttentionLayer",)
"""Layers that advance their tensors in place."""


class CacheFork:
    """Hold what the layers of a cache held at one time.

    Args:
        owner: what a message starts with.
        cache: of a model that has read at least one token with it.

    Raises:
        SpecError: the cache or one of its layers is of an unknown class.
    """

    def __init__(self, owner: str, cache: Any) -> None:
        self._cache = cache
        layers = getattr(cache, "layers", None)
        if not isinstance(layers, list) or getattr(cache, "offloading", False):
            _refuse(owner, f"the cache is a {type(cache).__name__}")
        for i, layer in enumerate(layers):
            # By the class itself: a subclass may hold what is not known here.
            if type(layer).__name__ not in (*REPLACED, *ADVANCED) or not _is_own(layer):
                _refuse(owner, f"layer {i} of the cache is a {type(layer).__name__}")
        self._held = [
            {name: _held(value, _is_advanced(layer)) for name, value in vars(layer).items()}
            for layer in layers
        ]

    def restore(self) -> None:
        """Set the cache back; the fork stays what it is."""
        for layer, held in zip(self._cache.layers, self._held, strict=True):
            for name, value in held.items():
                vars(layer)[name] = _restored(vars(layer)[name], value, _is_advanced(layer))


def _is_own(layer: Any) -> bool:
    return type(layer).__module__ == "transformers.cache_utils"


def _is_advanced(layer: Any) -> bool:
    return type(layer).__name__ in ADVANCED


def _held(value: Any, is_advanced: bool) -> Any:
    """Return what a fork holds of an attribute."""
    if isinstance(value, dict):
        return {key: _held(x, is_advanced) for key, x in value.items()}
    return value.clone() if is_advanced and isinstance(value, Tensor) else value


def _restored(now: Any, held: Any, is_advanced: bool) -> Any:
    """Return what an attribute is set back to: the tensor of the layer, where it stays in place."""
    if isinstance(held, dict):
        return {key: _restored(now.get(key), x, is_advanced) for key, x in held.items()}
    if not is_advanced or not isinstance(held, Tensor):
        return held
    if not isinstance(now, Tensor) or now.shape != held.shape or now.dtype != held.dtype:
        return held.clone()
    with torch.no_grad():
        return now.copy_(held)


def _refuse(owner: str, what: str) -> NoReturn:
    known = ", ".join((*REPLACED, *ADVANCED))
    raise SpecError(
        f"{owner}: {what}, whose states are unknown, should be a DynamicCache whose layers are of "
        f"{known}"
    )
