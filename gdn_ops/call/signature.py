"""Name what two calls have in common if they differ in values and addresses only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdn_ops.spec.language import OpSpec

if TYPE_CHECKING:
    from gdn_ops.call.bind import Arguments

Signature = tuple[Any, ...]
"""A key for all of a call but the values and the addresses of its tensors."""

_PLAIN_TYPES = frozenset((bool, int, float, str, type(None)))


def signature(spec: OpSpec, arguments: Arguments) -> Signature | None:
    """Return the signature of a call, whose checks and choices can be remembered by it.

    Returns:
        The key, or None for a call with an argument of an unusual type, or a tensor whose memory
        does not hold its values one by one: nested, sparse, or a negated view.
    """
    if torch.compiler.is_compiling():
        return None
    tokens, state, cu_seqlens, state_indices, *attributes = arguments
    kinds = tuple(map(type, attributes))
    if not _PLAIN_TYPES.issuperset(kinds):
        return None
    # 1, 1.0 and True are equal, but only one of them is a fine bool.
    parts: list[Any] = [spec.name, kinds, *attributes]
    for x in (*tokens, state, cu_seqlens, state_indices):
        if x is None:
            parts.append(None)
        elif (type(x) is Tensor or type(x) is Parameter) and not x.is_nested:
            if x.layout is not torch.strided or x.is_neg():
                return None
            parts += (x.shape, x.stride(), x.dtype, x.device)
        else:
            return None
    return tuple(parts)
