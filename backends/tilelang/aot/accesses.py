"""Find the grid of a traced kernel, and which tensors it reads and which it writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tilelang import tvm

from gdn_ops.kernel_support.launches import Launch

_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_READ, _WRITTEN = 1, 2


def grid(launch: Launch, function: Any) -> tuple[int, ...]:
    """Return the grid of a launch, given its traced kernel.

    Raises:
        ValueError: a size of it does not follow from the arguments.
    """
    known: dict[Any, Any] = {}
    for parameter, given in zip(function.params, launch.args, strict=True):
        if isinstance(given, torch.Tensor):
            shape = function.buffer_map[parameter].shape
            pairs = zip(shape, given.shape, strict=True)
            known |= {size: tvm.tirx.IntImm(size.dtype, n) for size, n in pairs if _is_free(size)}
        elif isinstance(given, int):
            known[parameter] = tvm.tirx.IntImm(parameter.dtype, given)
    sizes: dict[str, int] = {}

    def visit(node: Any) -> None:
        binding = node.thread_binding if isinstance(node, tvm.tirx.For) else None
        if binding is not None and binding.thread_tag in _AXES:
            extent = tvm.tirx.stmt_functor.substitute(node.extent, known)
            extent = tvm.arith.Analyzer().simplify(extent)
            if not isinstance(extent, tvm.tirx.IntImm):
                raise ValueError(f"{binding.thread_tag} has {extent} programs, should be a number")
            sizes[binding.thread_tag] = int(extent)

    tvm.tirx.stmt_functor.post_order_visit(function.body, visit)
    return tuple(sizes[axis] for axis in _AXES if axis in sizes)


def _is_free(size: Any) -> bool:
    return isinstance(size, tvm.tirx.Var)


def moved(launch: Launch, function: Any) -> tuple[int, int]:
    """Return the bytes of the tensors that a launch reads, and of those that it writes."""
    loads: Counter[Any] = Counter()
    copied: dict[int, set[Any]] = {_READ: set(), _WRITTEN: set()}

    def visit(node: Any) -> None:
        if isinstance(node, tvm.tirx.BufferLoad):
            loads[node.buffer] += 1
        elif isinstance(node, tvm.tirx.BufferStore):
            copied[_WRITTEN].add(node.buffer)
        elif isinstance(node, tvm.tirx.Call) and getattr(node.op, "name", "") == "tl.region":
            # The corner of a region is written like a load, and is none.
            tile = node.args[0].buffer
            loads[tile] -= 1
            for way in (_READ, _WRITTEN):
                if int(node.args[1]) & way:
                    copied[way].add(tile)

    tvm.tirx.stmt_functor.post_order_visit(function.body, visit)
    read = written = 0
    for parameter, given in zip(function.params, launch.args, strict=True):
        if isinstance(given, torch.Tensor):
            buffer, nbytes = function.buffer_map[parameter], given.numel() * given.element_size()
            read += nbytes * (loads[buffer] > 0 or buffer in copied[_READ])
            written += nbytes * (buffer in copied[_WRITTEN])
    return read, written
