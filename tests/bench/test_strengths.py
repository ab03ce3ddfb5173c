"""The row of erase and write: what it compares, what is left out, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gdn_ops import ops
from gdn_ops.backends.torch import Torch
from gdn_ops.bench import suite
from gdn_ops.bench.inputs import Setting, find_case
from gdn_ops.bench.rows import Row
from gdn_ops.bench.verify import RefusedError

CASE = find_case("kimi-8-8-1024")
SMALL = replace(CASE, sizes=replace(CASE.sizes, B=2, T=40, H=1, HV=2, K=8, V=12, N=2))

pytestmark = pytest.mark.usefixtures("given_rates")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "find_case", lambda name: SMALL)


def measure(dtype: str = "float32") -> Any:
    setting = Setting(dtype, repeats=2)
    return suite.run(suite.make_plan([CASE.name], ["strengths"], ["torch"], (), setting))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_erase_and_write_are_compared_with_beta_once_they_are_right(dtype: str) -> None:
    result = measure(dtype)
    (row,), (check,) = result.rows, result.checks
    assert isinstance(row, Row) and result.skipped == []
    assert (row.what, row.case, row.comparator) == ("strengths", CASE.name, "torch")
    assert (row.unit, row.samples, row.dtype) == ("x", 2, dtype)
    assert row.against == "a strength of beta" and row.median > 0
    assert check.passed and check.what == "o with erase and write" and check.error > 0


def test_the_two_calls_that_are_timed_differ_in_their_strengths_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, given = ops.gated_delta, []

    def noted(*qkv: Any, **named: Any) -> Any:
        if named["backend"] == "torch":
            given.append({n: tuple(x.shape) for n, x in named.items() if n != "backend"})
        return real(*qkv, **named)

    monkeypatch.setattr(ops, "gated_delta", noted)
    measure()
    full = [shapes for shapes in given if shapes["log_alpha"] == (2, 40, 2, 8)]
    apart = {"log_alpha": (2, 40, 2, 8), "erase": (2, 40, 2, 8), "write": (2, 40, 2, 12)}
    beta = {"log_alpha": (2, 40, 2, 8), "beta": (2, 40, 2)}
    assert apart in full and beta in full and all(shapes in (apart, beta) for shapes in full)


def test_a_backend_without_erase_and_write_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Torch, "limits", replace(Torch.limits, apart=False))
    result = measure()
    reason = "erase and write (supported: beta)"
    assert result.skipped == [(f"strengths, {CASE.name}", "torch", reason)]
    assert result.rows == result.checks == []


def test_a_backend_whose_erase_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.gated_delta

    def wrong(*qkv: Any, **named: Any) -> Any:
        if named["backend"] == "torch" and "erase" in named:
            named["erase"] = 0.99 * named["erase"]
        return real(*qkv, **named)

    monkeypatch.setattr(ops, "gated_delta", wrong)
    with pytest.raises(
        RefusedError, match=r"o with erase and write off by .*, above the allowance"
    ):
        measure()
