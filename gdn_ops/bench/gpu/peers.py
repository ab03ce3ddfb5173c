"""Wrap the contenders of `bench gpu`, our backends and the peers, each in its own convention.

A contender takes a `Problem` and returns a `Prepared`: a function that runs once more and a
function that reads its result in our layouts. Conversions of gates and states are done before
anything is timed. Conventions, as of the releases named in each class:

    ours, FLA, FlashQLA   log gates, state (N, HV, K, V)
    FlashInfer            linear alpha for sequences, raw gates for steps, state (N, HV, V, K)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.gpu.inputs import Problem
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import installed_version


@dataclass(frozen=True)
class Prepared:
    """Hold one call, ready to run again and again.

    Attributes:
        run: does the work that is timed.
        read: turns the result of `run` into (o, final state (N, HV, K, V)).
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, Tensor]]


class Contender:
    """Represent one implementation under measurement.

    Attributes:
        name: as printed.
        version: of the package that brings it.
        is_peer: whether it is another library's.
    """

    name: str
    version: str
    is_peer = True

    def reasons(self, p: Problem) -> list[str]:
        """Return why the contender cannot run a problem, as far as is known without running it."""
        return []

    def sequence(self, p: Problem) -> Prepared:
        """Prepare a forward with its final state; differentiable if the operands are."""
        raise NotImplementedError

    def step(self, p: Problem) -> Prepared:
        """Prepare a step; one that works in place updates the state of the problem itself."""
        raise NotImplementedError


class Ours(Contender):
    """Run a backend of this library."""

    is_peer = False

    def __init__(self, name: str) -> None:
        self.name, self.version = name, installed_version("gdn_ops") or "unknown"

    def reasons(self, p: Problem) -> list[str]:
        given: dict[str, Any] = {"log_alpha": p.log_alpha, "beta": p.beta, "backend": self.name}
        if p.row.what == "step":
            given |= {"state": p.state, "inplace": True}
            answer = ops.explain(ops.gated_delta_step, p.q, p.k, p.v, **given)
        else:
            given |= {"initial_state": p.state, "cu_seqlens": p.cu_seqlens}
            answer = ops.explain(p.q, p.k, p.v, **given)
        return list(dict(answer.reasons)[self.name])

    def sequence(self, p: Problem) -> Prepared:
        def run() -> tuple[Tensor, Tensor]:
            return ops.gated_delta(
                p.q,
                p.k,
                p.v,
                log_alpha=p.log_alpha,
                beta=p.beta,
                initial_state=p.state,
                return_state=True,
                cu_seqlens=p.cu_seqlens,
                backend=self.name,
            )

        return Prepared(run, _as_is)

    def step(self, p: Problem) -> Prepared:
        def run() -> tuple[Tensor, Tensor]:
            return ops.gated_delta_step(
                p.q,
                p.k,
                p.v,
                None,
                p.beta,
                p.state,
                log_alpha=p.log_alpha,
                inplace=True,
                backend=self.name,
            )

        return Prepared(run, _as_is)


