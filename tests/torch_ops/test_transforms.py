"""torch.func and forward mode: numbers by the definition in float64, and refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

from errors import refusal
from gdn_ops import explain, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.nn import GatedDeltaNet
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError
from gdn_ops.testing import Example

PLAIN = ("naive", "torch", "compile")
KERNELS = ("triton", "tilelang")
ALL = (*PLAIN, "cpp", *KERNELS)
NAMES = ("q", "k", "v", "alpha", "beta", "initial_state")
pytestmark = [
    pytest.mark.filterwarnings("ignore:backend .* emulates:UserWarning"),
    pytest.mark.usefixtures("eager_compiler", "one_thread"),
]


def call(backend: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the sequence op as a function of the tensors in NAMES."""
    options = {"return_state": True, "backend": backend} | options
    return lambda *x: gated_delta(*x[:5], initial_state=x[5], **options)


def tensors(backend: str = "torch", rows: int | None = None, **sizes: Any) -> list[Tensor]:
    """Return inputs with gates of exactly 0 among them, and an axis of `rows` in front if given."""
    width = 16 if backend not in PLAIN else 3
    sizes = {"B": 2, "T": 5, "H": 1, "R": 2, "K": width, "V": width} | sizes
    dtype = "float32" if backend not in PLAIN else "float64"
    drawn = []
    for seed in range(rows or 1):
        example = Example(dtype=dtype, initial_state=True, seed=seed, gate="extreme", **sizes)
        arguments = example.arguments()
        drawn.append([arguments[name] for name in NAMES])
    # The seeds draw zeros at random; one is there in any case.
    drawn[0][3][:, 1:2] = 0
    wide = [[x.double() if dtype == "float64" else x for x in one] for one in drawn]
    return wide[0] if rows is None else [torch.stack(x) for x in zip(*wide, strict=True)]


def directions(x: list[Tensor]) -> list[Tensor]:
    return [torch.cos(torch.arange(y.numel()) + 1.0).view_as(y).to(y) for y in x]


