"""What the custom-op library cannot run is refused when it is loaded or called."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn_ops.export.node.schema import INPUTS, OUTPUTS
from onnx_native import Node, needs_library
from paths import ORT_LIBRARY

pytestmark = needs_library


def refusal(call: Callable[..., Any], **options: Any) -> str:
    """Return what the library says against a call, of what onnxruntime makes of it."""
    with pytest.raises(Exception, match="GatedDeltaStep") as caught:
        call(**options)
    return str(caught.value).partition("gdn_ops::GatedDeltaStep: ")[2]


SHAPES = {
    "q": (3, 2, 24),
    "k": (3, 2, 24),
    "v": (3, 4, 40),
    "log_alpha": (3, 4),
    "beta": (3, 4),
    "state": (3, 4, 24, 40),
}


@pytest.mark.parametrize(
    ("text", "wrong"),
    {
        "q has shape (3, 24), should be (B, H, K): 3 dimensions, not 2": {"q": (3, 24)},
        "q has shape (3,), should be (B, H, K): 3 dimensions, not 1": {"q": (3,)},
        "log_alpha has shape (), should be (B, HV): 2 dimensions, not 0": {"log_alpha": ()},
        "q has shape (3, 4, 24), should be (B, H, K) = (3, 2, 24); H is fixed by num_qk_heads": {
            "q": (3, 4, 24)
        },
        "k has shape (1, 2, 8), should be (B, H, K) = (3, 2, 24); "
        "B is fixed by q, K is fixed by q": {"k": (1, 2, 8)},
        "v has shape (3, 2, 40), should be (B, HV, V) = (3, 4, 40); HV is fixed by num_v_heads": {
            "v": (3, 2, 40)
        },
        "log_alpha has shape (1, 4), should be (B, HV) = (3, 4); B is fixed by q": {
            "log_alpha": (1, 4)
        },
        "log_alpha has shape (3, 1), should be (B, HV) = (3, 4); HV is fixed by num_v_heads": {
            "log_alpha": (3, 1)
        },
        "beta has shape (2, 4), should be (B, HV) = (3, 4); B is fixed by q": {"beta": (2, 4)},
        "state has shape (1, 4, 24, 40), should be (B, HV, K, V) = (3, 4, 24, 40); "
        "B is fixed by q": {"state": (1, 4, 24, 40)},
        "state has shape (3, 4, 40, 24), should be (B, HV, K, V) = (3, 4, 24, 40); "
        "K is fixed by q, V is fixed by v": {"state": (3, 4, 40, 24)},
        "q has K=0, should be at least 1": {"q": (3, 2, 0), "k": (3, 2, 0), "state": (3, 4, 0, 40)},
        "v has V=0, should be at least 1": {"v": (3, 4, 0), "state": (3, 4, 24, 0)},
    }.items(),
)
def test_a_wrong_shape_is_refused(wrong: dict[str, tuple[int, ...]], text: str) -> None:
    node = Node()
    tensors = {name: torch.zeros(shape) for name, shape in (SHAPES | wrong).items()}
    assert refusal(node, **tensors) == text
    # And nothing of the mistake stays behind.
    node.check(**node.draw())


@pytest.mark.parametrize(
    ("text", "wrong"),
    {
        "log_alpha has shape (3, 4), should be (B, HV, K): 3 dimensions, not 2": (3, 4),
        "log_alpha has shape (3, 4, 1), should be (B, HV, K) = (3, 4, 24); K is fixed by q": (
            3,
            4,
            1,
        ),
        "log_alpha has shape (3, 4, 40), should be (B, HV, K) = (3, 4, 24); K is fixed by q": (
            3,
            4,
            40,
        ),
        "log_alpha has shape (3, 2, 24), should be (B, HV, K) = (3, 4, 24); HV is fixed by "
        "num_v_heads": (3, 2, 24),
    }.items(),
)
def test_a_decay_of_channels_of_a_wrong_shape_is_refused(wrong: tuple[int, ...], text: str) -> None:
    node = Node(decay="channel")
    tensors = {name: torch.zeros(shape) for name, shape in (SHAPES | {"log_alpha": wrong}).items()}
    assert refusal(node, **tensors) == text


def test_channels_where_a_decay_of_heads_is_written_are_refused() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["log_alpha"] = torch.zeros(3, 4, 24)
    text = "log_alpha has shape (3, 4, 24), should be (B, HV): 2 dimensions, not 3"
    assert refusal(Node(), **tensors) == text


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"num_qk_heads": 0}, "num_qk_heads is 0, should be at least 1"),
        ({"num_qk_heads": None}, "num_qk_heads is missing, should be an integer attribute"),
        ({"num_qk_heads": 2.0}, "num_qk_heads is missing, should be an integer attribute"),
        ({"num_v_heads": 3}, "num_v_heads is 3, should be a multiple of num_qk_heads=2"),
        ({"num_v_heads": 0}, "num_v_heads is 0, should be a multiple of num_qk_heads=2"),
        ({"num_v_heads": None}, "num_v_heads is missing, should be an integer attribute"),
        ({"scale": None}, "scale is missing, should be a float attribute"),
        ({"scale": float("inf")}, "scale is inf, should be a finite number"),
        ({"scale": float("nan")}, "scale is nan, should be a finite number"),
        ({"qk_l2norm": 2}, "qk_l2norm is 2, should be 0 or 1"),
        ({"qk_l2norm": None}, "qk_l2norm is missing, should be an integer attribute"),
        (
            {"rule": "gated_dleta"},
            "rule is 'gated_dleta', should be one of gated_delta, delta, gated, linear",
        ),
        ({"rule": None}, "rule is missing, should be one of gated_delta, delta, gated, linear"),
        ({"rule": ""}, "rule is '', should be one of gated_delta, delta, gated, linear"),
        ({"decay": "vector"}, "decay is 'vector', should be one of scalar, channel"),
        ({"decay": ""}, "decay is '', should be one of scalar, channel"),
        (
            {"decay": "channel", "rule": "linear"},
            "decay is 'channel', should be left out: rule 'linear' has no decay",
        ),
        (
            {"without": ["log_alpha"], "rule": "gated"},
            "log_alpha is missing, should be an input: rule 'gated' has a decay",
        ),
        (
            {"log_alpha": "log_alpha", "rule": "delta"},
            "log_alpha is given, should be absent: rule 'delta' has no decay",
        ),
    ],
)
def test_a_wrong_attribute_is_refused_when_the_file_is_loaded(
    attributes: dict[str, Any], text: str
) -> None:
    assert refusal(Node, **attributes) == text


@pytest.mark.parametrize(
    ("text", "types"),
    {
        "k has dtype float16, should be float32, the dtype of q": {"k": "float16"},
        "v has dtype float64, should be float32, the dtype of q": {"v": "float64"},
        "k has dtype int64, should be float32, the dtype of q": {"k": "int64"},
        "beta has dtype bfloat16, should be float32, the dtype of log_alpha": {"beta": "bfloat16"},
        "log_alpha has dtype int64, should be one of float32, float16, bfloat16, float64": {
            "log_alpha": "int64"
        },
    }.items(),
)
def test_a_wrong_type_is_refused_when_the_file_is_loaded(types: dict[str, str], text: str) -> None:
    assert refusal(Node, types=dict.fromkeys((*INPUTS, *OUTPUTS), "float32") | types) == text


def test_an_onnxruntime_that_is_too_old_is_refused() -> None:
    # What the library sees of an onnxruntime: a function that gives tables of functions by
    # their number, and its version. The first entry of a table makes a status.
    said: list[tuple[int, bytes]] = []
    asked: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        said.append((code, message))
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version <= 17 else None

    version = ctypes.create_string_buffer(b"1.17.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p)
    )
    register = ctypes.CDLL(str(ORT_LIBRARY)).RegisterCustomOps
    register.argtypes, register.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_void_p
    assert register(None, ctypes.addressof(base)) == 1
    assert asked == [18, 1]
    assert said == [
        (
            1,
            b"gdn_ops: onnxruntime is 1.17.3, should be 1.18 or newer for the custom-op library; "
            b"without it the function in the file runs",
        )
    ]
