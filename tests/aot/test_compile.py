"""Calls on meta tensors, and the command that compiles what a backend launches for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from command_line import run
from gdn_ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.aot import sampling
from gdn_ops.aot.results import CompiledKernel, CompilesAhead, Sample
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend, Forward, Grads
from gdn_ops.spec.ops import GATED_DELTA_STEPS, OPS
from gdn_ops.spec.rules import Limits

EVERYTHING = [case for op in OPS for case in op.cases]


class Ahead(Backend):
    """A backend that "compiles" one kernel per sample, of which a spilling one fails."""

    name = "ahead"
    limits = Limits(devices=("cuda",), dtypes=("bfloat16",), head_dims=(128,))
    targets = ("here", "there")

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        for sample in samples:
            if sampling.reasons_against(self, sample):
                continue
            bad = target == "there" and sample.call.needs_grad
            yield CompiledKernel(
                kernel="kernel[x]",
                sample=sample.label,
                target=target,
                options={"num_warps": 4, "enable_fp_fusion": True},
                shared=1024,
                registers=255,
                spills=7 if bad else 0,
                instructions={"HGMMA": 8, "HMMA": 2},
                failures=("spills are 7, should be none",) if bad else (),
                note="it is granted" if sample.call.op is GATED_DELTA_STEP else "",
                seconds=0.5,
            )


@pytest.fixture(autouse=True)
def _ahead(registry_as_found: None) -> None:
    registry.register_backend(Ahead)


# Samples.


def test_every_case_is_sampled_as_the_call_it_names() -> None:
    by_label = {sample.label: sample for sample in sampling.samples(EVERYTHING)}
    sequences = [f"{c.name} {how}" for c in GATED_DELTA.cases for how in ("inference", "training")]
    steps = [c.name for op in (GATED_DELTA_STEP, GATED_DELTA_STEPS) for c in op.cases]
    assert list(by_label) == sequences + steps
    for case in EVERYTHING:
        spec = sampling.spec_of(case)
        sample = by_label[f"{case.name} training" if spec is GATED_DELTA else case.name]
        call, s = sample.call, case.sizes
        assert call.op is spec and call.sizes == s
        assert call.needs_grad == (spec is GATED_DELTA)
        tokens = () if spec is GATED_DELTA_STEP else (s.T,)
        assert call.tokens.q.shape == (s.B, *tokens, s.H, s.K)
        assert call.tokens.q.dtype == getattr(torch, case.dtype)
        assert call.tokens.alpha is not None and call.tokens.alpha.dtype == torch.float32
        assert (call.state is None) == (spec is GATED_DELTA)
        of_channels = (s.K,) if case.channels else ()
        assert call.tokens.alpha.shape == (s.B, *tokens, s.HV, *of_channels)
        # Budgets of registers are those of one decay per head.
        is_reference = s.K == s.V == 128 and not case.channels
        assert call.tokens.q.is_meta and sample.is_reference == is_reference


def test_everything_is_what_the_defaults_are_not_and_never_a_reference() -> None:
    more = list(sampling.samples([], everything=True))
    assert not any(sample.is_reference for sample in more)
    labels = [sample.label for sample in more]
    assert len(set(labels)) == len(labels)
    calls = [sample.call for sample in more]
    for op in OPS:
        mine = [call for call in calls if call.op is op]
        assert {call.rule.name for call in mine} == {rule.name for rule in op.rules}
        dtypes = {call.tokens.q.dtype for call in mine}
        assert dtypes == {torch.bfloat16, torch.float16, torch.float32}
        assert any(call.qk_l2norm for call in mine)
        assert any(call.tokens.log_alpha is not None for call in mine)
        assert {(24, 40), (256, 256)} <= {(call.sizes.K, call.sizes.V) for call in mine}
    sequences = [call for call in calls if call.op is GATED_DELTA]
    assert {call.chunk_size for call in sequences} == {None, 16, 32, 64}
    assert any(call.cu_seqlens is not None and call.sizes.N == 7 for call in sequences)
    assert any(call.tokens.beta is None for call in sequences)
    pools = [call for call in calls if call.state_indices is not None]
    assert {call.op.name for call in pools} == {"gated_delta_step", "gated_delta_steps"}
    assert all(call.state is not None and call.state.shape[0] == 64 for call in pools)
    assert any(call.return_states for call in calls)


class Noting(Backend):
    """Notes what it is made to do."""

    name = "noting"
    limits = Limits(devices=("cuda",), dtypes=("bfloat16",), head_dims=(128,))

    def __init__(self) -> None:
        self.noted: list[str] = []

    def forward(self, call: Call) -> Forward:
        self.noted.append("forward")
        s = call.sizes
        state = torch.empty((s.N, s.HV, s.K, s.V), device=call.device)
        return Forward(torch.empty_like(call.tokens.v), state, (call.tokens.k,))

    def backward(
        self,
        call: Call,
        saved: tuple[torch.Tensor, ...] | None,
        d_o: torch.Tensor,
        d_state: torch.Tensor,
    ) -> Grads:
        assert saved is not None and saved[0] is call.tokens.k
        assert d_o.shape == call.tokens.v.shape and d_o.dtype == call.tokens.v.dtype
        assert d_state.shape == (call.sizes.N, call.sizes.HV, call.sizes.K, call.sizes.V)
        self.noted.append("backward")
        return Grads(*call.tokens, call.state)

    def decode_one(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        self.noted.append("step")
        assert call.state is not None
        return call.tokens.v, call.state


def test_a_sample_makes_a_backend_do_what_the_api_would() -> None:
    names = ("qwen-16-32-2048", "qwen-16-32-step-b1", "qwen-16-32-steps4-b1")
    cases = [case for case in EVERYTHING if case.name in names]
    noting = Noting()
    for sample in sampling.samples(cases):
        assert sampling.reasons_against(noting, sample) == []
        sampling.run(noting, sample)
    assert noting.noted == ["forward", "forward", "backward", "step", *["step"] * 4]


def test_a_backend_says_what_it_cannot_run_but_for_the_meta_device() -> None:
    (tiny, _) = sampling.samples([GATED_DELTA.case["tiny"]])
    assert sampling.reasons_against(Noting(), tiny) == [
        "dtype float32 (supported: bfloat16)",
        "K=32 (supported: 128)",
        "V=48 (supported: 128)",
    ]


# The command.


def test_compile_shows_a_table_and_fails_with_one_where_a_kernel_fails(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    cases = ("qwen-16-32-2048", "qwen-16-32-step-b1", "tiny")
    result = run("compile", *cases, "--backend", "ahead", "--out", path)
    assert result.exit_code == 1, result.output
    assert "compiled for here" in result.stdout and "compiled for there" in result.stdout
    failure = "kernel[x] (qwen-16-32-2048 training, there): spills are 7, should be none"
    assert failure in result.stdout.splitlines()
    row = next(line for line in result.stdout.splitlines() if "b1" in line and "granted" in line)
    for text in ("warps 4", "1024", "255", "HGMMA 8, HMMA 2"):
        assert text in row
    data = json.loads(path.read_text())
    assert data["backend"] == "ahead" and data["versions"]["torch"] == torch.__version__
    assert [(k["sample"], k["target"]) for k in data["kernels"]] == [
        (sample, target)
        for target in ("here", "there")
        for sample in (
            "qwen-16-32-2048 inference",
            "qwen-16-32-2048 training",
            "qwen-16-32-step-b1",
        )
    ]
    assert data["kernels"][4]["failures"] == ["spills are 7, should be none"]
    assert "seconds" not in data["kernels"][0]


def test_compile_ends_with_zero_where_all_pass() -> None:
    result = run("compile", "--backend", "ahead", "--target", "here")
    assert result.exit_code == 0, result.output
    assert "compiled for there" not in result.stdout
    # Of K = V = 128 in bfloat16: 12 sequences, in inference and in training, 2 steps, 2 drafts.
    assert sum(line.endswith(("  pass", "  granted")) for line in result.stdout.splitlines()) == 28
    more = run("compile", "qwen-16-32-2048", "--backend", "ahead", "--target", "here", "--all")
    assert more.exit_code == 0
    assert "rule delta training" in more.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_1"), "unknown target 'sm_1', known: here, there"),
        (("nope",), "unknown case 'nope', known: tiny, qwen-16-32-2048"),
    ],
)
def test_compile_names_what_it_does_not_know(arguments: tuple[str, ...], message: str) -> None:
    result = run("compile", "--backend", "ahead", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gdn-ops: {message}")


def test_a_backend_compiles_ahead_where_it_has_the_methods_for_it() -> None:
    assert isinstance(Ahead(), CompilesAhead)
    assert not isinstance(Noting(), CompilesAhead)
