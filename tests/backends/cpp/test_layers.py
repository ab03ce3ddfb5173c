"""The kernels around the rule compute what plain torch does in float64, at every level."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpp_libraries import LEVELS
from errors import message_of
from fences import all_fenced, fenced
from gdn_ops.backends.cpp import layers, library
from layer_kernels import (
    LAYOUTS,
    ROUNDING,
    TOKENS,
    ConvolutionCase,
    NormCase,
    assert_close,
    check_ends,
    check_float16,
    check_in_place,
    convolved,
    names_of,
    normal,
    normed,
)

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)


def check(case: ConvolutionCase | NormCase, level: str) -> None:
    """Check a case at one level, if it is there."""
    loaded = library.library()
    if loaded.gdn_choose_level(level.encode()):
        try:
            case.check()
        finally:
            library.choose_level(loaded, "")


@given(
    case=st.builds(
        ConvolutionCase,
        rows=st.integers(1, 3),
        tokens=st.integers(1, 70),
        channels=st.integers(1, 40),
        taps=st.sampled_from((1, 2, 3, 4, 4, 4, 5, 20)),
        dtype=st.sampled_from(list(ROUNDING)),
        layout=st.sampled_from(list(LAYOUTS)),
        kind=st.sampled_from(("whole", "lengths", "packed")),
        silu=st.booleans(),
        has_bias=st.booleans(),
        has_state=st.booleans(),
        has_d_final=st.booleans(),
        cuts=st.lists(st.integers(0, 70), max_size=5),
    ),
    level=st.sampled_from(LEVELS),
)
def test_the_convolution_is_that_of_plain_torch(case: ConvolutionCase, level: str) -> None:
    check(case, level)


def test_many_tokens_and_channels_are_convolved_in_tasks(level: str) -> None:
    made = functools.partial(normal, dtype=torch.float32)
    for width, tokens in ((2050, 130), (1008, 65), (16, 700)):
        call = layers.Convolution(
            made(2, tokens, width), made(width, 4, seed=1), None, None, None, None, True
        )
        d_y = made(2, tokens, width, seed=2)
        assert_close(names_of(call), *convolved(call, d_y, None))


@pytest.mark.parametrize("kept", [3, 4, 30])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_a_token_updates_its_state_in_place(level: str, dtype: torch.dtype, kept: int) -> None:
    check_in_place(dtype, kept)


@given(
    case=st.builds(
        NormCase,
        shape=st.lists(st.integers(1, 5), max_size=4),
        width=st.integers(1, 70),
        dtype=st.sampled_from(list(ROUNDING)),
        gate=st.sampled_from(("silu", "sigmoid", None)),
        is_transposed=st.booleans(),
    ),
    level=st.sampled_from(LEVELS),
)
def test_the_norm_is_that_of_plain_torch(case: NormCase, level: str) -> None:
    check(case, level)


def test_many_rows_are_normed_in_parts(level: str) -> None:
    x, z, d_y = (normal(2, 9001, 3, 16, seed=seed) for seed in (0, 1, 2))
    # Summed over all rows the weight's gradient is large, and so is its error.
    assert_close("y d_x d_weight d_z", *normed(x, normal(16, seed=3), z, d_y, "silu"))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_token_of_a_layer_is_that_of_plain_torch(level: str, dtype: torch.dtype) -> None:
    for case in TOKENS:
        case._replace(dtype=dtype).check()


def test_activations_are_right_at_their_ends(level: str) -> None:
    check_ends()


def test_every_number_of_float16_is_read(level: str) -> None:
    check_float16()


def results(tokens: int) -> list[Tensor]:
    """Return what a convolution and a norm result in, with their gradients."""
    x, weight = normal(2, tokens, 1100), normal(1100, 4, seed=1)
    state = normal(2, 1100, 3, seed=2)
    call = layers.Convolution(x, weight, weight[:, 0].contiguous(), state, None, None, True)
    d_final = torch.empty_like(state)
    out = [layers.convolution(call, d_final), d_final.clone()]
    out += [t for t in layers.convolution_backward(call, x, d_final, needs_x=True) if t is not None]
    rows, w = x.unflatten(2, (-1, 10)), normal(10, seed=3)
    out += [layers.norm(rows, w, -rows, 1e-5, "silu")]
    gradients = layers.norm_backward(rows, w, -rows, 1e-5, "silu", rows)
    return out + [t for t in gradients if t is not None]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the threads of torch, and set them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads: Callable[[int], None]) -> None:
    threads(1)
    alone = results(150)
    for count in (2, 3, 5):
        threads(count)
        assert all(map(torch.equal, results(150), alone))


def test_eight_threads_may_call_at_once() -> None:
    sizes = (1, 5, 16, 17, 33, 64, 65, 90)
    alone = [results(tokens) for tokens in sizes]
    with ThreadPoolExecutor(8) as pool:
        for got, right in zip(pool.map(results, sizes), alone, strict=True):
            assert all(map(torch.equal, got, right))


@pytest.mark.parametrize("tokens, channels", [(1, 3), (16, 17), (67, 33), (3, 64)])
def test_nothing_beside_the_operands_is_read(level: str, tokens: int, channels: int) -> None:
    operands = {
        "x": normal(2, tokens, channels),
        "weight": normal(channels, 4, seed=1),
        "bias": normal(channels, seed=2),
        "state": normal(2, channels, 3, seed=3),
    }
    within = all_fenced(operands)
    for silu in (False, True):
        own, inside = (
            layers.Convolution(**given, starts=None, lengths=None, silu=silu)
            for given in (operands, within)
        )
        d_y, d_final = normal(2, tokens, channels, seed=4), normal(2, channels, 3, seed=5)
        got = layers.convolution_backward(
            inside, fenced(d_y, torch.nan), fenced(d_final, torch.nan), needs_x=True
        )
        right = layers.convolution_backward(own, d_y, d_final, needs_x=True)
        assert torch.equal(layers.convolution(inside), layers.convolution(own))
        assert all(map(torch.equal, got, right))
    x, z, weight = normal(tokens, channels), normal(tokens, channels, seed=1), normal(channels)
    y = layers.norm(x, weight, z, 1e-5, "silu")
    inside = [fenced(t, torch.nan) for t in (x, weight, z)]
    assert torch.equal(layers.norm(*inside, 1e-5, "silu"), y)
    d = layers.norm_backward(x, weight, z, 1e-5, "silu", z)
    assert all(map(torch.equal, layers.norm_backward(*inside, 1e-5, "silu", inside[2]), d))


def test_memory_that_is_not_there_is_an_error() -> None:
    text = message_of(MemoryError, layers.check, 1)
    assert text == "the C++ kernels: no memory for a thread to work in"
