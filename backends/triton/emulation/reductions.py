"""Compute the reductions and scans of an emulated kernel.

A GPU combines in an order of its own and rounds every partial result to the type of the input.
Here a combination that is known adds, multiplies or compares in float32 at least and rounds once;
any other is called on whole slices, from the first to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl

from gdn_ops.backends.triton.emulation.builder import Array, wide
from gdn_ops.backends.triton.emulation.tensors import Tensor, block, stored, unwrap

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "_sum_combine": np.add.reduce,
    "_prod_combine": np.multiply.reduce,
    "_elementwise_max": np.fmax.reduce,
    "_elementwise_min": np.fmin.reduce,
    "_xor_combine": np.bitwise_xor.reduce,
    "_or_combine": np.bitwise_or.reduce,
}
_SCANS: dict[str, Callable[..., Any]] = {
    "_sum_combine": np.cumsum,
    "_prod_combine": np.cumprod,
}
_STANDARD = {
    id(getattr(tl.standard, name)): name
    for name in (*_REDUCTIONS, "_argmax_combine_tie_break_left", "_argmax_combine_tie_break_fast")
    if hasattr(tl.standard, name)
}
"""Names of Triton's own combinations, by the identity of the jitted function."""


def _name(combine_fn: Any) -> str:
    """Return the name of a combination if it is one of Triton's own, else an empty string."""
    return _STANDARD.get(id(getattr(combine_fn, "jitted", None)), "")


def _values(tensor: Tensor) -> Array:
    data = wide(tensor.handle)
    return data.astype(np.float32) if data.dtype == np.float16 else data


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, tl.core.tuple)) else (value,)


def _running(inputs: tuple[Tensor, ...], axis: int, combine: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the combination of the first slice along an axis, of the first two, and so on."""
    columns = [np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    so_far: tuple[Any, ...] = ()
    for slices in zip(*columns, strict=True):
        new = tuple(stored(np.asarray(s), x.dtype) for s, x in zip(slices, inputs, strict=True))
        so_far = _as_tuple(combine(*so_far, *new)) if so_far else new
        yield so_far


def reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any) -> Any:
    """Reduce a tensor, or a tuple of them together, along an axis; over everything if None."""
    inputs, axis, keep_dims = _as_tuple(input), unwrap(axis), bool(unwrap(keep_dims))
    known = _REDUCTIONS.get(_name(combine_fn))
    if known is not None:
        (x,) = inputs
        return block(known(_values(x), axis=axis, keepdims=keep_dims), x.dtype)
    shape: tuple[int, ...] = inputs[0].handle.data.shape
    if axis is None:
        inputs = tuple(stored(x.handle.data.reshape(-1), x.dtype) for x in inputs)
        left = (1,) * len(shape) if keep_dims else ()
    else:
        axis %= len(shape)
        left = (*shape[:axis], *([1] if keep_dims else []), *shape[axis + 1 :])
    *_parts, last = _running(inputs, axis or 0, combine_fn)
    found = tuple(stored(x.handle.data.reshape(left), x.dtype) for x in last)
    return found[0] if isinstance(input, Tensor) else found


def reduce_with_indices(
    input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any
) -> tuple[Tensor, Tensor]:
    """Return the extreme along an axis, NaN aside, and the index of the leftmost one."""
    axis, keep_dims = unwrap(axis), bool(unwrap(keep_dims))
    is_max = _name(combine_fn).startswith("_argmax")
    values = _values(input)
    worst = -np.inf if is_max else np.inf
    clean = np.where(np.isnan(values), worst, values) if values.dtype.kind == "f" else values
    at = (np.argmax if is_max else np.argmin)(clean, axis=axis, keepdims=keep_dims)
    extreme = (np.fmax if is_max else np.fmin).reduce(values, axis=axis, keepdims=keep_dims)
    return block(extreme, input.dtype), block(np.asarray(at), tl.int32)


def associative_scan(input: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
    """Return every running combination along an axis, from its end if `reverse`."""
    inputs = _as_tuple(input)
    axis = unwrap(axis) % inputs[0].handle.data.ndim

    def turn(data: Array) -> Array:
        return np.flip(data, axis) if unwrap(reverse) else data

    known = _SCANS.get(_name(combine_fn))
    if known is not None:
        (x,) = inputs
        values = turn(_values(x))
        return block(turn(known(values, axis=axis, dtype=values.dtype)), x.dtype)
    turned = tuple(stored(turn(x.handle.data), x.dtype) for x in inputs)
    columns = zip(*_running(turned, axis, combine_fn), strict=True)
    shape = np.delete(inputs[0].handle.data.shape, axis)
    found = tuple(
        stored(turn(np.stack([x.handle.data.reshape(shape) for x in column], axis)), x0.dtype)
        for column, x0 in zip(columns, inputs, strict=True)
    )
    return found[0] if isinstance(input, Tensor) else found
