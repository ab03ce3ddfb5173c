"""Define the namespace that traces a kernel for CPU tensors: tile operations as plain loops.

    kernel = make(CPU, **constants)

is the same source as `make(tilelang.language, **constants)`. What a GPU does with many threads is
written out as loops here: copies between tensors and tiles, reductions, scans; products call a
function of `prelude`. Names that say how threads share the work do nothing. Everything that is
the same on a CPU, loops, allocations, arithmetic, is TileLang's own, and what has no emulation
raises NotImplementedError.

What a GPU would refuse, or do with less precision than a reader expects, is refused here too:
products of float32 (TF32 on a GPU) or of tiles in the wrong memory, shapes that do not match.
`rounding` finishes what is traced here: low precision, parallel loops, which may not race, and
products that run beside other statements on a GPU, which must be waited for.

What an emulation does not show: races between programs, the order in which a GPU adds, layouts of
fragments, how much shared memory there is, and a compiler that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from gdn_ops.backends.tilelang.emulation.operands import Tile, check_product, matched, matrix, whole
from gdn_ops.backends.tilelang.emulation.prelude import GEMM, UNAWAITED_GEMM

UNAWAITED: Final = {"wg_wait": -1}
"""Mark a product that is not waited for."""

_NOTHING: Final = frozenset(
    {
        *("annotate_layout", "annotate_l2_hit_ratio", "annotate_min_blocks_per_sm"),
        *("annotate_restrict_buffers", "use_swizzle", "sync_threads", "sync_warp"),
        *("set_max_nreg", "inc_max_nreg", "dec_max_nreg", "no_set_max_nreg"),
        *("annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc"),
        "disable_warp_group_reg_alloc",
    }
)
"""Names that change only the speed on a GPU, and do nothing here."""

_ABSENT_MODULES: Final = tuple(
    f"tilelang.{name}"
    for name in (
        *("cuda", "language.atomic", "language.builtin", "language.logical", "language.fp8"),
        *("language.copy_op", "language.gemm_op", "language.fill_op", "language.reduce_op"),
        *("language.scan_op", "language.experimental", "language.math_intrinsics"),
        *("language.tile_schedule", "language.warp_specialize"),
    )
)
"""Modules of TileLang whose functions need threads, warps, or one kind of GPU."""

_ABSENT: Final = frozenset(
    {
        *("Persistent", "alloc_barrier", "alloc_reducer", "alloc_global", "empty", "ptr"),
        *("reshape", "view", "import_source", "make_tensor", "make_tensor_from_addr"),
        *("call_extern", "call_pure_extern", "call_packed", "call_intrin", "address_of"),
        *("get_thread_binding", "get_thread_bindings", "thread_binding", "dp4a", "reinterpret"),
    }
)
"""Names outside of those modules that have no emulation either."""

_FORWARDED: Final = frozenset({"Parallel", "unroll", "Unroll"})
"""Names inside of those modules that are TileLang's own here too."""