def total(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the sum of the cubes of a function's results."""
    return lambda *x: torch.stack([(y**3).sum() for y in function(*x)]).sum()


def close(got: Any, right: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(list(got), list(right), rtol=tolerance, atol=tolerance)


def tolerance(backend: str) -> float:
    return 2e-4 if backend not in PLAIN else 1e-9


# vmap.


@pytest.mark.parametrize("backend", ALL)
def test_vmap_equals_a_loop_wherever_the_axis_is(backend: str) -> None:
    x, function = tensors(backend, rows=3), call(backend)
    loop = [
        torch.stack(y) for y in zip(*(function(*(y[i] for y in x)) for i in range(3)), strict=True)
    ]
    close(vmap(function)(*x), loop, tolerance(backend))
    ends = vmap(function, in_dims=-1, out_dims=1)(*(y.movedim(0, -1) for y in x))
    close([y.movedim(1, 0) for y in ends], loop, tolerance(backend))


@pytest.mark.parametrize("backend", ALL)
def test_vmap_over_some_inputs_equals_a_loop(backend: str) -> None:
    x, function = tensors(backend, rows=2), call(backend)
    held = (x[0], x[1][0], x[2], x[3][0], x[4], x[5][0])
    got = vmap(function, in_dims=(0, None, 0, None, 0, None))(*held)
    rows = [function(x[0][i], x[1][0], x[2][i], x[3][0], x[4][i], x[5][0]) for i in range(2)]
    close(got, [torch.stack(y) for y in zip(*rows, strict=True)], tolerance(backend))


def test_nested_vmap_equals_loops() -> None:
    x, function = tensors(rows=3), call("torch")
    nested = vmap(
        vmap(function, in_dims=(0, None, 0, 0, 0, 0)), in_dims=(None, 0, None, None, None, None)
    )
    for row, o in enumerate(nested(*x)[0]):
        for i in range(3):
            right = function(x[0][i], x[1][row], *(y[i] for y in x[2:]))[0]
            torch.testing.assert_close(o[i], right)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_vmap_of_packed_sequences_equals_a_loop(backend: str, dtype: torch.dtype) -> None:
    boundaries = torch.tensor([0, 2, 2, 5], dtype=dtype)
    x = [y[:, :1] for y in tensors(backend, rows=2)]
    x[5] = x[5].expand(2, 3, *x[5].shape[2:])
    function = call(backend, cu_seqlens=boundaries)
    loop = [
        torch.stack(y) for y in zip(*(function(*(y[i] for y in x)) for i in range(2)), strict=True)
    ]
    close(vmap(function)(*x), loop, tolerance(backend))
    of_rows = vmap(grad(total(function), argnums=(0, 3, 5)))(*x)
    each = [grad(total(function), argnums=(0, 3, 5))(*(y[i] for y in x)) for i in range(2)]
    close(of_rows, [torch.stack(y) for y in zip(*each, strict=True)], 50 * tolerance(backend))


@pytest.mark.parametrize("backend", ALL)
def test_vmap_of_decode_ops_equals_a_loop(backend: str) -> None:
    x = tensors(backend, rows=2)
    close(
        vmap(lambda *y: gated_delta_steps(*y, return_states=True, backend=backend))(*x),
        [
            torch.stack(y)
            for y in zip(
                *(
                    gated_delta_steps(*(z[i] for z in x), return_states=True, backend=backend)
                    for i in range(2)
                ),
                strict=True,
            )
        ],
        tolerance(backend),
    )
    token = [y[:, :, 0] for y in x[:5]] + [x[5].to(torch.bfloat16)]
    steps = [gated_delta_step(*(y[i] for y in token), backend=backend) for i in range(2)]
    got = vmap(lambda *y: gated_delta_step(*y, backend=backend))(*token)
    close(got, [torch.stack(y) for y in zip(*steps, strict=True)], tolerance(backend))


def test_vmap_over_no_rows_returns_no_rows() -> None:
    x = [y.expand(0, *y.shape) for y in tensors()]
    assert [tuple(y.shape) for y in vmap(call("torch"))(*x)] == [(0, 2, 5, 2, 3), (0, 2, 2, 3, 3)]


# Reverse mode.


@pytest.mark.parametrize("backend", ALL)
def test_gradients_per_sample_equal_a_loop_of_backwards(backend: str) -> None:
    x, function = tensors(backend, rows=2), total(call(backend))
    got = vmap(grad(function, argnums=tuple(range(6))))(*x)
    for row in range(2):
        leaves = [y[row].clone().requires_grad_() for y in x]
        function(*leaves).backward()
        close([y[row] for y in got], [y.grad for y in leaves], 50 * tolerance(backend))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(
    "twice",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacfwd(f)),
    ],
    ids=["hessian", "reverse", "forward", "reverse over forward"],
)
def test_hessians_are_symmetric_and_those_of_the_definition(backend: str, twice: Any) -> None:
    x = tensors(B=1, T=3, K=2, V=2)
    sizes = [y.numel() for y in x]

    def flat(name: str) -> Callable[[Tensor], Tensor]:
        function = total(call(name))
        return lambda z: function(*(p.view_as(y) for p, y in zip(z.split(sizes), x, strict=True)))

    at = torch.cat([y.flatten() for y in x])
    got, right = twice(flat(backend))(at), jacrev(jacrev(flat("naive")))(at)
    torch.testing.assert_close(got, got.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", PLAIN)
def test_products_with_the_hessian_are_right_at_gates_of_0_in_plain_autograd(backend: str) -> None:
    x = tensors(B=1)
    assert int((x[3] == 0).sum()) > 0
    got, right = (
        torch.autograd.functional.hvp(total(call(b)), tuple(x), tuple(directions(x)))[1]
        for b in (backend, "naive")
    )
    close(got, right)


def test_third_derivatives_are_those_of_the_definition() -> None:
    x = tensors(B=1, T=3)

    def third(backend: str) -> Tensor:
        of = total(call(backend))
        once = lambda a: of(*x[:3], a, *x[4:])  # noqa: E731
        for _ in range(3):
            once = (lambda f: lambda a: (grad(f)(a) ** 2).sum())(once)
        return once(x[3])

    torch.testing.assert_close(third("torch"), third("naive"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    x, function = tensors(backend), total(call(backend))
    twice = grad(lambda q: (grad(lambda q: function(q, *x[1:]))(q) ** 2).sum())
    with pytest.raises(RuntimeError, match=r"second derivatives of gated_delta need eager mode"):
        twice(x[0])


def test_batched_gradients_of_autograd_are_refused_by_name() -> None:
    q, *rest = tensors()
    of_q = lambda q: call("torch")(q, *rest)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match=r"is_grads_batched .* torch.func.jacrev"):
        torch.autograd.functional.jacobian(of_q, q, vectorize=True)


def test_outer_autograd_reaches_what_vmap_does_not_map() -> None:
    x = tensors()
    q = x[0].clone().requires_grad_()
    values = torch.stack([x[2], 2 * x[2]])
    o = vmap(lambda v: call("torch")(q, x[1], v, *x[3:])[0])(values)
    o.sum().backward()
    other = x[0].clone().requires_grad_()
    sum(call("torch")(other, x[1], v, *x[3:])[0].sum() for v in values).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(q.grad, other.grad)


# Forward mode.


# torch.func.linearize warns of the graph that it makes itself.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("boundaries", [None, (0, 2, 2, 5)])
def test_tangents_are_those_of_the_definition(backend: str, boundaries: Any) -> None:
    x, options = tensors(B=1), {}
    if boundaries:
        options["cu_seqlens"] = torch.tensor(boundaries)
        x[5] = x[5].repeat(3, 1, 1, 1)
    v = directions(x)
    _, right = jvp(call("naive", **options), tuple(x), tuple(v))
    close(jvp(call(backend, **options), tuple(x), tuple(v))[1], right)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(x, v, strict=True)]
        results = call(backend, **options)(*duals)
        close([forward_ad.unpack_dual(y).tangent for y in results], right)
    close(torch.autograd.functional.jvp(call(backend, **options), tuple(x), tuple(v))[1], right)
    close(linearize(call(backend, **options), *x)[1](*v), right)


@pytest.mark.parametrize("options", [{"rule": "delta"}, {"rule": "linear", "qk_l2norm": True}])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_tangents_of_other_rules_and_lengths_are_right(options: Any, tokens: int) -> None:
    x = tensors(T=tokens)
    x, v = [*x[:3], x[4], x[5]], directions(x)
    v = [*v[:3], v[4], v[5]]

    def function(backend: str) -> Callable[..., Any]:
        return lambda q, k, v, b, s: gated_delta(
            q, k, v, None, b, initial_state=s, return_state=True, backend=backend, **options
        )

    got, right = (jvp(function(b), tuple(x), tuple(v))[1] for b in ("torch", "naive"))
    close(got, right)


@pytest.mark.parametrize("log", [False, True])
def test_tangents_equal_finite_differences(log: bool) -> None:
    x = tensors(T=40)
    x[3] = x[3].clamp(0.3, 0.9)
    function = call("torch")
    if log:
        x[3] = x[3].log()
        function = lambda q, k, v, g, b, s: gated_delta(  # noqa: E731
            q, k, v, None, b, log_alpha=g, initial_state=s, return_state=True, backend="torch"
        )
    x[4] = x[4].clamp(0.1, 1.9)
    v, step = directions(x), 1e-6
    up, down = (function(*(y + s * d for y, d in zip(x, v, strict=True))) for s in (step, -step))
    differences = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
    close(jvp(function, tuple(x), tuple(v))[1], differences, 1e-5)


def test_a_tangent_of_one_input_alone_is_not_lost() -> None:
    x = tensors()
    for i, y in enumerate(x):
        with forward_ad.dual_level():
            o, state = call("torch")(
                *x[:i], forward_ad.make_dual(y, torch.ones_like(y)), *x[i + 1 :]
            )
            assert forward_ad.unpack_dual(state if i == 5 else o).tangent is not None


def test_forward_over_reverse_in_plain_autograd_is_right() -> None:
    x = tensors(B=1)
    v = directions(x)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(y.clone().requires_grad_(), d) for y, d in zip(x, v, strict=True)
        ]
        grads = torch.autograd.grad(total(call("torch"))(*duals), duals)
        got = [forward_ad.unpack_dual(y).tangent for y in grads]
    right = torch.autograd.functional.hvp(total(call("naive")), tuple(x), tuple(v))[1]
    close([y.detach() for y in got], right)


