"""Gates from raw projections: their formulas, gradients, extremes, shapes, and one raw token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from errors import message_of
from gdn_ops import SpecError, gated_delta_step, gates
from gdn_ops.gates import BoundedGate, SoftplusGate, raw_gated_delta_step, sigmoid_beta
from gdn_ops.nn import DecayGate, gate

pytestmark = pytest.mark.usefixtures("one_thread")

HV, K = 3, 4
ONE = torch.ones(1)


def formula(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, bound: float | None) -> Tensor:
    """Return log α in float64, of parameters that are broadcast."""
    step = g.double() if dt_bias is None else g.double() + dt_bias.double()
    rate = ONE.double() if A_log is None else A_log.double().exp()
    if bound is None:
        return -rate * torch.logaddexp(step, torch.zeros((), dtype=torch.float64))
    return bound / (1 + (-rate * step).exp())


def made(bound: float | None, A_log: Tensor | None, dt_bias: Tensor | None, **options: Any) -> Any:
    if bound is None:
        assert A_log is not None
        return SoftplusGate(A_log, dt_bias, **options)
    return BoundedGate(A_log, dt_bias, bound, **options)


@pytest.mark.parametrize("bound", [None, -5.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", ["none", "heads", "channels", "flat"])
def test_a_gate_computes_its_formula(bound: float | None, dtype: torch.dtype, bias: str) -> None:
    torch.manual_seed(0)
    is_channel = bias in ("channels", "flat")
    g = (4 * torch.randn(2, 5, HV, *[K] * is_channel)).to(dtype)
    A_log = torch.randn(HV)
    whole = torch.randn(HV, *[K] * is_channel)
    dt_bias = None if bias == "none" else whole.flatten() if bias == "flat" else whole
    computed = made(bound, A_log, dt_bias)(g)
    rate = A_log.unsqueeze(-1) if is_channel else A_log
    expected = formula(g, rate, None if bias == "none" else whole, bound)
    assert computed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=0)


def _biased(g: Tensor, dt_bias: Tensor | None) -> Tensor:
    return g.float() if dt_bias is None else g.float() + dt_bias


MISTAKES: dict[str, Callable[..., Tensor]] = {
    "the bound is dropped": lambda g, A, bias, bound: gates.log_decay(g, A, bias),
    "the bound is that of alpha": lambda g, A, bias, bound: (
        (A.exp() * _biased(g, bias)).sigmoid() * (1 - math.exp(bound)) + math.exp(bound)
    ).log(),
    "the rate scales what is bounded": lambda g, A, bias, bound: (
        bound * A.exp() * _biased(g, bias).sigmoid()
    ),
    "the bias is not scaled": lambda g, A, bias, bound: (
        bound * (A.exp() * g.float() + (0 if bias is None else bias)).sigmoid()
    ),
}
"""Names mistakes in the bounded gate, each with what computes it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_bounded_gate_is_caught(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "log_bounded_decay", MISTAKES[mistake])
    with pytest.raises(AssertionError):
        test_a_gate_computes_its_formula(-5.0, torch.float32, "channels")


def test_a_rate_may_lie_as_kimi_linear_stores_it() -> None:
    g, A_log, dt_bias = torch.randn(2, 5, HV, K), torch.randn(HV), torch.randn(HV * K)
    stored = SoftplusGate(A_log.view(1, 1, HV, 1), dt_bias)(g)
    assert torch.equal(stored, SoftplusGate(A_log, dt_bias)(g))


def test_a_bounded_gate_without_a_rate_has_a_rate_of_one() -> None:
    g, dt_bias = torch.randn(2, HV, K), torch.randn(HV, K)
    computed = BoundedGate(None, dt_bias)(g)
    torch.testing.assert_close(computed, BoundedGate(torch.zeros(HV), dt_bias)(g))


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("channels", [False, True])
def test_gradients_reach_g_and_the_parameters(bound: float | None, channels: bool) -> None:
    torch.manual_seed(0)
    shape = (HV, K) if channels else (HV,)
    shapes = ((2, *shape), (HV,), (math.prod(shape),))
    x = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(g: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
        log_alpha: Tensor = made(bound, A_log, dt_bias)(g)
        return log_alpha

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("g", "softplus", "bounded"),
    [(-math.inf, 0.0, 0.0), (-1e4, 0.0, 0.0), (1e4, -1e4, -5.0), (math.inf, -math.inf, -5.0)],
)
def test_extremes_are_exact(
    bound: float | None, dtype: torch.dtype, g: float, softplus: float, bounded: float
) -> None:
    x = torch.full((1,), g, dtype=dtype, requires_grad=True)
    A_log, dt_bias = (torch.zeros(1, dtype=dtype, requires_grad=True) for _ in range(2))
    log_alpha = made(bound, A_log, dt_bias)(x)
    assert log_alpha.item() == (softplus if bound is None else bounded)
    log_alpha.sum().backward()
    slope = -1.0 if bound is None and g > 0 else 0.0
    gradients = [tensor.grad.item() for tensor in (x, dt_bias, A_log)]  # type: ignore[union-attr]
    assert gradients == [slope, slope, softplus if bound is None else 0.0]


