"""A product of factors per token is the recurrence over its micro-steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from gdn_ops import SpecError, SpecTypeError, gated_delta, gated_delta_product

B, T, H, HV, K, V = 2, 7, 2, 4, 6, 5
BACKENDS = ("naive", "torch", "cpp")


def drawn(n: int, *, tokens: int = T, rows: int = B, channels: bool = False) -> dict[str, Any]:
    """Return the arguments of a call in float64 with n factors per token."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decays = (rows, tokens, HV, *((K,) if channels else ()))
    return {
        "q": normal(rows, tokens, H, K),
        "k": torch.nn.functional.normalize(normal(rows, n * tokens, H, K), dim=-1),
        "v": normal(rows, n * tokens, HV, V),
        "alpha": torch.sigmoid(normal(*decays)),
        "beta": 2 * torch.sigmoid(normal(rows, n * tokens, HV)),
    }


def recurrence(x: dict[str, Any], n: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the equations of the docstring token by token."""
    q, k = (x[name].repeat_interleave(HV // H, 2) for name in ("q", "k"))
    outputs = []
    for t in range(q.shape[1]):
        alpha = x["alpha"][:, t]
        state = state * (alpha if alpha.dim() == 3 else alpha.unsqueeze(-1)).unsqueeze(-1)
        for j in range(n * t, n * t + n):
            error = x["v"][:, j] - torch.einsum("bhkv,bhk->bhv", state, k[:, j])
            write = x["beta"][:, j, :, None] * error
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, j], write)
        outputs.append(K**-0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def in_dtype_of(backend: str, x: dict[str, Any]) -> dict[str, Any]:
    """Return arguments in a dtype that a backend takes."""
    dtype = torch.float32 if backend == "cpp" else torch.float64
    return {name: value.to(dtype) for name, value in x.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_product_is_the_recurrence_of_its_factors(backend: str, n: int) -> None:
    x = drawn(n)
    start = torch.randn(
        B, HV, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    right = recurrence(x, n, start)
    given = in_dtype_of(backend, x | {"initial_state": start})
    got = gated_delta_product(**given, num_householder=n, return_state=True, backend=backend)
    bound = 1e-5 if backend == "cpp" else 1e-12
    for one, exact in zip(got, right, strict=True):
        assert one.shape == exact.shape
        assert float((one.double() - exact).norm() / exact.norm()) < bound


def test_channels_decay_by_themselves() -> None:
    x = drawn(2, channels=True)
    right = recurrence(x, 2, torch.zeros(B, HV, K, V, dtype=torch.float64))[0]
    got = gated_delta_product(**x, num_householder=2)
    torch.testing.assert_close(got, right)


def test_one_factor_is_gated_delta_to_the_last_bit() -> None:
    x = drawn(1)
    assert torch.equal(gated_delta_product(**x, num_householder=1), gated_delta(**x))


def test_factors_of_two_tokens_without_a_decay_are_those_of_one() -> None:
    x = drawn(1, tokens=6) | {"alpha": torch.ones(B, 6, HV, dtype=torch.float64)}
    pairs = x | {"q": x["q"][:, 1::2], "alpha": x["alpha"][:, 1::2]}
    single = gated_delta_product(**x, num_householder=1)
    torch.testing.assert_close(gated_delta_product(**pairs, num_householder=2), single[:, 1::2])


def test_orthonormal_factors_of_strength_two_are_a_reflection_of_their_span() -> None:
    """H_1 H_2 = I - 2 P for orthonormal keys, which keeps the norm of the state."""
    x = drawn(2, tokens=1)
    keys = torch.linalg.qr(torch.randn(B, H, K, 2, dtype=torch.float64))[0].movedim(-1, 1)
    start = torch.randn(B, HV, K, V, dtype=torch.float64)
    x |= {"k": keys, "v": torch.zeros_like(x["v"]), "initial_state": start}
    x |= {"alpha": torch.ones_like(x["alpha"]), "beta": torch.full_like(x["beta"], 2.0)}
    state = gated_delta_product(**x, num_householder=2, return_state=True)[1]
    span = torch.einsum("bthk,bthl->bhkl", keys, keys).repeat_interleave(HV // H, 1)
    torch.testing.assert_close(state, start - 2 * span @ start)


def test_packed_sequences_are_counted_in_tokens_of_q() -> None:
    x, n, cut = drawn(3, rows=1), 3, 4
    whole = gated_delta_product(
        **x, num_householder=n, cu_seqlens=torch.tensor([0, cut, T]), return_state=True
    )
    parts = []
    for tokens in (slice(0, cut), slice(cut, T)):
        wide = slice(tokens.start * n, tokens.stop * n)
        own = {k: y[:, tokens if k in ("q", "alpha") else wide] for k, y in x.items()}
        parts.append(gated_delta_product(**own, num_householder=n, return_state=True))
    torch.testing.assert_close(whole[0], torch.cat([o for o, _ in parts], 1))
    torch.testing.assert_close(whole[1], torch.cat([state for _, state in parts]))


def test_every_argument_has_its_gradient() -> None:
    n = 2
    x = {name: y[:, :4] for name, y in drawn(n, tokens=4, rows=1).items()}
    x = {**x, **{name: x[name][:, :2] for name in ("q", "alpha")}}
    x["alpha"], x["beta"] = x["alpha"].clamp(0.1, 0.9), x["beta"].clamp(0.1, 1.9)
    names = list(x)

    def function(*tensors: Tensor) -> Tensor:
        return gated_delta_product(**dict(zip(names, tensors, strict=True)), num_householder=n)

    inputs = [x[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs)


def test_erase_and_write_stand_for_beta() -> None:
    x = drawn(2)
    beta = x.pop("beta")
    with_beta = gated_delta_product(**x, beta=beta, num_householder=2)
    apart = gated_delta_product(**x, erase=beta, write=beta, num_householder=2)
    torch.testing.assert_close(apart, with_beta)


def q(*shape: int) -> Tensor:
    return torch.zeros(shape)


BAD: dict[str, Callable[[], object]] = {
    "k has 7 tokens, should have 14: 2 factors for each of the 7 tokens of q": (
        lambda: gated_delta_product(q(1, 7, 2, 3), q(1, 7, 2, 3), q(1, 7, 2, 3), num_householder=2)
    ),
    "num_householder is 0, should be a positive integer": (
        lambda: gated_delta_product(q(1, 7, 2, 3), q(1, 7, 2, 3), q(1, 7, 2, 3), num_householder=0)
    ),
    "q has shape (7, 2, 3), should have 4 dimensions, not 3": (
        lambda: gated_delta_product(q(7, 2, 3), q(1, 7, 2, 3), q(1, 7, 2, 3), num_householder=1)
    ),
    "rule is 'gated', should be one of gated_delta, delta": (
        lambda: gated_delta_product(
            q(1, 7, 2, 3), q(1, 7, 2, 3), q(1, 7, 2, 3), num_householder=1, rule="gated"
        )
    ),
}

OF_ANOTHER_TYPE: dict[str, Callable[[], object]] = {
    "num_householder has type float, should be a positive integer": (
        lambda: gated_delta_product(q(1, 1, 1, 1), q(1, 1, 1, 1), q(1), num_householder=2.0)  # type: ignore[arg-type]
    ),
    "k has type NoneType, should be a torch.Tensor": (
        lambda: gated_delta_product(q(1, 1, 1, 1), None, q(1), num_householder=2)  # type: ignore[arg-type]
    ),
    "got an unknown argument 'head_first', should be left out: tokens come before heads, "
    "(B, T, H, K); q.transpose(1, 2) turns (B, H, T, K)": (
        lambda: gated_delta_product(q(1), q(1), q(1), num_householder=1, head_first=False)  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_call_says_what_is_wrong(message: str) -> None:
    assert message_of(SpecError, BAD[message]) == f"gated_delta_product: {message}"


@pytest.mark.parametrize("message", OF_ANOTHER_TYPE)
def test_a_value_of_another_type_is_named(message: str) -> None:
    wrong = OF_ANOTHER_TYPE[message]
    assert message_of(SpecTypeError, wrong) == f"gated_delta_product: {message}"
