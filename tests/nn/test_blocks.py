"""What runs a block of tokens at a time is what one pass computes, and keeps its operands only."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gdn_ops.nn import blocks
from gdn_ops.nn.causal import causal_convolution
from gdn_ops.nn.norm import gated_rms_norm

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve with T last, as torch does."""
    reach = weight.shape[1] - 1
    p = functional.conv1d(
        functional.pad(x.mT, (reach, 0)), weight[:, None], bias, groups=len(weight)
    ).mT
    return functional.silu(p) if silu else p


def norm(x: Tensor, weight: Tensor, z: Tensor, eps: float, activation: str) -> Tensor:
    """Normalise and gate with the operations of torch."""
    gate = getattr(functional, activation)(z)
    return functional.rms_norm(x, weight.shape, weight, eps) * gate


def assert_same(
    function: Callable[..., Tensor], expected: Callable[..., Tensor], operands: list[Tensor]
) -> None:
    """Compare values and gradients, of what float64 makes of the same operands."""
    dtype = operands[0].dtype
    own = [x.detach().requires_grad_() for x in operands]
    exact = [x.detach().double().requires_grad_() for x in operands]
    y, reference = function(*own), expected(*exact)
    assert y.dtype == dtype
    assert y.is_contiguous()
    d_y = drawn(*y.shape, seed=9).to(dtype)
    grads = torch.autograd.grad(y, own, d_y)
    wanted = torch.autograd.grad(reference, exact, d_y.double())
    for a, b, operand in zip((y, *grads), (reference, *wanted), (y, *operands), strict=True):
        assert a.dtype == operand.dtype
        bound = ROUNDING[dtype] * max(1.0, float(b.detach().abs().amax()) if b.numel() else 0.0)
        assert torch.all((a.double() - b).abs() <= bound)


@given(
    rows=st.integers(0, 3),
    tokens=st.integers(0, 12),
    channels=st.integers(1, 5),
    taps=st.integers(1, 5),
    block=st.integers(1, 40),
    dtype=st.sampled_from(list(ROUNDING)),
    silu=st.booleans(),
    has_bias=st.booleans(),
    is_transposed=st.booleans(),
)
def test_the_convolution_by_blocks_is_that_of_torch(
    rows: int,
    tokens: int,
    channels: int,
    taps: int,
    block: int,
    dtype: torch.dtype,
    silu: bool,
    has_bias: bool,
    is_transposed: bool,
) -> None:
    x = drawn(rows, tokens, channels).to(dtype)
    if is_transposed:
        x = x.mT.contiguous().mT
    operands = [x, drawn(channels, taps, seed=1).to(dtype)]
    operands += [drawn(channels, seed=2).to(dtype)] if has_bias else []

    def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.numel():
            return convolution(x, weight, bias, silu)
        # torch convolves no empty rows.
        return x * weight.sum() * (1 if bias is None else bias.sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK", block)
        assert_same(functools.partial(causal_convolution, silu=silu), expected, operands)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    width=st.integers(1, 6),
    block=st.integers(1, 40),
    dtype=st.sampled_from(list(ROUNDING)),
    activation=st.sampled_from(["silu", "sigmoid"]),
    is_transposed=st.booleans(),
)
def test_the_norm_by_blocks_is_that_of_torch(
    shape: list[int],
    width: int,
    block: int,
    dtype: torch.dtype,
    activation: str,
    is_transposed: bool,
) -> None:
    x, z = (drawn(*shape, width, seed=seed).to(dtype) for seed in (0, 1))
    if is_transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    operands, options = [x, drawn(width, seed=2).to(dtype), z], {"activation": activation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK", block)
        assert_same(
            lambda x, w, z: gated_rms_norm(x, w, z, eps=1e-2, **options),
            lambda x, w, z: norm(x, w, z, 1e-2, activation),
            operands,
        )


X, WEIGHT = drawn(2, 7, 3), drawn(3, 4, seed=1)

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]

CASES: dict[str, Case] = {
    "conv": (functools.partial(causal_convolution, silu=True), (X, WEIGHT, drawn(3, seed=2))),
    "norm": (
        functools.partial(gated_rms_norm, eps=1e-2),
        (X, WEIGHT[:, 0].contiguous(), drawn(2, 7, 3, seed=3)),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return a function that runs in small blocks, and its operands in float64, as leaves."""
    monkeypatch.setattr(blocks, "_BLOCK", 12)
    function, operands = CASES[request.param]
    return function, tuple(x.clone().requires_grad_() for x in operands)


def test_gradients_can_be_differentiated_again(case: Case) -> None:
    function, operands = case
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def test_each_gradient_is_made_alone_too(case: Case) -> None:
    function, operands = case
    expected = torch.autograd.grad(function(*operands).sum(), operands)
    for i in range(len(operands)):
        alone = [x.detach().clone().requires_grad_(j == i) for j, x in enumerate(operands)]
        (grad,) = torch.autograd.grad(function(*alone).sum(), alone[i])
        assert torch.equal(grad, expected[i])


def test_only_operands_are_kept_for_the_backward(case: Case) -> None:
    function, operands = case
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(*operands)
    assert sorted(kept) == sorted(x.data_ptr() for x in operands)


def test_graphs_and_transforms_see_plain_operations(case: Case) -> None:
    function, operands = case[0], tuple(x.detach() for x in case[1])
    expected = function(*operands)

    class Module(torch.nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return function(*operands)

    exported = torch.export.export(Module(), operands)
    assert not any("_Blocked" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*operands), expected)
    doubled = [torch.stack([x, 2 * x]) for x in operands]
    torch.testing.assert_close(torch.vmap(function)(*doubled)[0], expected)
    meta = [x.to("meta") for x in operands]
    assert function(*meta).shape == expected.shape
