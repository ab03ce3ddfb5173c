"""Wrap this library's backends and other people's implementations, each in its own convention.

A contender turns `Inputs` into a `Prepared`: a function that runs once more and a function that
reads its result in our layouts. Conversions of gates and states are done before anything is timed.
A contender that is not installed is a reason, never an error. Conventions, as of the releases named
with each peer:

    ours, FLA, FlashQLA   log gates, state (N, HV, K, V)
    FlashInfer            linear alpha for sequences, raw gates for steps, state (N, HV, V, K)
    transformers          log gates, no state is passed
    onnxruntime           log gates, heads joined with their width, float32 only
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.device import Run
from gdn_ops.bench.inputs import Inputs
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import installed_version
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.names import unknown


@dataclass(frozen=True)
class Prepared:
    """Hold one call, ready to run again and again.

    Attributes:
        run: does the work that is timed.
        read: turns the result of `run` into (o, final state (N, HV, K, V)), or (o,) for inputs
            without a state.
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]] = tuple

    def results(self) -> tuple[Tensor, ...]:
        """Run once and read the result."""
        return self.read(self.run())


def _one(o: Tensor) -> tuple[Tensor, ...]:
    return (o,)


def _no_step(x: Inputs) -> Prepared:
    raise NotImplementedError("has no step")


@dataclass(frozen=True)
class Contender:
    """Hold one implementation under measurement.

    Attributes:
        name: of the backend or the peer, as printed.
        sequence: prepares a forward, with the final state if there is an initial one;
            differentiable if the operands are.
        step: prepares a step; one that works in place updates the state of the inputs itself.
        version: of the package that brings it.
        is_peer: whether it is another library's.
        lacks: why it cannot run a direction: forward, backward or step.
        dtypes: of q, k and v that it computes in or more precisely; empty for all.
        context: entered around a run and around the backward of what it returned.
    """

    name: str
    sequence: Callable[[Inputs], Prepared]
    step: Callable[[Inputs], Prepared] = _no_step
    version: str = ""
    is_peer: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def output(self, x: Inputs) -> Tensor:
        """Return o of a sequence."""
        return self.sequence(x).results()[0]

    def run(self, what: str, x: Inputs, d_o: Tensor) -> Run:
        """Return a sequence to time: "forward", or forward and backward of o's gradient d_o."""
        if what == "forward":
            return self.sequence(x).run
        leaves = x.with_grad()
        ready, operands = self.sequence(leaves), leaves.operands()
        return lambda: torch.autograd.grad(ready.results()[0], operands, d_o)

    def reasons(self, x: Inputs, what: str) -> list[str]:
        """Return why it cannot run inputs, as far as is known without running it."""
        if self.is_peer:
            dtype = str(x.q.dtype).removeprefix("torch.")
            if self.dtypes and dtype not in self.dtypes:
                return [f"does not compute in {dtype}, only in {', '.join(self.dtypes)}"]
            return [self.lacks[what]] if what in self.lacks else []
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "beta": x.beta, "backend": self.name}
        if what == "step":
            given |= {"state": x.state, "inplace": True, "op": "gated_delta_step"}
        else:
            given |= {"initial_state": x.state, "cu_seqlens": x.cu_seqlens}
        answer = ops.explain(x.q, x.k, x.v, **given)
        return list(dict(answer.reasons)[self.name])


def our_contender(name: str) -> Contender | str:
    """Return a backend of this library as a contender, or why it cannot run here.

    Raises:
        SpecError: no backend has that name.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        return backend

    def sequence(x: Inputs) -> Prepared:
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "beta": x.beta, "backend": name}
        if x.state is None:
            return Prepared(lambda: ops.gated_delta(x.q, x.k, x.v, **given), _one)
        given |= {"initial_state": x.state, "return_state": True, "cu_seqlens": x.cu_seqlens}
        return Prepared(lambda: ops.gated_delta(x.q, x.k, x.v, **given))

    def step(x: Inputs) -> Prepared:
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "inplace": True, "backend": name}
        operands = (x.q, x.k, x.v, None, x.beta, x.state)
        return Prepared(lambda: ops.gated_delta_step(*operands, **given))

    return Contender(name, sequence, step, installed_version("gdn_ops") or "unknown")


def _transformers() -> Contender:
    """Return transformers' `torch_chunk_gated_delta_rule`, its path on CPUs.

    q and k are repeated to the value heads inside the timed call, as the models do and, in
    newer releases, the function itself.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as model
    from transformers.utils import logging

    logging.set_verbosity_error()

    def sequence(x: Inputs) -> Prepared:
        heads = x.v.shape[2] // x.q.shape[2]

        def run() -> Tensor:
            q, k = (y.repeat_interleave(heads, 2) if heads > 1 else y for y in (x.q, x.k))
            o: Tensor = model.torch_chunk_gated_delta_rule(q, k, x.v, x.log_alpha, x.beta)[0]
            return o

        return Prepared(run, _one)

    # It computes in float32, whatever it is given.
    dtypes = ("float32", "bfloat16", "float16")
    return Contender("transformers", sequence, is_peer=True, dtypes=dtypes)


