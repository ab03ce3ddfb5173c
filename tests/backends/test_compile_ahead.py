"""Compile kernels without a GPU by both compilers, and find what is wrong for one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ahead_of_time import Launching, ahead, compile_for, compiled, failures, sequence
from gdn_ops.aot import sampling
from gdn_ops.aot.processors import GPUS
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS, OPS
from kernel_backends import part

HOPPER = {"triton": "sm_90", "tilelang": "sm_90a"}
TWO_TARGETS = [
    *(("triton", target) for target in ("sm_90", "gfx942")),
    *(("tilelang", target) for target in ("sm_90a", "sm_80")),
]
KERNELS = {"triton": "triton_kernels.bad", "tilelang": "tilelang_kernels.compiled"}
BFLOAT16 = {"triton": "bf16", "tilelang": "bfloat16"}


@pytest.fixture(params=HOPPER)
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend whose compiler is installed."""
    pytest.importorskip(request.param)
    if request.param == "tilelang":
        try:
            part("tilelang", "aot.cubin").check("sm_80")
        except FileNotFoundError as error:
            pytest.skip(str(error))
    return str(request.param)


def launching(
    name: str, kernel: str, tensors: tuple[Any, ...], warps: int, **sizes: Any
) -> Callable[[Call], None]:
    """Return what launches a kernel that both backends have."""
    launch = part(name, "host.launcher").launch
    function = getattr(importlib.import_module(KERNELS[name]), kernel)
    if name == "tilelang":
        return lambda call: launch(function, sizes | {"threads": 32 * warps}, *tensors)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return lambda call: launch(function, (1,), *tensors, **sizes, **options)


def product(name: str, M: int = 64, K: int = 64, warps: int = 4) -> Callable[[Call], None]:
    """Return what launches a product of M x K by K x 64 in bfloat16."""
    a, b = (torch.empty(shape, device="meta").bfloat16() for shape in ((M, K), (K, 64)))
    dtype = {"dtype": "bfloat16"} if name == "tilelang" else {}
    d = torch.empty(M, 64, device="meta")
    return launching(name, "product", (a, b, d), warps, M=M, N=64, K=K, **dtype)


def normalise(name: str, M: int, N: int, warps: int) -> Callable[[Call], None]:
    """Return what launches a kernel that needs all of x (M, N) twice."""
    x = torch.empty(M, N, device="meta")
    return launching(name, "normalise", (x, x), warps, M=M, N=N)


def spilling(name: str, rows: int | None = None) -> Callable[[Call], None]:
    """Return what launches a kernel of which a warp must hold 320 registers a thread, or more."""
    return normalise(name, rows or {"triton": 128, "tilelang": 80}[name], 128, 1)


@pytest.mark.parametrize(
    ("name", "target", "instruction"),
    [
        ("triton", "sm_80", "HMMA"),
        ("triton", "sm_90", "HGMMA"),
        ("triton", "sm_100", "UTCHMMA"),
        ("triton", "gfx942", "MFMA"),
        ("tilelang", "sm_80", "HMMA"),
        ("tilelang", "sm_90a", "HGMMA"),
        pytest.param("tilelang", "sm_100a", "HMMA", marks=pytest.mark.slow),
        pytest.param("tilelang", "sm_120a", "HMMA", marks=pytest.mark.slow),
    ],
    indirect=["name"],
)
def test_every_target_multiplies_in_its_matrix_unit(
    name: str, target: str, instruction: str
) -> None:
    row = compiled(name, target, product(name))
    assert row.target == target and row.kernel == "product"
    assert row.instructions[instruction] > 0
    assert 0 < row.shared <= GPUS[target].program_shared and 0 < row.registers <= 512
    assert row.failures == ()
    if name == "triton":
        assert row.options == {"num_warps": 4, "enable_fp_fusion": True}
        return
    assert row.options == {"M": 64, "N": 64, "K": 64, "dtype": "bfloat16", "threads": 128}
    # 64 x 64 x 64 by an instruction of 64 x 64 x 16 a warp group, or of 16 x 8 x 16 a warp.
    assert row.instructions == {instruction: {"HGMMA": 4, "HMMA": 32}[instruction]}
    assert row.shared == 2 * 64 * 64 * 2
    assert 32 < row.registers <= 255 and row.spills == row.stack == 0
    assert row.note == "" and row.seconds > 0


