"""Run a call of transformers' delta rule on gdn_ops: convert arguments, note the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import arguments_of, bind, signature
from gdn_ops.compat.fla_arguments import promoted
from gdn_ops.dispatch import plans, registry
from gdn_ops.nn import split_tokens
from gdn_ops.ops import gated_delta, gated_delta_step
from gdn_ops.parallel.context import Active
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.torch_ops import eager

SPLIT = "split over ranks"
"""Noted instead of a backend for a call of which every rank computes parts."""

Note = Callable[[str, str], None]
"""Told the name of the op and of the backend of every call."""

IN_A_GRAPH = "in a compiled graph"
"""Noted instead of a backend while a graph is traced, once per call in the graph."""


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    backend: str,
    note: Note,
) -> tuple[Tensor, Tensor | None]:
    """Compute one of the functions of `discovery.PAIRS` by gdn_ops.

    Args:
        query, key: (B, T, H, K), or repeated to (B, T, HV, K); value is (B, T, HV, V). Dtypes may
            differ.
        g: (B, T, HV) log α, or (B, T, HV, K) of every key channel; beta is (B, T, HV).
        initial_state: (B, HV, K, V) or None.
        output_final_state, use_qk_l2norm_in_kernel: as transformers' functions have them.
        mask: (B, T), 0 where a token is padding and must be the identity, or None.
        cu_seqlens: (N+1,) boundaries of packed sequences, or None.
        chunk_size: tokens per chunk, or None for the choice of the backend.
        backend, note: of gdn_ops, and what is told of every call.

    Returns:
        o (B, T, HV, V) in the dtype of `query`, and the state (B, HV, K, V) or None.
    """
    if mask is not None:
        # α = 1, β = 0. A zeroed hidden state is not enough: after real tokens its key is not 0.
        is_padding = mask.eq(0).unsqueeze(-1)
        of_decay = is_padding.unsqueeze(-1) if g.dim() == 4 else is_padding
        g, beta = g.masked_fill(of_decay, 0.0), beta.masked_fill(is_padding, 0.0)
    tensors = {"q": query, "k": key, "v": value, "log_alpha": g, "beta": beta}
    # The originals compute everything in float32, whatever the dtypes that they are given.
    tensors, _ = promoted(tensors)
    if initial_state is not None:
        wide = torch.promote_types(tensors["q"].dtype, torch.float32)
        initial_state = initial_state.to(wide)
    options = {"qk_l2norm": use_qk_l2norm_in_kernel, "backend": backend}
    if query.shape[1] == 1 and cu_seqlens is None:
        token = {name: x.squeeze(1) for name, x in tensors.items()}
        arguments = {**token, "state": initial_state, **options}
        o, state = _run(GATED_DELTA_STEP, gated_delta_step, arguments, note)
        o = o.unsqueeze(1)
    else:
        more = {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size, "return_state": True}
        arguments = {**tensors, "initial_state": initial_state, **more, **options}
        o, state = _run(GATED_DELTA, gated_delta, arguments, note)
    return o.to(query.dtype), state if output_final_state else None


def split_delta_rule(
    active: Active, given: dict[str, Any], *, backend: str, note: Note
) -> tuple[Tensor, None]:
    """Compute `torch_chunk_gated_delta_rule` on tokens that are split over ranks.

    Args:
        active: the context.
        given: arguments of the function by name, without a state.
        backend, note: as `delta_rule` takes them.

    Returns:
        o (B, T_local, HV, V) in the dtype of the queries, and no state.
    """
    names = {"q": "query", "k": "key", "v": "value", "log_alpha": "g", "beta": "beta"}
    tensors, _ = promoted({name: given[own] for name, own in names.items()})
    note(GATED_DELTA.name, SPLIT)
    o, _ = split_tokens.run_rule(
        active, tensors, "gated_delta", backend,
        qk_l2norm=given.get("use_qk_l2norm_in_kernel", False), chunk_size=given.get("chunk_size"),
    )  # fmt: skip
    return o.to(given["query"].dtype), None


def _run(
    spec: OpSpec, public: Callable[..., Any], arguments: dict[str, Any], note: Note
) -> tuple[Tensor, Tensor]:
    """Run a call as `gdn_ops.ops` does and note its backend; trace through the public function."""
    q = arguments["q"]
    if torch.compiler.is_compiling() or q.is_meta or type(q) is not Tensor:
        note(spec.name, IN_A_GRAPH)
        return public(**arguments)  # type: ignore[no-any-return]
    given = arguments_of(spec, arguments | {"backend": registry.resolve(arguments["backend"])})
    key = signature(spec, given)
    plan = plans.find(key)
    results: tuple[Tensor, Tensor] | None = None if plan is None else plan.repeated(given)
    if plan is not None and results is not None:
        note(spec.name, plan.backend.name)
        return results
    call = bind(spec, given, key)
    backend = registry.select(call, given.backend)
    note(spec.name, backend.name)
    plans.keep(key, given, call, backend)
    run = eager.run_sequence if spec is GATED_DELTA else eager.run_step
    return run(backend, call)
