"""Arithmetic of the emulation of Triton kernels: rounded as a GPU rounds, NaN and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn_ops.backends.triton.host.launcher import launch
from kernel_backends import assert_same_bits
from triton_kernels import arithmetic

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def patterns(n: int, dtype: torch.dtype) -> Tensor:
    """Return n values of a float dtype: random bits, so all sizes, infinities and NaNs too."""
    generator = torch.Generator().manual_seed(0)
    ints = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    info = torch.iinfo(ints[dtype])
    bits = torch.randint(info.min, info.max + 1, (n,), generator=generator)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0], dtype=dtype)
    x = bits.to(ints[dtype]).view(dtype)
    x[: len(special)] = special
    # All quiet: torch.fmax lets a signalling NaN win.
    return torch.where(x.isnan(), float("nan"), x)


# Rounding and arithmetic.


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_a_cast_rounds_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    x = patterns(4096, source)
    y = torch.full((4096,), 7.0, dtype=target)
    launch(arithmetic.cast, (1,), x, y, N=4096)
    assert_same_bits(y, x.to(target))


def test_halves_round_to_the_even_bfloat16() -> None:
    # Bits just below, at and just above the middle of two neighbours, one of them odd.
    bits = torch.tensor([0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F818000, 0x3F818001])
    x = bits.to(torch.int32).view(torch.float32).repeat_interleave(1)
    x = torch.cat([x, x[:2]])
    y = torch.empty(8, dtype=torch.bfloat16)
    launch(arithmetic.cast, (1,), x, y, N=8)
    expected = [0x3F80, 0x3F80, 0x3F81, 0x3F81, 0x3F82, 0x3F82, 0x3F80, 0x3F80]
    assert y.view(torch.int16).tolist() == expected


@pytest.mark.parametrize("source", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_a_cast_of_integers_and_booleans(source: torch.dtype) -> None:
    high = {torch.uint8: 256, torch.bool: 2}.get(source, 2**20)
    x = torch.randint(0, high, (64,), generator=torch.Generator().manual_seed(0)).to(source)
    for target in (*FLOATS, torch.int32, torch.uint8):
        y = torch.zeros(64, dtype=target)
        launch(arithmetic.cast, (1,), x, y, N=64)
        assert_same_bits(y, x.to(target))


BINARY: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": lambda x, y: -x,
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "clamp": lambda x, y: torch.fmin(torch.fmax(x, -y.abs()), y.abs()),
    "where": lambda x, y: torch.where(x < y, x, torch.zeros_like(x)),
    "abs": lambda x, y: x.abs(),
    # Triton divides in float32, whatever is divided.
    "div": lambda x, y: (x.float() / y.float()).to(x.dtype),
}


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic_rounds_once_as_torch_does(dtype: torch.dtype, operation: str) -> None:
    x, y = patterns(8192, dtype).reshape(2, -1)
    z = torch.full_like(x, 7.0)
    launch(arithmetic.binary, (1,), x, y, z, N=4096, OP=operation)
    torch.testing.assert_close(z, BINARY[operation](x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_comparisons_compare_values_not_bits(dtype: torch.dtype) -> None:
    x, y = patterns(4096, dtype).reshape(2, -1)
    y[::7] = x[::7]
    for operation, expected in (("lt", x < y), ("ge", x >= y), ("eq", x == y)):
        z = torch.zeros(2048, dtype=torch.bool)
        launch(arithmetic.binary, (1,), x, y, z, N=2048, OP=operation)
        assert torch.equal(z, expected), operation


def test_unsigned_integers_wrap_shift_and_divide_as_unsigned() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    y = x.flip(0).remainder(7) + 1
    expected = {
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "rshift": x >> y,
        "floordiv": x // y,
        "maximum": torch.maximum(x, y),
    }
    for operation, right in expected.items():
        z = torch.zeros(256, dtype=torch.uint8)
        launch(arithmetic.binary, (1,), x, y, z, N=256, OP=operation)
        assert torch.equal(z, right), operation


def test_a_number_that_is_an_argument_is_a_float32_tensor() -> None:
    x = patterns(1024, torch.bfloat16)
    y = torch.empty(1024)
    launch(arithmetic.scaled, (1,), x, y, 1 / 3, N=1024)
    # A bfloat16 product would have 8 bits.
    torch.testing.assert_close(y, x.float() * torch.tensor(1 / 3), rtol=0, atol=0, equal_nan=True)


UNARY: dict[str, Any] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: torch.softmax(x, 0),
    "method": lambda x: x.exp().sum() + x.sigmoid(),
}


@pytest.mark.parametrize("operation", UNARY)
def test_functions_of_float32(operation: str) -> None:
    x = torch.linspace(0.01, 4, 64)
    y = torch.empty(64)
    launch(arithmetic.unary_float32, (1,), x, y, N=64, OP=operation)
    torch.testing.assert_close(y, UNARY[operation](x), rtol=3e-7, atol=1e-7)


# Reductions, scans, products.


REDUCTIONS: dict[str, Any] = {
    "sum": lambda x, axis: x.sum(axis, keepdim=True),
    "max": lambda x, axis: x.amax(axis, keepdim=True),
    "min": lambda x, axis: x.amin(axis, keepdim=True),
    "argmax": lambda x, axis: x.argmax(axis, keepdim=True),
    "cumsum": lambda x, axis: x.cumsum(axis),
    "cumsum_reverse": lambda x, axis: x.flip(axis).cumsum(axis).flip(axis),
    "cumprod": lambda x, axis: x.cumprod(axis),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions_and_scans_of_narrow_floats_round_once(
    dtype: torch.dtype, operation: str
) -> None:
    # Multiples of 1/16, so that every order of float32 sums is exact; of powers of two, products.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-64, 64, (8, 32), generator=generator) / 16
    if operation == "cumprod":
        x = torch.exp2(torch.randint(-1, 2, (8, 32), generator=generator))
    x = x.to(dtype)
    for axis in (0, 1):
        expected = REDUCTIONS[operation](x.float(), axis).broadcast_to(8, 32)
        y = torch.empty(8, 32, dtype=torch.int32 if operation == "argmax" else dtype)
        z = torch.empty(1)
        launch(arithmetic.reduction, (1,), x, y, z, M=8, N=32, OP=operation, AXIS=axis)
        torch.testing.assert_close(y, expected.to(y.dtype), rtol=0, atol=0)
        assert z.item() == x.float().sum().item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_extreme_ignores_nan_unless_there_is_nothing_else(dtype: torch.dtype) -> None:
    nan = float("nan")
    x = torch.tensor([[nan, 1.0, 3.0, 3.0], [nan] * 4]).repeat(1, 4).to(dtype)
    for operation, expected in (("max", (3.0, nan)), ("min", (1.0, nan)), ("argmax", (2, 0))):
        y = torch.empty(2, 16, dtype=torch.int32 if operation == "argmax" else dtype)
        launch(arithmetic.reduction, (1,), x, y, torch.empty(1), M=2, N=16, OP=operation, AXIS=1)
        assert_same_bits(y, torch.tensor(expected).to(y.dtype)[:, None].broadcast_to(2, 16))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_with_a_combination_of_ones_own(reverse: bool) -> None:
    torch.manual_seed(0)
    a, x = torch.rand(4, 16), torch.randn(4, 16)
    y, z = torch.empty(4, 16), torch.empty(4)
    launch(arithmetic.linear_recurrence, (1,), a, x, y, z, M=4, N=16, REVERSE=reverse)
    state, expected = torch.zeros(4), torch.empty(4, 16)
    for t in reversed(range(16)) if reverse else range(16):
        state = a[:, t] * state + x[:, t]
        expected[:, t] = state
    torch.testing.assert_close(y, expected)
    if not reverse:
        torch.testing.assert_close(z, expected[:, -1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_accumulates_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 256).to(dtype), torch.randn(32, 256).to(dtype), torch.randn(16, 32)
    exact = a.double() @ b.double().T + c
    d, rounded = torch.empty(16, 32), torch.empty(16, 32, dtype=dtype)
    for out in (d, rounded):
        launch(arithmetic.matmul, (1,), a, b, c, out, 16, 32, 256, PRECISION="ieee")
    assert (d - exact).abs().max() < 1e-6 * (a.double().abs() @ b.double().abs().T).max()
    assert_same_bits(rounded, d.to(dtype))


def test_tf32_rounds_its_operands_and_three_of_them_give_float32_back() -> None:
    torch.manual_seed(0)
    a, b, d = torch.randn(32, 64), torch.randn(32, 64), torch.empty(32, 32)
    exact = a.double() @ b.double().T
    error = {}
    for precision in ("ieee", "tf32", "tf32x3", None):
        launch(arithmetic.matmul, (1,), a, b, None, d, 32, 32, 64, PRECISION=precision)
        error[precision] = ((d - exact).norm() / exact.norm()).item()
    assert error["ieee"] < 3e-7
    assert error["tf32x3"] < 3e-7
    # Each operand has a relative error of at most 2^-11.
    assert 5e-5 < error["tf32"] < 2**-10
    assert error[None] == error["tf32"], "a GPU takes it where no precision is named"


def test_infinities_pass_through_every_precision() -> None:
    a, b, d = torch.eye(16), torch.ones(16, 16), torch.empty(16, 16)
    a[3, 3], b[5, 5] = float("inf"), 3.0e38
    for precision in ("ieee", "tf32", "tf32x3"):
        launch(arithmetic.matmul, (1,), a, b, None, d, 16, 16, 16, PRECISION=precision)
        assert d[3].isposinf().all() and not d[4].isinf().any()
