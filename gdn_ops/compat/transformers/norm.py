"""Replace the gated norm of transformers' layers on CPUs by that of `gdn_ops.nn`.

Elsewhere than on CPUs, in a graph, or for operands of a kind that is not known here, the original
runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.compat.transformers.signatures import definition, modules_of, parameters_of
from gdn_ops.compat.transformers.trial import difference, drawn, plain_torch
from gdn_ops.nn import kernels
from gdn_ops.nn.blocks import is_plain
from gdn_ops.nn.norm import gated_rms_norm

Forward = Callable[..., Tensor]

_PARAMETERS = ("hidden_states", "gate")

GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
"""Activations of a gate as transformers calls them, and as `gated_rms_norm` does."""


def gated_norm(original: Forward, backend: Callable[[], str] = lambda: "auto") -> Forward:
    """Return the replacement of a gated norm's forward.

    Args:
        original: what it replaces.
        backend: says which backend runs the rule, at every call.
    """

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *gates: Any, **options: Any) -> Tensor:
        gate = gates[0] if len(gates) == 1 and not options else options.get("gate")
        weight, eps = getattr(self, "weight", None), getattr(self, "variance_epsilon", None)
        # Take the activation that the trial has seen where a norm names none.
        activation = GATES.get(getattr(self, "activation", "silu"))
        if (
            len(gates) + len(options) != 1
            or gate is None
            or weight is None
            or eps is None
            or activation is None
            or not is_plain(hidden_states)
            or hidden_states.shape != gate.shape
            or not _is_closer(name := backend(), hidden_states, gate, weight)
        ):
            return original(self, hidden_states, *gates, **options)
        return gated_rms_norm(
            hidden_states, weight, gate, eps=eps, activation=activation, backend=name
        )

    return forward


def _is_closer(backend: str, *tensors: Tensor) -> bool:
    """Return whether ours is at least as fast and as close to the norm as the original.

    In half precision the original rounds between norm and gate, and the kernels do not.
    """
    is_single = {x.dtype for x in tensors} == {torch.float32}
    return is_single or kernels.may_run(backend, *tensors)


def candidates(module: ModuleType) -> list[type[nn.Module]]:
    """Return the classes of a module whose forward takes hidden states and a gate."""
    return [cls for cls in modules_of(module) if _takes_a_gate(vars(cls)["forward"])]


def _takes_a_gate(forward: Any) -> bool:
    function = definition(forward, _PARAMETERS)
    return function is not None and len(parameters_of(function)) == len(_PARAMETERS)


def incompatibility_of(cls: type[nn.Module]) -> str | None:
    """Try to replace the forward of a class; return why it cannot be replaced, or None."""
    original = vars(cls)["forward"]
    new = gated_norm(original)
    with plain_torch():
        try:
            norm: Any = cls(4, eps=0.5)
            norm.weight.copy_(torch.arange(1.0, 5.0, dtype=torch.float32, device="cpu"))
        except Exception as error:
            return f"{cls.__name__} cannot be tried: {type(error).__name__}: {error}"
        x, gate = drawn((3, 4), (3, 4))
        has_choice = isinstance(getattr(norm, "activation", None), str)
        # None leaves the norm's own.
        for activation in (None, *GATES) if has_choice else (None,):
            if activation is not None:
                norm.activation = activation
            reason = difference(lambda: [original(norm, x, gate)], lambda: [new(norm, x, gate)])
            if reason is not None:
                return f"{cls.__name__} {reason}"
    return None
