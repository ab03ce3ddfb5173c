"""Rewrite a traced kernel for the C target: round to low precision, make parallel loops serial.

`lowered` takes the function that `make(language.CPU, ...)` returns and gives the same with

    tiles of bfloat16 and float16    as tiles of float32, whose values are of the low dtype
    tensors of bfloat16 and float16  as uint16, decoded when they are read, encoded when written
    a cast, an addition, a product   in float32, then rounded to the dtype that it has
    shared memory and fragments      as local arrays, full of NaN until they are written
    parallel loops                   as serial ones, once it is sure that they do not race
    an index of a tile               checked, unless it is sure to be inside

A sum or a product of two values of 16 bits is rounded to float32 first and then to 16 bits. That is
the same as once: float32 has at least twice as many bits of mantissa, and two.

This module imports TileLang, which takes seconds: it is imported when a kernel is compiled.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import tilelang  # noqa: F401, it is what brings tvm
import torch
from tvm import tirx

from gdn_ops.backends.tilelang.emulation.bounds import Bounds
from gdn_ops.backends.tilelang.emulation.prelude import GEMM
from gdn_ops.backends.tilelang.emulation.products import Products
from gdn_ops.backends.tilelang.emulation.races import Accesses

LOW: Final = ("bfloat16", "float16")
"""Dtypes that are kept in float32."""

NUMBERS: Final = ("float32", "float64", "int32", "int64", "bool")
"""Dtypes of parameters that are no tensors."""

_EXACT: Final = (
    *("float32", "float64", "bool", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)
_UNROUNDED: Final = ("tirx.if_then_else", "tirx.address_of", "tirx.fabs")
_KNOWN: Final = ("tl.launch_thread_idx", "tl.infinity")
"""Operations of TileLang's own that its C target knows."""

_MISSING: Final = {"tirx.fabs": "fabs", "tirx.fmod": "fmod", "tirx.exp10": "exp10"}
"""Functions of C that the C target does not know."""


def lowered(function: Any) -> tuple[Any, list[str]]:
    """Return a traced function, rewritten so that the C target computes it exactly.

    Args:
        function: a `tvm.tirx.PrimFunc`, traced with `language.CPU`.

    Returns:
        The function, and the names of tiles that it may index outside of: `gdn_ops_fault` is 1
        after an index outside of the first.

    Raises:
        NotImplementedError: a dtype or an operation that has no emulation.
        ValueError: a parallel loop whose iterations depend on each other; a product that is used
            before it has been waited for.
    """
    for parameter in function.params:
        dtype = str(parameter.dtype)
        if dtype not in ("handle", *NUMBERS):
            what = f"parameter {parameter.name} of {dtype}"
            raise NotImplementedError(f"{what} has no emulation on CPU tensors")
    exact = _Exact()
    tensors = {name: exact.tensor(buffer) for name, buffer in function.buffer_map.items()}
    try:
        body = exact.visit_stmt(function.body)
    except Exception:
        # Raise the own error: TVM's C++ turns what is raised below it into something else.
        if exact.refused is not None:
            raise exact.refused from None
        raise
    new = tirx.PrimFunc(function.params, body, function.ret_type, tensors, function.attrs)
    return new, exact.bounds.tiles