@pytest.mark.parametrize("backend", PLAIN)
def test_a_step_has_tangents_gradients_and_hessians(backend: str) -> None:
    x = tensors()
    token = [*(y[:, 1] for y in x[:5]), x[5]]
    v = directions(token)
    step = lambda name: lambda *y: gated_delta_step(*y, backend=name)  # noqa: E731
    got, right = (jvp(step(b), tuple(token), tuple(v))[1] for b in (backend, "naive"))
    close(got, right)
    got, right = (vjp(step(b), *token)[1](step(b)(*token)) for b in (backend, "naive"))
    close(got, right)
    got, right = (
        hessian(lambda a, b=b: total(step(b))(*token[:3], a, *token[4:]))(token[3])
        for b in (backend, "naive")
    )
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("backend", KERNELS)
def test_tangents_of_kernels_are_refused_and_explained(backend: str) -> None:
    x = tensors(backend)
    with pytest.raises(BackendUnsupportedError, match=r"forward-mode tangents \(supported"):
        jvp(call(backend), tuple(x), tuple(x))
    token = [*(y[:, 1] for y in x[:5]), x[5]]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(token[0], token[0])
        with pytest.raises(BackendUnsupportedError, match=r"forward-mode tangents \(supported"):
            gated_delta_step(dual, *token[1:], backend=backend)
        explained = str(explain(gated_delta_step, dual, *token[1:], backend=backend))
    assert f"{backend}  forward-mode tangents (supported: reverse mode)" in " ".join(
        explained.replace("triton    ", "triton  ").split("\n")
    )


