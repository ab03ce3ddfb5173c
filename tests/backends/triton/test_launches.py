"""Judge what each launch writes by itself against float64: on a GPU with -m gpu, and in emulation.

A call that is wrong on a GPU and right in emulation has a launch here that says which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.call.numerics import l2norm
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from kernel_backends import using

pytest.importorskip("triton")

from gdn_ops.backends.triton.host import forward, plan, walk
from gdn_ops.backends.triton.host.plan import Plan, Saved, is_weighted, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

EXAMPLES = {
    "bfloat16": Example(
        T=150, R=2, K=128, V=128, dtype="bfloat16", gate="slow", beta="wide", initial_state=True
    ),
    "normalised, packed": Example(
        T=181, lengths=(70, 0, 1, 110), H=2, R=3, K=48, V=80, dtype="bfloat16", gate="extreme",
        beta="wide", initial_state=True, qk_l2norm=True, seed=1,
    ),
    "repeated keys": Example(
        T=130, K=128, V=64, dtype="bfloat16", gate="slow", beta="unit", keys="repeated", seed=2
    ),
    "float16": Example(T=70, R=4, K=64, V=64, dtype="float16", log_gate=True, seed=3),
    "float32": Example(B=2, T=70, R=2, K=64, V=32, gate="strong", qk_l2norm=True, seed=4),
    "chunks of 16": Example(T=50, K=24, V=40, dtype="bfloat16", chunk_size=16, seed=5),
    "gated": Example(T=150, R=2, K=64, V=64, rule="gated", dtype="bfloat16", seed=6),
    "linear": Example(T=70, K=64, V=64, rule="linear", qk_l2norm=True, seed=7),
}  # fmt: skip

MOST = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 2e-5}
"""The largest relative error of what a launch keeps of a head in a chunk."""


class Chunk(NamedTuple):
    """Name a chunk of a value head: its slot, and where its tokens are."""

    slot: int
    n: int
    row: int
    tokens: slice
    hv: int


@dataclass
class Exact:
    """Hold what launches form of a chunk, in float64; `read` and `erased` are s b Q and β b K."""

    T: Tensor
    P: Tensor
    b: Tensor
    d: Tensor
    U: Tensor
    S: Tensor
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    erased: Tensor = field(default_factory=lambda: torch.empty(0))
    d_rhs: Tensor = field(default_factory=lambda: torch.empty(0))
    d_end: Tensor = field(default_factory=lambda: torch.empty(0))


class Case:
    """Hold a call on a device, and what its launches should form."""

    def __init__(self, example: Example, device: str, gradients: bool = False) -> None:
        arguments = replace(example, device=device).arguments()
        arguments = arguments_of(GATED_DELTA, arguments)
        self.call: Call = replace(bind(GATED_DELTA, arguments), needs_grad=gradients)
        self.plan: Plan = make_plan(self.call)
        self.most = MOST[example.dtype]
        d_o, d_final = example.cotangents()
        self.d_o, self.d_final = d_o.to(device), d_final.to(device)
        self.exact = self._exact()

    def _chunks(self) -> list[Chunk]:
        """Return the chunks of every head, in the order of the tokens."""
        s, C, cu = self.call.sizes, self.plan.C, self.call.cu_seqlens
        ends = [0, *([s.T] if cu is None else cu.tolist()[1:])]
        chunks = []
        for n in range(s.N):
            begin, end = (0, s.T) if cu is None else ends[n : n + 2]
            first = n * -(-s.T // C) if cu is None else begin // C + n
            row = n if cu is None else 0
            for c, token in enumerate(range(begin, end, C)):
                tokens = slice(token, min(token + C, end))
                chunks += [Chunk(first + c, n, row, tokens, hv) for hv in range(s.HV)]
        return chunks

    def _exact(self) -> list[tuple[Chunk, Exact]]:
        call, s = self.call, self.call.sizes
        q, k, v = (x.double().cpu() for x in call.tokens[:3])
        if call.qk_l2norm:
            q, k = l2norm(q), l2norm(k)
        ones = torch.ones(s.B, s.T, s.HV, dtype=torch.float64)
        alpha, beta = ones, ones
        if call.tokens.log_alpha is not None:
            alpha = call.tokens.log_alpha.double().cpu().exp()
        elif call.tokens.alpha is not None:
            alpha = call.tokens.alpha.double().cpu()
        if call.tokens.beta is not None:
            beta = call.tokens.beta.double().cpu()
        d_o = self.d_o.double().cpu()
        states: dict[tuple[int, int], Tensor] = {}
        exact = []
        for x in self._chunks():
            start = torch.zeros(s.K, s.V, dtype=torch.float64)
            if call.state is not None:
                start = call.state[x.n, x.hv].double().cpu()
            S = states.setdefault((x.n, x.hv), start)
            h = x.hv // (s.HV // s.H)
            Q, K = q[x.row, x.tokens, h], k[x.row, x.tokens, h]
            V, a = v[x.row, x.tokens, x.hv], alpha[x.row, x.tokens, x.hv]
            e = beta[x.row, x.tokens, x.hv]
            D = torch.eye(len(a), dtype=torch.float64)
            for i in range(1, len(a)):
                D[i, :i] = D[i - 1, :i] * a[i]
            b, d = a.cumprod(0), D[-1]
            A = (e[:, None] * (K @ K.T * D)).tril(-1) if call.rule.has_erase else 0 * D
            T = torch.linalg.inv(torch.eye(len(a), dtype=torch.float64) + A)
            rhs = V - (b[:, None] * (K @ S) if call.rule.has_erase else 0.0)
            U = T @ (e[:, None] * rhs)
            y = Exact(T, call.scale * (Q @ K.T * D).tril(), b, d, U, S)
            exact.append((x, y))
            y.read, y.erased = call.scale * b[:, None] * Q, (b * e)[:, None] * K
            states[x.n, x.hv] = b[-1] * S + (d[:, None] * K).T @ U
        back = {key: self.d_final[key].double().cpu() for key in states}
        for x, y in reversed(exact):
            h = x.hv // (s.HV // s.H)
            y.d_end = back[x.n, x.hv]
            g = d_o[x.row, x.tokens, x.hv]
            y.d_rhs = y.T.T @ (y.P.T @ g + y.d[:, None] * (k[x.row, x.tokens, h] @ y.d_end))
            back[x.n, x.hv] = y.read.T @ g + y.b[-1] * y.d_end
            if call.rule.has_erase:
                back[x.n, x.hv] = back[x.n, x.hv] - y.erased.T @ y.d_rhs
        self.final, self.d_initial = states, back
        return exact

    def check(self, name: str, x: Tensor, expected: Tensor, where: Any) -> None:
        """Assert that a result is as near to what it should be as its dtype lets it be."""
        error = (x.double().cpu() - expected).norm()
        assert error <= self.most * expected.norm() + 1e-30, (name, where, float(error))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A device that the kernels run on, or are emulated on."""
    return str(request.param)


