"""Translate a kernel to C++ by TileLang's C target, and call it on CPU tensors.

`program` makes C++ of a traced kernel, `Emulated` calls the library that a compiler made of it.

TileLang declares tiles as arrays on the stack, of which a thread may have little. Here they are in
memory that the caller passes: members of one struct, so that the compiler still knows that they do
not overlap.
"""

from __future__ import annotations

import ctypes
import re
import threading
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.emulation.prelude import PRELUDE

_NUMBERS: Final[dict[str, Any]] = {
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "bool": ctypes.c_bool,
}
_ARRAY: Final = re.compile(r"^ +(\w+) (\w+)\[(\d\d+|[2-9])\];$", re.MULTILINE)
"""The declaration of a tile of several elements; a tile of one element stays in a register."""
_PROTOTYPE: Final = re.compile(r"#ifdef __cplusplus\nextern \"C\"\n#endif\n\w+ \w+\([^{;]*\);\n")
_memory = threading.local()

GRID: Final = "the grid along "
"""Tells the axes of the grid from those of tiles: their names begin so."""


class Parameter(NamedTuple):
    """Describe a parameter of a kernel.

    Attributes:
        name: its name.
        dtype: of the elements, or of the number.
        shape: what each size should be: a number, a name that stands for one, or None for what is
            not checked. None for a number.
    """

    name: str
    dtype: str
    shape: list[int | str | None] | None


class Program(NamedTuple):
    """Hold a kernel in C++.

    Attributes:
        text: the whole file; it defines `gdn_ops_call(memory, ...)` and `gdn_ops_size()`.
        parameters: of the kernel, in its order.
        order: (name, dtype) of what follows `memory`: parameters, and sizes that have a name.
        tiles: names; the call returns n after an index outside of the n-th.
    """

    text: str
    parameters: list[Parameter]
    order: list[tuple[str, str]]
    tiles: list[str]


def program(function: Any) -> Program:
    """Return the C++ program of a kernel, a `PrimFunc` traced with `language.CPU`."""
    from gdn_ops.backends.tilelang.emulation.rounding import lowered

    exact, tiles = lowered(function)
    kernel, source = _generated(exact)
    order = [(str(variable.name), str(variable.dtype)) for variable in kernel.params]
    parameters = [_parameter(function, variable) for variable in function.params]
    known = {parameter.name for parameter in parameters}.union(
        *(parameter.shape or () for parameter in parameters)
    )
    for name, _ in order:
        if name not in known:
            raise ValueError(f"{name} is the size of no tensor, and no parameter")
    text = _with_memory(source, str(kernel.attrs["global_symbol"]))
    return Program(text, parameters, order, tiles)


def _generated(function: Any) -> tuple[Any, str]:
    """Return the function that the C target is given, and the C source that it generates.

    These are the passes of TileLang's own pipeline for this target that plain loops need. The
    others plan tile operations and simplify, for seconds, what a C++ compiler simplifies anyway.
    """
    from tilelang import transform as tl
    from tilelang.backend.module import create_backend_context
    from tvm import IRModule
    from tvm.ir.transform import PassContext
    from tvm.target import Target
    from tvm.tirx import transform as tirx

    context = create_backend_context(Target("c"), None, "cython")
    passes = (
        tirx.BindTarget(context.target),
        tl.MaterializeKernelLaunch(lower_thread_binding=False),
        tl.LegalizeSafeMemoryAccess(),
        tl.LowerOpaqueBlock(),
        tirx.NarrowDataType(32),
        tl.FlattenBuffer(),
        tl.ConfigIndexBitwidth(),
        tirx.AnnotateEntryFunc(),
        tl.AnnotateDeviceRegions(),
        tl.SplitHostDevice(),
        tl.AnnotateReadOnlyParams(),
        tl.MakePackedAPI(),
        tl.LowerDeviceKernelLaunch(),
        tirx.Filter(_is_kernel),
        tl.LowerIntrin(),
    )
    with PassContext(opt_level=3), context.target:
        module = IRModule({function.attrs["global_symbol"]: function})
        for step in passes:
            module = step(module)
        source = context.codegen_device(module, compile_device=False).inspect_source()
    ((_, kernel),) = module.functions.items()
    return kernel, str(source)


def _is_kernel(function: Any) -> bool:
    """Return whether a function is the kernel, and not the host code that calls it."""
    from tvm.ir import CallingConv

    return bool(function.attrs.get("calling_conv", 0) != CallingConv.C_PACKED_FUNC)


def _parameter(function: Any, variable: Any) -> Parameter:
    from tvm import tirx

    buffer = function.buffer_map.get(variable)
    if buffer is None:
        return Parameter(str(variable.name), str(variable.dtype), None)
    shape: list[int | str | None] = []
    for size in buffer.shape:
        if isinstance(size, tirx.IntImm):
            shape.append(int(size))
        else:
            shape.append(str(size.name) if isinstance(size, tirx.Var) else None)
    return Parameter(str(buffer.name), str(buffer.dtype), shape)


