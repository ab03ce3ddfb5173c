"""Make stand-ins for modeling modules of releases that are not there.

What they compute is right, and their list `ran` tells that they did.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops import gated_delta
from gdn_ops.compat.transformers import Acceleration, accelerate
from gdn_ops.compat.transformers.examine import Plan, examine

NAME = "transformers.models.someones_model.modeling_someones_model"
"""A model folder that no release has."""

Load = Callable[..., types.ModuleType]


def plan_of(module: types.ModuleType) -> Plan:
    """Return what would be replaced in a module that has the functions as they should be."""
    plan = examine(module)
    assert isinstance(plan, Plan), plan
    return plan


def only(strict: bool = False) -> Acceleration:
    """Accelerate the stand-in alone."""
    return accelerate(architectures=["someones_model"], strict=strict)


def gates() -> dict[str, Tensor]:
    return {"g": -torch.rand(1, 3, 1), "beta": torch.rand(1, 3, 1)}


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Any, has_state: bool, l2: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what both functions should return."""
    options = {"qk_l2norm": l2, "initial_state": state, "return_state": True, "backend": "naive"}
    o, final = gated_delta(q, k, v, log_alpha=g, beta=beta, **options)
    return o, final if has_state else None


def functions_of(rule: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return functions with the parameters of the two, which compute a rule.

    The chunked one has a parameter that gdn_ops does not know, the least log α.
    """

    def torch_chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        lower_bound: float | None = None,
        **kwargs: Any,
    ) -> Any:
        g = g if lower_bound is None else g.clamp(min=lower_bound)
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return rule("chunk", query, key, value, g, beta, *rest)

    def torch_recurrent_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return rule("recurrent", query, key, value, g, beta, *rest)

    return {f.__name__: f for f in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule)}


def run_layer(x: Tensor, chunk: Any, recurrent: Any) -> Tensor:
    """Run a layer without weights by one of the two functions."""
    gate = -x[..., 0].abs()
    if x.shape[1] > 1:
        return chunk(x, x, x, g=gate, beta=-gate)[0]
    options = {"initial_state": None, "output_final_state": True}
    return recurrent(x, x, x, g=gate, beta=-gate, **options)[0]


def holding_layer(module: types.ModuleType) -> type[nn.Module]:
    """Return a class of layers that keep both functions as attributes."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_idx = 0
            self.chunk_gated_delta_rule = module.torch_chunk_gated_delta_rule
            self.recurrent_gated_delta_rule = module.torch_recurrent_gated_delta_rule

        def forward(
            self, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kw: Any
        ) -> Tensor:
            functions = self.chunk_gated_delta_rule, self.recurrent_gated_delta_rule
            return run_layer(hidden_states, *functions)

    return Layer


def looking_layer(module: types.ModuleType) -> type[nn.Module]:
    """Return a class of layers that look both functions up in their module."""

    class Layer(nn.Module):
        def forward(
            self, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kw: Any
        ) -> Tensor:
            functions = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
            return run_layer(hidden_states, *functions)

    return Layer


def stand_in(name: str, *, holds: bool) -> types.ModuleType:
    """Return a module with both functions and a layer that looks them up, or holds them."""
    module = types.ModuleType(name)
    ran: list[str] = []

    def rule(kind: str, *arguments: Any) -> Any:
        ran.append(kind)
        return recurrence(*arguments)

    layer = holding_layer(module) if holds else looking_layer(module)
    layer.__module__ = name
    vars(module).update(functions_of(rule), Layer=layer, ran=ran)
    return module
