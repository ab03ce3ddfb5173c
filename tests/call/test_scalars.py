"""Numbers of other libraries count as the Python numbers that they equal."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import gdn_ops
from errors import message_of, refusal
from gdn_ops import SpecTypeError, explain
from gdn_ops.call.scalars import as_python
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.nn import GatedDeltaNet, GatedRMSNorm, HybridLM, SlidingWindowAttention
from good_calls import draft, sequence, token

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (Fraction(1, 2), 0.5),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.bool_(False), False),
    ],
)
def test_a_number_becomes_that_of_python(value: Any, expected: Any) -> None:
    result = as_python(value)
    assert type(result) is type(expected) and result == expected


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, "3", Decimal(1), np.ones(()), 1j, Fraction(10**400), [3]]
)
def test_any_other_value_is_unchanged(value: Any) -> None:
    assert as_python(value) is value


@pytest.mark.parametrize(
    ("backend", "device"), [*((name, "cpu") for name in INSTALLED), ("naive", "meta")]
)
def test_every_backend_takes_numbers_of_numpy(backend: str, device: str) -> None:
    given = {name: x.to(device) for name, x in sequence().items()}
    given["v"] = given["q"].repeat_interleave(2, 2)
    ours = {"scale": 0.5, "chunk_size": 32, "qk_l2norm": True, "return_state": True}
    theirs = {
        "scale": np.float32(0.5),
        "chunk_size": np.int64(32),
        "qk_l2norm": np.bool_(True),
        "return_state": np.bool_(True),
    }
    expected = gdn_ops.gated_delta(**given, **ours, backend=backend)
    results = gdn_ops.gated_delta(**given, **theirs, backend=backend)
    for result, other in zip(results, expected, strict=True):
        assert result.shape == other.shape and (device == "meta" or torch.equal(result, other))


def test_decode_ops_and_explain_take_numbers_of_numpy() -> None:
    numbers = {"scale": np.float32(0.5), "qk_l2norm": np.bool_(True), "inplace": np.bool_(True)}
    ours = {"scale": 0.5, "qk_l2norm": True}
    given = token()
    expected = gdn_ops.gated_delta_step(**given, **ours)
    o, state = gdn_ops.gated_delta_step(**given, **numbers)
    assert state is given["state"]
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])
    many = draft() | {"return_states": np.bool_(True)}
    assert len(gdn_ops.gated_delta_steps(**many, **ours)) == 3
    assert explain(**sequence(), chunk_size=np.int32(16)).backend is not None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("chunk_size", np.float32(16), "chunk_size is 16.0, should be a positive integer"),
        ("chunk_size", np.bool_(True), "chunk_size is True, should be a positive integer"),
        ("chunk_size", np.int64(0), "chunk_size is 0, should be a positive integer"),
        ("scale", np.bool_(True), "scale is True, should be a finite number"),
        ("scale", np.float32("nan"), "scale is nan, should be a finite number"),
        ("scale", np.ones(()), "scale has type ndarray, should be a finite number"),
        ("scale", Fraction(10**400), "scale has type Fraction, should be a finite number"),
        ("qk_l2norm", np.int64(1), "qk_l2norm is 1, should be True or False"),
    ],
)
def test_a_wrong_number_of_numpy_is_shown_as_that_of_python(
    name: str, value: Any, text: str
) -> None:
    assert refusal(gdn_ops.gated_delta, **sequence(), **{name: value}) == f"gated_delta: {text}"


def test_layers_keep_numbers_of_python() -> None:
    size, width = np.int64, np.float32
    flags = {"output_norm": np.bool_(True), "allow_neg_eigval": np.bool_(True)}
    sizes = (size(64), size(2), size(4), size(16), width(2))
    layer = GatedDeltaNet(*sizes, short_conv=size(4), **flags)
    lm = HybridLM("GA", size(16), size(64), num_heads=size(2), window=size(8), norm_eps=width(1e-5))
    modules = (layer, lm, GatedRMSNorm(size(8), width(1e-5)))
    modules += (SlidingWindowAttention(size(64), size(2), size(8), rope_base=width(100)),)
    for made in modules:
        for part in made.modules():
            kept = [x for x in vars(part).values() if isinstance(x, (np.generic, np.ndarray))]
            assert not kept, type(part).__name__
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(1, 5, 64)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    assert lm.generate(torch.zeros(1, 2, dtype=torch.int64), size(2)).shape == (1, 4)
    assert message_of(SpecTypeError, GatedDeltaNet, 64, 2, conv_bias=size(1)).endswith(
        "should be True or False"
    )
