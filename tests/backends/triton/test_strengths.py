"""Judge erase and write in place of beta, as a call and by what is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ahead_of_time import compile_for, failures
from gdn_ops.aot import sampling
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.kernel_support.launches import recording
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from kernel_backends import check_definition, using

pytest.importorskip("triton")

from gdn_ops.backends.triton import Triton
from gdn_ops.backends.triton.host import plan, strengths

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")

EXAMPLES = {
    "bfloat16": Example(
        T=70, R=2, K=48, V=40, dtype="bfloat16", gate="slow", beta="wide", channels=True,
        apart="channels", initial_state=True,
    ),
    "zeros, packed": Example(
        T=121, lengths=(50, 0, 1, 70), H=2, R=2, K=24, V=24, gate="extreme", channels=True,
        apart="erase", beta="wide", initial_state=True, qk_l2norm=True, chunk_size=32, seed=1,
    ),
    "of heads": Example(B=2, T=40, R=3, K=16, V=16, gate="strong", apart="scalars", seed=2),
    "float16": Example(
        T=70, K=40, V=24, dtype="float16", log_gate=True, apart="channels", qk_l2norm=True, seed=3
    ),
    "no decay": Example(T=70, K=16, V=32, rule="delta", apart="write", chunk_size=64, seed=4),
    "a token": Example(T=1, K=3, V=1, apart="channels", beta="binary", initial_state=True, seed=6),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_call_is_the_definition(name: str, device: str) -> None:
    check_definition("triton", replace(EXAMPLES[name], device=device))


@pytest.mark.parametrize("kept", ["on", "off"])
def test_segments_are_the_definition_too(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_kept", kept)
    example = replace(EXAMPLES["zeros, packed"], chunk_size=16)
    with using("triton", example, segment=2):
        check_definition("triton", example)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_lowered_call_has_channels_and_values_in_the_dtype_of_what_is_kept(name: str) -> None:
    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, EXAMPLES[name].arguments()))
    low = strengths.lowered(call)
    s, tokens = call.sizes, low.tokens
    assert tokens.beta is None and tokens.write is None and low.widths.decay == "channel"
    assert tokens.erase is not None and tokens.erase.shape == (s.B, s.T, s.HV, s.K)
    decay = tokens.alpha if tokens.alpha is not None else tokens.log_alpha
    assert decay is not None and decay.shape == tokens.erase.shape
    assert tokens.v.dtype == plan.make_plan(call).kept


def test_the_launches_are_those_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_kept", "on")
    triton, call = Triton(), next(s.call for s in SAMPLES if s.call.needs_grad)
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
    assert {launch.kernel.__name__ for launch in launches} >= {
        "prepare_channels", "walk", "walk_back", "square_gradients", "channel_gradients",
    }  # fmt: skip
    assert [launch.kwargs["APART"] for launch in launches if "APART" in launch.kwargs] == [True] * 2


SAMPLES = [s for s in sampling.samples([], everything=True) if s.label.startswith("erase and")]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_kernels_compile(target: str) -> None:
    rows = compile_for("triton", target, Triton(), SAMPLES)
    assert failures(rows) == []
    assert {row.kernel for row in rows} >= {"prepare_channels", "walk", "channel_gradients"}
