"""The Triton backend: what the kit cannot draw. Launches, bytes, memory, configurations, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from fences import all_fenced, assert_untouched, fenced
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.backend import MOST_STEPS
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.testing import Example
from gdn_ops.testing.example import run
from gdn_ops.testing.oracle import judge, judgement
from kernel_backends import (
    SIZES,
    check_absence,
    check_emulation,
    check_reason,
    check_saved,
    forbid_copies,
    launched,
    linear_arguments,
    meta_call,
    row_of,
)
from processes import python

pytest.importorskip("triton")

from gdn_ops.backends import triton as backend
from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host import table
from gdn_ops.backends.triton.host.plan import forward_bytes, make_plan
from gdn_ops.backends.triton.host.shapes import Config, Tiles
from gdn_ops.kernel_support.launches import recording

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")

AWKWARD = Example(
    T=70, R=2, K=24, V=40, gate="extreme", beta="wide", initial_state=True, qk_l2norm=True, seed=3
)
"""Two chunks of 64, head dims off powers of two, zeros in the gate."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_every_chunk_size_and_dtype_is_the_definition(dtype: str, chunk_size: int) -> None:
    example = dataclasses.replace(AWKWARD, dtype=dtype, chunk_size=chunk_size)
    verdict = judge(example, "triton")
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("K", "V"), [(96, 192), (192, 96), (80, 80), (256, 256), (128, 256), (200, 1), (1, 130)]
)
def test_wide_heads_off_powers_of_two_are_the_definition(K: int, V: int) -> None:
    example = Example(T=20, K=K, V=V, gate="extreme", beta="wide", dtype="bfloat16", seed=1)
    verdict = judge(example, "triton")
    assert verdict.passed, verdict


