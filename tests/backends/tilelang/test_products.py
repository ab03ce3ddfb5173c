"""The kernels wait for every product before they use it; a wait that is left out is an error."""

from __future__ import annotations

from typing import Any

import pytest

from errors import message_of

pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.emulation.language import UNAWAITED, Language
from gdn_ops.backends.tilelang.emulation.programs import program
from gdn_ops.backends.tilelang.host.launcher import trace
from gdn_ops.backends.tilelang.kernels.blocks import PENDING
from gdn_ops.backends.tilelang.kernels.compose import compose
from gdn_ops.backends.tilelang.kernels.solve import solve
from gdn_ops.backends.tilelang.kernels.state_gradients import state_gradients
from gdn_ops.backends.tilelang.kernels.states import states
from gdn_ops.backends.tilelang.kernels.token_gradients import token_gradients

COMMON: dict[str, Any] = {"K": 128, "BK": 128, "C": 64, "threads": 128}
CHUNKS: dict[str, Any] = COMMON | {"dtype": "bfloat16", "erase": True}
WALK: dict[str, Any] = CHUNKS | {"V": 64, "BV": 32, "stages": 2, "bulk": True}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "solve": (solve, CHUNKS),
    "output": (states, WALK | {"mode": "output"}),
    "states": (states, WALK | {"mode": "states"}),
    "map": (states, WALK | {"mode": "map"}),
    "state_gradients": (state_gradients, WALK | {"mode": "gradients"}),
    "token_gradients": (token_gradients, CHUNKS | {"V": 64, "BV": 64, "stages": 1}),
    "compose": (compose, COMMON | {"V": 64, "BV": 32, "reverse": False}),
}


class Counting(Language):
    """Count the products that are waited for, and leave out the wait of one of them."""

    def __init__(self, without: int | None = None) -> None:
        self.awaited = 0
        self.without = without

    def gemm(self, *args: Any, annotations: dict[str, int] | None = None, **options: Any) -> None:
        if annotations is None:
            annotations = UNAWAITED if self.awaited == self.without else None
            self.awaited += 1
        super().gemm(*args, annotations=annotations, **options)


class Careless(Language):
    """Hold no tile."""

    def evaluate(self, value: Any) -> None:
        pass


def test_kernels_and_the_emulation_mean_the_same_by_a_product_without_a_wait() -> None:
    assert PENDING == UNAWAITED


@pytest.mark.parametrize("name", KERNELS)
def test_every_wait_of_a_kernel_is_needed(name: str) -> None:
    make, constants = KERNELS[name]
    counted = Counting()
    program(trace(make, constants, counted))
    assert counted.awaited > 0
    for without in range(counted.awaited):
        message = message_of(ValueError, program, trace(make, constants, Counting(without)))
        assert " product" in message, without


def test_a_tile_that_is_not_held_is_an_error() -> None:
    make, constants = KERNELS["state_gradients"]
    message = message_of(ValueError, program, trace(make, constants, Careless()))
    assert message.endswith(" is loaded again while a product of it may run")
