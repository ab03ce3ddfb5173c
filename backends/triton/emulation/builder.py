"""Correct the arithmetic of Triton's interpreter builder, for the emulation.

A builder computes each operation of a kernel on numpy arrays. The one that ships with Triton
stores bfloat16 as uint16 and computes on those bits, truncates where a GPU rounds, and ignores
the precision of a product. Here

    bfloat16      every operation widens to float32, computes, rounds to nearest, ties to even
    products      accumulate in float32; "tf32" and "tf32x3" round operands as a tensor core does
    memory        an access outside of the tensors of the launch is an IndexError
    the program   its index is kept per thread, so that two threads may emulate at once

What stays different from a GPU: the order of additions inside a product or a reduction, and
float32 functions, which are numpy's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir

from gdn_ops.backends.triton.emulation.language import interpreter, tl

Array = npt.NDArray[Any]
TensorHandle = interpreter.TensorHandle
Stock: Any = interpreter.InterpreterBuilder

numpy_dtype = functools.cache(interpreter._get_np_dtype)


def round_to_bfloat16(values: Array) -> Array:
    """Return the bits, as uint16, of values rounded to nearest bfloat16, ties to even.

    A NaN stays one: its payload is cut, its quiet bit set.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
        rounded = np.where(is_nan, quiet, rounded)
    return rounded.reshape(np.shape(values))