CHOICES: dict[str, dict[str, Any]] = {
    "every two chunks": {"chunks_per_state": 2, "C": 16},
    "every four chunks": {"chunks_per_state": 4, "C": 16},
    "half squares": {"pair_rows": 32},
    "whole squares": {"pair_rows": 64},
    "k held": {"reload": False},
    "k read again": {"reload": True},
    "narrow tiles": {
        name: Tiles(16, 4, 1) for name in configs.KERNELS if name not in ("solve", "measured")
    },
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("lengths", [None, (70, 0, 17, 33)])
def test_no_configuration_changes_the_function(
    choice: str, lengths: tuple[int, ...] | None
) -> None:
    tokens = AWKWARD.T if lengths is None else sum(lengths)
    example = dataclasses.replace(AWKWARD, dtype="bfloat16", lengths=lengths, T=tokens)
    key = configs.tables.sequence_key(torch.device("cpu"), torch.bfloat16, example.K, example.V)
    row = Row(key, dataclasses.replace(table.SEQUENCE[key], **CHOICES[choice]))
    judgement(example)
    with configs.tables.using(row):
        verdict = judge(example, "triton")
    assert verdict.passed, verdict


def test_many_packed_sequences_are_found_by_every_chunk() -> None:
    # More sequences than are searched at once, empty ones and runs of one token among them.
    lengths = tuple(17 if n % 64 == 3 else n % 2 for n in range(140))
    example = Example(T=sum(lengths), lengths=lengths, K=8, V=8, chunk_size=16, initial_state=True)
    verdict = judge(example, "triton")
    assert verdict.passed, verdict


def test_boundaries_may_lie_apart() -> None:
    arguments = dataclasses.replace(AWKWARD, lengths=(30, 40), T=70).arguments()
    expected = gdn_ops.gated_delta(**arguments, backend="triton")
    wide = torch.full((6,), -1)
    wide[::2] = arguments["cu_seqlens"]
    arguments["cu_seqlens"] = wide[::2]
    assert torch.equal(gdn_ops.gated_delta(**arguments, backend="triton"), expected)


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_every_gpu_gets_a_row_that_it_can_run(capability: tuple[int, int], row: str) -> None:
    assert row_of(configs, capability) == row


def test_float32_means_float32() -> None:
    example = Example(T=130, R=2, K=64, V=64, beta="wide", gate="slow", initial_state=True)
    reference = judgement(example).reference
    found = example.run("triton")
    for name, x in found.items():
        error = (x.double() - reference[name]).norm() / reference[name].norm()
        assert error < 1e-6, name
    assert configs.float32_products == "tf32x3"


def test_the_same_call_gives_the_same_bits() -> None:
    for dtype in ("bfloat16", "float32"):
        example = dataclasses.replace(AWKWARD, dtype=dtype)
        first, second = example.run("triton"), example.run("triton")
        for name in first:
            assert torch.equal(first[name], second[name]), name


# Memory: inputs and scratch lie between fences, and every scratch tensor starts as NaN.


MEMORY_CASES = [
    AWKWARD,
    dataclasses.replace(AWKWARD, dtype="bfloat16", K=17, V=33, T=17, chunk_size=16),
    dataclasses.replace(AWKWARD, rule="gated", lengths=(5, 0, 66, 1), T=72, K=16, V=16),
    dataclasses.replace(AWKWARD, rule="linear", qk_l2norm=False, T=33),
    dataclasses.replace(AWKWARD, T=6, seed=9),
]


@pytest.mark.parametrize("example", MEMORY_CASES, ids=repr)
def test_no_kernel_touches_memory_that_is_not_its_own(
    example: Example, allocated: list[Tensor]
) -> None:
    arguments = all_fenced(example.arguments())
    allocated.clear()
    cotangents = tuple(fenced(x, float("nan")) for x in example.cotangents())
    allocated.clear()
    found = run(arguments, "triton", cotangents)  # type: ignore[arg-type]
    for name, x in found.items():
        assert not bool(x.isnan().any()), name
    assert allocated
    assert_untouched(allocated)
    with torch.no_grad():
        allocated.clear()
        o, state = gdn_ops.gated_delta(**arguments, return_state=True, backend="triton")
        assert not bool(o.isnan().any() | state.isnan().any())
        assert_untouched(allocated)


def test_a_strided_view_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    # q, k and v as a model slices them out of one projection: no copy is made of them.
    B, T, H, K = 2, 20, 2, 16
    mixed = torch.randn(B, T, 3 * H * K)
    q, k, v = (x.unflatten(-1, (H, K)) for x in mixed.split(H * K, -1))
    gate = torch.rand(B, T, H)
    options: dict[str, Any] = {"alpha": gate, "qk_l2norm": True, "backend": "triton"}
    expected = gdn_ops.gated_delta(q.clone(), k.clone(), v.clone(), **options)
    forbid_copies(monkeypatch)
    assert torch.equal(gdn_ops.gated_delta(q, k, v, **options), expected)


# Launches and bytes, from what a call on the meta device would launch.


def test_forward_takes_three_launches_and_backward_five() -> None:
    triton = backend.Triton()
    call = meta_call(True, **SIZES)
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        forward = [launch.kernel.__name__ for launch in launches]
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
    names = [launch.kernel.__name__ for launch in launches]
    assert forward == ["solve", "states", "output"]
    assert names[3:] == [
        "states",
        "local_gradients",
        "state_gradients",
        "pair_gradients",
        "token_gradients",
    ]


def test_a_short_call_without_gradients_takes_one_launch() -> None:
    triton = backend.Triton()
    call = meta_call(False, **(SIZES | {"T": MOST_STEPS}))
    assert launched("sm_90", lambda: triton.forward(call)) == ["tokens"]


def test_the_forward_moves_at_most_1_4_gigabytes_at_8192_tokens() -> None:
    call = meta_call(False, **SIZES)
    moved = forward_bytes(call, make_plan(call))
    assert sum(moved.values()) <= 1.4e9
    # Counted from the launches themselves: every tensor that a launch is given, once. `output`
    # is also given v, which it reads for rules without an error term only.
    triton = backend.Triton()
    with torch.no_grad(), recording("sm_90") as launches:
        triton.forward(call)
    for launch in launches:
        tensors = [x for x in launch.args if isinstance(x, Tensor)]
        given = sum(x.numel() * x.element_size() for x in tensors)
        if launch.kernel.__name__ == "output":
            given -= 2 * 8192 * 64 * 128
        assert given == moved[launch.kernel.__name__], launch.kernel.__name__


def test_saved_tensors_are_as_the_tracer_was_told() -> None:
    check_saved(backend.Triton(), meta_call(True, **SIZES), "sm_90")


# Bad input.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "dtype float64 (supported: bfloat16, float16, float32)"),
        ({"K": 300}, "K=300 (supported: 1 to 256); V=300 (supported: 1 to 256)"),
        ({"chunk_size": 48}, "chunk_size=48 (supported: 16, 32, 64)"),
    ],
)
def test_what_it_cannot_run_is_a_reason(changes: dict[str, Any], reason: str) -> None:
    check_reason("triton", linear_arguments(**changes), reason)


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    caches = (backend.version_reasons, backend.tool_reasons)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_reasons")
@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0", "nightly"])
def test_a_triton_out_of_range_is_a_reason(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: version)
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**linear_arguments(), backend="triton")
    assert f"  triton: triton {version} is installed (supported: 3.6 to 3.9)" in str(error.value)


