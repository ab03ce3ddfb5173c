"""Kernels that run in an emulation and are wrong for a GPU, each for one reason."""

import triton
import triton.language as tl


@triton.jit
def product(A_, B_, D_, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(A_ + m[:, None] * K + k[None, :])
    b = tl.load(B_ + k[:, None] * N + n[None, :])
    tl.store(D_ + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def normalise(X_, Y_, M: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X_ + o)
    tl.store(Y_ + o, x / tl.sum(x))


@triton.jit
def defined_in_one_branch(X_, n):
    if n > 2:
        x = 1.5
    tl.store(X_, x)


@triton.jit
def gather(X_, Y_, Z_, n, m, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X_ + i * m, mask=i < n, other=0.0)
    if Z_ is not None:
        x += tl.load(Z_ + i)
    tl.store(Y_ + i, x * scale)


@triton.jit
def transposed_product(X_, Y_, Z_, n, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(X_ + i), tl.load(Y_ + i)
    xy = tl.dot(x, y).to(x.dtype)
    tl.store(Z_ + i, tl.dot(tl.trans(xy), y).to(x.dtype))


@triton.jit
def transposed_sum_of_products(X_, Y_, Z_, n, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(X_ + i), tl.load(Y_ + i)
    total = tl.zeros([N, N], tl.float32)
    for _ in range(n):
        total = tl.dot(x, y, total)
    total = tl.trans((total * 2.0).to(x.dtype))
    tl.store(Z_ + i, tl.dot(total, y).to(x.dtype))
