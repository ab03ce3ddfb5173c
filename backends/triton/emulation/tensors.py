"""Define the tensors of an emulated kernel, and the loops that Triton leaves to its compiler."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle

from gdn_ops.backends.triton.emulation.builder import Array, Builder, narrow, wide


class Tensor(tl.tensor):  # type: ignore[misc]
    """Represent a tensor whose operators and methods compute at once.

    Attributes:
        handle: the values, a numpy array with one element for a scalar.
        type: a scalar type, or a block type with its shape.
        dtype: the scalar type.
    """

    def __init__(self, handle: Any, type: Any) -> None:
        self.type = type
        self.dtype = dtype = type.scalar
        # Triton's IR has no unsigned types, so a result may come as the signed one of its bits.
        if dtype.is_int_unsigned() and handle.data.dtype.kind == "i":
            data = handle.data.view(handle.data.dtype.str.replace("i", "u"))
            handle = TensorHandle(data, dtype)
        self.handle = handle

    @property
    def shape(self) -> Any:
        """Return the shape as a kernel sees it: a tuple of constexpr."""
        return _constexpr_tuple(sizes(self))

    @property
    def numel(self) -> Any:
        """Return the number of elements, a constexpr."""
        return tl.constexpr(math.prod(sizes(self)))

    @property
    def T(self) -> Tensor:
        """Return the transpose of a matrix."""
        return stored(np.swapaxes(self.handle.data, -1, -2), self.dtype)

    def __repr__(self) -> str:
        return f"{self.type} {wide(self.handle)}"

    __str__ = __repr__


def sizes(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor; () for a scalar, whose array has one element."""
    shape: tuple[int, ...] = tensor.handle.data.shape
    return shape if tensor.type.is_block() else ()


@functools.cache
def _constexpr_tuple(shape: tuple[int, ...]) -> Any:
    return tl.core.tuple([tl.constexpr(size) for size in shape])


_block_types: dict[tuple[str, tuple[int, ...]], Any] = {}


