"""`bench gpu` without a GPU: rows, operands, peers' conventions, errors, times, who is to blame."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.bench import peers
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.gpu import errors
from gdn_ops.bench.gpu.device import find_peaks
from gdn_ops.bench.gpu.errors import exact_backward, exact_forward, exact_step, worst_error
from gdn_ops.bench.gpu.result import roofline_seconds
from gdn_ops.bench.gpu.rows import ROWS, GpuRow, find_row
from gdn_ops.bench.inputs import Inputs, make_cotangents
from gdn_ops.bench.peers import find_contender, peers_on
from gdn_ops.bench.verify import Part
from gpu_stand_ins import BACKWARD, FORWARD, NARROW_STEP, STEP, TINY, contender, install_peers

ALWAYS: dict[str, Any] = {"seconds": 1e6, "clock": lambda: 0.0, "finish": lambda: None}


def exact(x: Inputs, what: str) -> list[Part]:
    if what == "step":
        return exact_step(x)
    if what == "backward":
        return exact_backward(x, *make_cotangents(x))
    return exact_forward(x, **ALWAYS)


def results_of(c: Contender, x: Inputs, what: str) -> tuple[Tensor, ...]:
    """Return what a contender makes of inputs: outputs, or the gradients."""
    if what == "step":
        assert x.state is not None
        with torch.no_grad():
            return c.step(replace(x, state=x.state.clone())).results()
    if what == "forward":
        return c.sequence(x).results()
    leaves = x.with_grad()
    results = c.sequence(leaves).results()
    return torch.autograd.grad(results, leaves.operands(), make_cotangents(x))


# Rows.


def test_every_row_has_a_name_of_its_own_and_is_found_by_it() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert [find_row(row.name) for row in ROWS] == list(ROWS)
    with pytest.raises(ValueError, match="unknown row 'x', known: forward 16/64 T=8192, "):
        find_row("x")


def test_the_rows_cover_what_is_asked_for_and_the_first_ones_are_the_first_goals() -> None:
    assert [row.name for row in ROWS[:5]] == [
        "forward 16/64 T=8192",
        "forward 16/32 T=8192",
        "backward 16/32 T=8192",
        "step 16/64 B=1 float32 state",
        "forward 16/64 4x8192 packed",
    ]
    published = {row.name: {p.who: p.ms for p in row.published} for row in ROWS}
    times = {"flash_qla": 0.320, "flashinfer": 1.655, "fla": 0.902}
    assert published["forward 2/8 T=32768"] == times
    assert published["backward 16/32 8192 in 4 packed"] == {"flash_qla": 1.259, "fla": 1.467}
    assert sum(len(p) == 3 for n, p in published.items() if n.startswith("forward")) == 8
    assert sum(len(p) == 2 for n, p in published.items() if n.startswith("backward")) == 5
    for state in ("float32", "bfloat16"):
        steps = [row for row in ROWS if row.what == "step" and row.state_dtype == state]
        steps = [row for row in steps if not row.channels]
        assert sorted(row.sizes.B for row in steps) == [1, 8, 64, 256, 512]
    for what in ("forward", "backward"):
        rows = [row for row in ROWS if row.what == what]
        assert any(row.sizes.B > 1 for row in rows)
        assert any(row.sizes.T < 1024 for row in rows)
        assert any(row.dims != (128, 128) for row in rows)


def test_rows_of_channels_are_in_every_direction_long_and_packed() -> None:
    rows = [row for row in ROWS if row.channels]
    assert [row.name for row in rows] == [
        "forward 32/32 channels T=8192",
        "backward 32/32 channels T=8192",
        "step 32/32 channels B=1 float32 state",
        "forward 32/32 channels 8192 in 4 packed",
        "step 32/32 channels B=64 float32 state",
        "forward 64/64 channels T=2048",
        "backward 32/32 channels 8192 in 4 packed",
    ]
    for row in rows:
        heads = replace(row, channels=False)
        s, moved = row.sizes, row.work()
        of_heads = heads.work()
        if moved is None or of_heads is None:
            assert row.what == "backward" and moved is of_heads is None
        else:
            # A decay of float32 is read for every key channel.
            assert moved[1] - of_heads[1] == 4 * (s.K - 1) * s.B * s.T * s.HV


def test_the_work_of_a_row_is_the_cost_model_and_a_narrow_state_moves_half() -> None:
    flops, moved = find_row("forward 16/64 T=8192").work() or (0, 0)
    assert 5e10 < flops < 9e10
    assert 3.4e8 < moved < 3.6e8
    wide = find_row("step 16/64 B=64 float32 state").work() or (0, 0)
    narrow = find_row("step 16/64 B=64 bfloat16 state").work() or (0, 0)
    state = 64 * 64 * 128 * 128 * 4
    assert wide[1] - narrow[1] == state
    assert find_row("backward 16/32 T=8192").work() is None


def test_rooflines_are_for_known_devices_alone() -> None:
    row = find_row("forward 16/64 T=8192")
    flops, moved = row.work() or (0, 0)
    assert roofline_seconds(row, "NVIDIA H200") == max(flops / 989e12, moved / 4.8e12)
    assert roofline_seconds(row, "NVIDIA A100-SXM4-80GB") == max(flops / 312e12, moved / 2.039e12)
    assert roofline_seconds(row, "AMD Instinct MI300X") == max(flops / 1307e12, moved / 5.3e12)
    assert roofline_seconds(row, "NVIDIA GeForce RTX 4090") is None
    assert roofline_seconds(find_row("backward 16/32 T=8192"), "NVIDIA H200") is None
    h100 = (find_peaks("NVIDIA H100 80GB HBM3"), find_peaks("NVIDIA H100 PCIe"))
    assert [p.bytes for p in h100 if p is not None] == [3.35e12, 2.0e12]


# Operands.


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.name)
def test_operands_are_in_the_domains_of_the_spec(row: GpuRow) -> None:
    p = row.draw("cpu")
    assert p.log_alpha.dtype == p.beta.dtype == torch.float32
    assert p.log_alpha.max() <= 0 and p.log_alpha.min() > -2
    assert p.beta.min() > 0 and p.beta.max() < 1
    torch.testing.assert_close(p.k.float().norm(dim=-1), torch.ones(p.k.shape[:-1]), rtol=0.01,
                               atol=0.01)  # fmt: skip
    assert p.state is not None
    assert p.state.shape == (row.sizes.N, row.sizes.HV, row.sizes.K, row.sizes.V)
    assert row.draw("cpu").q.equal(p.q)
    assert not contender().reasons(p, row.what)
    if row.packed:
        assert p.cu_seqlens is not None
        assert tuple(b - a for a, b in pairwise(p.cu_seqlens.tolist())) == row.lengths
    assert p.has_channels == row.channels
    if row.what != "step":
        still = p.log_alpha == 0
        assert still[..., ::4].all(), "a quarter of the heads, or of the channels, does not decay"
        assert not still[..., 1::4].any()


def test_the_gates_of_a_step_are_those_of_its_raw_gates() -> None:
    p = NARROW_STEP.draw("cpu")
    assert p.raw is not None and p.raw.a.dtype == torch.bfloat16
    assert not p.has_channels
    softplus = torch.nn.functional.softplus(p.raw.a.double() + p.raw.dt_bias.double())
    torch.testing.assert_close(p.log_alpha.double(), -p.raw.A_log.double().exp() * softplus)
    torch.testing.assert_close(p.beta, torch.sigmoid(p.raw.b.float()))


# Peers: every one is fed in its own convention.


@pytest.mark.parametrize("name", peers_on("cuda"))
@pytest.mark.parametrize("row", TINY, ids=lambda row: row.name)
def test_a_peer_gets_the_same_problem(
    name: str, row: GpuRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_peers(monkeypatch)
    c = contender(name)
    p = row.draw("cpu")
    reasons = c.reasons(p, row.what)
    if reasons:
        missing = {
            ("flash_qla", "step"): "has no step",
            ("flashinfer", "backward"): "has no backward",
        }
        scalar = "takes no decay of every key channel here"
        assert reasons == [scalar if row.channels else missing[name, row.what]]
        assert name != "fla"
        return
    error, what = worst_error(exact(p, row.what), results_of(c, p, row.what))
    assert error < (1e-2 if row is NARROW_STEP else 1e-5), what


@pytest.mark.parametrize("name", peers_on("cuda"))
@pytest.mark.parametrize("what", ["forward", "backward", "step"])
@pytest.mark.parametrize("channels", [False, True])
def test_gates_reach_a_peer_in_its_form_and_dtype_where_q_is_narrow(
    name: str, what: str, channels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_peers(monkeypatch)
    lengths = (1, 1, 1) if what == "step" else (20,)
    row = GpuRow(what, (1, 2), lengths, dims=(8, 4), channels=channels)
    x, c = row.draw("cpu"), contender(name)
    if c.reasons(x, what):
        return
    # As strong as a decay gets in a model: a confusion of forms shows.
    assert x.raw is None or x.raw.a.dtype == torch.bfloat16
    if what != "step":
        x = replace(x, log_alpha=(64 * x.log_alpha).clamp(min=-20.0))
    exact_parts = exact(x, what)
    assert worst_error(exact_parts, results_of(c, x, what))[0] < 2e-2
    # A gate in another form would be seen; that of a step is mild, and given raw too.
    confused = replace(x, log_alpha=x.log_alpha.exp() - 1)
    if x.raw is not None:
        confused = replace(x, log_alpha=8 * x.log_alpha, raw=x.raw._replace(A_log=x.raw.A_log + 2))
    assert worst_error(exact_parts, results_of(c, confused, what))[0] > 0.05


def test_a_step_of_a_peer_in_place_changes_its_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    install_peers(monkeypatch)
    for name in ("fla", "flashinfer", "torch"):
        ready = contender(name).step(STEP.draw("cpu"))
        first = [x.clone() for x in ready.results()]
        second = ready.results()
        # fla returns a new state, as it does in a server; the others go on from their last one.
        assert torch.equal(first[1], second[1]) == (name == "fla")


def test_a_peer_that_is_not_there_or_cannot_be_imported_is_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flash_qla", None)
    assert find_contender("flash_qla") == "package 'flash_qla' is not installed"

    def broken() -> Contender:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setitem(peers.PEERS, "fla", peers.Peer(broken))
    assert find_contender("fla") == "cannot be imported: RuntimeError: No CUDA GPUs are available"
    with pytest.raises(gdn_ops.SpecError, match="unknown backend 'x'"):
        find_contender("x")


# Errors.


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.name)
def test_a_backend_is_right_and_every_single_wrong_head_is_seen(row: GpuRow) -> None:
    p = row.draw("cpu")
    parts = exact(p, row.what)
    results = results_of(contender(), p, row.what)
    assert worst_error(parts, results)[0] < (1e-2 if row is NARROW_STEP else 1e-5)
    for part in parts:
        wrong = [x.clone() for x in results]
        taken = part.take(wrong[part.index])
        assert taken.data_ptr() >= wrong[part.index].data_ptr()
        (head_axis,) = set(range(1, taken.dim())) - set(part.axes)
        taken.select(head_axis, taken.shape[head_axis] - 1)[-1] *= 1.5
        error, what = worst_error(parts, wrong)
        assert what == part.what
        assert 0.05 < error <= 0.51
    nan = [x.clone() for x in results]
    nan[0].view(-1)[-1] = math.nan
    assert math.isnan(worst_error(parts, nan)[0])


def test_a_definition_that_takes_too_long_walks_the_beginning() -> None:
    now = iter(range(10_000))
    p = replace(FORWARD, lengths=(100,)).draw("cpu")
    # 32 tokens a second; what is left after learning the pace are two seconds.
    parts = exact_forward(p, 4.0, lambda: float(next(now)), lambda: None)
    assert [part.what for part in parts] == ["o"]
    assert parts[0].exact.shape[1] == 32
    results = list(results_of(contender(), p, "forward"))
    assert worst_error(parts, results)[0] < 1e-5
    results[0][:, 40:] = 7.0
    assert worst_error(parts, results)[0] < 1e-5, "what was not walked is not judged"
    results[0][:, 20:] = 7.0
    assert worst_error(parts, results)[0] > 0.5


def test_gradients_are_judged_in_a_window_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "WINDOW", 6)
    p = BACKWARD.draw("cpu")
    parts = exact(p, "backward")
    assert [part.what for part in parts] == ["dq", "dk", "dv", "dlog_alpha", "dbeta"]
    assert parts[0].exact.shape == (1, 6, 2, 8)
    assert parts[2].exact.shape == (1, 6, 4, 4)
    assert worst_error(parts, results_of(contender(), p, "backward"))[0] < 1e-5