def _as_is(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result


class Fla(Contender):
    """Run flash-linear-attention 0.5 or 0.6 on its own kernels, not dispatched to FlashQLA's.

    The process that measures sets FLA_FLASH_QLA=0 (`gdn_ops.bench.gpu.worker.ENVIRONMENT`).
    """

    name = "fla"

    def __init__(self) -> None:
        module = importlib.import_module("fla.ops.gated_delta_rule")
        self.chunk = module.chunk_gated_delta_rule
        self.recurrent = module.fused_recurrent_gated_delta_rule
        self.version = str(importlib.import_module("fla").__version__)

    def sequence(self, p: Problem) -> Prepared:
        def run() -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.chunk(
                q=p.q,
                k=p.k,
                v=p.v,
                g=p.log_alpha,
                beta=p.beta,
                initial_state=p.state,
                output_final_state=True,
                cu_seqlens=p.cu_seqlens,
            )
            return found

        return Prepared(run, _as_is)

    def step(self, p: Problem) -> Prepared:
        q, k, v, g, beta = (x.unsqueeze(1) for x in p.operands()[:5])

        def run() -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.recurrent(
                q=q, k=k, v=v, g=g, beta=beta, initial_state=p.state, output_final_state=True
            )
            return found

        return Prepared(run, _drop_token)


def _drop_token(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0].squeeze(1), result[1]


class FlashQla(Contender):
    """Run flash_qla 0.1, which has sequences only."""

    name = "flash_qla"

    def __init__(self) -> None:
        module = importlib.import_module("flash_qla")
        self.chunk, self.version = module.chunk_gated_delta_rule, str(module.__version__)

    def reasons(self, p: Problem) -> list[str]:
        return ["has no step"] if p.row.what == "step" else []

    def sequence(self, p: Problem) -> Prepared:
        def run() -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.chunk(
                q=p.q,
                k=p.k,
                v=p.v,
                g=p.log_alpha,
                beta=p.beta,
                initial_state=p.state,
                output_final_state=True,
                cu_seqlens=p.cu_seqlens,
            )
            return found

        return Prepared(run, _as_is)


class FlashInfer(Contender):
    """Run flashinfer 0.6 or 0.7: packed sequences with linear alpha, steps from raw gates."""

    name = "flashinfer"

    def __init__(self) -> None:
        self.prefill = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
        decode = importlib.import_module("flashinfer.gdn_decode")
        self.decode = decode.gated_delta_rule_decode_pretranspose
        self.version = str(importlib.import_module("flashinfer").__version__)

    def reasons(self, p: Problem) -> list[str]:
        return ["has no backward"] if p.row.what == "backward" else []

    def sequence(self, p: Problem) -> Prepared:
        s, v = p.row.sizes, p.v
        bounds = p.cu_seqlens
        if bounds is None:
            bounds = torch.arange(0, (s.B + 1) * s.T, s.T, device=v.device)
        arguments = {
            "q": p.q.flatten(0, 1).contiguous(),
            "k": p.k.flatten(0, 1).contiguous(),
            "v": v.flatten(0, 1).contiguous(),
            "g": p.log_alpha.exp().flatten(0, 1).contiguous(),
            "beta": p.beta.flatten(0, 1).contiguous(),
            "scale": s.K**-0.5,
            "initial_state": p.state.transpose(-1, -2).contiguous(),
            "output_final_state": True,
            "cu_seqlens": bounds,
        }

        def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return result[0].view_as(v), result[1].transpose(-1, -2)

        return Prepared(lambda: self.prefill(**arguments), read)

    def step(self, p: Problem) -> Prepared:
        if p.raw is None:
            raise ValueError("flashinfer's step needs raw gates")
        q, k, v, a, b = (x.unsqueeze(1) for x in (p.q, p.k, p.v, p.raw.a, p.raw.b))
        state = p.state.transpose(-1, -2).contiguous()
        arguments: dict[str, Any] = {
            **{"q": q, "k": k, "v": v, "a": a, "b": b, "state": state},
            "A_log": p.raw.A_log,
            "dt_bias": p.raw.dt_bias,
            "scale": p.row.sizes.K**-0.5,
            "use_qk_l2norm": False,
        }
        pools = "initial_state_indices" in inspect.signature(self.decode).parameters
        if pools and state.dtype == torch.bfloat16:
            # Its 16-bit kernel works on a pool, and makes the indices in every call without.
            slots = torch.arange(state.shape[0], dtype=torch.int32, device=state.device)
            arguments |= {"state": None, "initial_state": state, "initial_state_indices": slots}

        def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return result[0].squeeze(1), state.transpose(-1, -2)

        return Prepared(lambda: self.decode(**arguments), read)


PEERS: dict[str, type[Contender]] = {"fla": Fla, "flash_qla": FlashQla, "flashinfer": FlashInfer}


def contender(name: str) -> Contender | str:
    """Return the contender of that name, a peer or one of our backends, or why it cannot run.

    Raises:
        SpecError: nothing has that name.
    """
    if name in PEERS:
        try:
            return PEERS[name]()
        except ModuleNotFoundError as error:
            return f"package {error.name!r} is not installed"
        # Peers ask for the device, for a compiler, for a version while they are imported.
        except Exception as error:
            return f"cannot be imported: {type(error).__name__}: {error}"
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        return backend
    return Ours(name)