# Checks and refusals.


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_values_are_checked_under_transforms(transform: str) -> None:
    x = tensors()
    x[3] = x[3] + 2
    run = {
        "vmap": lambda: vmap(call("torch"))(*(y[None] for y in x)),
        "grad": lambda: grad(total(call("torch")))(*x),
        "jvp": lambda: jvp(call("torch"), tuple(x), tuple(x)),
    }[transform]
    assert "alpha has values in [2, 3], should be in [0, 1]" in refusal(run)


def test_shapes_in_messages_are_those_of_a_row() -> None:
    x = [y[None] for y in tensors()]
    x[1] = x[1][:, :, :-1]
    assert "k has shape (2, 4, 1, 3), should be (B, T, H, K) = (2, 5, 1, 3)" in refusal(
        lambda: vmap(call("torch"))(*x)
    )


def test_what_transforms_cannot_do_is_refused_by_name() -> None:
    x = tensors()
    token = [*(y[:, 1] for y in x[:5]), x[5]]
    step = lambda **options: lambda *y: gated_delta_step(*y, backend="torch", **options)  # noqa: E731
    rows = [y[None] for y in token]
    assert refusal(lambda: vmap(step(inplace=True))(*rows)) == (
        "gated_delta_step: inplace is True, should be False under vmap, grad, vjp and jvp"
    )
    assert refusal(lambda: vmap(step(state_indices=torch.tensor([0, 1])))(*rows)) == (
        "gated_delta_step: state_indices is for decoding: it is given, should be None under vmap "
        "and jvp; give the rows of the pool as state"
    )
    boundaries = torch.tensor([[0, 2, 5], [0, 1, 5]])
    single = [y[:1] for y in x[:5]]
    assert refusal(
        lambda: vmap(lambda c: gated_delta(*single, cu_seqlens=c, backend="torch"))(boundaries)
    ) == (
        "gated_delta: cu_seqlens is mapped by vmap, should be the same for all: give it in_dims "
        "None"
    )


@pytest.mark.parametrize("backend", ALL)
def test_steps_have_no_derivatives_under_any_transform(backend: str) -> None:
    x = tensors(backend)
    steps = lambda *y: gated_delta_steps(*y, backend=backend)[0]  # noqa: E731
    mapped = lambda *y: vmap(steps)(*(z[None] for z in y)).sum()  # noqa: E731
    for run in (
        lambda: grad(lambda *y: steps(*y).sum())(*x),
        lambda: grad(mapped)(*x),
        lambda: vmap(grad(lambda *y: steps(*y).sum()))(*(z[None] for z in x)),
    ):
        with pytest.raises(SpecError, match="q requires a gradient, should not"):
            run()
    with pytest.raises(SpecError, match="q has a tangent, should not"):
        jvp(steps, tuple(x), tuple(x))


# The layer.


def test_gradients_per_sample_through_a_layer_equal_a_loop() -> None:
    torch.manual_seed(0)
    layer = GatedDeltaNet(hidden_size=8, num_heads=2, head_dim=4, backend="torch").double()
    weights = {name: x.detach() for name, x in layer.named_parameters()}
    x = torch.randn(3, 1, 6, 8, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(layer, weights, (x,))
        return ((out[0] if isinstance(out, tuple) else out) ** 2).sum()

    got = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for row in range(3):
        layer.zero_grad()
        loss(dict(layer.named_parameters()), x[row]).backward()
        for name, weight in layer.named_parameters():
            torch.testing.assert_close(got[name][row], weight.grad, rtol=1e-9, atol=1e-9)
    v = {name: torch.ones_like(y) for name, y in weights.items()}
    _, tangent = jvp(lambda w: loss(w, x[0]), (weights,), (v,))
    slope = sum((grad(loss)(weights, x[0])[name] * v[name]).sum() for name in v)
    torch.testing.assert_close(tangent, slope, rtol=1e-9, atol=1e-9)
    curvature = jvp(lambda w: grad(loss)(w, x[0]), (weights,), (v,))[1]
    assert all(bool(y.isfinite().all()) for y in curvature.values())
