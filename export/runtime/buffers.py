"""Hold memory that onnxruntime reads and writes: aligned arrays, and checks of copies into them."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from gdn_ops.export.runtime.sessions import onnxruntime
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import printed_shape

_ELEMENT_TYPES = {
    f"tensor({name.lower()})": kind
    for name, kind in TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}
"""ONNX element types by onnxruntime's names of tensors of them, such as tensor(float)."""

_ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector: without it every load of a row takes two."""


def numpy_dtype(element_type: int) -> np.dtype[Any]:
    """Return the numpy dtype of an ONNX element type; that of bfloat16 is ml_dtypes'."""
    if element_type == TensorProto.BFLOAT16:
        # Before 1.19, onnx takes float32 for it.
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = helper.tensor_dtype_to_np_dtype(element_type)
    return dtype


@dataclass(frozen=True)
class Port:
    """Describe one input or output of a graph, with its batch filled in.

    Attributes:
        name: its name.
        element_type: its ONNX element type.
        shape: its sizes.
        symbolic: its sizes as the model writes them, e.g. ("batch", "4").
    """

    name: str
    element_type: int
    shape: tuple[int, ...]
    symbolic: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the numpy dtype, see `numpy_dtype`."""
        return numpy_dtype(self.element_type)

    def is_like(self, other: Port) -> bool:
        """Return whether one buffer can serve both ports."""
        return (self.element_type, self.shape) == (other.element_type, other.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name} ({', '.join(self.symbolic)})"


def ports_of(session: Any, batch: int) -> tuple[dict[str, Port], dict[str, Port]]:
    """Return inputs and outputs of an onnxruntime session by name.

    Raises:
        SpecError: there is a symbolic size besides the batch.
    """
    symbols: dict[str, str] = {}

    def port(value: Any) -> Port:
        if value.type not in _ELEMENT_TYPES:
            raise SpecError(
                f"DecodeSession: {value.name} is a {value.type}, should be a tensor of numbers"
            )
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                symbols.setdefault(str(size), f"{value.name} has it in axis {axis}")
        shape = tuple(size if isinstance(size, int) else batch for size in value.shape)
        if any(size < 0 for size in shape):
            raise SpecError(
                f"DecodeSession: {value.name} has shape {shape}, should have sizes of 0 and more"
            )
        symbolic = tuple(map(str, value.shape))
        return Port(value.name, _ELEMENT_TYPES[value.type], shape, symbolic)

    inputs = {value.name: port(value) for value in session.get_inputs()}
    outputs = {value.name: port(value) for value in session.get_outputs()}
    if len(symbols) > 1:
        second, where = list(symbols.items())[1]
        raise SpecError(
            f"DecodeSession: the model has the sizes {', '.join(symbols)}, should have one, the "
            f"batch ({second}: {where}); a prompt runs in an onnxruntime.InferenceSession"
        )
    return inputs, outputs


def check_memory(ports: Sequence[Port], copies: int) -> None:
    """Check that buffers for all ports, `copies` of each, can fit into this machine.

    Raises:
        SpecError: they take more than its memory.
    """
    sizes = {port.name: math.prod(port.shape) * port.dtype.itemsize for port in ports}
    needed, here = copies * sum(sizes.values()), _memory()
    if needed > here:
        largest = max(ports, key=lambda port: sizes[port.name])
        raise SpecError(
            f"DecodeSession: {largest.name} has shape {largest.shape}, and all buffers take "
            f"{needed / 2**30:.4g} GiB, should take at most the {here / 2**30:.4g} GiB of this "
            f"machine: take a smaller batch, or look at the sizes with gdn-ops export --inspect"
        )


def _memory() -> int:
    """Return the bytes of memory that this machine has; 1 TiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40


