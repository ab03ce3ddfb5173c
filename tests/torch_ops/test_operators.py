"""torch.library, torch.compile, torch.export and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from gdn_ops.torch_ops import operators
from graphs import compiled, nodes


def _values(example: Example, **changes: Any) -> list[Any]:
    arguments = {name: default for name, default, _ in GATED_DELTA.parameters()}
    arguments |= example.arguments() | changes
    return [arguments[name] for name in operators.schema_names(GATED_DELTA)]


def _needing_grad(values: list[Any]) -> list[Any]:
    return [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in values
    ]


EXAMPLES = {
    "batch": Example(B=2, T=40, H=2, R=2, K=4, V=3, initial_state=True, gate="extreme"),
    "packed": Example(T=12, H=1, R=2, K=4, V=3, lengths=(5, 0, 7)),
    "delta": Example(rule="delta", B=1, T=9, H=1, R=1, K=4, V=3, beta="none"),
}


# opcheck reads .grad of a tensor that is no leaf; torch hides its warning, but not from -W error.
reads_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@reads_grad
@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck_passes_for_the_sequence_op(backend: str, name: str) -> None:
    values = _values(EXAMPLES[name], backend=backend)
    torch.library.opcheck(torch.ops.gdn_ops.gated_delta.default, (*values, False))
    torch.library.opcheck(torch.ops.gdn_ops.gated_delta.default, (*_needing_grad(values), True))


def test_opcheck_passes_for_the_backward_op() -> None:
    values = _values(EXAMPLES["batch"], backend="torch")
    o, state, saved = torch.ops.gdn_ops.gated_delta(*values, True)
    torch.library.opcheck(
        torch.ops.gdn_ops.gated_delta_backward.default,
        (*values, saved, torch.ones_like(o), torch.ones_like(state)),
    )


def test_a_graph_holds_one_opaque_node_whatever_the_length() -> None:
    function, graphs = compiled(gdn_ops.gated_delta, dynamic=True)
    for tokens in (20, 50, 131):
        arguments = Example(B=2, T=tokens, H=2, R=2, K=4, V=3).arguments() | {"backend": "torch"}
        torch.testing.assert_close(function(**arguments), gdn_ops.gated_delta(**arguments))
    assert len(graphs) == 1, f"got {len(graphs)} graphs, but should be 1 for every length"
    assert len(nodes(graphs)) == 1


def test_a_bad_call_is_refused_while_tracing() -> None:
    function, _ = compiled(gdn_ops.gated_delta)
    arguments = EXAMPLES["batch"].arguments()
    with pytest.raises(Exception, match="k has shape"):
        function(**arguments | {"k": arguments["k"][:, :-1]}, backend="torch")


def test_autocast_narrows_activations_and_keeps_gates_and_state_wide() -> None:
    example = Example(B=2, T=40, H=2, R=2, K=8, V=8, initial_state=True)
    arguments = example.arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = gdn_ops.gated_delta(**arguments, return_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    narrow = {n: arguments[n].to(torch.bfloat16) for n in ("q", "k", "v")}
    expected = gdn_ops.gated_delta(**(arguments | narrow), return_state=True)
    assert torch.equal(o, expected[0])
    assert torch.equal(state, expected[1])


def test_autocast_does_not_touch_the_arithmetic_of_a_backward() -> None:
    arguments = Example(B=1, T=40, H=2, R=2, K=8, V=8).arguments()
    q = arguments["q"].to(torch.bfloat16).float().requires_grad_()
    plain = arguments | {n: arguments[n].to(torch.bfloat16) for n in ("k", "v")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = gdn_ops.gated_delta(**(plain | {"q": q}), backend="torch")
        o.float().sum().backward()
    other = q.detach().to(torch.bfloat16).requires_grad_()
    gdn_ops.gated_delta(**(plain | {"q": other}), backend="torch").float().sum().backward()
    assert q.grad is not None and other.grad is not None
    assert torch.equal(q.grad, other.grad.float())


def test_second_derivatives_of_the_opaque_operator_say_what_to_do() -> None:
    values = _needing_grad(_values(EXAMPLES["batch"], backend="torch"))
    o, _, _ = torch.ops.gdn_ops.gated_delta(*values, True)
    (d_q,) = torch.autograd.grad(o.square().sum(), values[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .* need eager mode"):
        d_q.sum().backward()


@pytest.mark.parametrize("operator", operators.OPERATORS, ids=lambda operator: operator.name)
def test_the_schema_is_the_one_that_torch_registered(operator: operators.Operator) -> None:
    registered = str(getattr(torch.ops.gdn_ops, operator.name).default._schema)
    assert registered == f"gdn_ops::{operator.name}{operator.schema}"
