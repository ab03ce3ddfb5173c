"""Make calls of one signature again and again, and see which way they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gdn_ops import gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.backends.cpp.library import missing
from layer_kernels import assert_close, normal

needs_cpp = pytest.mark.skipif(missing() is not None, reason=f"backend 'cpp': {missing()}")

B, T, H, HV, K, V = 2, 3, 2, 4, 16, 8

Op = Callable[..., Any]


def given(op: Op, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a good call on a state, with changes."""
    draw = torch.Generator().manual_seed(seed)
    shape = (B,) if op is gated_delta_step else (B, T)
    arguments: dict[str, Any] = {n: torch.randn(*shape, H, K, generator=draw) / 4 for n in "qk"}
    arguments["v"] = torch.randn(*shape, HV, V, generator=draw)
    arguments |= {n: torch.rand(*shape, HV, generator=draw) for n in ("alpha", "beta")}
    state = torch.randn(B, HV, K, V, generator=draw)
    if op is gated_delta:
        arguments |= {"initial_state": state, "return_state": True}
    else:
        arguments |= {"state": state, "inplace": True}
    return arguments | changes


def exact(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the results of the definition, which leaves the arguments as they are."""
    tensors = {n: x.clone() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    results: tuple[Tensor, ...] = op(**tensors | {"backend": "naive"})
    return results


OPS: tuple[Op, ...] = (gated_delta, gated_delta_step, gated_delta_steps)

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
decode_op = pytest.mark.parametrize("op", OPS[1:], ids=lambda op: op.__name__)


class DecodeCase(NamedTuple):
    """Describe four calls of one signature, each on the state of the last one."""

    op: Op
    changes: dict[str, Any]
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32

    def check(self) -> None:
        """Compare the kernels with the definition in float64."""
        held = "initial_state" if self.op is gated_delta else "state"
        rows, V = 3 if "state_indices" in self.changes else B, 139
        state = normal(rows, HV, K, V, dtype=self.state_dtype)
        for seed in range(4):
            x = given(self.op, seed, **self.changes | {held: state})
            x["v"] = normal(*x["v"].shape[:-1], V, seed=seed)
            x |= {name: x[name].to(self.dtype) for name in "qkv"}
            tensors = {name: y for name, y in x.items() if isinstance(y, Tensor)}
            wide = {name: y.double() for name, y in tensors.items() if y.is_floating_point()}
            wanted = exact(self.op, x | wide)
            results = self.op(**x, backend="cpp")
            names = ("o", "state", "states")[: len(results)]
            assert_close(" ".join(names), [*results], [*wanted])
            state = results[1]


DECODED = (
    DecodeCase(gated_delta_step, {}),
    DecodeCase(gated_delta_step, {"inplace": False}),
    DecodeCase(gated_delta_step, {"alpha": torch.rand(B, HV, K)}),
    DecodeCase(gated_delta_step, {"state_indices": torch.tensor([-1, 2])}),
    DecodeCase(gated_delta_steps, {}),
    DecodeCase(gated_delta_steps, {"inplace": False, "return_states": True}),
    DecodeCase(gated_delta, {}),
)
"""States in their place or another one, decays of channels, a skipped row, all states of a call."""