def block_type(dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return the type of a block, cached: making one costs more than adding two blocks."""
    key = dtype.name, shape
    found = _block_types.get(key)
    if found is None:
        found = _block_types[key] = tl.block_type(dtype, list(shape))
    return found


@functools.cache
def _common_shape(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def _spread(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast a tensor to a larger shape, without a copy: data of a handle are never written."""
    if sizes(tensor) == shape:
        return tensor
    data = np.broadcast_to(tensor.handle.data, shape)
    return Tensor(TensorHandle(data, tensor.dtype), block_type(tensor.dtype, shape))


_FLOATS = frozenset(("fp16", "bf16", "fp32"))


class Semantic(TritonSemantic):  # type: ignore[misc]
    """Apply Triton's own rules of types and shapes to our tensors.

    The methods below give the results of Triton's, faster in the common cases of kernels.
    """

    tensor = Tensor

    def binary_op_type_checking_impl(
        self,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Convert two operands to one type and one shape."""
        is_alike = type(lhs) is type(rhs) is Tensor and lhs.dtype is rhs.dtype
        if is_alike and not div_or_mod and not lhs.dtype.is_ptr():
            return self.broadcast_impl_value(lhs, rhs)
        return super().binary_op_type_checking_impl(  # type: ignore[no-any-return]
            lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        )

    def cast(self, input: Tensor, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Tensor:
        """Convert a tensor to a scalar type, or that of a block; floats round to nearest even."""
        target = dst_ty.scalar
        if input.dtype is target:
            return input
        if fp_downcast_rounding is None and _FLOATS.issuperset((input.dtype.name, target.name)):
            data = narrow(wide(input.handle), target)
            kind = block_type(target, data.shape) if input.type.is_block() else target
            return Tensor(TensorHandle(data, target), kind)
        return super().cast(input, dst_ty, fp_downcast_rounding)  # type: ignore[no-any-return]

    def expand_dims(self, input: Tensor, axis: int) -> Tensor:
        """Insert an axis of length one."""
        shape = sizes(input)
        if not 0 <= axis <= len(shape):
            return super().expand_dims(input, axis)  # type: ignore[no-any-return]
        return stored(input.handle.data.reshape(*shape[:axis], 1, *shape[axis:]), input.dtype)

    def broadcast_impl_value(self, lhs: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Broadcast two operands to one shape."""
        shape = _common_shape(sizes(lhs), sizes(rhs))
        if shape is None:
            return super().broadcast_impl_value(lhs, rhs)  # type: ignore[no-any-return]
        return _spread(lhs, shape), _spread(rhs, shape)


BUILDER = Builder()
SEMANTIC = Semantic(BUILDER)


def own(value: Any) -> Any:
    """Convert the result of a function of the language to our tensors."""
    if type(value) is tl.tensor:
        return Tensor(value.handle, value.type)
    if type(value) is tuple:
        return tuple(own(item) for item in value)
    return value


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the language, bound to our builder."""
    # Below the check that a builder is given: one call less for every operator.
    inner = getattr(function, "__wrapped__", function)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A function of the language that calls another one passes it on.
        kwargs["_semantic"] = SEMANTIC
        return own(inner(*args, **kwargs))

    return call


for _name in dir(tl.tensor):
    _member = getattr(tl.tensor, _name)
    if tl.core.is_builtin(_member):
        setattr(Tensor, _name, bound(_member))


def to_tensor(value: Any) -> Any:
    """Return a value as an assignment in a kernel stores it: a number becomes a tensor."""
    return value if type(value) is Tensor else SEMANTIC.to_tensor(value, False)


def truth(value: Any) -> Any:
    """Return the truth value that a kernel branches on.

    A tensor has no `__bool__`: Triton asks `if other` and means whether there is one.
    """
    if not isinstance(value, tl.tensor):
        return value
    data = value.handle.data
    if data.size != 1:
        raise ValueError(
            f"a block of shape {data.shape} has no truth value: combine blocks with & | ~"
        )
    return bool(data.item())


def scalar(data: Any, dtype: Any) -> Tensor:
    """Return a scalar tensor of a numpy value that is stored as `dtype` is."""
    return Tensor(TensorHandle(np.asarray(data).reshape(1), dtype), dtype)


def stored(data: Array, dtype: Any) -> Tensor:
    """Return a tensor of values that are stored as `dtype` is; a scalar where there is no axis."""
    if data.ndim == 0:
        return scalar(data, dtype)
    return Tensor(TensorHandle(data, dtype), block_type(dtype, data.shape))


def block(data: Array, dtype: Any) -> Tensor:
    """Return a tensor of values that are rounded to `dtype` first."""
    return stored(narrow(np.asarray(data), dtype), dtype)


def unwrap(value: Any) -> Any:
    """Return the Python value of a constexpr or of a scalar tensor."""
    if isinstance(value, tl.constexpr):
        return value.value
    return wide(value.handle).item() if isinstance(value, tl.tensor) else value


def static_range(*bounds: Any, step: Any = None, **hints: Any) -> range:
    """Iterate like `tl.static_range`: the loop variable is a Python int."""
    given = [unwrap(bound) for bound in bounds]
    if step is not None:
        given = [*([0] if len(given) == 1 else []), *given, unwrap(step)]
    return range(*given)


def loop_range(*bounds: Any, step: Any = None, **hints: Any) -> Iterator[Tensor]:
    """Iterate like `range` and `tl.range` in a kernel: the loop variable is a tensor."""
    for i in static_range(*bounds, step=step):
        yield to_tensor(i)


def types_of(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the types of those names that hold tensors before a loop."""
    found = ((name, values.get(name)) for name in names)
    return {name: value.type for name, value in found if isinstance(value, Tensor)}


def check_types(before: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse a loop that changes the type of a name that it carries: it does not compile."""
    for name, type_ in before.items():
        value = values.get(name)
        if isinstance(value, Tensor) and value.type is not type_ and value.type != type_:
            raise TypeError(
                f"{name} is {_words(type_)} before a loop and {_words(value.type)} after a turn "
                f"of it; a loop keeps types"
            )


def _words(type_: Any) -> str:
    shape = tuple(type_.shape) if type_.is_block() else ()
    return f"{type_.scalar} of shape {shape}" if shape else str(type_)