def nearest(value: float, dtype: str) -> float:
    """Return the value of a low dtype that is nearest to a float, ties to even."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(getattr(torch, dtype)))


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    """Return the call of a function of the prelude."""
    return tirx.call_pure_extern(dtype, f"gdn_ops_{name}", *arguments)


def _rounded(value: Any, dtype: Any) -> Any:
    """Return a float32 value, rounded if the dtype is a low one."""
    return _call("float32", f"round_{dtype}", value) if str(dtype) in LOW else value


def _constant(dtype: str, value: float) -> Any:
    """Return a constant, by its bits if the seven digits that the C target writes are not exact."""
    code, integer, bits = ("f", "i", 32) if dtype == "float32" else ("d", "q", 64)
    (value,) = struct.unpack(code, struct.pack(code, value))
    if math.isfinite(value):
        (written,) = struct.unpack(code, struct.pack(code, float(f"{value:e}")))
        if (written, math.copysign(1, written)) == (value, math.copysign(1, value)):
            return tirx.FloatImm(dtype, value)
    (pattern,) = struct.unpack(integer, struct.pack(code, value))
    return _call(dtype, f"constant_{dtype}", tirx.IntImm(f"int{bits}", pattern))


def _poison(tile: Any) -> Any:
    """Return the statement that makes every element of a tile NaN."""
    first = tirx.BufferLoad(tile, [0] * len(tile.shape))
    address = tirx.call_intrin("handle", "tirx.address_of", first)
    size = math.prod(int(n) for n in tile.shape)
    return tirx.Evaluate(tirx.call_extern("int32", f"gdn_ops_poison_{tile.dtype}", address, size))


@tirx.functor.mutator
class _Exact(tirx.PyStmtExprMutator):  # type: ignore[misc]
    """Rewrite a function in one pass, in the order of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[Any, Any] = {}
        self.encoded: dict[Any, str] = {}
        self.variables: dict[Any, Any] = {}
        self.accesses = Accesses()
        self.products = Products()
        self.is_operand = False
        self.bounds = Bounds()
        self.refused: Exception | None = None
        self.grid: dict[str, Any] = {}

    def _refuse(self, what: str) -> Exception:
        self.refused = NotImplementedError(f"{what} has no emulation on CPU tensors")
        return self.refused

    def tensor(self, buffer: Any) -> Any:
        """Declare a tensor parameter as the C target takes it, and return it."""
        dtype = str(buffer.dtype)
        if dtype in LOW:
            self.encoded[buffer] = dtype
            dtype = "uint16"
        elif dtype not in _EXACT:
            raise self._refuse(f"tensor {buffer.name} of {dtype}")
        # A size is never negative. Without that, every quotient by one has two cases.
        for size in buffer.shape:
            if isinstance(size, tirx.Var):
                self.variables.setdefault(size, tirx.SizeVar(size.name, size.dtype))
        shape, strides = (
            [self.visit_expr(n) for n in numbers] for numbers in (buffer.shape, buffer.strides)
        )
        self.buffers[buffer] = tirx.decl_buffer(shape, dtype, buffer.name, strides=strides)
        return self.buffers[buffer]

    def tile(self, buffer: Any) -> Any:
        """Declare a tile as the C target takes it, and return it."""
        dtype = str(buffer.dtype)
        if dtype not in (*LOW, *_EXACT):
            raise self._refuse(f"tile {buffer.name} of {dtype}")
        self.buffers[buffer] = tirx.decl_buffer(
            buffer.shape,
            "float32" if dtype in LOW else dtype,
            buffer.name,
            scope="local.var" if buffer.scope() == "local.var" else "local",
        )
        return self.buffers[buffer]

    def visit_sblock_(self, op: Any) -> Any:
        tiles = [self.tile(buffer) for buffer in op.alloc_buffers]
        poison = [_poison(tile) for tile in tiles if str(tile.dtype).startswith("float")]
        body = self.visit_stmt(op.body)
        checks, self.grid = self.bounds.of_grid(self.grid), {}
        if checks or poison:
            body = tirx.SeqStmt([*checks, *poison, body])
        return tirx.SBlock(op.iter_vars, [], [], op.name_hint, body, None, tiles)

    def visit_for_(self, op: Any) -> Any:
        low, extent = self.visit_expr(op.min), self.visit_expr(op.extent)
        self.bounds.loop(op)
        if op.kind == tirx.ForKind.THREAD_BINDING:
            self.grid[str(op.thread_binding.thread_tag)] = extent
        with self.accesses.loop(op), self.products.loop():
            body = self.visit_stmt(op.body)
        if op.kind == tirx.ForKind.THREAD_BINDING:
            return tirx.For(op.loop_var, low, extent, op.kind, body, op.thread_binding)
        return tirx.For(op.loop_var, low, extent, tirx.ForKind.SERIAL, body)

    def visit_if_then_else_(self, op: Any) -> Any:
        condition = self.visit_expr(op.condition)
        with self.accesses.condition(op.condition), self.products.branches():
            with self.bounds.condition(op.condition):
                then = self.visit_stmt(op.then_case)
            with self.bounds.condition(tirx.Not(op.condition)):
                otherwise = None if op.else_case is None else self.visit_stmt(op.else_case)
        return tirx.IfThenElse(condition, then, otherwise)

    def visit_bind_(self, op: Any) -> Any:
        value = self.visit_expr(op.value)
        self.accesses.bind(op.var, op.value)
        self.bounds.bind(op.var, op.value)
        variable = op.var
        if str(variable.dtype) in LOW:
            variable = self.variables[op.var] = tirx.Var(variable.name, "float32")
        return tirx.Bind(variable, value)

    def visit_var_(self, op: Any) -> Any:
        return self.variables.get(op, op)

    def visit_buffer_load_(self, op: Any) -> Any:
        self.accesses.load(op)
        if not self.is_operand:
            self.products.load(op.buffer)
        buffer, indices = self._place(op)
        load = tirx.BufferLoad(buffer, indices)
        dtype = self.encoded.get(op.buffer)
        return load if dtype is None else _call("float32", f"decode_{dtype}", load)

    def visit_buffer_store_(self, op: Any) -> Any:
        self.accesses.store(op)
        self.products.store(op.buffer, op.value)
        buffer, indices = self._place(op)
        value, dtype = self.visit_expr(op.value), self.encoded.get(op.buffer)
        if dtype is not None:
            value = _call("uint16", f"encode_{dtype}", value)
        return tirx.BufferStore(buffer, value, indices)

    def _place(self, op: Any) -> tuple[Any, list[Any]]:
        """Return the rewritten buffer and indices of a load or a store."""
        if op.buffer not in self.buffers:
            raise self._refuse(f"{op.buffer.name}, a view of a tile,")
        buffer = self.buffers[op.buffer]
        indices = [self.visit_expr(index) for index in op.indices]
        if buffer.scope() == "global":
            return buffer, indices
        return buffer, self.bounds.checked(buffer, indices, op.indices)

    def visit_cast_(self, op: Any) -> Any:
        value = self.visit_expr(op.value)
        dtype = "float32" if str(op.dtype) in LOW else str(op.dtype)
        if str(value.dtype) != dtype:
            value = tirx.Cast(dtype, value)
        # Round what was bfloat16, which may not be a float16; what was float16 is one.
        return value if op.value.dtype == op.dtype else _rounded(value, op.dtype)

    def visit_add_(self, op: Any) -> Any:
        return _rounded(type(op)(self.visit_expr(op.a), self.visit_expr(op.b)), op.dtype)

    visit_sub_ = visit_mul_ = visit_div_ = visit_add_

    def visit_float_imm_(self, op: Any) -> Any:
        if str(op.dtype) in LOW:
            return _constant("float32", nearest(op.value, str(op.dtype)))
        return _constant(str(op.dtype), op.value)

    def visit_call_(self, op: Any) -> Any:
        name, dtype = getattr(op.op, "name", ""), str(op.dtype)
        if name not in _KNOWN and name.startswith(("tl.", "tirx.reinterpret")):
            raise self._refuse(name)
        if name == "tirx.call_extern":
            self.accesses.call()
            c, a, b = (op.args[i].args[0].buffer for i in (1, 3, 5))
            self.products.product(c, (a, b), is_awaited=str(op.args[0].value) == GEMM)
            # The addresses of operands are no loads of them.
            self.is_operand = True
        arguments = self._arguments(op, name)
        if name == "tirx.call_extern":
            self.is_operand = False
        exact = "float32" if dtype in LOW else dtype
        if name in _MISSING:
            function = _MISSING[name] + ("f" if exact == "float32" else "")
            new = tirx.call_pure_extern(exact, function, *arguments)
        else:
            new = tirx.Call(exact, op.op, arguments)
        return new if name in _UNROUNDED else _rounded(new, dtype)

    def _arguments(self, op: Any, name: str) -> list[Any]:
        if name != "tirx.if_then_else":
            return [self.visit_expr(argument) for argument in op.args]
        condition, then, otherwise = op.args
        arguments = [self.visit_expr(condition)]
        for holds, value in ((condition, then), (tirx.Not(condition), otherwise)):
            with self.bounds.condition(holds):
                arguments.append(self.visit_expr(value))
        return arguments
