"""The decode operators: a few steps and pools under torch.library and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from gdn_ops import gated_delta_step, gated_delta_steps
from gdn_ops.backends import compile as compile_backend
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.testing import Example
from gdn_ops.torch_ops import operators
from graphs import compiled, nodes

OPERATORS = torch.ops.gdn_ops


def arguments(tokens: int = 3, pool: bool = False, **changes: Any) -> dict[str, Any]:
    """Return every argument of `gated_delta_steps`."""
    example = Example(B=2, T=tokens, H=2, R=2, K=4, V=3, initial_state=True)
    drawn = example.arguments()
    state = drawn.pop("initial_state")
    del drawn["chunk_size"]
    values = {name: default for name, default, _ in GATED_DELTA_STEPS.parameters()}
    values |= drawn | {"state": state}
    if pool:
        values["state"] = torch.cat((state, state, state))
        values["state_indices"] = torch.tensor([4, -1])
    return values | changes


def one_token(**changes: Any) -> dict[str, Any]:
    """Return every argument of `gated_delta_step`."""
    values = {n: x for n, x in arguments(1, **changes).items() if n != "return_states"}
    return values | {n: values[n].squeeze(1) for n in ("q", "k", "v", "alpha", "beta")}


def needing_gradients(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return values | {name: values[name].detach().requires_grad_() for name in names}


ALL = ("q", "k", "v", "alpha", "beta", "state")


def schema_values(spec: OpSpec, values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in operators.schema_names(spec)]


# opcheck reads .grad of a tensor that is no leaf; torch hides its warning, but not from -W error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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


def test_the_step_operator_has_the_gradients_of_the_eager_step() -> None:
    mine, theirs = (needing_gradients(one_token(backend="naive"), *ALL) for _ in range(2))
    eager = gated_delta_step(**theirs)
    for o, state in (OPERATORS.gated_delta_step(*schema_values(GATED_DELTA_STEP, mine)), eager):
        (o.square().sum() + state.square().sum()).backward()
    for name in ALL:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad)


def test_meta_tensors_have_the_shapes_of_results() -> None:
    values = {
        n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments(pool=True).items()
    }
    o, pool, states = gdn_ops.gated_delta_steps(**(values | {"return_states": True}))
    assert (o.shape, pool.shape, states.shape) == ((2, 3, 4, 3), (6, 4, 4, 3), (2, 3, 4, 4, 3))


def test_a_new_draft_length_does_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")
    gated_delta_steps(**arguments(backend="compile"))
    before = len(compile_backend._functions)
    for t in (1, 2, 7):
        actual = gated_delta_steps(**arguments(t, backend="compile"))
        torch.testing.assert_close(actual, gated_delta_steps(**arguments(t, backend="naive")))
    assert len(compile_backend._functions) == before
