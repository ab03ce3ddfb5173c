"""Kernels that do one thing each: what emulation makes of the language is compared with torch."""

import itertools
from typing import Any


def rounds(T: Any, *, dtype: str) -> Any:
    """Round floats to a low dtype; the tile is of that dtype, and so is the tensor."""
    N = T.dynamic("N")

    @T.prim_func
    def rounds(
        x: T.Tensor((N,), "float32"),
        low: T.Tensor((N,), dtype),
        back: T.Tensor((N,), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, 256), threads=128) as i:
            tile = T.alloc_shared((256,), dtype)
            for j in T.Parallel(256):
                tile[j] = x[i * 256 + j]
            T.copy(tile, low[i * 256])
            for j in T.Parallel(256):
                back[i * 256 + j] = T.cast(tile[j], "float32")

    return rounds


def computes(T: Any, *, dtype: str) -> Any:
    """Compute in a low dtype; each operation has a row of the result."""
    N = T.dynamic("N")

    @T.prim_func
    def computes(
        a: T.Tensor((N,), dtype),
        b: T.Tensor((N,), dtype),
        low: T.Tensor((9, N), dtype),
        wide: T.Tensor((2, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, 256), threads=128) as i:
            x = T.alloc_shared((256,), dtype)
            y = T.alloc_fragment((256,), dtype)
            T.copy(a[i * 256 : (i + 1) * 256], x)
            T.copy(b[i * 256 : (i + 1) * 256], y)
            for j in T.Parallel(256):
                low[0, i * 256 + j] = x[j] + y[j]
                low[1, i * 256 + j] = x[j] - y[j]
                low[2, i * 256 + j] = x[j] * y[j]
                low[3, i * 256 + j] = x[j] / y[j]
                low[4, i * 256 + j] = x[j] * y[j] + x[j]
                low[5, i * 256 + j] = T.if_then_else(x[j] < y[j], x[j], -y[j])
                low[6, i * 256 + j] = x[j] * T.cast(0.1, dtype)
                low[7, i * 256 + j] = T.sqrt(T.abs(x[j]))
                once = T.cast(T.cast(x[j], "float32") * 3.0, dtype)
                low[8, i * 256 + j] = once - x[j]
                wide[0, i * 256 + j] = T.cast(x[j], "float32") * T.cast(y[j], "float32")
                wide[1, i * 256 + j] = x[j] * y[j]

    return computes


def constants(T: Any, *, values: Any, dtype: str) -> Any:
    """Store numbers that the kernel is made with."""

    @T.prim_func
    def constants(x: T.Tensor((len(values) + 1,), dtype)):
        with T.Kernel(1, threads=32):
            for i, value in [*enumerate(values)]:
                x[i] = T.cast(value, dtype)
            x[len(values)] = T.cast(-T.infinity("float32"), dtype)

    return constants


def copies(T: Any, *, rows: int, columns: int, dtype: str, shift: int) -> Any:
    """Copy a matrix tile by tile, moved by `shift` in both axes, through another dtype."""
    M, N = T.dynamic("M"), T.dynamic("N")

    @T.prim_func
    def copies(x: T.Tensor((M, 1, N), "float32"), y: T.Tensor((M, N), "float32")):
        with T.Kernel(T.ceildiv(N, columns), T.ceildiv(M, rows), threads=64) as (j, i):
            a = T.alloc_shared((2, rows, columns), dtype)
            b = T.alloc_fragment((rows, columns), "float32")
            top, left = i * rows + shift, j * columns + shift
            T.copy(x[top : top + rows, 0, left : left + columns], a[1, :, :])
            T.copy(a[1, 0:rows, 0:columns], b)
            T.copy(b, y[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns])

    return copies


def multiplies(
    T: Any, *, M: int, N: int, K: int, dtype: str, transpose_A: bool, transpose_B: bool
) -> Any:
    """D = C + A B for parts of larger tiles, and E = A B."""
    a_shape = (K, M) if transpose_A else (M, K)
    b_shape = (N, K) if transpose_B else (K, N)

    @T.prim_func
    def multiplies(
        A: T.Tensor(a_shape, dtype),
        B: T.Tensor(b_shape, dtype),
        C: T.Tensor((M, N), "float32"),
        D: T.Tensor((M, N), "float32"),
        E: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128):
            a = T.alloc_fragment(a_shape, dtype)
            b = T.alloc_shared((2, b_shape[0], b_shape[1] + 8), dtype)
            c = T.alloc_fragment((M, N), "float32")
            e = T.alloc_fragment((M, N), "float32")
            T.copy(A, a)
            T.copy(B, b[1, :, 8 : b_shape[1] + 8])
            T.copy(C, c)
            T.gemm(a, b[1, :, 8 : b_shape[1] + 8], c, transpose_A, transpose_B)
            T.gemm(a, b[1, :, 8 : b_shape[1] + 8], e, transpose_A, transpose_B, clear_accum=True)
            T.copy(c, D)
            T.copy(e, E)

    return multiplies


def reduces(T: Any, *, M: int, N: int) -> Any:
    """Every reduction and scan of an (M, N) tile."""

    @T.prim_func
    def reduces(
        x: T.Tensor((M, N), "float32"),
        rows: T.Tensor((4, M), "float32"),
        columns: T.Tensor((3, N), "float32"),
        scans: T.Tensor((4, M, N), "float32"),
        sums: T.Tensor((N,), "float64"),
    ):
        with T.Kernel(1, threads=128):
            a = T.alloc_fragment((M, N), "float32")
            s = T.alloc_shared((M, N), "float32")
            r = T.alloc_fragment((M,), "float32")
            k = T.alloc_fragment((M, 1), "float32")
            c = T.alloc_fragment((N,), "float32")
            d = T.alloc_shared((N,), "float64")
            T.copy(x, a)

            T.reduce_sum(a, r, dim=1)
            T.copy(r, rows[0, :])
            T.reduce_max(a, k, dim=-1)
            T.copy(k, rows[1, 0:M])
            T.fill(r, 10.0)
            T.reduce_sum(a, r, dim=1, clear=False)
            T.copy(r, rows[2, :])
            T.reduce_min(a, r, dim=1)
            T.copy(r, rows[3, :])

            T.reduce_sum(a, c, dim=0)
            T.copy(c, columns[0, :])
            T.reduce_max(a, c, dim=0)
            T.copy(c, columns[1, :])
            T.fill(c, 2.5)
            T.clear(c[0 : N // 2])
            T.copy(c, columns[2, :])

            T.cumsum(a, s, dim=0)
            T.copy(s, scans[0, :, :])
            T.cumsum(a, s, dim=1, reverse=True)
            T.copy(s, scans[1, :, :])
            T.cumsum(a, s, dim=0, reverse=True)
            T.copy(s, scans[2, :, :])
            T.cumsum(a, dim=1)
            T.copy(a, scans[3, :, :])

            for j in T.Parallel(N):
                d[j] = T.cast(x[0, j], "float64") / 3.0
            T.cumsum(d)
            T.copy(d, sums)

    return reduces


def controls(T: Any, *, steps: int, parts: int) -> Any:
    """Loops of every kind, variables, conditions and macros."""

    @T.macro
    def add(tiles, amount):
        for tile in tiles:
            for j in T.Parallel(8):
                tile[j] = tile[j] + amount

    @T.macro
    def largest(values, n):
        best = T.alloc_var("int32", init=0)
        for i in T.serial(n):
            if values[i] > best:
                best = values[i]
        return best

    @T.prim_func
    def controls(values: T.Tensor((8,), "int32"), out: T.Tensor((6, 8), "int32"), n: T.int32):
        with T.Kernel(1, threads=32):
            tiles = [T.alloc_shared((8,), "int32") for _ in range(parts)]
            count = T.alloc_var("int32")
            for tile in tiles:
                T.clear(tile)
            for i in T.Pipelined(n, num_stages=2):
                add(tiles, i)
            for i in T.serial(0, steps, 2):
                add(tiles[:1], 100 * i)
            for i in T.unroll(3):
                add(tiles[1:], -i)
            count = 0
            while count * count < n:
                count += 1
            top = largest(values, 8)
            for j in T.Parallel(8):
                out[0, j] = tiles[0][j]
                out[1, j] = tiles[1][j]
                out[2, j] = count
                out[3, j] = top
                out[4, j] = T.if_then_else(j > 0, values[T.max(j - 1, 0)], -1)
                out[5, j] = (values[j] - 20) // 8 * 100 + (values[j] - 20) % 8

    return controls


def forgets(T: Any, *, dtype: str) -> Any:
    """Read a tile that nothing has written in the second program, and in the first only half."""

    @T.prim_func
    def forgets(x: T.Tensor((2, 8), dtype)):
        with T.Kernel(2, threads=32) as i:
            tile = T.alloc_shared((8,), dtype)
            if i == 0:
                T.fill(tile[0:4], 1.0)
            T.copy(tile, x[i, :])

    return forgets


def strays(T: Any) -> Any:
    """Read a tile at an index that is an argument."""

    @T.prim_func
    def strays(x: T.Tensor((8,), "float32"), i: T.int32):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((4,), "float32")
            T.fill(tile, 3.0)
            for j in T.Parallel(8):
                x[j] = T.if_then_else(j >= 4, tile[j - 4], 0.0) + tile[i]

    return strays


def wide_grid(T: Any) -> Any:
    """Have a grid whose second axis may be longer than a GPU's."""

    @T.prim_func
    def wide_grid(x: T.Tensor((1,), "float32"), rows: T.int32, columns: T.int32):
        with T.Kernel(columns, rows, threads=32):
            tile = T.alloc_shared((1,), "float32")
            tile[0] = 1.0
            x[0] = tile[0]

    return wide_grid


def sweeps(T: Any, *, n: int) -> Any:
    """Read the first n elements of a tile of four."""

    @T.prim_func
    def sweeps(x: T.Tensor((8,), "float32")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((4,), "float32")
            T.fill(tile, 3.0)
            for j in T.Parallel(n):
                x[j] = tile[j]

    return sweeps


def widens(T: Any, *, tiles: int, rows: int) -> Any:
    """Use many large tiles: rows * 4 KiB each."""

    @T.prim_func
    def widens(x: T.Tensor((1024,), "float32"), y: T.Tensor((1024,), "float32")):
        with T.Kernel(1, threads=128):
            large = [T.alloc_shared((rows, 1024), "float32") for _ in range(tiles)]
            for i in T.serial(rows):
                T.copy(x, large[0][i, :])
            for source, target in itertools.pairwise(large):
                for i, j in T.Parallel(rows, 1024):
                    target[i, j] = source[rows - 1 - i, j] + 1.0
            T.copy(large[-1][rows - 1, :], y)

    return widens


def reaches(T: Any) -> Any:
    """Write the last row of a tensor of more elements than 32 bits can count."""
    M, N = T.dynamic("M"), T.dynamic("N")

    @T.prim_func
    def reaches(x: T.Tensor((M, N), "int8")):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((32,), "int8")
            T.fill(tile, 7)
            T.copy(tile, x[M - 1, N - 32])

    return reaches