class Language:
    """Provide TileLang's language, as far as kernels use it, for the C target."""

    def __getattr__(self, name: str) -> Any:
        """Return TileLang's own attribute where it means the same on a CPU.

        Raises:
            NotImplementedError: where it is not.
        """
        import tilelang.language

        value = getattr(tilelang.language, name)
        if name in _NOTHING:
            return _nothing
        module = getattr(value, "__module__", None) or ""
        elsewhere = callable(value) and module.startswith(_ABSENT_MODULES)
        if name in _ABSENT or (elsewhere and name not in _FORWARDED):
            raise NotImplementedError(f"T.{name} has no emulation on CPU tensors")
        return value

    def Kernel(self, *grid: Any, threads: int = 128) -> Any:
        """Run every program of the grid, one after the other.

        Args:
            grid: one to three sizes.
            threads: of one program, on a GPU.

        Raises:
            ValueError: a number of threads that no GPU has.
        """
        from tilelang.cpu.language import Kernel

        if threads % 32 or not 32 <= threads <= 1024:
            raise ValueError(f"T.Kernel: threads={threads}, should be a multiple of 32 up to 1024")
        return Kernel(*grid)

    def copy(self, src: Any, dst: Any, **hints: Any) -> None:
        """Copy a rectangle, converted to the dtype of the destination.

        What lies outside of a tensor is read as 0 and not written.

        Args:
            src, dst: tensors, tiles, or parts of them; axes of extent 1 do not count.
            hints: for a GPU.

        Raises:
            ValueError: rectangles of different sizes.
        """
        a, b = matched(src, dst, "T.copy")
        _loops(b.inner, lambda i: _store(b, _load(a, i), i))

    def fill(self, buffer: Any, value: Any) -> None:
        """Set every element of a tile, or of a part of one."""
        part = whole(buffer, "T.fill")
        _loops(part.inner, lambda i: _store(part, value, i))

    def clear(self, buffer: Any) -> None:
        """Set every element of a tile, or of a part of one, to 0."""
        self.fill(buffer, 0)

    def gemm(
        self,
        A: Any,
        B: Any,
        C: Any,
        transpose_A: bool = False,
        transpose_B: bool = False,
        policy: Any = None,
        clear_accum: bool = False,
        annotations: dict[str, int] | None = None,
    ) -> None:
        """Emit C += A B, or C = A B, in float32.

        Args:
            A: (M, K), or (K, M) with transpose_A; in shared memory or a fragment.
            B: (K, N), or (N, K) with transpose_B; in shared memory.
            C: (M, N) float32, a fragment.
            transpose_A, transpose_B: whether an operand is stored transposed.
            policy: how warps share the work, on a GPU.
            clear_accum: whether C is 0 before.
            annotations: {"wg_wait": -1} for a product that the next one without it waits for.

        Raises:
            NotImplementedError: other annotations.
            ValueError: operands that a GPU has no instruction for, shapes that do not match,
                and float32 operands, which a GPU would round to TF32.
        """
        from tvm import tirx
        from tvm.script.ir_builder import tirx as build

        a, b, c = (matrix(operand, "T.gemm") for operand in (A, B, C))
        check_product(a, b, c, (transpose_A, transpose_B))
        shape = [*c.shape, a.shape[0] if transpose_A else a.shape[1]]
        flags = [int(transpose_A), int(transpose_B), int(clear_accum)]
        operands = [*c.pointer(), *a.pointer(), *b.pointer()]
        if annotations not in (None, UNAWAITED):
            raise NotImplementedError(f"T.gemm with {annotations} has no emulation on CPU tensors")
        name = GEMM if annotations is None else UNAWAITED_GEMM
        build.evaluate(tirx.call_extern("void", name, *operands, *shape, *flags))

    def reduce_sum(self, buffer: Any, out: Any, dim: int = -1, clear: bool = True) -> None:
        """Sum a tile along an axis, in its dtype."""
        _reduce("T.reduce_sum", buffer, out, dim, 0.0 if clear else None)

    def reduce_max(self, buffer: Any, out: Any, dim: int = -1, clear: bool = True) -> None:
        """Take the largest element of a tile along an axis."""
        _reduce("T.reduce_max", buffer, out, dim, -math.inf if clear else None)

    def reduce_min(self, buffer: Any, out: Any, dim: int = -1, clear: bool = True) -> None:
        """Take the smallest element of a tile along an axis."""
        _reduce("T.reduce_min", buffer, out, dim, math.inf if clear else None)

    def cumsum(self, src: Any, dst: Any = None, dim: int = 0, reverse: bool = False) -> None:
        """Sum a tile up to each element along an axis, itself included.

        Args:
            src: the tile.
            dst: where the sums go; by default where they come from.
            dim: the axis.
            reverse: from the end.

        Raises:
            ValueError: tiles of different shapes.
        """
        from tvm.script.ir_builder import tirx as build

        source = whole(src, "T.cumsum")
        result = source if dst is None else whole(dst, "T.cumsum")
        if source.extents != result.extents:
            raise ValueError(
                f"T.cumsum: {result.name} has shape {result.extents}, should be {source.extents}"
            )
        axis = range(len(source.extents))[dim]
        size = source.extents[axis]

        def place(outer: list[Any], i: Any) -> list[Any]:
            indices = [*outer[:axis], size - 1 - i if reverse else i, *outer[axis:]]
            return [at for at, n in zip(indices, source.extents, strict=True) if n != 1]

        def body(outer: list[Any]) -> None:
            first = place(outer, 0)
            _store(result, _load(source, first), first)
            with build.serial(1, size) as i:
                here, before = place(outer, i), place(outer, i - 1)
                _store(result, _load(result, before) + _load(source, here), here)

        _loops(source.extents[:axis] + source.extents[axis + 1 :], body)


CPU: Final = Language()
"""The `T` of a kernel that is traced for CPU tensors."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Ignore a hint to a GPU."""


def _loops(extents: Sequence[Any], body: Callable[[list[Any]], None]) -> None:
    """Emit nested loops around the statements that `body` emits for their variables."""
    from tvm.script.ir_builder import tirx as build

    if not extents:
        body([])
        return
    with build.serial(0, extents[0]) as i:
        _loops(extents[1:], lambda rest: body([i, *rest]))


def _load(part: Tile, indices: Sequence[Any]) -> Any:
    from tvm import tirx

    return tirx.BufferLoad(part.buffer, part.at(indices))


def _store(part: Tile, value: Any, indices: Sequence[Any]) -> None:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as build

    dtype = str(part.buffer.dtype)
    if not isinstance(value, tirx.PrimExpr):
        value = tirx.const(value, dtype)
    elif str(value.dtype) != dtype:
        value = tirx.Cast(dtype, value)
    build.buffer_store(part.buffer, value, part.at(indices))


def _reduce(operation: str, buffer: Any, out: Any, dim: int, first: float | None) -> None:
    """Emit a reduction along an axis.

    Args:
        operation: its name.
        buffer: the tile.
        out: the result: its shape, without the axis or with 1 for it.
        dim: the axis.
        first: what the result starts from; None for what it holds.

    Raises:
        ValueError: a result of the wrong shape or dtype.
    """
    from tvm import tirx

    source, result = whole(buffer, operation), whole(out, operation)
    axis = range(len(source.extents))[dim]
    extents = [1 if i == axis else n for i, n in enumerate(source.extents)]
    expected = source._replace(extents=extents)
    if expected.inner != result.inner or source.buffer.dtype != result.buffer.dtype:
        raise ValueError(
            f"{operation}: {result.name} is {result.buffer.dtype} {result.extents}, should be "
            f"{source.buffer.dtype} {expected.extents}, with or without the 1"
        )
    combine = {
        "T.reduce_sum": lambda a, b: a + b,
        "T.reduce_max": tirx.Max,
        "T.reduce_min": tirx.Min,
    }[operation]
    axes = [i for i, n in enumerate(source.extents) if n != 1]

    def body(indices: list[Any]) -> None:
        kept = [at for i, at in zip(axes, indices, strict=True) if i != axis]
        _store(result, combine(_load(result, kept), _load(source, indices)), kept)

    if first is not None:
        _loops(result.inner, lambda i: _store(result, first, i))
    _loops(source.inner, body)