@pytest.mark.usefixtures("fresh_reasons")
def test_no_c_compiler_is_a_reason_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    expected = ("no C compiler, which Triton launches with: install gcc or clang, or set CC",)
    assert backend.tool_reasons("cuda") == expected
    triton = get_backend("triton")
    assert not isinstance(triton, str)
    call = meta_call(False, **SIZES)
    monkeypatch.setattr(type(call), "device", property(lambda self: torch.device("cuda")))
    assert triton.reasons(call) == list(expected)


def test_tensors_on_two_devices_are_refused() -> None:
    v = torch.empty(1, 4, 2, 16, device="meta")
    text = message_of(
        gdn_ops.SpecError, gdn_ops.gated_delta, **linear_arguments(v=v), backend="triton"
    )
    assert text == "gated_delta: v is on meta, should be on cpu, the device of q"


def test_cpu_tensors_are_emulated_with_one_warning() -> None:
    check_emulation("triton")


def test_without_triton_the_backend_is_not_installed() -> None:
    check_absence("triton")


def test_an_unknown_choice_of_products_is_refused() -> None:
    found = python("-c", "import gdn_ops.backends.triton", GDN_OPS_TRITON_FLOAT32="tf32")
    assert found.stderr.strip().splitlines()[-1] == (
        "ValueError: GDN_OPS_TRITON_FLOAT32 is 'tf32', should be one of tf32x3, ieee"
    )


def test_ieee_products_are_the_definition_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "float32_products", "ieee")
    verdict = judge(AWKWARD, "triton")
    assert verdict.passed, verdict


# Configurations.


def test_every_row_names_its_kernels_and_is_source_text() -> None:
    for key, config in (*table.SEQUENCE.items(), *table.STEP.items()):
        row = Row(key, config)
        names = {"Config": Config, "StepConfig": type(table.STEP["sm_90", 64]), "Tiles": Tiles}
        assert eval("{" + str(row) + "}", names) == {key: config}
    assert {key[0] for key in table.SEQUENCE} == set(configs.TARGETS)


def test_neighbours_differ_in_one_choice_and_begin_with_the_row() -> None:
    key = ("sm_90", 128, "low")
    own = Row(key, table.SEQUENCE[key])
    rows = configs.tables.neighbours(own)
    assert rows[0] == own
    for row in rows[1:]:
        changed = [
            f.name
            for f in dataclasses.fields(row.config)
            if getattr(row.config, f.name) != getattr(own.config, f.name)
        ]
        assert len(changed) == 1, row
    assert len(set(rows)) == len(rows)
