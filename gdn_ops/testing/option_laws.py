"""State the laws of what callers of the sequence op may ask for beside the recurrence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import gdn_ops
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Verdict


def some_sequences_start_from_nothing(backend: str, example: Example) -> Verdict:
    """Law 1, mask: without `has_initial_state` a row may hold anything; it counts as zeros."""
    example = replace(example, initial_state=True)
    arguments, N = example.arguments(), example.sizes.N
    state = arguments["initial_state"]
    mask = torch.arange(example.seed, example.seed + N, device=state.device) % 2 == 0
    rows = mask[:, None, None, None]
    results = []
    for held, options in (
        (torch.where(rows, state, 0.0), {}),
        (torch.where(rows, state, float("nan")), {"has_initial_state": mask}),
    ):
        # With gradients, for a forward alone may take another way for few tokens.
        given = arguments | options | {"initial_state": held.detach().requires_grad_()}
        with torch.enable_grad():
            o, final = gdn_ops.gated_delta(**given, return_state=True, backend=backend)
            loss = o.double().sum() + final.double().sum()
            (d_state,) = torch.autograd.grad(loss, given["initial_state"])
        results.append((o, final, d_state))
    (o, final, d_state), (masked_o, masked_final, masked_d_state) = results
    wanted = torch.where(rows, d_state, 0.0)  # what does not count has no gradient
    pairs = ((o, masked_o), (final, masked_final), (wanted, masked_d_state))
    are_equal = all(torch.equal(x, y) for x, y in pairs)
    return Verdict.exact(are_equal, "a row that does not count changes a result, or has a gradient")


def results_lie_where_the_caller_wants(backend: str, example: Example) -> Verdict:
    """Law 1, out: results in the caller's memory are those of new tensors, the state rounded."""
    example = replace(example, initial_state=True)
    arguments = example.arguments()
    with torch.no_grad():
        o, final = gdn_ops.gated_delta(**arguments, return_state=True, backend=backend)
        wide = o.new_full((*o.shape[:-1], o.shape[-1] + 3), float("nan"))
        place = wide[..., 1 : o.shape[-1] + 1]
        stored = torch.empty_like(final, dtype=torch.bfloat16)
        options: dict[str, Any] = {"return_state": True, "out": (place, stored), "backend": backend}
        found, state = gdn_ops.gated_delta(**arguments, **options)
        if found is not place or state is not stored:
            return Verdict.exact(False, "other tensors are returned")
        are_equal = torch.equal(place, o) and torch.equal(stored, final.to(torch.bfloat16))
        # The initial state may be overwritten by the final one.
        held = arguments["initial_state"].to(final.dtype, copy=True)
        given = arguments | {"initial_state": held}
        _, state = gdn_ops.gated_delta(**given, **options | {"out": (torch.empty_like(o), held)})
    return Verdict.exact(
        are_equal and state is held and torch.equal(held, final), "results differ from new ones"
    )