def _with_memory(source: str, name: str) -> str:
    """Return a whole C++ file, with the arrays of the kernel in memory that the caller passes."""
    source = _PROTOTYPE.sub("", source)
    start = source.index(f" {name}(")
    signature, _, body = source[start:].partition(" {\n")
    members = "".join(
        f"  alignas(64) {kind} {tile}[{size}];\n" for kind, tile, size in _ARRAY.findall(body)
    )
    body = _ARRAY.sub(r"  \1 (&\2)[\3] = gdn_ops_tiles.\2;", body)
    body, _, end = body.rpartition("return 0;")
    parameters = signature.partition("(")[2].removesuffix(")")
    struct = f"struct gdn_ops_struct {{\n  char none;\n{members}}};\n"
    joined = ", ".join(["gdn_ops_struct *gdn_ops_memory", *filter(None, [parameters])])
    return (
        f"{PRELUDE}\n{struct}\n"
        f'extern "C" int64_t gdn_ops_size() {{ return sizeof(gdn_ops_struct); }}\n\n'
        f'extern "C" int32_t gdn_ops_call({joined}) {{\n'
        f"  gdn_ops_struct &gdn_ops_tiles = *gdn_ops_memory;\n  gdn_ops_fault = 0;\n"
        f"{body}return gdn_ops_fault;{end}"
    )


class Emulated:
    """Run a compiled kernel on CPU tensors.

    Args:
        path: the shared library.
        name: of the kernel, for errors.
        parameters, order, tiles: as in `Program`.
    """

    def __init__(
        self,
        path: str,
        name: str,
        parameters: list[Parameter],
        order: list[tuple[str, str]],
        tiles: list[str],
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.tiles = tiles
        library = ctypes.CDLL(path)
        library.gdn_ops_size.restype = ctypes.c_int64
        self.size = int(library.gdn_ops_size())
        self.call = library.gdn_ops_call
        types: list[Any] = [_NUMBERS.get(dtype, ctypes.c_void_p) for _, dtype in order]
        self.call.argtypes = [ctypes.c_void_p, *types]
        self.order = [name for name, _ in order]

    def __call__(self, *args: Any) -> None:
        """Run the kernel.

        Raises:
            TypeError: a wrong number of arguments, or one of the wrong kind or dtype.
            ValueError: a tensor of the wrong shape or device, or that is not contiguous.
            IndexError: the kernel has indexed outside of a tile.
        """
        if len(args) != len(self.parameters):
            raise TypeError(
                f"{self.name}: {len(args)} arguments, should be {len(self.parameters)}: "
                f"{', '.join(parameter.name for parameter in self.parameters)}"
            )
        values = {
            parameter.name: self._number(parameter, value)
            for parameter, value in zip(self.parameters, args, strict=True)
            if parameter.shape is None
        }
        for parameter, value in zip(self.parameters, args, strict=True):
            if parameter.shape is not None:
                values[parameter.name] = self._pointer(parameter, value, values)
        fault = self.call(_tiles(self.size), *[values[name] for name in self.order])
        if fault:
            tile = self.tiles[fault - 1]
            kind = "" if tile.startswith(GRID) else "the tile "
            raise IndexError(f"{self.name}: an index is outside of {kind}{tile}")

    def _number(self, parameter: Parameter, value: Any) -> Any:
        """Check a number against its parameter, and return it."""
        name, is_float = f"{self.name}: {parameter.name}", parameter.dtype.startswith("float")
        if not isinstance(value, (int, float) if is_float else int):
            kind = type(value).__name__
            raise TypeError(f"{name} is {kind}, should be a number of {parameter.dtype}")
        if not is_float and _NUMBERS[parameter.dtype](value).value != value:
            raise ValueError(f"{name} is {value}, which is no {parameter.dtype}")
        return value

    def _pointer(self, parameter: Parameter, value: Any, sizes: dict[str, Any]) -> int:
        """Check a tensor against its parameter, and return its address.

        `sizes` are what the names in shapes stand for; this tensor gives those that it is first to
        have.
        """
        name = f"{self.name}: {parameter.name}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, should be a tensor")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != parameter.dtype:
            raise TypeError(f"{name} is {dtype}, should be {parameter.dtype}")
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}, should be on cpu")
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}, should be contiguous")
        shape, actual = parameter.shape or [], list(value.shape)
        if len(actual) == len(shape):
            expected = [
                sizes.setdefault(n, size) if isinstance(n, str) else size if n is None else n
                for n, size in zip(shape, actual, strict=True)
            ]
            if actual == expected:
                return value.data_ptr()
        known = (f"{n} = {sizes[n]}" if n in sizes else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(actual)}, should be ({', '.join(known)})")


def _tiles(size: int) -> int:
    """Return the address of this thread's memory for the tiles of one program."""
    memory = getattr(_memory, "tiles", None)
    if memory is None or memory.numel() < size + 64:
        memory = _memory.tiles = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    return (memory.data_ptr() + 63) & ~63
