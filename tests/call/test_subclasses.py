"""Masked tensors, and fake ones beside tensors with values, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

import gdn_ops
from errors import refusal
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.nn import GatedDeltaNet, ShortConvolution
from good_calls import draft, sequence, states, token

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]
OPS: dict[str, Callable[..., dict[str, Any]]] = {
    "gated_delta": lambda: sequence(initial_state=states(2)),
    "gated_delta_step": token,
    "gated_delta_steps": draft,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors"),
]


def masked(x: Tensor) -> Tensor:
    result: Tensor = masked_tensor(x, x > 0)  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_masked_tensor_is_refused(is_autocast: bool, op: str, backend: str) -> None:
    call, given = getattr(gdn_ops, op), OPS[op]()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        for name, x in given.items():
            assert refusal(call, **given | {name: masked(x)}, backend=backend) == (
                f"{op}: {name} is a MaskedTensor, should be a plain tensor: its mask would be "
                "lost; pass x.to_tensor(value) with a value for what is masked"
            )


@pytest.mark.parametrize(
    ("owner", "make"),
    [
        ("GatedDeltaNet", lambda: GatedDeltaNet(64, 2)),
        ("ShortConvolution", lambda: ShortConvolution(64)),
    ],
)
def test_a_layer_refuses_a_masked_tensor(owner: str, make: Callable[[], Any]) -> None:
    assert refusal(make(), masked(torch.randn(1, 3, 64))) == (
        f"{owner}: x is a MaskedTensor, should be a plain tensor: its mask would be lost; pass "
        "x.to_tensor(value) with a value for what is masked"
    )


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_beside_others_are_refused(op: str, backend: str) -> None:
    call, given = getattr(gdn_ops, op), OPS[op]()
    fake = {name: FakeTensorMode().from_tensor(x) for name, x in given.items()}
    for name in given:
        first = "k" if name == "q" else "q"
        assert refusal(call, **given | {name: fake[name]}, backend=backend) == (
            f"{op}: {name} is a FakeTensor and {first} is none, should be all or none of them: "
            f"mode.from_tensor({first}) makes one"
        )
    assert refusal(call, **fake, backend=backend) == (
        f"{op}: k is a FakeTensor of another mode than q, should be of the same one"
    )
    # Values as wide as keys, for tilelang.
    given |= {name: x.new_zeros(*x.shape[:-1], 16) for name, x in given.items() if x.shape[-1] == 6}
    mode = FakeTensorMode()
    o = call(**{name: mode.from_tensor(x) for name, x in given.items()}, backend=backend)
    o = o[0] if isinstance(o, tuple) else o
    assert o.shape == given["v"].shape and type(o).__name__ == "FakeTensor"


def test_a_mode_that_takes_other_tensors_takes_them() -> None:
    given = sequence()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    o = gdn_ops.gated_delta(**given | {"q": mode.from_tensor(given["q"])})
    assert o.shape == given["v"].shape
