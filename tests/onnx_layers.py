"""Modules that are exported in the ONNX tests, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gdn_ops
from onnx_steps import engine_of

D, H, HV, K, V, TAPS = 24, 2, 4, 8, 6, 4
CHANNELS = 2 * H * K + HV * V


class Layer(nn.Module):
    """A whole layer: projections, short convolution, gates, the rule, gated norm, output."""

    def __init__(self, rule: str = "gated_delta") -> None:
        super().__init__()
        self.rule = rule
        self.project = nn.Linear(D, CHANNELS, bias=False)
        self.taps = nn.Parameter(0.3 * torch.randn(CHANNELS, TAPS))
        self.gates = nn.Linear(D, 2 * HV)
        self.rate = nn.Parameter(torch.rand(HV))
        self.gate = nn.Linear(D, HV * V)
        self.norm = nn.Parameter(torch.rand(V))
        self.output = nn.Linear(HV * V, D)

    def heads(self, x: Tensor, mixed: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Return the arguments of the op, and what gates the norm."""
        q, k, v = functional.silu(mixed).split((H * K, H * K, HV * V), -1)
        a, b = self.gates(x).chunk(2, -1)
        arguments = {
            "q": q.unflatten(-1, (H, K)),
            "k": k.unflatten(-1, (H, K)),
            "v": v.unflatten(-1, (HV, V)),
            "beta": torch.sigmoid(b),
            "rule": self.rule,
            "qk_l2norm": True,
        }
        if gdn_ops.GATED_DELTA.rule[self.rule].has_decay:
            arguments["log_alpha"] = -self.rate.exp() * functional.softplus(a)
        return arguments, functional.silu(self.gate(x).unflatten(-1, (HV, V)))

    def finish(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.output((functional.rms_norm(o, (V,), self.norm, 1e-6) * gate).flatten(-2))

    def forward(self, x: Tensor, conv_state: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        window = torch.cat((conv_state, self.project(x).unsqueeze(-1)), -1)
        arguments, gate = self.heads(x, (window * self.taps).sum(-1))
        o, state = gdn_ops.gated_delta_step(**arguments, state=state)
        return self.finish(o, gate), window[..., 1:], state


class Prompt(Layer):
    """The same layer over a prompt."""

    def forward(self, x: Tensor, conv_state: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        padded = torch.cat((conv_state, self.project(x).mT), -1)
        mixed = sum(padded[..., i : i + x.shape[1]] * self.taps[:, i, None] for i in range(TAPS))
        arguments, gate = self.heads(x, mixed.mT)
        o, state = gdn_ops.gated_delta(**arguments, initial_state=state, return_state=True)
        return self.finish(o, gate), padded[..., x.shape[1] :], state


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, rules: tuple[str, str] = ("gated_delta", "gated_delta")) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(rule) for rule in rules)

    def forward(self, x: Tensor, conv_states: list[Tensor], states: list[Tensor]) -> Any:
        after: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, conv_state, state in zip(self.layers, conv_states, states, strict=True):
            x, *new = layer(x, conv_state, state)
            for values, value in zip(after, new, strict=True):
                values.append(value)
        return x, *after


def layer_args(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, D), (batch, CHANNELS, TAPS - 1), (batch, HV, K, V))
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


def assert_same(found: Any, expected: Any, allowed: float = 2e-6) -> None:
    for x, y in zip(found, expected, strict=True):
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
