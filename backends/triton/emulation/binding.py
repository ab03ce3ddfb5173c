"""Bind the copy of Triton's language to our builder, and give it what a compiler would do.

The patches are those of Triton's own interpreter, applied once to the copy. On top of them, types
and shapes of the common operations are found faster, and reductions of narrow floats round once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from gdn_ops.backends.triton.emulation.builder import Builder, wide
from gdn_ops.backends.triton.emulation.language import interpreter, tl
from gdn_ops.kernel_support.sources import reading


class _Once(type):
    """Make the type of a block once: making one costs more than adding two blocks."""

    _made: ClassVar[dict[tuple[str, tuple[int, ...]], Any]] = {}

    def __call__(cls, element_ty: Any, shape: Any) -> Any:
        key = element_ty.name, tuple(map(int, shape))
        if key not in cls._made:
            # Of two threads that make one, both take the first.
            cls._made.setdefault(key, super().__call__(element_ty, list(key[1])))
        return cls._made[key]


class BlockType(tl.block_type, metaclass=_Once):  # type: ignore[misc]
    """Represent the type of a block, with the shape and size that a kernel sees."""

    def __init__(self, element_ty: Any, shape: Any) -> None:
        super().__init__(element_ty, shape)
        self.seen = tl.core.tuple(map(tl.constexpr, shape)), tl.constexpr(math.prod(shape))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.seen if type.is_block() else _SCALAR


_SCALAR = tl.core.tuple([]), tl.constexpr(1)
_OFFSETS = ("int32", "int64")
_common_shape = functools.cache(np.broadcast_shapes)


class Semantic(tl.semantic.TritonSemantic):  # type: ignore[misc]
    """Apply Triton's rules of types and shapes, at once in the common cases of kernels."""

    def binary_op_type_checking_impl(
        self, lhs: Any, rhs: Any, *flags: bool, **division: bool
    ) -> tuple[Any, Any]:
        """Convert two operands to one type and one shape."""
        if type(lhs) is not tl.tensor or len(flags) > 3 or division:
            pass
        elif lhs.dtype.is_ptr():
            if flags and flags[0] and type(rhs) is tl.tensor and rhs.dtype.name in _OFFSETS:
                return self._meeting(lhs, rhs)
        elif type(rhs) is tl.tensor:
            if lhs.dtype is rhs.dtype:
                return self._meeting(lhs, rhs)
        elif type(rhs) in (int, float) and rhs and len(flags) < 3:
            # A -0.0 equals 0, and would be taken for it.
            constant = self.constant(rhs, lhs.dtype)
            if constant is not None:
                return self._meeting(lhs, constant)
        return super().binary_op_type_checking_impl(lhs, rhs, *flags, **division)  # type: ignore[no-any-return]

    @functools.lru_cache(maxsize=1024, typed=True)  # noqa: B019, there is one instance
    def constant(self, number: float, dtype: Any) -> Any:
        """Return a number as a tensor of a dtype, or None where an operation needs a wider one."""
        operand = super().cast(self.to_tensor(0), dtype)
        _, constant = super().binary_op_type_checking_impl(operand, number)
        return constant if constant.dtype is dtype else None

    def cast(self, input: Any, dst_ty: Any, *rounding: Any, **options: Any) -> Any:
        """Convert a tensor to a type."""
        if input.dtype is dst_ty:
            return input
        return super().cast(input, dst_ty, *rounding, **options)

    def _meeting(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """Broadcast two operands, and leave a smaller second one to numpy."""
        if lhs.type is rhs.type or (lhs.type.is_block() and not rhs.type.is_block()):
            return lhs, rhs
        return self.broadcast_impl_value(lhs, rhs)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """Broadcast two operands to one shape."""
        if lhs.type is rhs.type:
            return lhs, rhs
        shapes = [x.handle.data.shape if x.type.is_block() else () for x in (lhs, rhs)]
        try:
            common = _common_shape(*shapes)
        except ValueError:
            return super().broadcast_impl_value(lhs, rhs)  # type: ignore[no-any-return]
        return tuple(
            x if shape == common else self.broadcast(x, common)
            for x, shape in zip((lhs, rhs), shapes, strict=True)
        )

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Broadcast a tensor to a larger shape, without a copy: data are never written."""
        return tl.tensor(self.builder.create_broadcast(x.handle, shape), BlockType(x.dtype, shape))


BUILDER = Builder()
SEMANTIC = Semantic(BUILDER)


def to_tensor(value: Any) -> Any:
    """Return a value as an assignment in a kernel stores it: a number becomes a tensor."""
    return value if type(value) is tl.tensor else SEMANTIC.to_tensor(value, False)


def unwrap(value: Any) -> Any:
    """Return the Python value of a constexpr or of a scalar tensor."""
    if isinstance(value, tl.constexpr):
        return value.value
    return wide(value.handle).item() if isinstance(value, tl.tensor) else value


def loop_range(*bounds: Any, step: Any = None, **hints: Any) -> Iterator[Any]:
    """Iterate like `range` and `tl.range` in a kernel: the loop variable is a tensor."""
    given = [unwrap(bound) for bound in bounds]
    if step is not None:
        given = [*([0] if len(given) == 1 else []), *given, unwrap(step)]
    for i in range(*given):
        yield to_tensor(i)


_stock_unwrap = tl.core._unwrap_if_constexpr


def _unwrap(value: Any) -> Any:
    """Return the value of a constexpr, and of those in tuples, or another value as it is."""
    kind = type(value)
    if kind is tl.tensor or kind is int or kind is float or kind is bool or value is None:
        return value
    return value.value if kind is tl.constexpr else _stock_unwrap(value)


def _patch(owner: Any, name: str, member: Any, builder: Any, *scope: Any) -> None:
    """Let a builtin of the language be called without the check for a semantic, and with ours."""
    function = getattr(member, "__wrapped__", member)

    def bound(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = SEMANTIC
        return function(*args, **kwargs)

    for known in scope:
        known.set_attr(owner, name, bound)
    if not scope:
        setattr(owner, name, bound)


def _condition(value: Any, *_: Any, **__: Any) -> Any:
    """Return what a loop tests; the hints are for the compiler alone."""
    return value


class _Reduction(interpreter.ReduceOps):  # type: ignore[misc]
    """Reduce like the interpreter, but let NaN lose in every version of Triton."""

    def min_max(self, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        """Return the extreme along an axis, NaN aside, and the index of the leftmost one."""
        is_max = val_reduce_op in (np.max, np.nanmax)
        extreme: Any = (np.fmax if is_max else np.fmin).reduce

        def leftmost(values: Any, axis: Any, keepdims: bool) -> Any:
            is_extreme = values == extreme(values, axis=axis, keepdims=True)
            return np.argmax(is_extreme, axis=axis, keepdims=keepdims)

        return super().min_max(input, extreme, idx_reduce_op and leftmost)


def _rounded_once(operation: Any, input: Any) -> Any:
    """Apply a reduction or scan, in float32 at least if its combination is one of Triton's own."""
    inputs = input if isinstance(input, tuple) else (input,)
    wider = inputs
    if operation.combine_fn.fn.__module__ == tl.standard.__name__:
        wider = tuple(SEMANTIC.cast(x, _WIDE.get(x.dtype.name, x.dtype)) for x in inputs)
    pairs = zip(operation.apply(wider), inputs, strict=False)
    out = tuple(SEMANTIC.cast(y, x.dtype) for y, x in pairs)
    return out if isinstance(input, tuple) else out[0]


_WIDE = {"fp16": tl.float32, "bf16": tl.float32}


def _reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any) -> Any:
    return _rounded_once(_Reduction(axis, combine_fn, keep_dims), input)


def _scan(input: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
    return _rounded_once(interpreter.ScanOps(axis, combine_fn, reverse), input)


def _interpreted(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of Triton's own, which is rewritten when it is first called."""
    with reading:
        rewritten = function.rewrite()
    return rewritten(*args, **kwargs)


def _bind() -> None:
    """Patch the copy of the language as the interpreter does, and with what is above."""
    tl.block_type = tl.core.block_type = BlockType
    tl.tensor.__init__ = _init_tensor
    interpreter.interpreter_builder, interpreter.interpreter_semantic = BUILDER, SEMANTIC
    # Triton 3.6 makes one for every module that it patches.
    interpreter.TritonSemantic = lambda builder: SEMANTIC
    interpreter._patch_attr, tl.core._unwrap_if_constexpr = _patch, _unwrap
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for module in (tl, tl.core):
        module.range, module.condition = loop_range, _condition
        module.reduce, module.associative_scan = _reduce, _scan
    # Triton asks `if other` and means whether there is one.
    del tl.tensor.__bool__
    # The stock call of a jitted function patches the language again, and hides the type of errors.
    interpreter.InterpretedFunction.__call__ = _interpreted


_bind()
