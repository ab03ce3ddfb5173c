"""torch.library, torch.compile, torch.export and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.testing import Example
from gdn_ops.torch_ops import operators
from graphs import compiled, nodes


def _values(example: Example, spec: Any = GATED_DELTA, **changes: Any) -> list[Any]:
    arguments = {attr.name: attr.default for attr in spec.attrs}
    arguments |= {arg.name: None for arg in spec.tensors} | example.arguments() | changes
    return [arguments[name] for name in operators.schema_names(spec)]


def _step_values(**changes: Any) -> list[Any]:
    example = Example(B=2, T=1, H=2, R=2, K=4, V=3, initial_state=True)
    arguments = {n: x for n, x in example.arguments().items() if n not in ("chunk_size",)}
    state = arguments.pop("initial_state")
    token = {n: x.squeeze(1) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    return _values(example, GATED_DELTA_STEP, **(token | {"state": state} | changes))


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


@reads_grad
def test_opcheck_passes_for_the_steps() -> None:
    values = _step_values(backend="torch")
    torch.library.opcheck(torch.ops.gdn_ops.gated_delta_step.default, values)
    torch.library.opcheck(torch.ops.gdn_ops.gated_delta_step.default, _needing_grad(values))
    torch.library.opcheck(torch.ops.gdn_ops.gated_delta_step_.default, values)


class Layer(torch.nn.Module):
    """A module whose forward is the op and a little around it."""

    def __init__(self, backend: str = "auto", **options: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4))
        self.backend, self.options = backend, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        o = gdn_ops.gated_delta(
            q @ self.weight, k, v, alpha, beta, backend=self.backend, **self.options
        )
        return torch.tanh(o)


def _layer_inputs(tokens: int = 20, batch: int = 2) -> list[Tensor]:
    example = Example(B=batch, T=tokens, H=2, R=2, K=4, V=3)
    arguments = example.arguments()
    return [arguments[name] for name in ("q", "k", "v", "alpha", "beta")]


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("auto", "aot_eager"), ("naive", "aot_eager"), ("torch", "aot_eager"), ("torch", "inductor")],
)
def test_a_full_graph_compiles_forward_and_backward(backend: str, compiler: str) -> None:
    layer, inputs = Layer(backend), _layer_inputs()
    expected = layer(*inputs)
    expected.sum().backward()
    gradient = layer.weight.grad
    layer.weight.grad = None
    actual = torch.compile(layer, fullgraph=True, backend=compiler)(*inputs)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer.weight.grad, gradient)


def test_a_graph_holds_one_opaque_node_whatever_the_length() -> None:
    layer, graphs = compiled(Layer("torch"), dynamic=True)
    with torch.no_grad():
        for tokens in (20, 50, 131):
            torch.testing.assert_close(
                layer(*_layer_inputs(tokens)), Layer("torch")(*_layer_inputs(tokens))
            )
    assert len(graphs) == 1, f"got {len(graphs)} graphs, but should be 1 for every length"
    assert len(nodes(graphs)) == 1


def test_export_keeps_batch_and_length_dynamic() -> None:
    layer = Layer("torch")
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    shapes = {name: {0: batch, 1: tokens} for name in ("q", "k", "v", "alpha", "beta")}
    with torch.no_grad():
        program = torch.export.export(layer, tuple(_layer_inputs()), dynamic_shapes=shapes)
        for size in ((3, 33), (1, 7)):
            inputs = _layer_inputs(size[1], size[0])
            torch.testing.assert_close(program.module()(*inputs), layer(*inputs))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("gdn_ops.gated_delta.default") == 1


def test_a_bad_call_is_refused_while_tracing() -> None:
    inputs = _layer_inputs()
    inputs[1] = inputs[1][:, :-1]
    compiled = torch.compile(Layer("torch"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="k has shape"):
        compiled(*inputs)


def test_a_compiled_step_through_torch_is_traced_through() -> None:
    values = _step_values()[:6]
    decode, graphs = compiled(gdn_ops.gated_delta_step)
    torch.testing.assert_close(decode(*values), gdn_ops.gated_delta_step(*values))
    assert graphs and not nodes(graphs)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_step_of_another_backend_is_one_opaque_node(inplace: bool) -> None:
    def decode(*values: Tensor) -> tuple[Tensor, Tensor]:
        return gdn_ops.gated_delta_step(*values, backend="naive", inplace=inplace)

    values = _step_values()[:6]
    expected = gdn_ops.gated_delta_step(*values, backend="naive")
    function, graphs = compiled(decode)
    torch.testing.assert_close(function(*values), expected)
    assert len(nodes(graphs)) == 1
    if inplace:
        torch.testing.assert_close(values[5], expected[1])


def test_the_step_operator_has_the_gradients_of_the_eager_step() -> None:
    values = _step_values(backend="naive")
    names = operators.schema_names(GATED_DELTA_STEP)
    mine, theirs = _needing_grad(values), _needing_grad(values)
    o, state = torch.ops.gdn_ops.gated_delta_step(*mine)
    o2, state2 = gdn_ops.gated_delta_step(**dict(zip(names, theirs, strict=True)))
    (o.square().sum() + state.square().sum()).backward()
    (o2.square().sum() + state2.square().sum()).backward()
    checked = 0
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a.grad, b.grad)
            checked += 1
    assert checked == 6


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