def round_to_tf32(values: Array) -> Array:
    """Return float32 values rounded to TF32, 10 bits of mantissa, halves away from zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def is_bfloat16(handle: Any) -> bool:
    """Return whether a handle holds bfloat16 values, and not pointers to some."""
    # By name: comparing two types takes as long as adding two blocks.
    return bool(handle.dtype.scalar.name == "bf16")


def wide(handle: Any) -> Array:
    """Return the values of a handle in a dtype that numpy computes in."""
    data: Array = handle.data
    if is_bfloat16(handle):
        data = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data


def narrow(values: Array, dtype: Any) -> Array:
    """Return values as they are stored for a scalar type of Triton."""
    return round_to_bfloat16(values) if dtype.name == "bf16" else values.astype(numpy_dtype(dtype))


class Extent(NamedTuple):
    """Describe the memory of one tensor of a launch, from its first byte to past its last."""

    name: str
    start: int
    stop: int


def _block(descriptor: Any, offsets: Any) -> tuple[Any, Any]:
    """Return the pointers to a block of a descriptor, and which of them lie in its matrix."""
    ptrs, mask = descriptor.materialize_pointers(offsets)
    # Triton 3.6 returns an array.
    return ptrs, mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)


def _stray(address: int, size: int, extents: Sequence[Extent], does: str) -> str:
    """Return a text that says how far an address lies outside of the nearest tensor."""
    if not extents:
        return f"{does} {size} bytes, but the launch has no tensor"
    near = min(extents, key=lambda e: max(e.start - address, address - e.stop))
    if address < near.start:
        return f"{does} {size} bytes, {near.start - address} bytes before {near.name}"
    return f"{does} {size} bytes, {address - near.stop} bytes behind the end of {near.name}"


def _in_float32(name: str) -> Any:
    """Return a stock operation that computes on bfloat16 in float32, rounded once."""
    stock = getattr(Stock, name)

    def operation(self: Any, *args: Any) -> Any:
        if not any(isinstance(x, TensorHandle) and is_bfloat16(x) for x in args):
            return stock(self, *args)
        out = stock(self, *(self.widened(x) if isinstance(x, TensorHandle) else x for x in args))
        return self.cast_impl(out, tl.bfloat16) if out.data.dtype == np.float32 else out

    return operation


class Builder(Stock):  # type: ignore[misc]
    """Compute the operations of kernels; one builder serves all threads, each with its program."""

    binary_op, unary_op = _in_float32("binary_op"), _in_float32("unary_op")
    ternary_op, create_fma = _in_float32("ternary_op"), _in_float32("create_fma")

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()
        # tl.device_assert is checked. Checking every int32 sum in int64 would cost five
        # operations for one.
        self.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)

    def begin(self, grid: tuple[int, int, int], extents: Sequence[Extent]) -> None:
        """Begin a launch in this thread, whose programs may touch `extents` only."""
        self._thread.grid, self._thread.extents = grid, extents

    def start(self, index: tuple[int, int, int]) -> None:
        """Set the index of the program that this thread runs."""
        self._thread.index = index

    @property
    def grid_idx(self) -> tuple[int, int, int]:
        """Return the index of the running program."""
        return self._thread.index  # type: ignore[no-any-return]

    @property
    def grid_dim(self) -> tuple[int, int, int]:
        """Return the number of programs along each axis."""
        return self._thread.grid  # type: ignore[no-any-return]

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Any:
        """Load values; without an `other`, masked ones have all bits set: NaN, or -1."""
        self._check(ptrs, mask, "reads")
        dtype = ptrs.get_element_ty()
        stored = numpy_dtype(dtype)
        if other is None:
            bits = 1 if stored == np.bool_ else -1
            fill = np.full(ptrs.data.shape, bits, f"i{stored.itemsize}").view(stored)
        else:
            fill = other.data
        return TensorHandle(memory.load(ptrs.data, mask.data, fill, stored), dtype)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any) -> Any:
        self._check(ptrs, mask, "writes")
        memory.store(ptrs.data, value.data, mask.data)

    def create_make_tensor_descriptor(
        self, base: Any, shape: Any, strides: Any, block: Any, is_signed: bool, padding: Any
    ) -> Any:
        """Return a descriptor of a matrix; what a GPU's descriptors cannot have is an error."""
        size = base.dtype.element_ty.primitive_bitwidth // 8
        apart = [int(stride.data.item()) * size for stride in strides]
        if base.data.item() % 16 or any(n % 16 for n in apart[:-1]) or apart[-1] != size:
            raise ValueError(
                f"a tensor descriptor begins {base.data.item() % 16} bytes behind a multiple of 16 "
                f"and has strides of {apart} bytes, should be multiples of 16, the last {size}"
            )
        return interpreter.TensorDescHandle(base, shape, strides, block, padding)

    def create_descriptor_load(self, descriptor: Any, offsets: Any, *hints: Any) -> Any:
        """Load a block by a descriptor: zero outside of its matrix, or NaN where it is made so."""
        ptrs, mask = _block(descriptor, offsets)
        dtype = ptrs.get_element_ty()
        outside = 0.0 if descriptor.padding == ir.PADDING_OPTION.PAD_ZERO else float("nan")
        fill = narrow(np.full(ptrs.data.shape, outside, np.float32), dtype)
        return self.create_masked_load(ptrs, mask, TensorHandle(fill, dtype))

    def create_descriptor_store(self, descriptor: Any, value: Any, offsets: Any) -> None:
        """Store a block by a descriptor, but for what lies outside of its matrix."""
        ptrs, mask = _block(descriptor, offsets)
        self.create_masked_store(ptrs, value, mask)

    def _check(self, ptrs: Any, mask: Any, does: str) -> None:
        """Raise an IndexError where a program accesses memory outside of its launch's tensors."""
        addresses = ptrs.data[mask.data]
        if not addresses.size:
            return
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        first, last = int(addresses.min()), int(addresses.max()) + size
        extents: Sequence[Extent] = self._thread.extents
        if any(extent.start <= first and last <= extent.stop for extent in extents):
            return
        inside = np.zeros(addresses.shape, np.bool_)
        for extent in extents:
            inside |= (addresses >= extent.start) & (addresses + np.uint64(size) <= extent.stop)
        if not inside.all():
            raise IndexError(_stray(int(addresses[~inside][0]), size, extents, does))

    def get_bf16(self, value: float) -> Any:
        return TensorHandle(round_to_bfloat16(np.array([value])), tl.bfloat16)

    def widened(self, handle: Any) -> Any:
        """Return a handle of bfloat16 values as one of float32, any other unchanged."""
        return TensorHandle(wide(handle), tl.float32) if is_bfloat16(handle) else handle

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return TensorHandle(narrow(wide(src), dst_type.scalar), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        widths = (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
        if min(widths) >= 16 and rounding_mode != ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        """Return the smaller of two values; a NaN loses, in every version of Triton."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            return super().create_clampf(arg, lo, hi, propagate_nans)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        """Return a b + d, accumulated in float32 (float64 for float64, int32 for int8)."""
        if a.dtype.scalar.primitive_bitwidth == 8 or a.dtype.scalar == tl.float64:
            return super().create_dot(a, b, d, input_precision, *rest)
        # float16 is widened first: numpy multiplies it without BLAS.
        lhs, rhs = wide(a).astype(np.float32), wide(b).astype(np.float32)
        is_float32 = a.dtype.scalar == tl.float32
        product = _float32_product(lhs, rhs, input_precision) if is_float32 else lhs @ rhs
        return TensorHandle(narrow(product + wide(d), d.dtype.scalar), d.dtype.scalar)


def _float32_product(a: Array, b: Array, precision: Any) -> Array:
    """Return a b as a tensor core forms it from float32 operands.

    "ieee" is float32 throughout. "tf32" rounds both operands. "tf32x3" adds the products with
    what that rounding cut off: hi lo + lo hi + hi hi.
    """
    out: Array
    if precision == ir.INPUT_PRECISION.IEEE:
        out = a @ b
        return out
    high_a, high_b = round_to_tf32(a), round_to_tf32(b)
    out = high_a @ high_b
    if precision == ir.INPUT_PRECISION.TF32x3:
        low_a, low_b = round_to_tf32(a - high_a), round_to_tf32(b - high_b)
        low = high_a @ low_b + low_a @ high_b
        # Drop what an infinity leaves, no number: it belongs to the high product alone.
        out = np.where(np.isnan(low), np.float32(0), low) + out
    return out
