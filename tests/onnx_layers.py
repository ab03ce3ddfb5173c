"""Modules that are exported in the ONNX tests, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdn_ops.nn import GatedDeltaNet, State
from onnx_steps import engine_of

D, H, HV, K, V, TAPS = 24, 2, 4, 8, 6, 4
CHANNELS = 2 * H * K + HV * V


class Layer(nn.Module):
    """A GatedDeltaNet over one token or a prompt, its states as plain arguments and results."""

    def __init__(self, layer: GatedDeltaNet) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, conv_state: Tensor | None, state: Tensor) -> tuple[Tensor, ...]:
        y, new = self.layer(x, State(conv_state, state))
        return (y, new.memory) if new.conv is None else (y, *new)


def make_layer(rule: str = "gated_delta") -> Layer:
    return Layer(GatedDeltaNet(D, H, HV, head_dim=K, expand_v=V / K, rule=rule, short_conv=TAPS))


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, rules: tuple[str, str] = ("gated_delta", "gated_delta")) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layer(rule) for rule in rules)

    def forward(self, x: Tensor, conv_states: list[Tensor], states: list[Tensor]) -> Any:
        after: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, conv_state, state in zip(self.layers, conv_states, states, strict=True):
            x, *new = layer(x, conv_state, state)
            for values, value in zip(after, new, strict=True):
                values.append(value)
        return x, *after


def layer_args(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 1, D), (batch, CHANNELS, TAPS - 1), (batch, HV, K, V))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def zero_states(batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, CHANNELS, TAPS - 1), torch.zeros(batch, HV, K, V)


def run_engine(model: Any, tensors: Iterable[Tensor]) -> Any:
    """Run a model, or the file of one, in onnxruntime on its inputs in order."""
    engine = engine_of(model)
    feeds = {i.name: x.numpy() for i, x in zip(engine.get_inputs(), tensors, strict=True)}
    return engine.run(None, feeds)


def shapes_of(values: Any) -> dict[str, list[str | int]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


def assert_same(computed: Any, expected: Any, allowed: float = 2e-6) -> None:
    for x, y in zip(computed, expected, strict=True):
        assert x.shape == tuple(y.shape)
        assert np.abs(x - y.detach().numpy()).max(initial=0.0) <= allowed


class Step(nn.Module):
    """Nothing but the op; `call` says how."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Any:
        return self.call(q, k, v, a, b, s)


def step_args(dtype: torch.dtype = torch.float32, heads: int = HV) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, H, K), torch.randn(2, H, K) / 3, torch.randn(2, heads, V)
    gates = torch.rand(2, 2, heads)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.randn(2, heads, K, V).to(wide)
    return q.to(dtype), k.to(dtype), v.to(dtype), *gates.to(wide), state