@pytest.mark.parametrize(
    ("name", "target", "most"),
    [("triton", "sm_90", 232448), ("tilelang", "sm_90a", 232448), ("tilelang", "sm_80", 166912)],
    indirect=["name"],
)
def test_more_shared_memory_than_a_program_has_is_a_failure(
    name: str, target: str, most: int
) -> None:
    row = compiled(name, target, product(name, K=1024))
    assert row.shared > most
    text = f"shared memory is {row.shared} bytes, should be at most {most} on {target}"
    assert text in row.failures
    if name == "tilelang":
        assert row.shared == 2 * 64 * 1024 * 2 and row.failures == (text,)


@pytest.mark.parametrize(("name", "target"), TWO_TARGETS, indirect=["name"])
def test_spills_are_a_failure_of_a_reference_unless_they_are_granted(
    name: str, target: str
) -> None:
    launches = spilling(name, 256 if target == "gfx942" else None)
    row = compiled(name, target, launches)
    assert row.spills > 0 and row.stack > 0
    assert row.failures == (f"spills are {row.spills}, should be none",)
    assert row.note == ""
    assert compiled(name, target, launches, is_reference=False).failures == ()
    key, why = ("normalise", target), "all of x is needed twice"
    allowed = compiled(name, target, launches, {key: (row.spills, why)})
    assert allowed.failures == () and allowed.note == why
    refused = compiled(name, target, launches, {key: (row.spills - 1, why)})
    text = f"spills are {row.spills}, should be at most {row.spills - 1}"
    assert refused.failures == (text,) and refused.note == ""


@pytest.mark.parametrize(("name", "target"), TWO_TARGETS, indirect=["name"])
def test_a_kernel_that_multiplies_nothing_needs_no_matrix_unit(name: str, target: str) -> None:
    calm = compiled(name, target, normalise(name, 16, 64, 2))
    assert calm.instructions == {} and calm.failures == ()
    assert calm.registers > 0 and calm.spills == calm.stack == 0


def test_a_large_product_of_bfloat16_without_hgmma_is_a_failure_on_hopper(name: str) -> None:
    target = HOPPER[name]
    # Two warps are half a warp group.
    row = compiled(name, target, product(name, warps=2))
    assert row.instructions.keys() == {"HMMA"}
    text = f"no HGMMA on {target}, but a {BFLOAT16[name]} product of 64 x 64 by 64 x 64"
    assert row.failures == (text,)
    good = compiled(name, target, product(name))
    assert good.instructions.keys() == {"HGMMA"} and good.failures == ()
    # A warp group multiplies 64 rows: fewer cannot use it.
    small = compiled(name, target, product(name, M=32))
    assert small.instructions.keys() == {"HMMA"} and small.failures == ()


# Launches of a backend are found, and compiled once.


def test_a_kernel_that_is_launched_alike_is_compiled_once(name: str) -> None:
    def twice(call: Call) -> None:
        v, M = call.tokens.v, 32 if call.tokens.v.dtype == torch.float32 else 16
        for _ in range(2):
            if name == "tilelang":
                normalise(name, M, 64, 2)(call)
            else:
                launching(name, "gather", (v, v, None, call.sizes.T, 3, 1.0), 4, N=16)(call)

    backend = Launching(twice, dtypes=("bfloat16", "float32"), head_dims=(128,))
    odd, even, wide = sequence(T=4095), sequence(), sequence(dtype="float32")
    # (1, 2**20, 32, 128): 2**32 elements, to which offsets of 64 bits are the same code.
    huge = sequence(T=2**20)
    excluded = [sequence(dtype="float16"), sequence(K=64)]
    assert sampling.reasons_against(backend, excluded[0]) == [
        "dtype float16 (supported: bfloat16, float32)"
    ]
    samples = [odd, even, *excluded, wide, huge, odd]
    rows = compile_for(name, HOPPER[name], backend, samples)
    # Triton makes another kernel where T is a multiple of 16.
    first = [odd, even, wide] if name == "triton" else [odd, wide]
    assert [row.sample for row in rows] == [sample.label for sample in first]
    assert all(row.failures == () and row.registers > 0 for row in rows)


