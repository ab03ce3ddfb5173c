"""Kernels for a GPU, some of them wrong for one, each for one reason."""

from typing import Any


def product(T: Any, *, M: int, N: int, K: int, dtype: str, threads: int) -> Any:
    """A Bᵀ in one program, all of it in shared memory."""

    @T.prim_func
    def product(
        A: T.Tensor((M, K), dtype),
        B: T.Tensor((N, K), dtype),
        D: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=threads):
            a = T.alloc_shared((M, K), dtype)
            b = T.alloc_shared((N, K), dtype)
            d = T.alloc_fragment((M, N), "float32")

            T.copy(A, a)
            T.copy(B, b)

            T.gemm(a, b, d, transpose_B=True, clear_accum=True)

            T.copy(d, D)

    return product


def normalise(T: Any, *, M: int, N: int, threads: int) -> Any:
    """Rows of X divided by their largest element, in registers."""
    rows = T.dynamic("rows")

    @T.prim_func
    def normalise(X: T.Tensor((rows, N), "float32"), Y: T.Tensor((rows, N), "float32")):
        with T.Kernel(T.ceildiv(rows, M), threads=threads) as i:
            x = T.alloc_fragment((M, N), "float32")
            most = T.alloc_fragment((M,), "float32")

            T.copy(X[i * M : (i + 1) * M, 0:N], x)

            T.reduce_max(x, most, dim=1)
            for r, c in T.Parallel(M, N):
                x[r, c] = x[r, c] / most[r]

            T.copy(x, Y[i * M : (i + 1) * M, 0:N])

    return normalise


def two_layouts(T: Any, *, N: int) -> Any:
    """One accumulator for a product in bfloat16 and one in float32: Hopper has two layouts."""

    @T.prim_func
    def two_layouts(A: T.Tensor((N, N), "bfloat16"), B: T.Tensor((N, N), "float32")):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((N, N), "bfloat16")
            b = T.alloc_shared((N, N), "float32")
            d = T.alloc_fragment((N, N), "float32")

            T.copy(A, a)
            T.copy(B, b)

            T.gemm(a, a, d, clear_accum=True)
            T.gemm(b, b, d)

            T.copy(d, B)

    return two_layouts


def misspelt(T: Any, *, N: int) -> Any:
    """Uses a name that the language does not have."""

    @T.prim_func
    def misspelt(A: T.Tensor((N, N), "float32")):
        with T.Kernel(1, threads=128):
            a = T.alloc_share((N, N), "float32")
            T.copy(A, a)
            T.copy(a, A)

    return misspelt
