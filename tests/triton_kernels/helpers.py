"""Functions that kernels of another file call."""

import triton
import triton.language as tl

BIAS: tl.constexpr = tl.constexpr(0.5)


@triton.jit
def half(x):
    return x / 2


@triton.jit
def affine(x, by):
    y = x * by
    return half(y) + 1


@triton.jit
def square(x):
    return x * x
