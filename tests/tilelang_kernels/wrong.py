"""Kernels that a GPU would refuse, or run in another way than they read, each for one reason."""

from typing import Any


def tile_operation(
    T: Any, *, name: str, shapes: Any, scopes: str, dtypes: Any, options: Any
) -> Any:
    """One tile operation on tiles of these shapes.

    Args:
        T: the language.
        name: of the operation.
        shapes: of the tiles.
        scopes: of the tiles, a letter each: s for shared, f for fragment.
        dtypes: of the tiles.
        options: pairs of a keyword and its value.
    """
    memory = {"s": "alloc_shared", "f": "alloc_fragment"}

    @T.prim_func
    def tile_operation(x: T.Tensor((1,), "float32")):
        with T.Kernel(1, threads=128):
            tiles = [
                getattr(T, memory[scope])(shape, dtype)
                for scope, shape, dtype in [*zip(scopes, shapes, dtypes, strict=True)]
            ]
            getattr(T, name)(*tiles, **dict(options))

    return tile_operation


def one_for_all(T: Any) -> Any:
    """All iterations write one element."""

    @T.prim_func
    def one_for_all(x: T.Tensor((8, 8), "float32")):
        with T.Kernel(1, threads=32):
            total = T.alloc_shared((8,), "float32")
            T.clear(total)
            for i, j in T.Parallel(8, 8):
                total[i] = total[i] + x[i, j]
            T.copy(total, x[0, :])

    return one_for_all


def neighbour(T: Any) -> Any:
    """An iteration reads what its neighbour writes."""

    @T.prim_func
    def neighbour(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((8,), "float32")
            T.copy(x, tile)
            for i in T.Parallel(8):
                if i > 0:
                    tile[i] = tile[i - 1] + 1.0
            T.copy(tile, x)

    return neighbour


def nested(T: Any) -> Any:
    """A product inside of a parallel loop."""

    @T.prim_func
    def nested(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((16, 16), "bfloat16")
            c = T.alloc_fragment((16, 16), "float32")
            for i in T.Parallel(8):
                T.gemm(a, a, c)
                x[i] = c[0, 0]

    return nested


def orderly(T: Any) -> Any:
    """No race: what looks like one is in the same iteration, behind a condition, or apart."""

    @T.prim_func
    def orderly(x: T.Tensor((8, 16), "float32")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((8, 16), "float32")
            row = T.alloc_shared((8,), "float32")
            T.copy(x, tile)
            for i in T.Parallel(8):
                for j in T.serial(1, 16):
                    tile[i, j] = tile[i, j] + tile[i, j - 1]
            for i, j in T.Parallel(8, 16):
                if j == 15:
                    row[i] = tile[i, j]
            for i, j in T.Parallel(8, 8):
                k = j + 8
                tile[i, k] = tile[i, j] + row[i]
            T.copy(tile, x)

    return orderly


def named(T: Any, *, name: str, threads: int = 32) -> Any:
    """Ask the language for a name, in a program of so many threads."""

    @T.prim_func
    def named(x: T.Tensor((1,), "float32")):
        with T.Kernel(1, threads=threads):
            getattr(T, name)(x)

    return named


def low_number(T: Any) -> Any:
    """A number of a low dtype."""

    @T.prim_func
    def low_number(x: T.Tensor((1,), "float32"), y: T.bfloat16):
        with T.Kernel(1, threads=32):
            x[0] = T.cast(y, "float32")

    return low_number


def tile_of(T: Any, *, dtype: str) -> Any:
    """A tile of a dtype."""

    @T.prim_func
    def tile_of(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((8,), dtype)
            T.copy(x, tile)

    return tile_of


def clamped(T: Any) -> Any:
    """An operation that only a GPU's code generator has."""

    @T.prim_func
    def clamped(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=32):
            x[0] = T.clamp(x[0], 0.0, 1.0)

    return clamped


def viewed(T: Any) -> Any:
    """A tile under two names."""

    @T.prim_func
    def viewed(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((8,), "float32")
            square = T.Tensor((2, 4), "float32", tile.data)
            T.copy(x, tile)
            x[0] = square[1, 1]

    return viewed


def unawaited(T: Any, *, then: str) -> Any:
    """What follows a product that nothing has waited for."""
    beside = {"wg_wait": -1}

    @T.prim_func
    def unawaited(x: T.Tensor((16, 16), "bfloat16"), y: T.Tensor((16, 16), "float32")):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((16, 16), "bfloat16")
            c = T.alloc_fragment((16, 16), "float32")
            d = T.alloc_fragment((16, 16), "float32")
            T.copy(x, a)
            T.gemm(a, a, c, clear_accum=True, annotations=beside)
            if then == "read the result":
                d[0, 0] = c[0, 0]
            if then == "read it after a branch":
                if y[0, 0] > 0.0:
                    T.gemm(a, a, d, clear_accum=True)
                T.copy(c, y)
            if then == "write the result":
                T.clear(c)
            if then == "write an operand":
                T.clear(a)
            if then == "write another tile":
                b = T.alloc_shared((16, 16), "bfloat16")
                T.clear(b)
            if then == "wait":
                T.gemm(a, a, c, clear_accum=False, annotations=beside)
                T.gemm(a, a, d, clear_accum=True)
                for i, j in T.Parallel(16, 16):
                    y[i, j] = c[i, j] + d[i, j]

    return unawaited


def unawaited_in_loop(T: Any, *, then: str) -> Any:
    """What follows a product of a loop that nothing has waited for."""

    @T.prim_func
    def unawaited_in_loop(x: T.Tensor((4, 16, 16), "bfloat16"), y: T.Tensor((16, 16), "float32")):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((16, 16), "bfloat16")
            b = T.alloc_shared((16, 16), "bfloat16")
            c = T.alloc_fragment((16, 16), "float32")
            d = T.alloc_fragment((16, 16), "float32")
            T.clear(b)
            T.clear(c)
            T.clear(d)
            for turn in T.Pipelined(4, num_stages=2):
                T.copy(x[turn, :, :], a)
                T.gemm(a, b, c, annotations={"wg_wait": -1})
                if then != "end the loop":
                    T.gemm(b, b, d)
                if then == "wait and hold":
                    T.evaluate(a[0, 0])
            T.copy(c, y)

    return unawaited_in_loop
