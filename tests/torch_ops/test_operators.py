"""The operators of the ops under torch.library, torch.compile, torch.export and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import message_of
from gdn_ops import gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.backends import compile as compile_backend
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.testing import Example
from gdn_ops.torch_ops import operators
from graphs import compiled, nodes

OPERATORS = torch.ops.gdn_ops
ALL = ("q", "k", "v", "alpha", "beta", "state")


def schema_values(spec: OpSpec, values: dict[str, Any]) -> list[Any]:
    """Return the values of an operator's arguments in order; what is not given has its default."""
    values = {name: default for name, default, _ in spec.parameters()} | values
    return [values[name] for name in operators.schema_names(spec)]


def needing_gradients(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return values | {name: values[name].detach().requires_grad_() for name in names}


# opcheck reads .grad of a tensor that is no leaf; torch hides its warning, but not from -W error.
reads_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


# A sequence.

EXAMPLES = {
    "batch": Example(B=2, T=40, H=2, R=2, K=4, V=3, initial_state=True, gate="extreme"),
    "packed": Example(T=12, H=1, R=2, K=4, V=3, lengths=(5, 0, 7)),
    "delta": Example(rule="delta", B=1, T=9, H=1, R=1, K=4, V=3, beta="none"),
}


def sequence_values(name: str, backend: str, needs_grad: bool = False) -> list[Any]:
    """Return what the operator of an example takes, perhaps with gradients of every float."""
    arguments = EXAMPLES[name].arguments()
    if needs_grad:
        floats = [n for n, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()]
        arguments = needing_gradients(arguments, *floats)
    return schema_values(GATED_DELTA, arguments | {"backend": backend})


@reads_grad
@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_passes_for_the_sequence_op(needs_grad: bool, name: str, backend: str) -> None:
    values = sequence_values(name, backend, needs_grad)
    torch.library.opcheck(OPERATORS.gated_delta.default, (*values, needs_grad))


def test_opcheck_passes_for_the_backward_op() -> None:
    values = sequence_values("batch", "torch")
    o, state, saved = OPERATORS.gated_delta(*values, True)
    torch.library.opcheck(
        OPERATORS.gated_delta_backward.default,
        (*values, saved, torch.ones_like(o), torch.ones_like(state)),
    )


def test_a_graph_holds_one_opaque_node_whatever_the_length() -> None:
    function, graphs = compiled(gated_delta, dynamic=True)
    for tokens in (20, 50, 131):
        arguments = Example(B=2, T=tokens, H=2, R=2, K=4, V=3).arguments() | {"backend": "torch"}
        torch.testing.assert_close(function(**arguments), gated_delta(**arguments))
    assert len(graphs) == 1, f"got {len(graphs)} graphs, but should be 1 for every length"
    assert len(nodes(graphs)) == 1


def test_a_bad_call_is_refused_while_tracing() -> None:
    function, _ = compiled(gated_delta)
    arguments = EXAMPLES["batch"].arguments()
    with pytest.raises(Exception, match="k has shape"):
        function(**arguments | {"k": arguments["k"][:, :-1]}, backend="torch")


def test_autocast_does_not_touch_the_arithmetic_of_a_backward() -> None:
    arguments = Example(B=1, T=40, H=2, R=2, K=8, V=8).arguments()
    q = arguments["q"].to(torch.bfloat16).float().requires_grad_()
    plain = arguments | {n: arguments[n].to(torch.bfloat16) for n in ("k", "v")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = gated_delta(**(plain | {"q": q}), backend="torch")
        o.float().sum().backward()
    other = q.detach().to(torch.bfloat16).requires_grad_()
    gated_delta(**(plain | {"q": other}), backend="torch").float().sum().backward()
    assert q.grad is not None and other.grad is not None
    assert torch.equal(q.grad, other.grad.float())


def test_second_derivatives_of_the_opaque_operator_say_what_to_do() -> None:
    values = sequence_values("batch", "torch", needs_grad=True)
    o, _, _ = OPERATORS.gated_delta(*values, True)
    (d_q,) = torch.autograd.grad(o.square().sum(), values[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .* need eager mode"):
        d_q.sum().backward()


@pytest.mark.parametrize("operator", operators.OPERATORS, ids=lambda operator: operator.name)
def test_the_schema_is_the_one_that_torch_registered(operator: operators.Operator) -> None:
    registered = str(getattr(OPERATORS, operator.name).default._schema)
    assert registered == f"gdn_ops::{operator.name}{operator.schema}"


# One token and a few.


def arguments(tokens: int = 3, pool: bool = False, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `gated_delta_steps`."""
    example = Example(B=2, T=tokens, H=2, R=2, K=4, V=3, initial_state=True)
    drawn = example.arguments()
    state = drawn.pop("initial_state")
    del drawn["chunk_size"]
    values = drawn | {"state": state}
    if pool:
        values["state"] = torch.cat((state, state, state))
        values["state_indices"] = torch.tensor([4, -1])
    return values | changes


def one_token(**changes: Any) -> dict[str, Any]:
    """Return the arguments of `gated_delta_step`."""
    values = arguments(1, **changes)
    return values | {n: values[n].squeeze(1) for n in ("q", "k", "v", "alpha", "beta")}


@reads_grad
@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("pool", [False, True], ids=["states", "pool"])
def test_opcheck_passes_for_every_decode_operator(backend: str, pool: bool) -> None:
    token = one_token(pool=pool, backend=backend)
    step = schema_values(GATED_DELTA_STEP, token)
    torch.library.opcheck(OPERATORS.gated_delta_step.default, step)
    torch.library.opcheck(OPERATORS.gated_delta_step_.default, step)
    if not pool:
        step = schema_values(GATED_DELTA_STEP, needing_gradients(token, *ALL))
        torch.library.opcheck(OPERATORS.gated_delta_step.default, step)
    for tokens, return_states in ((3, True), (2, False), (0, True), (1, False)):
        values = arguments(tokens, pool, return_states=return_states, backend=backend)
        steps = schema_values(GATED_DELTA_STEPS, values)
        torch.library.opcheck(OPERATORS.gated_delta_steps.default, steps)
        torch.library.opcheck(OPERATORS.gated_delta_steps_.default, steps)


def test_opcheck_passes_for_a_few_steps_from_zeros() -> None:
    values = arguments(state=None, return_states=True, backend="torch")
    steps = schema_values(GATED_DELTA_STEPS, values)
    torch.library.opcheck(OPERATORS.gated_delta_steps.default, steps)


def test_states_that_are_not_asked_for_have_no_token() -> None:
    steps = schema_values(GATED_DELTA_STEPS, arguments(backend="torch"))
    assert OPERATORS.gated_delta_steps(*steps)[2].shape == (2, 0, 4, 4, 3)


@pytest.mark.parametrize("pool", [None, False, True], ids=["sequence", "states", "pool"])
def test_autocast_narrows_activations_and_keeps_gates_and_state_wide(pool: bool | None) -> None:
    if pool is None:
        op, values = gated_delta, EXAMPLES["batch"].arguments() | {"return_state": True}
    else:
        op, values = gated_delta_steps, arguments(pool=pool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = op(**values)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected = op(**values | {n: values[n].bfloat16() for n in ("q", "k", "v")})
    assert torch.equal(o, expected[0])
    assert torch.equal(state, expected[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pool", [False, True], ids=["states", "pool"])
@pytest.mark.parametrize("backend", ["auto", "torch", "naive"])
def test_a_step_is_traced_through_torch_and_one_node_of_another_backend(
    backend: str, pool: bool, inplace: bool
) -> None:
    mine, theirs = (one_token(pool=pool, backend=backend, inplace=inplace) for _ in range(2))
    function, graphs = compiled(gated_delta_step)
    torch.testing.assert_close(function(**mine), gated_delta_step(**theirs))
    torch.testing.assert_close(mine["state"], theirs["state"])
    operator = f"gdn_ops.gated_delta_step{'_' if inplace else ''}"
    assert graphs and nodes(graphs) == ([operator] if backend == "naive" else [])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pool", [False, True], ids=["states", "pool"])
def test_a_few_steps_are_one_node_whatever_their_number(pool: bool, inplace: bool) -> None:
    def values(tokens: int) -> dict[str, Any]:
        return arguments(tokens, pool, inplace=inplace, return_states=True)

    function, graphs = compiled(gated_delta_steps, dynamic=True)
    # None is another axis' size: torch.compile takes equal sizes for one axis.
    for tokens in (5, 7, 9):
        mine, theirs = values(tokens), values(tokens)
        torch.testing.assert_close(function(**mine), gated_delta_steps(**theirs))
        assert torch.equal(mine["state"], values(tokens)["state"]) != inplace
    assert nodes(graphs) == [f"gdn_ops.gated_delta_steps{'_' if inplace else ''}"]


def test_inductor_compiles_a_step_on_a_pool() -> None:
    values = one_token(pool=True)
    torch._dynamo.reset()
    actual = torch.compile(gated_delta_step, fullgraph=True)(**values)
    torch.testing.assert_close(actual, gated_delta_step(**values))


def test_a_graph_that_needs_gradients_is_refused() -> None:
    function, _ = compiled(gated_delta_steps)
    # Some Dynamos show the error that they ran into, and others only what kind it is.
    kind = r"|raised exception .*SpecError"
    text = "v requires a gradient, should not: gated_delta_steps is"
    with pytest.raises(Exception, match=text + kind):
        function(**needing_gradients(arguments(), "v"))
    function, _ = compiled(gated_delta_step)
    for backend in ("naive", "torch"):
        with pytest.raises(Exception, match="state_indices is for decoding" + kind):
            function(**needing_gradients(one_token(pool=True, backend=backend), "v"))


def test_the_operators_themselves_have_no_gradients_but_of_a_plain_step() -> None:
    values = needing_gradients(arguments(backend="torch"), "v")
    o, *_ = OPERATORS.gated_delta_steps(*schema_values(GATED_DELTA_STEPS, values))
    assert message_of(RuntimeError, o.sum().backward) == (
        "gated_delta_steps is for decoding and has no gradients; gated_delta has"
    )
    values = needing_gradients(one_token(pool=True, backend="torch"), "v")
    o, _ = OPERATORS.gated_delta_step(*schema_values(GATED_DELTA_STEP, values))
    assert message_of(RuntimeError, o.sum().backward) == (
        "gated_delta_step with state_indices is for decoding and has no gradients; gated_delta has"
    )


@pytest.mark.filterwarnings("ignore:backend .* emulates:UserWarning")
@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_the_step_operator_has_the_gradients_of_the_eager_step(backend: str) -> None:
    mine, theirs = (needing_gradients(one_token(backend=backend), *ALL) for _ in range(2))
    eager = gated_delta_step(**theirs)
    for o, state in (OPERATORS.gated_delta_step(*schema_values(GATED_DELTA_STEP, mine)), eager):
        (o.square().sum() + state.square().sum()).backward()
    for name in ALL:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad)


def test_meta_tensors_have_the_shapes_of_results() -> None:
    values = arguments(pool=True, return_states=True)
    meta = {n: x.to("meta") if torch.is_tensor(x) else x for n, x in values.items()}
    o, pool, states = gated_delta_steps(**meta)
    assert (o.shape, pool.shape, states.shape) == ((2, 3, 4, 3), (6, 4, 4, 3), (2, 3, 4, 4, 3))


def test_a_new_draft_length_does_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")
    gated_delta_steps(**arguments(backend="compile"))
    before = len(compile_backend._functions)
    for t in (1, 2, 7):
        actual = gated_delta_steps(**arguments(t, backend="compile"))
        torch.testing.assert_close(actual, gated_delta_steps(**arguments(t, backend="naive")))
    assert len(compile_backend._functions) == before