def test_a_kernel_of_a_reference_is_judged_as_one_whoever_launches_it_first(name: str) -> None:
    backend, varied = Launching(spilling(name)), sequence(T=1024)
    (row,) = compile_for(name, HOPPER[name], backend, [varied])
    assert row.spills > 0 and row.failures == ()
    (row,) = compile_for(name, HOPPER[name], backend, [varied, sequence()])
    assert row.sample == varied.label
    assert row.failures == (f"spills are {row.spills}, should be none",)


# The backends themselves.


@pytest.mark.parametrize("name", ["tilelang"], indirect=True)
def test_what_a_backend_refuses_on_a_target_is_left_out(name: str) -> None:
    # Three parts of such keys do not fit 99 KiB.
    assert list(ahead(name, "sm_120a", iter([sequence(dtype="float32", K=256)]))) == []


REFERENCES = (GATED_DELTA.case[sampling.REFERENCE], GATED_DELTA_STEP.case["qwen-16-32-step-b1"])
DEFAULTS = {
    # One of every class of widths and of dtypes that has a configuration of its own.
    "triton": [
        *REFERENCES,
        *(GATED_DELTA.case[name] for name in ("tiny", "paper-400m-2048")),
        GATED_DELTA_STEP.case["olmo-hybrid-step"],
        *(GATED_DELTA_STEPS.case[name] for name in ("qwen-16-32-steps4-b1", "tiny-steps")),
    ],
    "tilelang": REFERENCES,
}
MOST = {"triton": 2 + 4, "tilelang": 2 + 2 + 5}
"""Launches forward and backward, with those for segments."""


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *TWO_TARGETS[:2],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in TWO_TARGETS[2:]),
    ],
    indirect=["name"],
)
def test_every_default_configuration_is_fit_for(name: str, target: str) -> None:
    rows = list(ahead(name, target, sampling.samples(DEFAULTS[name])))
    assert failures(rows) == []
    assert all(row.registers > 0 for row in rows)
    launches = [(row.kernel, launch) for row in rows for launch in row.launches]
    assert [(kernel, x.sample) for kernel, x in launches if x.prediction is None] == []
    kernels = [row.kernel for row in rows if row.sample.startswith(sampling.REFERENCE)]
    assert {"prepare", "walk"} < set(kernels) and "tokens" in {row.kernel for row in rows}
    assert len(set(kernels) if name == "triton" else kernels) <= MOST[name], kernels


def test_every_launch_of_a_case_with_budgets_is_held_to_its_own(name: str) -> None:
    budgets, target = part(name, "aot.budgets").current(), HOPPER[name]
    if not budgets:
        pytest.skip(f"no budgets for this version of {name}")
    cases = sorted({case for case, *_ in budgets})
    assert sampling.REFERENCE in cases
    samples = [*sampling.samples([GATED_DELTA.case[case] for case in cases])]
    rows = list(ahead(name, target, iter(samples)))
    assert failures(rows) == []
    made = {
        (x.sample.rpartition(" ")[0], row.kernel, x.direction, row.target)
        for row in rows
        for x in row.launches
    }
    # Behind the direction may be the place of the launch.
    assert made == {(*at[:2], at[2].partition(" ")[0], at[3]) for at in budgets}
    # Budgets that nothing can hold, and one that is missing.
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    less = {key: budget._replace(instructions=0) for key, budget in budgets.items()}
    case, kernel, direction, _ = next(iter(less))
    del less[case, kernel, direction, target]
    compiler = part(name, "aot.compiler")
    rows = list(compiler.compile_ahead(backend, target, samples, budgets=less))
    missing = f"{direction}: no budget on {target}, should be in the table of budgets"
    assert (kernel, direction) in {(row.kernel, x.direction) for row in rows for x in row.launches}
    for row in rows:
        ways = {text.partition(": ")[0] for text in row.failures}
        assert ways == {x.direction for x in row.launches}
        is_missing = row.kernel == kernel and direction in ways
        others = [text for text in row.failures if text != missing]
        assert row.failures.count(missing) == is_missing
        assert all(text.endswith("should be at most 0") for text in others)


TARGETS = {
    "triton": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "tilelang": ("sm_90a", "sm_80", "sm_100a", "sm_120a"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name, targets in TARGETS.items() for target in targets],
    indirect=["name"],
)
def test_everything_the_api_allows_is_fit_for(name: str, target: str) -> None:
    cases = [case for op in OPS for case in op.cases]
    assert failures(ahead(name, target, sampling.samples(cases, everything=True))) == []
