"""Judge the launches of a decay of every key channel, by themselves and as a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from ahead_of_time import compile_for, failures, sequence
from gdn_ops.aot import sampling
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.call.numerics import l2norm
from gdn_ops.kernel_support.launches import Launch, recording
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from kernel_backends import SIZES, check_definition, meta_call, using
from tests.backends.triton.test_transposed import source_of, transposed_products

pytest.importorskip("triton")

from gdn_ops.backends.triton import Triton
from gdn_ops.backends.triton.aot import budgets
from gdn_ops.backends.triton.host import forward, plan
from gdn_ops.backends.triton.host.config import tables

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")

EXAMPLES = {
    "bfloat16": Example(
        T=70, R=2, K=48, V=40, dtype="bfloat16", gate="slow", beta="wide", initial_state=True
    ),
    "zeros, packed": Example(
        T=121, lengths=(50, 0, 1, 70), H=2, R=2, K=24, V=24, gate="extreme", beta="wide",
        initial_state=True, qk_l2norm=True, chunk_size=32, seed=1,
    ),
    "strong": Example(B=2, T=40, R=3, K=16, V=16, gate="strong", chunk_size=16, seed=2),
    "float16": Example(T=70, K=40, V=24, dtype="float16", log_gate=True, qk_l2norm=True, seed=3),
    "faint": Example(T=70, K=16, V=16, magnitude="faint", keys="repeated", chunk_size=64, seed=4),
    "a faint token": Example(T=1, K=3, V=1, magnitude="faint", initial_state=True, seed=6),
    "GLA": Example(T=70, R=2, K=40, V=24, rule="gated", dtype="bfloat16", gate="extreme", seed=5),
    "no beta": Example(T=40, K=16, V=16, rule="gated", beta="one", chunk_size=16, seed=6),
}  # fmt: skip
EXAMPLES = {name: replace(example, channels=True) for name, example in EXAMPLES.items()}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

MOST = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 2e-5}
"""The largest relative error of what a launch keeps of a head in a chunk."""


def call_of(example: Example, *, gradients: bool = False) -> Call:
    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, example.arguments()))
    return replace(call, needs_grad=gradients)


def decays_between(alpha: Tensor) -> Tensor:
    """Return the decays from token j to token i, i ≥ j, (C, C, K), 0 above; alpha is (C, K)."""
    C = alpha.shape[0]
    D = alpha.new_zeros(C, C, alpha.shape[1])
    for i in range(C):
        D[i, i] = 1.0
        if i:
            D[i, :i] = D[i - 1, :i] * alpha[i]
    return D


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bfloat16", "strong", "float16", "GLA"])
def test_prepare_forms_squares_and_rows_that_have_their_decays(name: str, device: str) -> None:
    example = replace(EXAMPLES[name], device=device)
    call = call_of(example)
    own = plan.make_plan(call)
    saved = forward.run_prepare(call, own)
    s, C, most = call.sizes, own.C, MOST[example.dtype]
    q, k, _, given, log_alpha, beta = (None if x is None else x.double() for x in call.tokens[:6])
    assert q is not None and k is not None
    if call.qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    alpha = log_alpha.exp() if log_alpha is not None else given
    assert alpha is not None and beta is not None
    slots = -(-s.T // C)

    def check(what: str, x: Tensor, expected: Tensor, at: Any) -> None:
        error = (x.double() - expected).norm()
        assert error <= most * expected.norm() + 1e-30, (what, at, float(error))

    for row, hv, c in [(b, h, c) for b in range(s.B) for h in range(s.HV) for c in range(slots)]:
        at = slice(c * C, min((c + 1) * C, s.T))
        n, slot = at.stop - at.start, row * slots + c
        Q, K = q[row, at, hv // (s.HV // s.H)], k[row, at, hv // (s.HV // s.H)]
        D, e = decays_between(alpha[row, at, hv]), beta[row, at, hv, None]
        b, where = alpha[row, at, hv].cumprod(0), (row, hv, c)
        P = call.scale * torch.einsum("ic,jc,ijc->ij", Q, K, D)
        check("P", saved.scores[hv, slot, :n, :n], P, where)
        assert not bool(saved.scores[hv, slot].triu(1).any())
        check("b_C", saved.ends[hv, slot], b[-1], where)
        erase, read = saved.factors[:, hv, slot, :n, None].double()
        check("s b Q", read * saved.scaled_q[row, at, hv], call.scale * b * Q, where)
        check("d K", saved.written_k[row, at, hv], D[-1] * K, where)
        if call.rule.has_erase:
            A = (e * torch.einsum("ic,jc,ijc->ij", K, K, D)).tril(-1)
            T = torch.linalg.inv(torch.eye(n, dtype=A.dtype, device=device) + A)
            check("T", saved.inverses[hv, slot, :n, :n], T, where)
            check("β b K", erase * saved.scaled_k[row, at, hv], e * b * K, where)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_call_is_the_definition(name: str, device: str) -> None:
    check_definition("triton", replace(EXAMPLES[name], device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", ["on", "off"])
def test_segments_are_the_definition_too(
    kept: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_kept", kept)
    example = replace(EXAMPLES["zeros, packed"], chunk_size=16, device=device)
    with using("triton", example, segment=2):
        check_definition("triton", example)


def test_a_small_beta_has_its_gradient_without_a_quotient() -> None:
    example = replace(EXAMPLES["strong"], gate="slow")
    arguments = example.arguments()
    arguments["beta"] = arguments["beta"] * torch.tensor([0.0, 1e-9, 1.0])
    found = []
    for backend in ("triton", "naive"):
        given = {k: x.double() if backend == "naive" and isinstance(x, Tensor) else x
                 for k, x in arguments.items()}  # fmt: skip
        given["beta"] = given["beta"].clone().requires_grad_()
        gdn_ops.gated_delta(**given, backend=backend).sum().backward()
        found.append(given["beta"].grad.double())
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_a_reset_of_all_channels_separates_what_is_before_from_what_is_behind() -> None:
    arguments = replace(EXAMPLES["bfloat16"], chunk_size=16).arguments()
    arguments["alpha"][:, 20] = 0.0
    changed = dict(arguments)
    changed["v"] = arguments["v"].clone()
    changed["v"][:, :20] = 1e4
    first, second = (
        gdn_ops.gated_delta(**x, return_state=True, backend="triton")
        for x in (arguments, changed)
    )  # fmt: skip
    assert torch.equal(first[0][:, 20:], second[0][:, 20:]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
def test_a_token_decays_by_channels_as_the_definition_says(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    alpha = drawn(2, 3, 4, 20)
    alpha[alpha < 0.2] = 0.0
    given = {"q": drawn(2, 3, 2, 20), "k": drawn(2, 3, 2, 20), "v": drawn(2, 3, 4, 24)}
    given |= {"log_alpha": alpha.log(), "beta": drawn(2, 3, 4), "state": drawn(2, 4, 20, 24)}
    found, expected = (
        gdn_ops.gated_delta_steps(**given, rule=rule, return_states=True, backend=name)
        for name in ("triton", "naive")
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)


# Launches, from what a call on the meta device would launch.


def launches_of(**sizes: Any) -> list[Launch]:
    """Return what a training call launches, forward and backward."""
    s = SIZES | sizes
    gate = torch.empty(s["B"], s["T"], s["HV"], s["K"], device="meta")
    return launches_for(meta_call(True, **s, log_alpha=gate))


def launches_for(call: Call) -> list[Launch]:
    triton = Triton()
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
    return launches


def test_the_walks_are_those_of_the_other_rules_and_read_rows_of_both_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_kept", "on")
    launches = launches_of(B=4)
    names = [launch.kernel.__name__ for launch in launches]
    squares = ["square_gradients", "channel_gradients"]
    assert names == ["prepare_channels", "walk", "walk_back", *squares]
    for launch in launches[1:3]:
        given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert launch.kwargs["CHANNELS"] and not launch.kwargs.get("WEIGHTED", False)
        assert given["writes"].shape == given["q"].shape == (4, 8192, 64, 128)
        assert given["R"] == 1


def test_programs_share_the_chunks_that_are_prepared() -> None:
    processors = tables.processors(torch.device("cpu"))
    launches = launches_of(B=4)
    assert launches[0].grid == launches[-1].grid == (2 * processors,)
    few = launches_of(T=64, H=1, HV=2)
    # Two squares are formed together, by one program; a key head is one more task.
    assert (few[0].grid, few[-1].grid) == ((1,), (1,))


def test_what_is_saved_for_a_backward_has_the_sizes_of_what_is_there() -> None:
    s = {"B": 1, "T": 128, "H": 2, "HV": 4, "K": 32, "V": 16}
    gate = torch.empty(1, 128, 4, 32, device="meta")
    saved = plan.empty_saved(call := meta_call(True, **s, log_alpha=gate), plan.make_plan(call))
    assert saved.ends.shape == (4, 2, 32) and saved.inv_norms.numel() == 0
    assert saved.scaled_q.shape == saved.scaled_k.shape == saved.written_k.shape == (1, 128, 4, 32)
    other = plan.empty_saved(call := meta_call(True, **s), plan.make_plan(call))
    assert other.written_k.numel() == 0 and other.ends.shape == (4, 2)


def test_no_kernel_multiplies_with_a_transposed_product() -> None:
    call = replace(sequence(channels=True).call, needs_grad=True)
    for launch in launches_for(call):
        assert transposed_products(source_of(launch)) == [], launch.kernel.__name__


def test_the_kernels_compile_for_hopper_within_their_budgets_and_have_predicted_times() -> None:
    samples = list(sampling.samples([GATED_DELTA.case[budgets.CHANNELS]]))
    rows = compile_for("triton", "sm_90", Triton(), samples)
    # A launch that has no budget fails too.
    assert failures(rows) == [] and budgets.current()
    spills = {row.kernel: row.spills for row in rows if row.spills}
    assert set(spills) <= {"prepare_channels", "walk"} and max(spills.values(), default=0) <= 16
    assert all(timed.prediction is not None for row in rows for timed in row.launches)
