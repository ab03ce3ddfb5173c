"""Kernels compiled without a GPU: what is wrong for one is found, and the defaults are right."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import ahead, check_judgement, failures, sequence  # noqa: E402
from gdn_ops import GATED_DELTA, GATED_DELTA_STEP  # noqa: E402
from gdn_ops.aot import sampling  # noqa: E402
from gdn_ops.aot.gpu_limits import BUDGETS, AllowedSpills, Product  # noqa: E402
from gdn_ops.aot.results import CompiledKernel  # noqa: E402
from gdn_ops.aot.sass import Usage  # noqa: E402
from gdn_ops.backends.triton.aot.compiler import (  # noqa: E402
    TARGETS,
    compile_ahead,
    compile_job,
    specialised,
)
from gdn_ops.backends.triton.aot.usage import amd_usage, products  # noqa: E402
from gdn_ops.backends.triton.host.launcher import launch  # noqa: E402
from gdn_ops.call.bind import Call  # noqa: E402
from gdn_ops.dispatch.backend import Backend, Forward  # noqa: E402
from gdn_ops.kernel_support.launches import recording  # noqa: E402
from gdn_ops.spec.ops import GATED_DELTA_STEPS, OPS  # noqa: E402
from gdn_ops.spec.rules import Limits  # noqa: E402
from triton_kernels import bad  # noqa: E402

REFERENCE = next(sampling.samples([GATED_DELTA.case[sampling.REFERENCE]]))
assert REFERENCE.is_reference


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(
    target: str, kernel: Any, *args: Any, allowed: AllowedSpills | None = None, **kwargs: Any
) -> CompiledKernel:
    """Compile one launch as if the reference made it."""
    with recording(target) as launches:
        launch(kernel, (1,), *args, enable_fp_fusion=True, **kwargs)
    _, job = specialised(launches[0], target, REFERENCE)
    return compile_job(job, target, allowed or {})


def product(target: str, m: int, n: int, k: int, **options: Any) -> CompiledKernel:
    a, b, d = meta(m, k), meta(k, n), meta(m, n, dtype=torch.float32)
    return compiled(target, bad.product, a, b, d, m, n, k, **options)


# What is wrong is found.


def test_more_shared_memory_than_a_program_has_is_a_failure() -> None:
    row = product("sm_90", 64, 64, 1024, num_warps=4)
    assert row.shared > 232448
    text = f"shared memory is {row.shared} bytes, should be at most 232448 on sm_90"
    assert text in row.failures
    assert product("sm_90", 64, 64, 64, num_warps=4).failures == ()


def normalise(
    target: str, m: int, n: int, warps: int, allowed: AllowedSpills | None = None
) -> CompiledKernel:
    x = meta(m, n, dtype=torch.float32)
    return compiled(target, bad.normalise, x, x, m, n, num_warps=warps, allowed=allowed)


@pytest.mark.parametrize(("target", "rows"), [("sm_90", 128), ("gfx942", 256)])
def test_spills_are_a_failure_of_a_reference_unless_they_are_granted(
    target: str, rows: int
) -> None:
    # A warp must hold all of x: 512 registers a thread.
    row = normalise(target, rows, 128, 1)
    assert row.spills > 0 and row.stack > 0
    assert row.failures == (f"spills are {row.spills}, should be none",)
    assert row.note == ""
    key, why = ("normalise", target), "all of x is needed twice"
    allowed = normalise(target, rows, 128, 1, {key: (row.spills, why)})
    assert allowed.failures == () and allowed.note == why
    refused = normalise(target, rows, 128, 1, {key: (row.spills - 1, why)})
    text = f"spills are {row.spills}, should be at most {row.spills - 1}"
    assert refused.failures == (text,) and refused.note == ""
    calm = normalise(target, 32, 32, 4)
    assert calm.failures == () and calm.spills == calm.stack == 0


def test_a_large_product_of_bfloat16_without_hgmma_is_a_failure_on_sm_90() -> None:
    row = product("sm_90", 64, 64, 64, num_warps=2)
    assert row.instructions.keys() == {"HMMA"}
    text = "no HGMMA on sm_90, but a bf16 product of 64 x 64 by 64 x 64"
    assert row.failures == (text,)
    good = product("sm_90", 64, 64, 64, num_warps=4)
    assert good.instructions.keys() == {"HGMMA"} and good.failures == ()
    # A warp group multiplies 64 rows: fewer cannot use it.
    small = product("sm_90", 32, 64, 64, num_warps=4)
    assert small.instructions.keys() == {"HMMA"} and small.failures == ()


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")],
)
def test_every_target_multiplies_in_its_matrix_unit(target: str, instruction: str) -> None:
    row = product(target, 64, 64, 64, num_warps=4)
    assert row.target == target and row.kernel == "product" and row.sample == REFERENCE.label
    assert row.options == {"num_warps": 4, "enable_fp_fusion": True}
    assert row.instructions[instruction] > 0
    assert 0 < row.shared <= BUDGETS[target].shared and 0 < row.registers <= 512
    assert row.failures == ()


def test_what_does_not_compile_is_a_failure_though_it_runs_in_an_emulation() -> None:
    x = torch.zeros(1)
    launch(bad.defined_in_one_branch, (1,), x, 3)
    assert x.item() == 1.5
    (failure,) = compiled("sm_90", bad.defined_in_one_branch, x.to("meta"), 3).failures
    assert failure == (
        "does not compile: CompilationError: NameError('x is not defined'), in: tl.store(X_, x)"
    )


# The specialisation is that of a launch.


@contextmanager
def driver_for(target: str) -> Iterator[None]:
    """Give Triton's own warm-up enough of a driver: one GPU that cannot launch."""
    driver = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        yield
    bad.gather.device_caches.clear()