_LINEAR_ATTENTION = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
sequence (float[b, t, q_width] q, float[b, t, k_width] k, float[b, t, v_width] v,
          float[b, heads, k_size, v_size] state, float[b, t, heads] log_alpha,
          float[b, t, heads] beta)
      => (float[b, t, v_width] o, float[b, heads, k_size, v_size] new_state) {{
  o, new_state = com.microsoft.LinearAttention <q_num_heads: int = {q_heads},
    kv_num_heads: int = {v_heads}, scale: float = {scale}, update_rule = "gated_delta">
    (q, k, v, state, log_alpha, beta)
}}"""


def _onnxruntime() -> Contender:
    """Return onnxruntime's com.microsoft::LinearAttention on CPUs, with torch's threads."""
    runtime, parser = map(importlib.import_module, ("onnxruntime", "onnx.parser"))

    def session(q_heads: int, v_heads: int, scale: float) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Let its error through where it cannot do the call.
        options.log_severity_level = 4
        text = _LINEAR_ATTENTION.format(q_heads=q_heads, v_heads=v_heads, scale=scale)
        model = parser.parse_model(text).SerializeToString()
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def sequence(x: Inputs) -> Prepared:
        if x.state is not None:
            raise ValueError("onnxruntime's sequences are measured without a state")
        B, _, H, K = x.q.shape
        HV, V = x.v.shape[2:]
        tensors = {"q": x.q.flatten(2), "k": x.k.flatten(2), "v": x.v.flatten(2)}
        tensors |= {"log_alpha": x.log_alpha, "beta": x.beta, "state": x.v.new_zeros(B, HV, K, V)}
        feeds = {name: y.detach().contiguous().numpy() for name, y in tensors.items()}
        made = session(H, HV, K**-0.5)

        def read(results: list[Any]) -> tuple[Tensor, ...]:
            return (torch.from_numpy(results[0]).view(x.v.shape),)

        return Prepared(lambda: made.run(None, feeds), read)

    # An older release does not have it.
    session(1, 1, 1.0)
    lacks = {"backward": "has no backward"}
    version = str(runtime.__version__)
    return Contender(
        "onnxruntime", sequence, version=version, is_peer=True, lacks=lacks, dtypes=("float32",)
    )


def _fla_arguments(x: Inputs) -> dict[str, Any]:
    given = {"q": x.q, "k": x.k, "v": x.v, "g": x.log_alpha, "beta": x.beta}
    return {**given, "initial_state": x.state, "output_final_state": True}


def _fla_sequence(chunk: Callable[..., Any]) -> Callable[[Inputs], Prepared]:
    """Return how a function with FLA's signature prepares a sequence."""

    def sequence(x: Inputs) -> Prepared:
        arguments = {**_fla_arguments(x), "cu_seqlens": x.cu_seqlens}
        return Prepared(lambda: chunk(**arguments))

    return sequence


def _fla() -> Contender:
    """Return flash-linear-attention 0.5 or 0.6 on its own kernels, not dispatched to FlashQLA's.

    The process that measures sets FLA_FLASH_QLA=0 (`gdn_ops.bench.child.ENVIRONMENT`).
    """
    module = importlib.import_module("fla.ops.gated_delta_rule")
    recurrent = module.fused_recurrent_gated_delta_rule

    def step(x: Inputs) -> Prepared:
        arguments = _fla_arguments(replace(x.map(lambda y: y.unsqueeze(1)), state=x.state))

        def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return result[0].squeeze(1), result[1]

        return Prepared(lambda: recurrent(**arguments), read)

    version = str(importlib.import_module("fla").__version__)
    return Contender("fla", _fla_sequence(module.chunk_gated_delta_rule), step, version, True)


def _flash_qla() -> Contender:
    """Return flash_qla 0.1, which has sequences only."""
    module = importlib.import_module("flash_qla")
    sequence = _fla_sequence(module.chunk_gated_delta_rule)
    lacks = {"step": "has no step"}
    version = str(module.__version__)
    return Contender("flash_qla", sequence, version=version, is_peer=True, lacks=lacks)


def _flashinfer() -> Contender:
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


@dataclass(frozen=True)
class Peer:
    """Hold another library's implementation.

    Attributes:
        load: imports it.
        devices: types of the devices that it runs on, "*" for any.
        absent: what a failed import means; None for the package that is missing.
    """

    load: Callable[[], Contender]
    devices: tuple[str, ...] = ("cuda",)
    absent: str | None = None


PEERS = {
    "transformers": Peer(_transformers, ("*",), "package 'transformers' is not usable"),
    "onnxruntime": Peer(_onnxruntime, ("cpu",)),
    "fla": Peer(_fla),
    "flash_qla": Peer(_flash_qla),
    "flashinfer": Peer(_flashinfer),
}


def check_peers(names: Iterable[str], *devices: str) -> None:
    """Refuse names that are no peers of types of devices.

    Raises:
        SpecError: a name is unknown.
    """
    known = peers_on(*devices)
    for name in names:
        if name not in known:
            raise SpecError(unknown("peer", name, known))


def peers_on(*devices: str) -> tuple[str, ...]:
    """Return the names of the peers of types of devices: "cuda", "cpu", or "*" for any."""
    return tuple(name for name, peer in PEERS.items() if {*devices} & {*peer.devices})


def find_contender(name: str) -> Contender | str:
    """Return the contender of that name, a peer or one of our backends, or why it cannot run.

    Raises:
        SpecError: nothing has that name.
    """
    if name not in PEERS:
        return our_contender(name)
    peer = PEERS[name]
    try:
        return peer.load()
    # Peers ask for the device, for a compiler, for a version while they are imported.
    except Exception as error:
        if isinstance(error, ImportError) and peer.absent is not None:
            return f"{peer.absent}: {error}"
        if isinstance(error, ModuleNotFoundError):
            return f"package {error.name!r} is not installed"
        return f"cannot be imported: {type(error).__name__}: {error}"