class Buffer:
    """Hold an array and the OrtValue over the same memory; the array keeps the memory alive.

    Attributes:
        port: what it is for.
        memory: the bytes; every view of the array, and of a view, refers to them.
        array: its values, zero at first.
        value: the OrtValue.
    """

    def __init__(self, port: Port, memory: np.ndarray[Any, Any] | None = None) -> None:
        """Make the buffer of a port, at the start of memory that is given or in its own."""
        self.port = port
        self.dtype, self.shape = port.dtype, port.shape
        size = math.prod(port.shape) * self.dtype.itemsize
        self.memory = np.zeros(_room(port), np.uint8) if memory is None else memory
        start = -self.memory.ctypes.data % _ALIGNMENT
        self.array = self.memory[start : start + size].view(self.dtype).reshape(port.shape)
        # numpy itself knows no bfloat16: onnxruntime is given the bits.
        is_known = self.dtype.isbuiltin == 1
        bits = self.array if is_known else self.array.view(f"u{self.dtype.itemsize}")
        self.value = onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(
            bits, port.element_type
        )

    def check(self, label: str, x: Any) -> None:
        """Check that an array can be copied into the buffer.

        Raises:
            SpecError: it has another shape or dtype, or is no array.
        """
        port = self.port
        # Refuse masked arrays: a masked element has no value to copy.
        if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
            kind = type(x).__name__
            raise SpecTypeError(f"{label}: {port.name} has type {kind}, should be a numpy.ndarray")
        if x.dtype != self.dtype:
            raise SpecError(f"{label}: {port.name} has dtype {x.dtype}, should be {self.dtype}")
        if x.shape != self.shape:
            raise SpecError(
                f"{label}: {port.name} has shape {x.shape}, should be "
                f"{printed_shape(port.symbolic)} = {self.shape}{self._hint(x.shape)}"
            )

    def _hint(self, shape: tuple[int, ...]) -> str:
        """Return the likely mistake in a wrong shape, or an empty string."""
        own = self.shape
        if len(shape) != len(own):
            return f": {len(own)} dimension{'s' if len(own) != 1 else ''}, not {len(shape)}"
        if shape[0] != own[0] and shape[1:] == own[1:]:
            return "; the batch is fixed when a DecodeSession is made"
        if len(own) == 4 and shape == (*own[:2], own[3], own[2]):
            return "; K comes before V in a state"
        return ""


def _room(port: Port) -> int:
    """Return the bytes that a buffer of a port takes wherever they start."""
    return math.prod(port.shape) * port.dtype.itemsize + _ALIGNMENT


def neighbours(ports: Sequence[Port]) -> tuple[dict[str, Buffer], np.ndarray[Any, Any]]:
    """Return buffers by name, and the memory that all of them lie in.

    Whether an array shares memory with any of them is then one question.
    """
    ends = list(itertools.accumulate(map(_room, ports), initial=0))
    memory = np.zeros(ends[-1], np.uint8)
    spans = zip(ports, itertools.pairwise(ends), strict=True)
    return {port.name: Buffer(port, memory[start:end]) for port, (start, end) in spans}, memory


class Results:
    """Hold buffers whose arrays are given to callers, and reused once no caller has them any more.

    A fresh array of a few hundred KiB costs more to touch for the first time than to fill. What
    refers to an array, or to a part of it, refers to its memory: so the count of references says
    whether a result is still in use. Where the count cannot tell, it is taken to be.

    Attributes:
        buffers: by the name of the output.
        bindings: that write them, in the order of the session's turns.
    """

    def __init__(self, ports: Iterable[Port]) -> None:
        self.buffers = {port.name: Buffer(port) for port in ports}
        self.bindings: list[Any] = []
        self._arrays = [buffer.array for buffer in self.buffers.values()]
        self._memories = [buffer.memory for buffer in self.buffers.values()]
        self._unused = self._references()

    def _references(self) -> int:
        return sum(map(sys.getrefcount, self._memories))

    def is_free(self) -> bool:
        """Return whether no caller has an array of an earlier step any more."""
        return self._references() == self._unused

    def given(self) -> Any:
        """Return the array, or a tuple of the arrays, as new views."""
        if len(self._arrays) == 1:
            return self._arrays[0].view()
        return tuple(array.view() for array in self._arrays)
