"""What a TileLang kernel does on CPU tensors is exact, and a stray index is an error."""

from __future__ import annotations

import itertools
import math
import threading

import numpy
import pytest
import torch
from torch import Tensor

from errors import message_of

pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.emulation.rounding import nearest
from gdn_ops.backends.tilelang.host.launcher import launch
from kernel_backends import assert_same_bits
from tilelang_kernels import tiles
from tilelang_kernels.launching import needs_compiler, traced

LOW = (torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(dtype: torch.dtype) -> Tensor:
    """Return every value of a dtype of 16 bits, in the order of its bits; quiet NaNs only."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(x.isnan(), float("nan"), x)


def around(dtype: torch.dtype) -> Tensor:
    """Return floats around every value of a low dtype, ties between two of them among them."""
    x = values(dtype).float()
    bits = x.view(torch.int32).long()
    step = 2**16 if dtype == torch.bfloat16 else 2**13
    near = [bits + offset for offset in (0, 1, -1, step // 2, step // 2 + 1, step // 2 - 1)]
    # Subnormals of float16 have fewer bits: ties between them are elsewhere.
    ties = (x + x.nextafter(torch.tensor(0.0)).to(dtype).float()) / 2
    subnormal = torch.arange(-4100, 4101) * 2.0**-26
    edges = torch.tensor([65519.0, 65519.996, 65520.0, 65536.0, 3.4e38, 3.39e38, 1e-45, 1e-8])
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF])
    floats = torch.cat([*near, random, nans]).to(torch.int32).view(torch.float32)
    return torch.cat([floats, ties, subnormal, edges, -edges])


# Low precision.


@needs_compiler
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_a_store_to_a_low_tile_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = around(dtype)
    low, back = torch.full_like(x, 5, dtype=dtype), torch.full_like(x, 5)
    launch(tiles.rounds, {"dtype": name_of(dtype)}, x, low, back)
    assert_same_bits(low, x.to(dtype))
    assert_same_bits(back, x.to(dtype).float())
    assert int(low.isnan().sum()) == int(x.isnan().sum()) > 0
    assert int(low.isinf().sum()) > int(x.isinf().sum())
    assert int(((low != 0) & (low.abs() < torch.finfo(dtype).tiny)).sum()) > 100


@needs_compiler
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_arithmetic_in_a_low_dtype_rounds_after_every_operation(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    every = values(dtype)
    a = torch.cat([every[torch.randperm(2**16, generator=generator)], every])
    scaled = torch.randn(2**16, generator=generator).to(dtype)
    b = torch.cat([every[torch.randperm(2**16, generator=generator)], scaled])
    low = torch.zeros(9, len(a), dtype=dtype)
    wide = torch.zeros(2, len(a))
    launch(tiles.computes, {"dtype": name_of(dtype)}, a, b, low, wide)

    tenth = torch.tensor(0.1).to(dtype)
    expected = [a + b, a - b, a * b, a / b, a * b + a, torch.where(a < b, a, -b), a * tenth]
    # NumPy's square root is the nearest float; torch's may not be.
    expected += [torch.from_numpy(numpy.sqrt(a.abs().float().numpy())).to(dtype)]
    expected += [(a.float() * 3).to(dtype) - a]
    for emulated, should_be in zip(low, expected, strict=True):
        assert_same_bits(emulated, should_be)
    assert_same_bits(wide[0], a.float() * b.float())
    assert_same_bits(wide[1], (a * b).float())
    finite = wide.isfinite().all(0)
    assert (wide[0] != wide[1])[finite].float().mean() > 0.5


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_a_constant_of_a_low_dtype_is_the_nearest(dtype: torch.dtype) -> None:
    x = around(dtype)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))[:20_000]]
    rounded = torch.tensor([nearest(value, name_of(dtype)) for value in x.tolist()])
    assert_same_bits(rounded, x.to(dtype).float())
    assert nearest(1e300, name_of(dtype)) == float("inf")
    assert nearest(-1e300, name_of(dtype)) == float("-inf")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=name_of)
def test_a_constant_keeps_every_digit(dtype: torch.dtype) -> None:
    given = (0.1, -1 / 3, 1e-30, 1.25, -0.0, 2.0**-149, 12345.6789, math.inf, -math.inf, math.nan)
    x = torch.zeros(len(given) + 1, dtype=dtype)
    launch(tiles.constants, {"values": given, "dtype": name_of(dtype)}, x)
    assert_same_bits(x, torch.tensor([*given, -math.inf], dtype=torch.float64).to(dtype))


# Tile operations.


@needs_compiler
@pytest.mark.parametrize("shift", [0, -3, 5])
@pytest.mark.parametrize("shape", [(16, 24), (37, 50), (1, 1)])
def test_a_copy_reads_zero_outside_and_writes_nothing_there(
    shape: tuple[int, int], shift: int
) -> None:
    M, N = shape
    x = torch.randn(M, 1, N, generator=torch.Generator().manual_seed(3))
    guarded = torch.full((M + 2, N), 9.0)
    constants = {"rows": 16, "columns": 24, "dtype": "bfloat16", "shift": shift}
    launch(tiles.copies, constants, x, guarded[1:-1])
    moved = torch.zeros(M, N)
    rows = [i for i in range(M) if 0 <= i + shift < M]
    columns = [j for j in range(N) if 0 <= j + shift < N]
    for i, j in itertools.product(rows, columns):
        moved[i, j] = x[i + shift, 0, j + shift].bfloat16()
    assert torch.equal(guarded[1:-1], moved)
    assert (guarded[0] == 9).all() and (guarded[-1] == 9).all()


@needs_compiler
@pytest.mark.parametrize(
    ("M", "N", "K", "transpose_A", "transpose_B", "dtype"),
    [
        (64, 32, 64, False, False, torch.bfloat16),
        (16, 24, 304, False, True, torch.float16),
        (32, 8, 16, True, False, torch.bfloat16),
        (48, 40, 48, True, True, torch.float16),
    ],
)
def test_a_product_of_small_integers_is_exact(
    M: int, N: int, K: int, transpose_A: bool, transpose_B: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    a, b, c = integers(M, K), integers(K, N), integers(M, N)
    d, e = torch.full((M, N), float("nan")), torch.full((M, N), float("nan"))
    stored_a = (a.T if transpose_A else a).contiguous().to(dtype)
    stored_b = (b.T if transpose_B else b).contiguous().to(dtype)
    constants = {
        **{"M": M, "N": N, "K": K, "dtype": name_of(dtype)},
        **{"transpose_A": transpose_A, "transpose_B": transpose_B},
    }
    launch(tiles.multiplies, constants, stored_a, stored_b, c, d, e)
    assert torch.equal(e, a @ b)
    assert torch.equal(d, c + a @ b)


@needs_compiler
def test_reductions_and_scans_agree_with_torch() -> None:
    M, N = 16, 12
    x = torch.randint(-50, 51, (M, N), generator=torch.Generator().manual_seed(5)).float()
    # A row and a column without a positive number, and a row without a negative one.
    x[0] -= 100
    x[1] += 100
    x[:, 0] = -x[:, 0].abs()
    nan = float("nan")
    rows, columns = torch.full((4, M), nan), torch.full((3, N), nan)
    scans, sums = torch.full((4, M, N), nan), torch.full((N,), nan, dtype=torch.float64)
    launch(tiles.reduces, {"M": M, "N": N}, x, rows, columns, scans, sums)

    by_row = [x.sum(1), x.amax(1), x.sum(1) + 10, x.amin(1)]
    assert torch.equal(rows, torch.stack(by_row))
    half = torch.where(torch.arange(N) < N // 2, 0.0, 2.5)
    assert torch.equal(columns, torch.stack([x.sum(0), x.amax(0), half]))
    backwards = x.flip(1).cumsum(1).flip(1), x.flip(0).cumsum(0).flip(0)
    assert torch.equal(scans, torch.stack([x.cumsum(0), *backwards, x.cumsum(1)]))
    torch.testing.assert_close(sums, (x[0].double() / 3).cumsum(0), rtol=1e-15, atol=1e-14)
    assert not torch.equal(sums, sums.float().double())


@needs_compiler
@pytest.mark.parametrize("n", [0, 1, 10])
def test_loops_variables_and_macros_do_what_they_read(n: int) -> None:
    given = torch.tensor([3, -5, 40, 20, 19, 12, 28, 0], dtype=torch.int32)
    out = torch.full((6, 8), -7, dtype=torch.int32)
    launch(tiles.controls, {"steps": 5, "parts": 2}, given, out, n)
    total = sum(range(n))
    root = next(i for i in range(100) if i * i >= n)
    assert (out[0] == total + 100 * (0 + 2 + 4)).all()
    assert (out[1] == total - (0 + 1 + 2)).all()
    assert (out[2] == root).all()
    assert (out[3] == 40).all()
    assert out[4].tolist() == [-1, *given[:-1].tolist()]
    shifted = given - 20
    assert torch.equal(out[5], shifted.div(8, rounding_mode="floor") * 100 + shifted.remainder(8))


# Memory.


@needs_compiler
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64], ids=name_of)
def test_a_tile_is_nan_until_a_program_writes_it(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype)
    for _ in range(2):
        launch(tiles.forgets, {"dtype": name_of(dtype)}, x)
        assert x[0, :4].tolist() == [1, 1, 1, 1]
        assert x[0, 4:].isnan().all() and x[1].isnan().all()


@needs_compiler
@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_an_index_outside_of_a_tile_is_an_error(index: int) -> None:
    x = torch.zeros(8)
    launch(tiles.strays, {}, x, 3)
    assert x.tolist() == [3.0] * 4 + [6.0] * 4
    message = message_of(IndexError, launch, tiles.strays, {}, x, index)
    assert message == "strays: an index is outside of the tile tile"
    launch(tiles.strays, {}, x, 0)


@needs_compiler
def test_a_loop_that_runs_past_the_end_of_a_tile_is_an_error() -> None:
    x = torch.zeros(8)
    launch(tiles.sweeps, {"n": 4}, x)
    assert x.tolist() == [3.0] * 4 + [0.0] * 4
    message = message_of(IndexError, launch, tiles.sweeps, {"n": 5}, x)
    assert message == "sweeps: an index is outside of the tile tile"


@needs_compiler
def test_a_grid_that_no_gpu_has_is_an_error() -> None:
    x = torch.zeros(1)
    launch(tiles.wide_grid, {}, x, 65535, 1)
    launch(tiles.wide_grid, {}, x, 1, 65536)
    assert x.item() == 1
    assert message_of(IndexError, launch, tiles.wide_grid, {}, x, 65536, 1) == (
        "wide_grid: an index is outside of the grid along y, of at most 65535 programs"
    )


def test_only_an_index_that_may_be_outside_is_checked() -> None:
    body = traced(tiles.strays).text.partition("gdn_ops_call(")[2]
    assert body.count("tile[gdn_ops_index(((int64_t)i), (int64_t)4, (int64_t)1)]") == 1
    assert body.count("gdn_ops_index") == 1


@needs_compiler
def test_large_tiles_need_no_stack() -> None:
    x, y = torch.randn(1024), torch.empty(1024)
    size = threading.stack_size(256 * 1024)
    try:
        # 32 MiB of tiles, four times what the main thread has.
        thread = threading.Thread(
            target=launch, args=(tiles.widens, {"tiles": 8, "rows": 1024}, x, y)
        )
        thread.start()
    finally:
        threading.stack_size(size)
    thread.join()
    assert torch.equal(y, x + 1 + 1 + 1 + 1 + 1 + 1 + 1)


@needs_compiler
def test_more_elements_than_32_bits_can_count_are_reached() -> None:
    # Memory that is not touched is not there.
    x = torch.empty(2**11 + 1, 2**20, dtype=torch.int8)
    x[-1, -64:] = 1
    launch(tiles.reaches, {}, x)
    assert x.numel() > 2**31
    assert x[-1, -64:].tolist() == [1] * 32 + [7] * 32