GATHERS = {
    "aligned": (meta(64), meta(64), None, 64, 32, 0.5),
    "a view that is not aligned": (meta(64)[1:], meta(64), None, 64, 32, 0.5),
    "odd": (meta(64), meta(64), meta(64), 63, 7, 0.5),
    "one": (meta(64), meta(64), None, 64, 1, 1.0),
    "wide": (meta(64), meta(2**31), None, 2**40, 1, 1.0),
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_specialisation_is_the_one_that_a_launch_makes(target: str) -> None:
    hashes = {}
    for name, args in GATHERS.items():
        with recording(target) as launches:
            launch(bad.gather, (1,), *args, N=64, num_warps=2, enable_fp_fusion=True)
        _, job = specialised(launches[0], target, REFERENCE)
        gpu = TARGETS[target]
        ours = triton.compile(job.source, target=gpu, options=job.options.__dict__)
        with driver_for(target):
            theirs = bad.gather.warmup(*args, N=64, num_warps=2, enable_fp_fusion=True, grid=(1,))
        assert ours.hash == theirs.hash, name
        hashes[name] = ours.hash
    assert len(set(hashes.values())) == len(GATHERS)


# Launches of a backend are found, and compiled once.


class Gathering(Backend):
    """A backend with one kernel, specialised by whether T is odd."""

    name = "gathering"
    limits = Limits(devices=("cuda",), dtypes=("bfloat16", "float32"), head_dims=(128,))

    def forward(self, call: Call) -> Forward:
        s = call.sizes
        o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.v.dtype, device=call.device)
        for _ in range(2):
            launch(
                bad.gather, (1,), call.tokens.v, o, None, s.T, 3, 1.0, N=16, enable_fp_fusion=True
            )
        return Forward(o, torch.empty((s.N, s.HV, s.K, s.V), device=call.device))


def test_a_kernel_that_is_launched_alike_is_compiled_once() -> None:
    odd, even, again = sequence(T=4095), sequence(), sequence(T=2048)
    excluded = [sequence(dtype="float16"), sequence(K=64)]
    assert sampling.reasons_against(Gathering(), excluded[0]) == [
        "dtype float16 (supported: bfloat16, float32)"
    ]
    rows = list(compile_ahead(Gathering(), "sm_90", [odd, even, *excluded, again, odd]))
    assert [row.sample for row in rows] == [odd.label, even.label]
    assert all(row.failures == () for row in rows)


def test_a_kernel_of_a_reference_is_judged_as_one_whoever_launches_it_first() -> None:
    class Spilling(Gathering):
        def forward(self, call: Call) -> Forward:
            x = torch.empty(128, 128, device=call.device)
            launch(bad.normalise, (1,), x, x, 128, 128, num_warps=1, enable_fp_fusion=True)
            return Forward(x, x)

    check_judgement(compile_ahead, Spilling(), "sm_90")


def test_sources_are_translated_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []
    make_ir = triton.compiler.ASTSource.make_ir

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return make_ir(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(triton.compiler.ASTSource, "make_ir", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # Results that are in Triton's cache are not translated again.
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    samples = [sequence(T=t) for t in (4095, 4096)]
    assert len(list(compile_ahead(Gathering(), "sm_90", samples))) == 2
    assert most == [1, 1]


# What a compiler prints is read.


def test_usage_on_amd_is_read_from_the_assembly() -> None:
    assembly = """
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        v_smfmac_f32_16x16x32_bf16 v[0:3], v[4:5], v[6:9], v10
    .agpr_count: 46
    .private_segment_fixed_size: 16
    .vgpr_count:     302
    .vgpr_spill_count: 3
    """
    assert amd_usage(assembly) == Usage(302, 3, 16, {"MFMA": 1, "SMFMA": 1})
    with pytest.raises(ValueError, match=r"^the assembly has no .vgpr_count$"):
        amd_usage("s_endpgm")


def test_products_are_read_from_the_representation_of_a_kernel() -> None:
    text = """
    %a = tt.dot %k, %t, %c, inputPrecision = tf32 : tensor<64x128xbf16> * tensor<128x32xbf16> -> tensor<64x32xf32> loc(#loc)
    %b = tt.dot %k, %t, %c : tensor<2x16x64xf32> * tensor<2x64x16xf32> -> tensor<2x16x16xf32>
    %d = arith.addf %a, %a : tensor<64x32xf32>
    """  # noqa: E501
    assert products(text) == [Product(64, 32, 128, "bf16"), Product(16, 16, 64, "f32")]


# The backend itself.


DEFAULTS = [
    # One of every class of widths and of dtypes that has a configuration of its own.
    *(GATED_DELTA.case[name] for name in (sampling.REFERENCE, "tiny", "paper-400m-2048")),
    *(GATED_DELTA_STEP.case[name] for name in ("qwen-16-32-step-b1", "olmo-hybrid-step")),
    *(GATED_DELTA_STEPS.case[name] for name in ("qwen-16-32-steps4-b1", "tiny-steps")),
]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_default_configuration_is_fit_for(target: str) -> None:
    rows = list(ahead("triton", target, sampling.samples(DEFAULTS)))
    assert failures(rows) == []
    reference = {row.kernel for row in rows if row.sample.startswith(sampling.REFERENCE)}
    # Three launches forward, at most five more backward.
    assert 3 < len(reference) <= 3 + 5, reference
    assert all(row.registers > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_the_api_allows_is_fit_for(target: str) -> None:
    cases = [case for op in OPS for case in op.cases]
    assert failures(ahead("triton", target, sampling.samples(cases, everything=True))) == []