@pytest.mark.parametrize("weighted", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_prepare_forms_the_inverse_the_scores_and_the_decays(
    name: str, weighted: bool, device: str
) -> None:
    case = Case(EXAMPLES[name], device, gradients=not weighted)
    call, C = case.call, case.plan.C
    saved = forward.run_prepare(call, case.plan)
    beta = torch.ones(call.tokens.v.shape[:3]) if call.tokens.beta is None else call.tokens.beta
    for x, y in case.exact:
        n, e = len(y.b), beta[x.row, x.tokens, x.hv].double().cpu()
        case.check("P", saved.scores[x.hv, x.slot, :n, :n], y.P, x)
        assert not bool(saved.scores[x.hv, x.slot].triu(1).any())
        if call.rule.has_erase:
            T = y.T * e if is_weighted(call) else y.T
            case.check("T", saved.inverses[x.hv, x.slot, :n, :n], T, x)
            assert not bool(saved.inverses[x.hv, x.slot].triu(1).any())
        if call.rule.has_decay:
            case.check("b_C", saved.ends[x.hv, x.slot], y.b[-1], x)
        # What multiplies the rows of q and k has the rest of the norms in it, at most a factor 2.
        if not call.qk_l2norm:
            erase = y.b if is_weighted(call) else y.b * e
            factors = torch.stack([erase, call.scale * y.b, y.d])
            case.check("factors", saved.factors[:, x.hv, x.slot, :n], factors, x)
        case.check("β", saved.gates[3, x.hv, x.slot, :n], e, x)
        assert not bool(saved.gates[3, x.hv, x.slot, n:C].any())


@pytest.mark.parametrize("segment", [None, 1], ids=["whole", "segments"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_walk_keeps_the_states_and_what_is_written(
    name: str, segment: int | None, device: str
) -> None:
    example = EXAMPLES[name]
    with using("triton", example, segment=segment):
        case = Case(example, device, gradients=True)
        call, plan = case.call, case.plan
        shape = (call.sizes.N, call.sizes.HV, call.sizes.K, call.sizes.V)
        saved, final = forward.run_prepare(call, plan), torch.empty(shape, device=device)
        if segment is not None:
            walk.walk_for_starts(call, plan, saved, final)
        o = walk.walk_for_output(call, plan, saved, final)
        u, states = walk.walk_again(call, plan, saved)
    for x, y in case.exact:
        case.check("S", states[x.hv, x.slot].T, y.S, x)
        if call.rule.has_erase:
            case.check("U", u[x.hv, x.slot, : len(y.b)], y.U, x)
        if segment == 1:
            case.check("start", saved.starts[x.slot, x.hv], y.S, x)
        h = x.hv // (call.sizes.HV // call.sizes.H)
        q = call.tokens.q[x.row, x.tokens, h].double().cpu()
        q = l2norm(q) if call.qk_l2norm else q
        out = call.scale * y.b[:, None] * (q @ y.S) + y.P @ y.U
        case.check("o", o[x.row, x.tokens, x.hv], out, x)
    for (n, hv), S in case.final.items():
        case.check("final", final[n, hv], S, (n, hv))


@pytest.mark.parametrize("kept", ["on", "off"])
@pytest.mark.parametrize("segment", [None, 1], ids=["whole", "segments"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_walk_back_forms_the_gradients_of_states_and_of_what_is_written(
    name: str, segment: int | None, kept: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = EXAMPLES[name]
    monkeypatch.setattr(plan, "_kept", kept)
    with using("triton", example, segment=segment):
        case = Case(example, device, gradients=True)
        out = forward.forward(case.call, case.plan)
        cotangents = case.d_o.contiguous(), case.d_final.contiguous()
        walked = walk.walk_for_gradients(case.call, case.plan, Saved(*out.saved), *cotangents)
    assert case.plan.keep == (kept == "on")
    u, states, d_rhs, d_states, d_initial = walked
    for x, y in case.exact:
        case.check("S", states[x.hv, x.slot].T, y.S, x)
        if case.call.rule.has_erase:
            case.check("U", u[x.hv, x.slot, : len(y.b)], y.U, x)
        case.check("dRHS", d_rhs[x.hv, x.slot, : len(y.b)], y.d_rhs, x)
        case.check("dS", d_states[x.hv, x.slot].T, y.d_end, x)
    for (n, hv), S in case.d_initial.items():
        case.check("dS_0", d_initial[n, hv], S, (n, hv))


@pytest.mark.gpu
def test_a_call_is_captured_into_a_graph_and_runs_on_any_stream() -> None:
    example = replace(EXAMPLES["bfloat16"], device="cuda")
    arguments = example.arguments()
    expected, _ = gdn_ops.gated_delta(**arguments, return_state=True, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside, _ = gdn_ops.gated_delta(**arguments, return_state=True, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = gdn_ops.gated_delta(**arguments, return_state=True, backend="triton")
    graph.replay()
    assert torch.equal(beside, expected) and torch.equal(captured, expected)


@pytest.mark.gpu
def test_tensors_of_another_gpu_than_the_current_one_are_computed_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")

    def on(n: int) -> Example:
        return replace(EXAMPLES["bfloat16"], device=f"cuda:{n}")

    results = [gdn_ops.gated_delta(**on(n).arguments(), backend="triton") for n in range(2)]
    assert results[1].device.index == 1 and torch.equal(results[0].cpu(), results[1].cpu())
