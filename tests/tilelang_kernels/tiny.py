"""Small kernels, to be compiled often."""

from typing import Any


def scaled(T: Any, *, N: int, dtype: str) -> Any:
    """Y = scale X."""
    M = T.dynamic("M")

    @T.prim_func
    def scaled(
        X: T.Tensor((M, N), dtype), Y: T.Tensor((M, N), dtype), scale: T.float32, rows: T.int32
    ):
        with T.Kernel(rows, threads=32) as i:
            x = T.alloc_fragment((N,), "float32")
            T.copy(X[i, 0:N], x)
            for j in T.Parallel(N):
                x[j] = x[j] * scale
            T.copy(x, Y[i, 0:N])

    return scaled


def broken(T: Any, *, N: int) -> Any:
    """A kernel that TileLang cannot trace."""

    @T.prim_func
    def broken(X: T.Tensor((N,), "float32")):
        with T.Kernel(1, threads=32):
            T.copy(X, T.alloc_shared((N + 1,), "float32"))

    return broken