def test_softplus_is_as_close_as_the_dtype_allows_where_it_turns_linear() -> None:
    for dtype, rtol in ((torch.float32, 1.2e-7), (torch.float64, 2.3e-16)):
        g = torch.linspace(15, 45, 301, dtype=dtype).unsqueeze(1)
        computed = -SoftplusGate(torch.zeros(1, dtype=dtype))(g)
        exact = g.double() + torch.log1p((-g.double()).exp())
        torch.testing.assert_close(computed.double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_beta_is_a_sigmoid_and_may_be_doubled(dtype: torch.dtype) -> None:
    b = torch.tensor([-math.inf, -1e4, 0.0, 1.5, math.inf]).to(dtype)
    expected = 1 / (1 + (-b.double()).exp())
    computed = sigmoid_beta(b), sigmoid_beta(b, allow_neg_eigval=True)
    assert computed[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(computed[0].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(computed[1].double(), 2 * expected, rtol=1e-6, atol=0)


def test_the_layer_computes_the_same_gate() -> None:
    decay, a = DecayGate(HV), torch.randn(2, 5, HV)
    expected = SoftplusGate(decay.A_log, decay.dt_bias)(a)
    assert torch.equal(decay(a), expected)
    assert torch.equal(gate(a, decay.A_log, decay.dt_bias), expected)


# One token.

B, H, V = 2, 1, 5


def token(channels: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (B, H, K), "k": (B, H, K), "v": (B, HV, V), "b": (B, HV)}
    shapes |= {"g": (B, HV, K) if channels else (B, HV), "state": (B, HV, K, V)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("doubled", [False, True])
def test_a_raw_token_is_a_step_with_its_gates(
    bound: float | None, channels: bool, doubled: bool
) -> None:
    x = token(channels)
    own = made(bound, torch.randn(HV), torch.randn(HV * K) if channels else torch.randn(HV))
    options: dict[str, Any] = {"qk_l2norm": True, "scale": 0.5}
    o, state = raw_gated_delta_step(**x, gate=own, allow_neg_eigval=doubled, **options)
    raw, b = x.pop("g"), x.pop("b")
    beta = b.sigmoid() * (2 if doubled else 1)
    expected = gated_delta_step(**x, log_alpha=own(raw), beta=beta, **options)
    torch.testing.assert_close((o, state), expected, rtol=1e-6, atol=1e-6)


def test_the_rank_of_g_says_what_the_shapes_of_the_parameters_do_not() -> None:
    heads = torch.zeros(2)
    q, square = torch.randn(1, 2, 2), torch.randn(1, 2, 2)
    o, _ = raw_gated_delta_step(q, q, q, square, q[..., 0], gate=SoftplusGate(heads))
    log_alpha = -functional.softplus(square)
    expected, _ = gated_delta_step(q, q, q, log_alpha=log_alpha, beta=q[..., 0].sigmoid())
    torch.testing.assert_close(o, expected)


def test_a_raw_token_updates_a_pool_in_place() -> None:
    x = token(True)
    pool = torch.randn(4, HV, K, V)
    slots = torch.tensor([3, -1])
    own = BoundedGate(torch.zeros(HV), torch.zeros(HV, K))
    expected, _ = raw_gated_delta_step(**(x | {"state": pool[[3, 0]]}), gate=own)
    kept = pool.clone()
    o, new = raw_gated_delta_step(
        **(x | {"state": pool}), gate=own, state_indices=slots, inplace=True
    )
    assert new is pool
    torch.testing.assert_close(o[0], expected[0])
    assert torch.equal(o[1], torch.zeros(HV, V))
    assert torch.equal(pool[:3], kept[:3])


def test_a_raw_token_has_gradients_for_everything() -> None:
    x = [tensor.double()[:1].requires_grad_() for tensor in token(True).values()]
    parameters = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (HV, HV * K)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, b, g, state, A_log, dt_bias = tensors
        own = BoundedGate(A_log, dt_bias)
        return raw_gated_delta_step(q, k, v, g, b, state, gate=own, backend="torch")

    assert torch.autograd.gradcheck(run, (*x, *parameters))


def test_a_gate_compiles_into_one_graph() -> None:
    own = BoundedGate(torch.randn(HV), torch.randn(HV * K))
    compiled = torch.compile(own.__call__, fullgraph=True, backend="eager")
    g = torch.randn(2, HV, K)
    torch.testing.assert_close(compiled(g), own(g))


def test_a_raw_token_compiles_into_one_graph() -> None:
    x, own = token(True), SoftplusGate(torch.zeros(HV), torch.zeros(HV, K))
    with torch.no_grad():
        expected = raw_gated_delta_step(**x, gate=own)
        compiled = torch.compile(raw_gated_delta_step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**x, gate=own), expected, rtol=1e-6, atol=1e-6)


# Bad input.

ZEROS = torch.zeros(HV)
G = torch.zeros(2, 5, HV, K)

REFUSED: dict[str, Callable[[], Any]] = {
    "BoundedGate: lower_bound is -6.0, should be a number in [-5, 0): log α of the bounded gate "
    "lies between it and 0": lambda: BoundedGate(ZEROS, lower_bound=-6.0),
    "BoundedGate: lower_bound is 0.0, should be a number in [-5, 0): log α of the bounded gate "
    "lies between it and 0": lambda: BoundedGate(ZEROS, lower_bound=0.0),
    "BoundedGate: lower_bound is nan, should be a number in [-5, 0): log α of the bounded gate "
    "lies between it and 0": lambda: BoundedGate(ZEROS, lower_bound=math.nan),
    "BoundedGate: lower_bound is 'safe', should be a number in [-5, 0)": lambda: BoundedGate(
        ZEROS,
        lower_bound="safe",  # type: ignore[arg-type]
    ),
    "SoftplusGate: A_log has type NoneType, should be a torch.Tensor": lambda: SoftplusGate(
        None  # type: ignore[arg-type]
    ),
    "SoftplusGate: dt_bias has dtype int64, should be a float": lambda: SoftplusGate(
        ZEROS, torch.zeros(HV, dtype=torch.int64)
    ),
    "SoftplusGate: per_channel is 'yes', should be True, False or None": lambda: SoftplusGate(
        ZEROS,
        per_channel="yes",  # type: ignore[arg-type]
    ),
    "SoftplusGate: A_log has shape (2,), should be (HV,) = (3,)": lambda: SoftplusGate(
        torch.zeros(2), torch.zeros(HV, K)
    )(G),
    "SoftplusGate: dt_bias has shape (4, 3), should be (HV, K) = (3, 4) or flat, (12,)": lambda: (
        SoftplusGate(ZEROS, torch.zeros(K, HV))(G)
    ),
    "BoundedGate: dt_bias has shape (2,), should be (HV,) = (3,)": lambda: BoundedGate(
        ZEROS, torch.zeros(2), per_channel=False
    )(G[..., 0]),
    "SoftplusGate: g has shape (5, 3, 3), which may be (..., HV) or (..., HV, K): HV = 3 fits "
    "both; pass per_channel=True or per_channel=False": lambda: SoftplusGate(ZEROS)(
        torch.zeros(5, HV, HV)
    ),
    "BoundedGate: g has shape (5, 3, 3), which may be (..., HV) or (..., HV, K): no parameter "
    "says; pass per_channel=True or per_channel=False": lambda: BoundedGate(None)(
        torch.zeros(5, HV, HV)
    ),
    "SoftplusGate: g has shape (3,), should be (..., HV, K)": lambda: SoftplusGate(
        ZEROS, per_channel=True
    )(ZEROS),
    "SoftplusGate: A_log is on cpu, should be on meta, the device of g": lambda: SoftplusGate(
        ZEROS
    )(G.to("meta")),
    "BoundedGate: g has type float, should be a torch.Tensor": lambda: BoundedGate(ZEROS)(
        1.0  # type: ignore[arg-type]
    ),
    "sigmoid_beta: allow_neg_eigval is 2, should be True or False": lambda: sigmoid_beta(
        ZEROS,
        allow_neg_eigval=2,  # type: ignore[arg-type]
    ),
    "sigmoid_beta: b has dtype int64, should be a float": lambda: sigmoid_beta(
        torch.zeros(2, dtype=torch.int64)
    ),
    "raw_gated_delta_step: gate has type function, should be a SoftplusGate or a BoundedGate of "
    "gdn_ops.gates": lambda: raw_gated_delta_step(**token(True), gate=gate),  # type: ignore[arg-type]
    "raw_gated_delta_step: g has shape (2, 5, 3, 4), should be (B, HV), or (B, HV, K) for a decay "
    "of every key channel": lambda: raw_gated_delta_step(
        **(token(True) | {"g": G}), gate=SoftplusGate(ZEROS)
    ),
    "raw_gated_delta_step: A_log has shape (2,), should be (HV,) = (3,)": lambda: (
        raw_gated_delta_step(**token(True), gate=SoftplusGate(torch.zeros(2)))
    ),
}
"""Calls that are refused, by the error."""


@pytest.mark.parametrize(("message", "call"), REFUSED.items())
def test_what_a_gate_cannot_be_made_of_is_refused(message: str, call: Callable[[], Any]) -> None:
    assert message_of(SpecError, call) == message
