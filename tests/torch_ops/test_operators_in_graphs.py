"""The registered operators under torch.func, in graphs and exported programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from gdn_ops import gated_delta, gated_delta_steps
from graphs import compiled, nodes
from operator_calls import (
    CASES,
    KERNELS,
    PLAIN,
    Function,
    close,
    directions,
    exact_sequence,
    loop,
    sequence,
    tensors,
    total,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend .* emulates:UserWarning"),
    pytest.mark.usefixtures("eager_compiler", "one_thread"),
]


class Model(nn.Module):
    """Decode a step after a sequence."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        o, state = gated_delta(*x[:5], initial_state=x[5], return_state=True, backend=self.backend)
        drafts, last = gated_delta_steps(*x[:5], state, backend=self.backend)
        return o, drafts, last


@pytest.mark.parametrize("backend", PLAIN)
def test_an_exported_program_can_be_transformed(backend: str) -> None:
    rows, model = tensors(backend, 2), Model(backend)
    program = torch.export.export(model, tuple(y[0] for y in rows)).module()
    close(vmap(program)(*rows), loop(model, rows))
    # Nothing after the sequence can be differentiated.
    sequences = torch.export.export(Sequence(backend), tuple(y[0] for y in rows)).module()
    got = vmap(grad(total(sequences), argnums=(0, 5)))(*rows)
    close(got, loop(grad(total(exact_sequence()), argnums=(0, 5)), rows))
    x, v = tuple(y[0] for y in rows), tuple(directions([y[0] for y in rows]))
    close(jvp(sequences, x, v)[1], jvp(exact_sequence(), x, v)[1])


class Sequence(nn.Module):
    """Run a sequence."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, *x: Tensor) -> Any:
        return gated_delta(*x[:5], initial_state=x[5], return_state=True, backend=self.backend)


TRANSFORMED: dict[str, Callable[[Function], Function]] = {
    "vmap": vmap,
    "gradients per sample": lambda f: vmap(grad(total(f), argnums=(0, 3, 5))),
    "tangents": lambda f: lambda *x: jvp(vmap(f), x, tuple(directions(list(x))))[1],
}


@pytest.mark.parametrize("public", [False, True], ids=["operator", "public"])
@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("how", TRANSFORMED)
def test_a_graph_of_a_transformed_call_has_the_eager_numbers(
    how: str, backend: str, public: bool
) -> None:
    function = Sequence(backend).forward if public else sequence(backend)
    x, transform = tensors(backend, 2), TRANSFORMED[how]
    torch._dynamo.reset()
    got = torch.compile(transform(function), fullgraph=True, backend="aot_eager")(*x)
    close(got, transform(exact_sequence())(*x))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_graph_holds_a_mapped_kernel_as_one_operator(backend: str) -> None:
    x = tensors(backend, 2)
    function, graphs = compiled(vmap(sequence(backend)))
    close(function(*x), loop(exact_sequence(), x), backend)
    assert nodes(graphs) == ["gdn_ops.gated_delta"]


@pytest.mark.parametrize("name", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_an_exported_map_is_that_of_each_row(name: str) -> None:
    make, draw = CASES[name]
    x, function = draw("naive", 2), make("naive")

    if not exports_maps():
        pytest.skip("this torch exports no vmap, of plain torch neither")
    close(torch.export.export(Mapped(function), tuple(x)).module()(*x), loop(function, x))


class Mapped(nn.Module):
    """Map a function over its inputs."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return vmap(self.function)(*x)


def exports_maps() -> bool:
    """Return whether torch exports a map of plain torch; 2.8 does not."""
    try:
        torch.export.export(Mapped(torch.neg), (torch.ones(2, 2),))
    except AssertionError:
        return False
    return True
