"""The registered operators under torch.func: numbers and refusals of the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from errors import message_of, refusal
from gdn_ops import gated_delta
from gdn_ops.call import transforms
from gdn_ops.spec.errors import BackendUnsupportedError
from gdn_ops.spec.ops import GATED_DELTA
from operator_calls import (
    ALL,
    CASES,
    KERNELS,
    OPERATORS,
    PLAIN,
    Function,
    close,
    directions,
    exact_gradients,
    exact_sequence,
    exact_step,
    gradients,
    loop,
    schema_values,
    sequence,
    step,
    steps,
    tensors,
    token,
    total,
    with_directions,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend .* emulates:UserWarning"),
    pytest.mark.usefixtures("eager_compiler", "one_thread"),
]

# vmap.


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CASES)
def test_a_mapped_operator_equals_a_loop_along_any_axis(name: str, backend: str) -> None:
    make, draw = CASES[name]
    function, x = make(backend), draw(backend, 2)
    right = loop(function, x)
    close(vmap(function)(*x), right, backend, 50)
    last = vmap(function, in_dims=-1, out_dims=1)(*(y.movedim(0, -1) for y in x))
    close([y.movedim(1, 0) for y in last], right, backend, 50)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_mapped_by_one_input_equals_a_loop(name: str, backend: str) -> None:
    make, draw = CASES[name]
    function, x = make(backend), draw(backend, 2)
    for i in range(len(x)) if backend == "torch" else (2, len(x) - 1):
        dims = tuple(0 if i == j else None for j in range(len(x)))
        held = [y if i == j else y[0] for j, y in enumerate(x)]
        each = [y if i == j else torch.stack([y[0], y[0]]) for j, y in enumerate(x)]
        close(vmap(function, in_dims=dims)(*held), loop(function, each), backend, 50)


@pytest.mark.parametrize("backend", ALL)
def test_a_mapped_operator_of_packed_sequences_equals_the_definition(backend: str) -> None:
    packed = torch.tensor([0, 2, 2, 5], dtype=torch.int64)
    x = [y[:, :1] for y in tensors(backend, 2)]
    x[5] = x[5].expand(2, 3, *x[5].shape[2:])
    right = loop(exact_sequence(cu_seqlens=packed), x)
    close(vmap(sequence(backend, cu_seqlens=packed))(*x), right, backend)
    each = loop(grad(total(exact_sequence(cu_seqlens=packed)), argnums=(0, 3, 5)), x)
    got = vmap(grad(total(sequence(backend, cu_seqlens=packed)), argnums=(0, 3, 5)))(*x)
    close(got, each, backend, 50)


def test_nested_vmap_of_an_operator_equals_loops() -> None:
    x, function = tensors("torch", rows=3), sequence("torch")
    inner = vmap(function, in_dims=(0, None, 0, 0, 0, 0))
    got = vmap(inner, in_dims=(None, 0, None, None, None, None))(*x)[0]
    for row in range(3):
        right = loop(lambda q, *y, k=x[1][row]: exact_sequence()(q, k, *y), [x[0], *x[2:]], 3)
        close([got[row]], [right[0]])


def test_no_rows_and_states_that_are_not_asked_for_have_their_shapes() -> None:
    x = tensors("torch")
    none = vmap(sequence("torch"))(*(y.expand(0, *y.shape) for y in x))
    assert [tuple(y.shape) for y in none] == [(0, 2, 5, 2, 3), (0, 2, 2, 3, 3)]
    shapes = [tuple(y.shape) for y in vmap(steps("torch"))(*(y[None] for y in x))]
    assert shapes == [(1, 2, 5, 2, 3), (1, 2, 2, 3, 3), (1, 2, 0, 2, 3, 3)]


def test_a_transformed_operator_saves_nothing_for_a_backward() -> None:
    x = tensors("torch")
    values = lambda *y: schema_values(GATED_DELTA, y, {"backend": "torch"})  # noqa: E731
    assert len(OPERATORS.gated_delta(*values(*x), True)[2]) > 0
    assert vmap(lambda *y: OPERATORS.gated_delta(*values(*y), True))(*(y[None] for y in x))[2] == []


# Reverse mode.


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("save", [False, True])
def test_gradients_of_the_sequence_operator_are_those_of_the_definition(
    backend: str, save: bool
) -> None:
    x, six = tensors(backend, 2), tuple(range(6))
    function, exact = total(sequence(backend, save)), total(exact_sequence())
    one = [y[0] for y in x]
    close(grad(function, argnums=six)(*one), grad(exact, argnums=six)(*one), backend, 100)
    got = vmap(grad(function, argnums=six))(*x)
    close(got, loop(grad(exact, argnums=six), x), backend, 100)
    # One by one: what is not differentiated is not lost.
    for i in six:
        close([grad(function, argnums=i)(*one)], [grad(exact, argnums=i)(*one)], backend, 100)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_of_the_step_operator_are_those_of_the_definition(backend: str) -> None:
    x, six = token(backend, 2), tuple(range(6))
    got = vmap(grad(total(step(backend)), argnums=six))(*x)
    close(got, loop(grad(total(exact_step), argnums=six), x), backend, 100)


@pytest.mark.parametrize("backend", ALL)
def test_vjp_and_jacrev_of_operators_are_those_of_the_definition(backend: str) -> None:
    x = with_directions(tensors(backend, B=1, T=3), backend)
    o, pull = vjp(sequence(backend), *x[:6])
    close(o, exact_sequence()(*x[:6]), backend)
    close(pull(tuple(x[6:])), exact_gradients(*x), backend, 50)
    close(gradients(backend)(*x), exact_gradients(*x), backend, 50)
    got = jacrev(lambda v: sequence(backend)(*x[:2], v, *x[3:])[0].sum(-1))(x[2])
    right = jacrev(lambda v: exact_sequence()(*x[:2], v, *x[3:])[0].sum(-1))(x[2])
    close([got], [right], backend, 50)


def test_outer_autograd_reaches_what_vmap_of_an_operator_does_not_map() -> None:
    x = tensors("torch")
    mine, theirs = (x[0].clone().requires_grad_() for _ in range(2))
    values = torch.stack([x[2], 2 * x[2]])
    o = vmap(lambda v: sequence("torch")(mine, x[1], v, *x[3:])[0])(values)
    (o**2).sum().backward()
    for v in values:
        (exact_sequence()(theirs, x[1], v, *x[3:])[0] ** 2).sum().backward()
    close([mine.grad], [theirs.grad])


# Forward mode and second derivatives.


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("gated_delta", exact_sequence()),
        ("gated_delta_step", exact_step),
        ("gated_delta_backward", exact_gradients),
    ],
)
def test_tangents_of_an_operator_are_those_of_the_definition(
    name: str, exact: Function, backend: str
) -> None:
    make, draw = CASES[name]
    function, rows = make(backend), draw(backend, 2)
    x = [y[0] for y in rows]
    v = directions(x)
    close(jvp(function, tuple(x), tuple(v))[1], jvp(exact, tuple(x), tuple(v))[1])
    mapped = vmap(lambda *y: jvp(function, y, tuple(v))[1])(*rows)
    close(mapped, loop(lambda *y: jvp(exact, y, tuple(v))[1], rows))
    for i, y in enumerate(x):
        alone = lambda f, i=i: lambda z: f(*x[:i], z, *x[i + 1 :])  # type: ignore[misc] # noqa: E731
        got, right = (jvp(alone(f), (y,), (v[i],))[1] for f in (function, exact))
        close(got, right)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(
    "twice",
    [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))],
    ids=["hessian", "reverse", "forward"],
)
def test_hessians_of_operators_are_those_of_the_definition(backend: str, twice: Any) -> None:
    x = tensors(backend, B=1, T=3, K=2, V=2)
    one = [*(y[:, 1] for y in x[:5]), x[5]]
    for function, exact, given in (
        (sequence(backend), exact_sequence(), x),
        (step(backend), exact_step, one),
    ):
        for i in (1, 3):
            of = lambda f, i=i, x=given: lambda z: total(f)(*x[:i], z, *x[i + 1 :])  # type: ignore[misc] # noqa: E731
            close([twice(of(function))(given[i])], [jacrev(jacrev(of(exact)))(given[i])])


@pytest.mark.parametrize("backend", PLAIN)
def test_gradients_of_the_backward_operator_are_second_derivatives(backend: str) -> None:
    x = with_directions(tensors(backend), backend)
    eight = tuple(range(8))
    got = grad(total(gradients(backend)), argnums=eight)(*x)
    close(got, grad(total(exact_gradients), argnums=eight)(*x))


@pytest.mark.parametrize("backend", PLAIN)
def test_a_tangent_of_the_gradients_of_results_alone_is_not_lost(backend: str) -> None:
    *x, d_o, d_state = with_directions(tensors(backend), backend)

    def public(*y: Tensor) -> Any:
        return gated_delta(*y[:5], initial_state=y[5], return_state=True, backend=backend)

    right = exact_gradients(*x, d_o, d_state)
    for of in (sequence(backend), public):
        pull = vjp(of, *x)[1]
        # It is linear in them.
        close(jvp(lambda *d, pull=pull: pull(d), (d_o, d_state), (d_o, d_state))[1], right)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_tangent_of_the_gradients_of_a_kernel_is_refused(backend: str) -> None:
    *x, d_o, d_state = with_directions(tensors(backend), backend)
    pull = vjp(sequence(backend), *x)[1]
    both = (d_o, d_state)
    text = message_of(BackendUnsupportedError, jvp, lambda *d: pull(d), both, both)
    assert "forward-mode tangents (supported: reverse mode)" in " ".join(text.split())


# Operators that no transform concerns.


def test_an_operator_of_captured_tensors_runs_as_outside() -> None:
    x, rows = tensors("torch"), torch.arange(2.0)
    values = schema_values(GATED_DELTA, tuple(x), {"backend": "torch"})
    saved = []

    def function(row: Tensor) -> Any:
        o, state, kept = OPERATORS.gated_delta(*values, True)
        saved.append(kept)
        return row * o, row * state

    right = exact_sequence()(*x)
    close([y[1] for y in vmap(function)(rows)], right)
    close(jvp(function, (rows[1],), (rows[1],))[1], right)
    own = OPERATORS.gated_delta(*values, True)[2]
    assert all(map(torch.equal, saved[0], own)) and len(saved[0]) == len(own)
    close(functionalize(sequence("torch"))(*x), right)


@pytest.mark.parametrize("make", [step, steps], ids=["step", "steps"])
def test_an_operator_in_place_on_captured_tensors_updates_them_once(make: Function) -> None:
    x = token("torch") if make is step else tensors("torch")
    state = x[5].clone()
    function = make("torch", "_")
    got = vmap(lambda row: row * (y if torch.is_tensor(y := function(*x[:5], state)) else y[0]))
    o = got(torch.ones(2))
    right = make("torch")(*x)
    close([o[0], o[1], state], [right[0], right[0], right[1]])


def test_a_refused_call_leaves_the_transforms_as_they_were() -> None:
    x = tensors("torch")
    levels = []

    def function(row: Tensor) -> Tensor:
        with pytest.raises(Exception, match="k has shape"):
            sequence("torch")(x[0], x[1][:, :-1], *x[2:])
        levels.append(transforms.any_active())
        return sequence("torch")(row, *x[1:])[0]

    close(vmap(function)(x[0][None])[0], exact_sequence()(*x)[0])
    assert levels == [True] and not transforms.any_active()


# Refusals, which are those of the public functions.


@pytest.mark.parametrize("name", ["gated_delta_step", "gated_delta_steps"])
def test_operators_in_place_are_refused_under_any_transform(name: str) -> None:
    make, x = (step, token("torch")) if name == "gated_delta_step" else (steps, tensors("torch"))
    function, before = make("torch", "_"), x[5].clone()
    scalar = lambda *y: torch.utils._pytree.tree_leaves(function(*y))[0].sum()  # noqa: E731
    text = f"{name}: inplace is True, should be False under vmap, grad, vjp and jvp"
    assert refusal(lambda: vmap(function)(*(y[None] for y in x))) == text
    assert refusal(lambda: vmap(lambda q: function(q, *x[1:]))(x[0][None])) == text
    assert refusal(lambda: grad(scalar)(*x)) == text
    assert refusal(lambda: jvp(function, tuple(x), tuple(x))) == text
    assert torch.equal(x[5], before)


@pytest.mark.parametrize("backend", ALL)
def test_the_operator_of_a_few_steps_has_no_derivatives_under_any_transform(backend: str) -> None:
    x = tensors(backend)
    of = lambda *y: steps(backend)(*y)[0]  # noqa: E731
    mapped = lambda *y: vmap(of)(*(z[None] for z in y)).sum()  # noqa: E731
    rest = "should not: gated_delta_steps is for decoding, under torch.no_grad(); gated_delta has"
    for run in (lambda: grad(lambda *y: of(*y).sum())(*x), lambda: grad(mapped)(*x)):
        assert refusal(run) == f"gated_delta_steps: q requires a gradient, {rest} derivatives"
    assert refusal(lambda: jvp(of, tuple(x), tuple(x))) == (
        f"gated_delta_steps: q has a tangent, {rest} derivatives"
    )


def test_pools_and_mapped_boundaries_are_refused_by_name() -> None:
    x = token("torch")
    pool = step("torch", state_indices=torch.tensor([0, 1]))
    assert refusal(lambda: vmap(pool)(*(y[None] for y in x))) == (
        "gated_delta_step: state_indices is for decoding: it is given, should be None under vmap "
        "and jvp; give the rows of the pool as state"
    )
    one = [y[:1] for y in tensors("torch")]
    boundaries = torch.tensor([[0, 5], [0, 5]])
    packed = lambda c: sequence("torch", cu_seqlens=c)(*one)  # noqa: E731
    assert refusal(lambda: vmap(packed)(boundaries)) == (
        "gated_delta: cu_seqlens is mapped by vmap, should be the same for all: give it in_dims "
        "None"
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["gated_delta", "gated_delta_step", "gated_delta_backward"])
def test_tangents_of_kernels_are_refused(name: str, backend: str) -> None:
    make, draw = CASES[name]
    x = tuple(y[0] for y in draw(backend, 1))
    text = message_of(BackendUnsupportedError, jvp, make(backend), x, x)
    assert "forward-mode tangents (supported: reverse mode)" in " ".join(text.split())


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    x = with_directions(tensors(backend), backend)
    of = total(sequence(backend))
    twice = grad(lambda q: (grad(lambda q: of(q, *x[1:6]))(q) ** 2).sum())
    text = (
        f"backend {backend!r}: second derivatives of gated_delta need eager mode and a backend "
        'that has them: backend="torch" or backend="naive"'
    )
    assert message_of(RuntimeError, twice, x[0]) == text
    assert message_of(RuntimeError, grad(total(gradients(backend))), *x) == text


def test_a_tangent_of_forward_ad_alone_is_refused_and_not_lost() -> None:
    text = (
        "torch.ops.gdn_ops.{}: an input has a tangent of torch.autograd.forward_ad, which does "
        "not reach operators: call gdn_ops.{}, or take torch.func.jvp"
    )
    for name, (make, draw) in CASES.items():
        function, (q, *rest) = make("torch"), [y[0] for y in draw("torch", 1)]
        message = text.format(name, "gated_delta" if "step" not in name else name)
        with forward_ad.dual_level():
            function(q, *rest)  # Without a tangent it runs.
            dual = forward_ad.make_dual(q, q)
            assert message_of(RuntimeError, function, dual, *rest) == message
        of_q = lambda q, f=function, rest=rest: f(q, *rest)  # type: ignore[misc] # noqa: E731
        assert message_of(RuntimeError, linearize, of_q, q) == message
