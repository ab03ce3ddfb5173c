"""One operation of Triton each, over one block."""

import triton
import triton.language as tl


@triton.jit
def cast(X_, Y_, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y_ + i, tl.load(X_ + i).to(Y_.dtype.element_ty))


@triton.jit
def binary(X_, Y_, Z_, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X_ + i)
    y = tl.load(Y_ + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "neg":
        z = -x
    elif OP == "clamp":
        z = tl.clamp(x, -tl.abs(y), tl.abs(y))
    elif OP == "lt":
        z = x < y
    elif OP == "ge":
        z = x >= y
    elif OP == "eq":
        z = x == y
    elif OP == "where":
        z = tl.where(x < y, x, 0.0)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "rshift":
        z = x >> y
    elif OP == "floordiv":
        z = x // y
    else:
        z = getattr(tl, OP)(x, y)
    tl.store(Z_ + i, z)


@triton.jit
def scaled(X_, Y_, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y_ + i, tl.load(X_ + i) * scale)


@triton.jit
def unary_float32(X_, Y_, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X_ + i)
    if OP == "method":
        y = tl.exp(x).sum(axis=0) + x.sigmoid()
    else:
        y = getattr(tl, OP)(x)
    tl.store(Y_ + i, y)


@triton.jit
def reduction(X_, Y_, Z_, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    x = tl.load(X_ + i * N + j)
    if OP == "cumsum_reverse":
        y = tl.cumsum(x, axis=AXIS, reverse=True)
    elif OP == "cumsum" or OP == "cumprod":
        y = getattr(tl, OP)(x, axis=AXIS)
    else:
        y = getattr(tl, OP)(x, axis=AXIS, keep_dims=True)
    tl.store(Y_ + i * N + j, y.broadcast_to(M, N))
    tl.store(Z_, tl.sum(x.to(tl.float32)))


@triton.jit
def decay_combine(a, x, b, y):
    return a * b, b * x + y


@triton.jit
def linear_recurrence(A_, X_, Y_, Z_, M: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    a = tl.load(A_ + i * N + j)
    x = tl.load(X_ + i * N + j)
    _, y = tl.associative_scan((a, x), 1, decay_combine, reverse=REVERSE)
    tl.store(Y_ + i * N + j, y)
    _, z = tl.reduce((a, x), 1, decay_combine)
    tl.store(Z_ + tl.arange(0, M), z)


@triton.jit
def matmul(
    A_, B_, C_, D_, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(A_ + m[:, None] * K + k[None, :])
    b = tl.load(B_ + n[:, None] * K + k[None, :])
    c = tl.zeros((M, N), tl.float32)
    if C_ is not None:
        c += tl.load(C_ + m[:, None] * N + n[None, :])
    d = tl.dot(a, b.T, c, input_precision=PRECISION)
    tl.store(D_ + m[:, None] * N + n[None, :], d.to(D_.dtype.element_ty))
