"""The floor of a case rests on the highest rates that the machine was seen to reach."""

from __future__ import annotations

import pytest
import torch

from gdn_ops import GATED_DELTA
from gdn_ops.backends.cpp import library
from gdn_ops.bench import floors
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import find_case

CASE = find_case("qwen-16-32-2048")
ROUNDS = 1000


@pytest.fixture
def multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.missing() is not None:
        pytest.skip(f"backend 'cpp': {library.missing()}")
    monkeypatch.setattr(floors, "_ROUNDS", ROUNDS)


@pytest.mark.parametrize(
    ("products", "registers", "flops"), [(2e11, 4e11, 4e11), (4e11, 2e11, 4e11), (2e11, None, 2e11)]
)
def test_the_floor_is_of_the_faster_of_products_and_multiply_adds(
    products: float, registers: float | None, flops: float
) -> None:
    rates = Rates(products, 1e12, 1e12, registers)
    assert rates.flops == flops
    expected = GATED_DELTA.cost.flops(CASE.sizes, floors.CHUNK) / flops
    assert rates.floor(GATED_DELTA, CASE.sizes, 4) == pytest.approx(expected)
    assert rates.to_json()["gflops_registers"] == (registers and registers / 1e9)


@pytest.mark.usefixtures("multiply_adds")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", ["avx512bf16", "avx512", "avx2", "baseline"])
def test_multiply_adds_are_counted_in_every_thread(
    level: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = library.library()
    if not loaded.gdn_choose_level(level.encode()):
        pytest.skip(f"the library or this processor has no level {level}")
    if library.team().parallel is None:
        threads = 1
    monkeypatch.setattr(library, "threads", lambda: threads)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = floors._multiply_adds(dtype, "cpu")
            assert found is not None
            run, flops = found
            # So many vectors, lanes and threads, and two operations of each; four of pairs.
            each = {"avx512bf16": 24 * 16, "avx512": 24 * 16, "avx2": 12 * 8}.get(level)
            pairs = 2 if (level, dtype) == ("avx512bf16", torch.bfloat16) else 1
            if each is not None:
                assert flops == ROUNDS * threads * each * 2 * pairs
            assert run() == flops
    finally:
        library.choose_level(loaded, "")


def test_where_the_kernels_are_not_built_or_take_no_such_dtype_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert floors._multiply_adds(torch.float64, "cpu") is None
    assert floors._multiply_adds(torch.float32, "cuda:0") is None
    monkeypatch.setattr(library, "missing", lambda: "not built")
    assert floors._multiply_adds(torch.float32, "cpu") is None
