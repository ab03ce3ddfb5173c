"""Make backends that answer one number everywhere, and small good calls for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops import Backend, Forward, Limits
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from good_calls import sequence


def arguments(**changes: Any) -> dict[str, Any]:
    """Return a small good `gated_delta` call: B=1, T=4, H=2, HV=4, K=8, V=6."""
    return sequence(1, 4, 2, 4, 8, **changes)


def step_arguments(**changes: Any) -> dict[str, Any]:
    return {**{name: x[:, 0] for name, x in arguments().items()}, **changes}


def bound(**changes: Any) -> Call:
    return bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments(**changes)))


def bound_step(**changes: Any) -> Call:
    return bind(GATED_DELTA_STEP, arguments_of(GATED_DELTA_STEP, step_arguments(**changes)))


def make_backend(backend_name: str, answer: float = 7.0, **limits_: Any) -> type[Backend]:
    """Return a backend class that answers one number everywhere."""

    class Constant(Backend):
        name = backend_name
        limits = Limits(**{"devices": ("cpu",), **limits_})

        def forward(self, call: Call) -> Forward:
            return Forward(*self.decode_one(call))

        def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
            s = call.sizes
            return torch.full_like(call.tokens.v, answer), torch.zeros(s.N, s.HV, s.K, s.V)

    return Constant
