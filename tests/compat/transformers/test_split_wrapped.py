"""Models of transformers inside DDP and FSDP2 with split sequences train as on one process."""

from __future__ import annotations

import functools

import pytest
from torch import Tensor

from compat_models import SMALL, has_convolutions
from compat_split import Case, loss_and_gradients_of_wrapped, on_one_process, trained
from tests.parallel.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

WRAPPERS = ("ddp", "fsdp")


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    return on_one_process(case)


def check_equal(ranks: Ranks, count: int, case: Case, wrapper: str, groups: int = 1) -> None:
    has_convolutions(case.family)
    parts = ranks.run(count, loss_and_gradients_of_wrapped, case, wrapper, groups)
    for found, _ in parts:
        for name, right in expected(case).items():
            assert float((found[name] - right).norm()) <= 1e-9 * (float(right.norm()) + 1e-3), name
    shares = [share for _, share in parts]
    if wrapper == "fsdp":
        assert sum(shares) == pytest.approx(1) and max(shares) < 1.1 / count
    else:
        assert shares == [1] * count


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", dict.fromkeys((SMALL, "qwen3_next-2:1")))
def test_loss_and_gradients_equal_those_of_one_process(
    ranks: Ranks, family: str, wrapper: str
) -> None:
    check_equal(ranks, 2, Case(family, "zigzag", rows=2), wrapper)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_are_computed_anew_in_the_backward(ranks: Ranks, wrapper: str) -> None:
    check_equal(ranks, 2, Case(SMALL, "contiguous", rows=2, checkpoint=True), wrapper)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_rows_and_tokens_are_shared_at_once(ranks: Ranks, wrapper: str) -> None:
    check_equal(ranks, 4, Case(SMALL, "zigzag", rows=3), wrapper, groups=2)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_takes_the_same_course(ranks: Ranks, wrapper: str) -> None:
    has_convolutions(SMALL)
    alone = ranks.run(1, trained, SMALL, "contiguous", 10)[0]
    assert alone[-1] < alone[0] - 0.2
    for losses in ranks.run(2, trained, SMALL, "contiguous", 10, wrapper):
        assert losses == pytest.approx(alone, abs=1e-5, rel=0)
