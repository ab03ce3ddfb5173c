"""Loops, branches, helpers, absent pointers, and the mistakes that an emulation must show."""

import triton
import triton.language as tl

from triton_kernels import helpers
from triton_kernels.helpers import BIAS, affine


@triton.jit
def loops(X_, n, step):
    total = 0
    for i in range(n):
        total += i
    tl.store(X_, total)
    wide = tl.zeros((), tl.int64)
    for i in tl.range(1, n, step, num_stages=2):
        wide += i.to(tl.int64) * 2147483647
    tl.store(X_ + 1, wide)
    for i in tl.static_range(2, 5):
        tl.store(X_ + i, i * i)
    left = n
    turns = 0
    while left > 1:
        left = left // 2
        turns += 1
    tl.store(X_ + 5, turns)


@triton.jit
def branches(X_, Y_):
    x = tl.load(X_ + tl.program_id(0))
    y = tl.program_id(1) if x > 0 else -1
    if x > 100 and not x == 102:  # noqa: SIM201  (it is `not` that is tested)
        y = 100
    if x == 7:
        return
    tl.store(Y_ + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), y)


@triton.jit
def with_helpers(X_, Y_, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X_ + i)
    y = affine(x, 2.0) + helpers.square(x) + BIAS
    tl.store(Y_ + i, y)


@triton.jit
def with_default(X_, Y_, Z_=None, by=2.0, N: tl.constexpr = 16):
    i = tl.program_id(0) * N + tl.arange(0, N)
    y = tl.load(X_ + i) * by
    if Z_ is not None:
        y += tl.load(Z_ + i)
    tl.store(Y_ + i, y)


@triton.jit
def shifted(X_, Y_, read, write, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X_ + i + read, mask=i < n, other=0.0)
    tl.store(Y_ + i + write, x, mask=i < n)


@triton.jit
def masked(X_, Y_, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y_ + i, tl.load(X_ + i, mask=i < n))


@triton.jit
def speaking(X_, n):
    x = tl.load(X_)
    tl.device_print("x is", x)
    tl.device_assert(x < n, "x is too large")


@triton.jit
def branch_on_a_block(X_, N: tl.constexpr):
    x = tl.load(X_ + tl.arange(0, N))
    if x > 0:
        tl.store(X_, 1.0)


@triton.jit
def changing_type(X_, n):
    total = 0
    for _ in range(n):
        total = total + 0.5
    tl.store(X_, total)


@triton.jit
def growing(X_, n, N: tl.constexpr):
    x = tl.load(X_ + tl.arange(0, N))
    y = 0.0
    while n > 0:
        y += x
        n -= 1
    tl.store(X_ + tl.arange(0, N), y)


@triton.jit
def chained(X_, n):
    if 0 < n < 3:
        tl.store(X_, 1.0)


@triton.jit
def two_names(X_):
    a = b = tl.load(X_)
    tl.store(X_, a + b)
