"""Compute on one rank what the tests compare: functions that its process can find by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_ops import parallel
from gdn_ops.testing.example import Example

GIVEN = ("q", "k", "v", "alpha", "log_alpha", "beta")


@dataclass(frozen=True)
class Case:
    """Describe one call on several ranks.

    Attributes:
        example: the call of one process.
        fragments: of every rank.
        strategy: "pipeline" or "gather".
        backend: of the op.
        holder: the rank whose loss reads the final states.
    """

    example: Example
    fragments: tuple[tuple[tuple[int, int], ...], ...]
    strategy: str
    backend: str
    holder: int = 0

    def split(self, group: Any) -> parallel.SequenceSplit:
        cuts = None
        if self.example.lengths is not None:
            cuts = self.example.arguments()["cu_seqlens"]
        return parallel.SequenceSplit(group, self.fragments, cuts)


def forward_and_gradients(group: Any, case: Case) -> dict[str, Tensor]:
    """Return the results of this rank, and its gradients by name."""
    split, example = case.split(group), case.example
    arguments, (d_o, d_state) = example.arguments(), example.cotangents()
    arguments.pop("cu_seqlens", None)
    inputs: dict[str, Tensor] = {}
    for name in (*GIVEN, "initial_state"):
        if name in arguments:
            x = arguments[name] if name == "initial_state" else split.local(arguments[name])
            inputs[name] = arguments[name] = x.detach().clone().requires_grad_()
    o, state = parallel.gated_delta(
        **arguments, split=split, return_state=True, strategy=case.strategy, backend=case.backend
    )
    d_state = d_state.to(state.dtype)
    if split.rank != case.holder:
        d_state = torch.zeros_like(d_state)
    gradients = torch.autograd.grad((o, state), [*inputs.values()], (split.local(d_o), d_state))
    found = {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "final_state": state.detach(), **found}
