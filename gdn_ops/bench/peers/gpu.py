"""Wrap other people's kernels for GPUs, each in its own convention, as of the releases named.

FLA             log gates, of channels too, state (N, HV, K, V)
FlashQLA        log gates, state (N, HV, K, V)
FlashInfer      linear alpha for sequences, raw gates for steps, state (N, HV, V, K)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.inputs import Inputs


def _fla_arguments(x: Inputs) -> dict[str, Any]:
    given = {"q": x.q, "k": x.k, "v": x.v, "g": x.log_alpha, "beta": x.beta}
    return {**given, "initial_state": x.state, "output_final_state": True}


def _fla_sequence(chunk: Callable[..., Any]) -> Callable[[Inputs], Prepared]:
    """Return how a function with FLA's signature prepares a sequence."""

    def sequence(x: Inputs) -> Prepared:
        arguments = {**_fla_arguments(x), "cu_seqlens": x.cu_seqlens}
        return Prepared(lambda: chunk(**arguments))

    return sequence


def fla() -> Contender:
    """Return flash-linear-attention 0.5 or 0.6 on its own kernels, not dispatched to others'.

    With a decay of every key channel it is `chunk_kda` and `fused_recurrent_kda`. The process that
    measures sets FLA_FLASH_QLA=0 and FLA_FLASH_KDA=0 (`gdn_ops.bench.child.ENVIRONMENT`).
    """
    module = importlib.import_module("fla.ops.gated_delta_rule")

    def sequence(x: Inputs) -> Prepared:
        chunk = _fla_kda().chunk_kda if x.has_channels else module.chunk_gated_delta_rule
        return _fla_sequence(chunk)(x)

    def step(x: Inputs) -> Prepared:
        recurrent = module.fused_recurrent_gated_delta_rule
        if x.has_channels:
            recurrent = _fla_kda().fused_recurrent_kda
        arguments = _fla_arguments(x.as_sequence())

        def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return result[0].squeeze(1), result[1]

        return Prepared(lambda: recurrent(**arguments), read)

    version = str(importlib.import_module("fla").__version__)
    return Contender("fla", sequence, step, version, is_peer=True, channels=True)


def _fla_kda() -> Any:
    return importlib.import_module("fla.ops.kda")


def flash_qla() -> Contender:
    """Return flash_qla 0.1, which has sequences only."""
    module = importlib.import_module("flash_qla")
    sequence = _fla_sequence(module.chunk_gated_delta_rule)
    lacks = {"step": "has no step"}
    version = str(module.__version__)
    return Contender("flash_qla", sequence, version=version, is_peer=True, lacks=lacks)


def flashinfer() -> Contender:
    """Return flashinfer 0.6 or 0.7: packed sequences with linear alpha, steps from raw gates."""
    prefill = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
    module = importlib.import_module("flashinfer.gdn_decode")
    decode = module.gated_delta_rule_decode_pretranspose
    version = str(importlib.import_module("flashinfer").__version__)
    return Contender(
        "flashinfer",
        lambda x: _flashinfer_sequence(prefill, x),
        lambda x: _flashinfer_step(decode, x),
        version,
        is_peer=True,
        lacks={"backward": "has no backward"},
    )


def _flashinfer_sequence(prefill: Callable[..., Any], x: Inputs) -> Prepared:
    if x.state is None:
        raise ValueError("flashinfer's sequences need a state")
    rows, length = x.v.shape[:2]
    bounds = x.cu_seqlens
    if bounds is None:
        bounds = torch.arange(0, (rows + 1) * length, length, device=x.v.device)
    tokens = {"q": x.q, "k": x.k, "v": x.v, "g": x.log_alpha.exp(), "beta": x.beta}
    arguments: dict[str, Any] = {
        **{name: y.flatten(0, 1).contiguous() for name, y in tokens.items()},
        "scale": x.q.shape[-1] ** -0.5,
        "initial_state": x.state.transpose(-1, -2).contiguous(),
        "output_final_state": True,
        "cu_seqlens": bounds,
    }

    def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return result[0].view_as(x.v), result[1].transpose(-1, -2)

    return Prepared(lambda: prefill(**arguments), read)


def _flashinfer_step(decode: Callable[..., Any], x: Inputs) -> Prepared:
    if x.raw is None or x.state is None:
        raise ValueError("flashinfer's step needs raw gates")
    q, k, v, a, b = (y.unsqueeze(1) for y in (x.q, x.k, x.v, x.raw.a, x.raw.b))
    state = x.state.transpose(-1, -2).contiguous()
    arguments: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "a": a, "b": b, "state": state},
        "A_log": x.raw.A_log,
        "dt_bias": x.raw.dt_bias,
        "scale": x.q.shape[-1] ** -0.5,
        "use_qk_l2norm": False,
    }
    pools = "initial_state_indices" in inspect.signature(decode).parameters
    if pools and state.dtype == torch.bfloat16:
        # Its 16-bit kernel works on a pool, and makes the indices in every call without.
        slots = torch.arange(state.shape[0], dtype=torch.int32, device=state.device)
        arguments |= {"state": None, "initial_state": state, "initial_state_indices": slots}

    def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return result[0].squeeze(1), state.transpose(-1, -2)

    return Prepared(lambda: decode(**arguments), read)
