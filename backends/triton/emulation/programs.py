"""Run an emulated launch: convert its arguments to tensors, then run program after program."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from typing import Any

import numpy as np
import torch
from triton.backends import backends as compilers
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gdn_ops.backends.triton.emulation import functions
from gdn_ops.backends.triton.emulation.binding import BUILDER, to_tensor
from gdn_ops.backends.triton.emulation.builder import Extent
from gdn_ops.backends.triton.emulation.language import interpreter

MAX_GRID = (2**31 - 1, 65535, 65535)
"""The largest grid of CUDA."""


def emulate(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run every program of a grid on CPU tensors.

    Raises:
        TypeError: the kernel is no jitted function, or an argument is none that it takes.
        ValueError: a tensor is not on the CPU, or the grid is larger than a GPU's.
        IndexError: a program reads or writes outside of the tensors.
    """
    if isinstance(kernel, InterpretedFunction):
        raise TypeError(
            f"{kernel.__name__} was made under TRITON_INTERPRET=1: unset it, it is not needed "
            f"here and its bfloat16 is wrong"
        )
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel is a {type(kernel).__name__}, should be made by triton.jit")
    function = functions.emulated(kernel)
    x, y, z = full = (*grid, 1, 1)[:3]
    if any(n > limit for n, limit in zip(full, MAX_GRID, strict=True)):
        raise ValueError(f"{kernel.__name__}: grid is {grid}, should be at most {MAX_GRID}")
    values = _values(kernel, args, kwargs)
    extents = [_extent(n, t) for n, t in values.items() if isinstance(t, torch.Tensor)]
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    tensors = {
        n: functions.translated(v) if n in constexprs else _argument(n, v)
        for n, v in values.items()
    }
    BUILDER.begin((x, y, z), extents)
    with np.errstate(all="ignore"):
        for index in itertools.product(range(x), range(y), range(z)):
            BUILDER.start(index)
            try:
                function(**tensors)
            except Exception as error:
                error.add_note(f"in program {index} of {full} of the kernel {kernel.__name__}")
                raise


def _values(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a kernel by name, without the options of its launch."""
    given = {name: x for name, x in kwargs.items() if name in kernel.signature.parameters}
    unknown = kwargs.keys() - given.keys() - _launch_options()
    if unknown:
        raise TypeError(f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    bound = kernel.signature.bind(*args, **given)
    bound.apply_defaults()
    return bound.arguments  # type: ignore[no-any-return]


@functools.cache
def _launch_options() -> frozenset[str]:
    """Return the names of all options that a compiler of this Triton knows."""
    fields: set[str] = set()
    for compiler in compilers.values():
        for name, value in vars(inspect.getmodule(compiler.compiler)).items():
            if name.endswith("Options") and dataclasses.is_dataclass(value):
                fields |= {field.name for field in dataclasses.fields(value)}
    return frozenset(fields)


def _extent(name: str, x: torch.Tensor) -> Extent:
    """Return the memory from the first element of a tensor to its last."""
    start = x.data_ptr()
    if x.numel() == 0:
        return Extent(name, start, start)
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return Extent(name, start, start + (last + 1) * x.element_size())


def _argument(name: str, value: Any) -> Any:
    """Return an argument as a kernel sees it: an address or a number is a scalar tensor."""
    if isinstance(value, torch.Tensor):
        if not value.is_cpu:
            raise ValueError(f"{name} is on {value.device}, should be on cpu like the first tensor")
        return interpreter._implicit_cvt(value)
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        return to_tensor(value)
    raise TypeError(f"{name} is a {type(value).__name__}, should be a tensor, a number or None")
