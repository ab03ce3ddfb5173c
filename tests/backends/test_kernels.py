"""Backends of kernels, alike: what they refuse, launch, touch in memory and take from tables."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from fences import all_fenced, assert_untouched, fenced
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.backend import MOST_STEPS
from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.testing import Example
from gdn_ops.testing.example import run
from gdn_ops.testing.oracle import judge, judgement
from kernel_backends import (
    AWKWARD,
    PACKED,
    SIZES,
    check_reason,
    launched,
    linear_arguments,
    meta_call,
    part,
    using,
)
from processes import printed, python

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend '.*' emulates"),
    pytest.mark.usefixtures("one_thread"),
]

HOPPER = {"triton": "sm_90", "tilelang": "sm_90a"}
LEAST = {"triton": 1, "tilelang": 10}
"""Tensors that a call with gradients allocates, at least."""


@pytest.fixture(params=HOPPER)
def name(request: pytest.FixtureRequest) -> str:
    """A backend whose package is installed."""
    pytest.importorskip(request.param)
    return str(request.param)


# What they refuse.


WIDTHS = "multiples of 16 from 16 to 256"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "triton",
            {"dtype": torch.float64},
            "dtype float64 (supported: bfloat16, float16, float32)",
        ),
        ("triton", {"K": 300}, "K=300 (supported: 1 to 256); V=300 (supported: 1 to 256)"),
        ("triton", {"chunk_size": 48}, "chunk_size=48 (supported: 16, 32, 64)"),
        (
            "tilelang",
            {"dtype": torch.float64},
            "dtype float64 (supported: bfloat16, float16, float32)",
        ),
        ("tilelang", {"K": 24}, f"K=24 (supported: {WIDTHS}); V=24 (supported: {WIDTHS})"),
        ("tilelang", {"K": 272}, f"K=272 (supported: {WIDTHS}); V=272 (supported: {WIDTHS})"),
        ("tilelang", {"chunk_size": 48}, "chunk_size=48 (supported: 32, 64)"),
        (
            "tilelang",
            {"chunk_size": 64},
            "chunk_size=64 (at most 32 for float32 with K=16 on sm_90a)",
        ),
    ],
    indirect=["name"],
)
def test_what_it_cannot_run_is_a_reason(name: str, changes: dict[str, Any], reason: str) -> None:
    check_reason(name, linear_arguments(**changes), reason)


def test_more_heads_than_a_grid_has_programs_are_a_reason(name: str) -> None:
    for HV, reasons in ((65535, ()), (65536, ("HV=65536 (supported: up to 65535)",))):
        q, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, HV, 16)
        explanation = gdn_ops.explain(q, q, v, rule="linear", backend=name)
        assert dict(explanation.reasons)[name] == reasons


def test_more_sequences_than_65535_are_along_the_first_axis_of_a_grid() -> None:
    pytest.importorskip("tilelang")
    N, T, K = 70_000, 3, 16
    x = torch.ones(1, T, 1, K)
    # All of them empty but the last one.
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int64)
    cu_seqlens[-1] = T
    given = {"q": x, "k": x, "v": x, "rule": "linear", "scale": 1.0, "cu_seqlens": cu_seqlens}
    o, state = gdn_ops.gated_delta(**given, return_state=True, backend="tilelang")
    assert o[0, :, 0, 0].tolist() == [16.0, 32.0, 48.0]
    assert state.shape == (N, 1, K, K)
    assert not state[:-1].any() and bool((state[-1] == 3).all())


def test_without_its_package_a_backend_is_not_installed(name: str) -> None:
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {name!r} else find(n, *a)\n"
        "import gdn_ops, torch\n"
        f"print([b.status for b in gdn_ops.list_backends() if b.name == {name!r}][0])\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        f"try: gdn_ops.gated_delta(q, q, q, rule='linear', backend={name!r})\n"
        "except gdn_ops.BackendUnsupportedError as error: print(str(error).splitlines()[2])\n"
    )
    assert printed(code).splitlines() == [
        f"package {name!r} is not installed",
        f"  {name}: package {name!r} is not installed",
    ]


@pytest.mark.parametrize(
    ("name", "variable", "value", "choices"),
    [
        ("triton", "GDN_OPS_TRITON_FLOAT32", "tf32", "tf32x3, ieee"),
        ("triton", "GDN_OPS_TRITON_SEGMENTS", "no", "on, off"),
        ("triton", "GDN_OPS_TRITON_KEEP", "yes", "auto, on, off"),
        ("tilelang", "GDN_OPS_TILELANG_SEGMENTS", "no", "on, off"),
    ],
    indirect=["name"],
)
def test_an_unknown_choice_is_refused(name: str, variable: str, value: str, choices: str) -> None:
    done = python("-c", f"import gdn_ops.backends.{name}", **{variable: value})
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: {variable} is {value!r}, should be one of {choices}"
    )


def test_cpu_tensors_are_emulated_with_one_warning_where_it_is_asked_for(name: str) -> None:
    registry._logged.discard(("emulation", name, "cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            gdn_ops.gated_delta(**linear_arguments(), backend=name)
    assert [str(w.message) for w in caught] == [
        f"backend '{name}' emulates its kernels on cpu tensors: for checking, not for speed"
    ]
    assert gdn_ops.explain(**linear_arguments()).backend == "cpp"


# What they compute.


@pytest.mark.parametrize(
    ("name", "example", "changes", "most"),
    [
        (
            "triton",
            Example(T=130, R=2, K=64, V=64, beta="wide", gate="slow", initial_state=True),
            {},
            1e-6,
        ),
        (
            "tilelang",
            replace(PACKED, K=16, V=48, dtype="float32", gate="slow"),
            {"segment": 1},
            2e-6,
        ),
    ],
    indirect=["name"],
)
def test_float32_means_float32(
    name: str, example: Example, changes: dict[str, Any], most: float
) -> None:
    reference = judgement(example).reference
    with using(name, example, **changes):
        results = example.run(name)
    for result, x in results.items():
        error = (x.double() - reference[result]).norm() / reference[result].norm()
        assert error < most, result


# Inputs and scratch lie between fences, and every scratch tensor starts as NaN.


@pytest.mark.parametrize(
    ("name", "example", "changes"),
    [
        ("triton", AWKWARD, {}),
        ("triton", replace(AWKWARD, dtype="bfloat16", K=17, V=33, T=17, chunk_size=16), {}),
        ("triton", replace(AWKWARD, rule="gated", lengths=(5, 0, 66, 1), T=72, K=16, V=16), {}),
        ("triton", replace(AWKWARD, rule="linear", qk_l2norm=False, T=33), {}),
        ("triton", replace(AWKWARD, T=6, seed=9), {}),
        ("triton", replace(PACKED, qk_l2norm=True), {"segment": 1}),
        ("triton", PACKED, {"descriptors": False}),
        ("tilelang", PACKED, {}),
        ("tilelang", PACKED, {"segment": 1}),
        ("tilelang", replace(PACKED, rule="linear", qk_l2norm=True), {"segment": 1}),
        ("tilelang", replace(PACKED, K=16, V=48, dtype="float32"), {}),
    ],
    indirect=["name"],
)
def test_no_kernel_touches_memory_that_is_not_its_own(
    name: str, example: Example, changes: dict[str, Any], allocated: list[Tensor]
) -> None:
    arguments, (d_o, d_state) = example.arguments(), example.cotangents()
    between = all_fenced(arguments)
    cotangents = (fenced(d_o, float("nan")), fenced(d_state, float("nan")))
    with using(name, example, **changes):
        expected = run(arguments, name, (d_o, d_state))
        allocated.clear()
        results = run(between, name, cotangents)
        assert len(allocated) >= LEAST[name]
        assert_untouched(allocated)
        allocated.clear()
        with torch.no_grad():
            forward = gdn_ops.gated_delta(**between, return_state=True, backend=name)
        assert_untouched(allocated)
    # NaN from a fence, or from what nothing has written, would be in the results.
    for x in (*forward, *results.values()):
        assert not bool(x.isnan().any())
    for result, x in expected.items():
        assert torch.equal(results[result], x), result


# Launches, from what a call on the meta device would launch.


def test_a_short_call_without_gradients_takes_one_launch(name: str) -> None:
    call, backend = meta_call(**(SIZES | {"T": MOST_STEPS})), get_backend(name)
    assert isinstance(backend, gdn_ops.Backend)
    assert launched(HOPPER[name], lambda: backend.forward(call)) == ["tokens"]
    verdict = judge(Example(T=MOST_STEPS, K=16, V=16), name, gradients=False)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("name", "unread", "most"),
    [("triton", None, 0.74e9), ("tilelang", "q", 0.551e9)],
    indirect=["name"],
)
def test_the_forward_moves_few_bytes_at_8192_tokens(
    name: str, unread: str | None, most: float
) -> None:
    # Four sequences, which nothing is gained by cutting.
    call, backend = meta_call(**SIZES | {"B": 4, "T": 2048}), get_backend(name)
    assert isinstance(backend, gdn_ops.Backend)
    with torch.no_grad(), recording(HOPPER[name]) as launches:
        backend.forward(call)
    # Every tensor that a launch is given, once: caches serve the second reader of a tile. One
    # launch of TileLang is given what only other options let it read.
    tensors = (x for launch in launches for x in launch.args if isinstance(x, Tensor))
    moved = sum(x.nbytes for x in tensors)
    moved -= 0 if unread is None else getattr(call.tokens, unread).nbytes
    assert 0.9 * most < moved <= most


@pytest.mark.parametrize("changes", [{}, {"rule": "linear", "log_alpha": None}, {"H": 2, "HV": 8}])
def test_saved_tensors_are_as_the_tracer_was_told(name: str, changes: dict[str, Any]) -> None:
    call, backend = meta_call(True, **(SIZES | changes)), get_backend(name)
    assert isinstance(backend, gdn_ops.Backend)
    with torch.no_grad(), recording(HOPPER[name]):
        saved = backend.forward(call).saved
    told = backend.saved_like(call)
    assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in told]


# Configurations.


@pytest.mark.parametrize(
    ("name", "capability", "row"),
    [
        ("triton", (8, 0), "sm_80"),
        ("triton", (8, 9), "sm_80"),
        ("triton", (9, 0), "sm_90"),
        ("triton", (10, 3), "sm_100"),
        ("triton", (12, 0), "sm_80"),
        ("tilelang", (8, 0), "sm_80"),
        ("tilelang", (8, 6), "sm_120a"),
        ("tilelang", (8, 9), "sm_120a"),
        ("tilelang", (9, 0), "sm_90a"),
        ("tilelang", (10, 3), "sm_100a"),
        ("tilelang", (12, 0), "sm_120a"),
    ],
    indirect=["name"],
)
def test_every_gpu_gets_a_row_that_it_can_run(
    name: str, capability: tuple[int, int], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = part(name, "host.config")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    configs._target_of.cache_clear()
    target = configs.tables.target(torch.device("cuda", 0))
    configs._target_of.cache_clear()
    assert target == row


def test_every_row_names_its_kernels_and_is_source_text(name: str) -> None:
    rows = dict(part(name, "host.config").tables.rows)
    key = (HOPPER[name], 64, "low")
    rows["forced", *key] = replace(rows[key], segment=4)
    names = vars(part(name, "host.table"))
    for key, config in rows.items():
        assert eval("{" + str(Row(key, config)) + "}", names) == {key: config}
    targets = {key[0] for key in part(name, "host.table").SEQUENCE}
    assert targets == set(part(name, "host.config").TARGETS)


@pytest.mark.parametrize("key", [(128, "low"), (128,)])
def test_neighbours_differ_in_one_choice_and_begin_with_the_row(
    name: str, key: tuple[Any, ...]
) -> None:
    tables = part(name, "host.config").tables
    own = Row((HOPPER[name], *key), tables.rows[HOPPER[name], *key])
    rows = tables.neighbours(own)
    assert rows[0] == own
    for row in rows[1:]:
        fields = [field.name for field in dataclasses.fields(row.config)]
        changed = [f for f in fields if getattr(row.config, f) != getattr(own.config, f)]
        assert len(changed) == 1, row
    assert len(set(rows)) == len(rows)
