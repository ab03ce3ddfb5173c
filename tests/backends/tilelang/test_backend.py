"""The TileLang backend: what the kit cannot draw. Decode, bytes, configurations, errors."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from gdn_ops.testing.decode_laws import (
    a_pool_equals_separate_states,
    steps_equal_one_step_after_another,
)
from gdn_ops.testing.oracle import judge

pytest.importorskip("tilelang")

from gdn_ops.backends import tilelang as backend
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import decode, plan, table, toolchain
from gdn_ops.backends.tilelang.host.plan import forward_bytes, make_plan
from gdn_ops.backends.tilelang.host.shapes import Config, StepConfig, Tiles

pytestmark = pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates")

CPU = torch.device("cpu")


def _meta_call(gradients: bool = False, **options: Any) -> Call:
    """Return a bound call of `gated_delta` on meta tensors, bfloat16 with a log gate and β."""
    B, T, H, HV, K, V = (options.pop(x) for x in ("B", "T", "H", "HV", "K", "V"))
    N, state = options.pop("N", None), options.pop("state", False)
    low: dict[str, Any] = {"device": "meta", "dtype": options.pop("dtype", torch.bfloat16)}
    arguments: dict[str, Any] = {
        "q": torch.empty(B, T, H, K, **low, requires_grad=gradients),
        "k": torch.empty(B, T, H, K, **low),
        "v": torch.empty(B, T, HV, V, **low),
        "beta": torch.empty(B, T, HV, device="meta"),
        "log_alpha": torch.empty(B, T, HV, device="meta"),
        "initial_state": torch.empty(N or B, HV, K, V, device="meta") if state else None,
        "cu_seqlens": None if N is None else torch.empty(N + 1, device="meta", dtype=torch.int64),
    }
    return bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments | options), check_values=False)


SIZES = {"B": 1, "T": 8192, "H": 16, "HV": 64, "K": 128, "V": 128}


# Decode.

DECODING = Example(B=3, T=5, H=2, R=3, K=48, V=80, initial_state=True, strided=True, seed=7)

DECODED = [
    dataclasses.replace(DECODING, dtype=dtype, state_dtype=state)
    for dtype in ("bfloat16", "float16", "float32")
    for state in (None, "bfloat16")
] + [
    dataclasses.replace(DECODING, K=16, V=16, gate="zero", qk_l2norm=True),
    dataclasses.replace(DECODING, K=128, V=128, B=1, dtype="bfloat16", gate="extreme"),
    dataclasses.replace(DECODING, K=256, V=32, B=1, R=1, log_gate=True, gate="extreme"),
    dataclasses.replace(DECODING, rule="delta", beta="none", T=1),
    dataclasses.replace(DECODING, rule="gated", initial_state=False),
    dataclasses.replace(DECODING, rule="linear", scale=-2.0, qk_l2norm=True, dtype="bfloat16"),
]


@pytest.mark.parametrize("example", DECODED, ids=repr)
def test_decoded_tokens_are_the_definition(example: Example) -> None:
    verdict = steps_equal_one_step_after_another("tilelang", example)
    assert verdict.passed, verdict


@pytest.mark.parametrize("example", DECODED[:2] + DECODED[-3:-2], ids=repr)
def test_a_pool_is_advanced_where_it_lies(example: Example) -> None:
    pooled = dataclasses.replace(example, slots=(4, -1, 0), pool=6, initial_state=True)
    for law in (a_pool_equals_separate_states, steps_equal_one_step_after_another):
        verdict = law("tilelang", pooled)
        assert verdict.passed, verdict


def _decoding_arguments(K: int, V: int) -> dict[str, Any]:
    arguments = Example(B=3, T=2, H=2, R=2, K=K, V=V, dtype="bfloat16", seed=4).arguments()
    del arguments["chunk_size"]
    return arguments


@pytest.mark.parametrize("kind", ["odd rows", "an odd start", "columns first"])
def test_a_pool_of_any_strides_is_updated_in_place(kind: str) -> None:
    K, V = 16, 32
    arguments, slots = _decoding_arguments(K, V), torch.tensor([2, -1, 0])
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 4 * K * V + 3, generator=generator)
    pools = {
        "odd rows": wide[1:4, : 4 * K * V].unflatten(1, (4, K, V)),
        "an odd start": wide[1:4, 1 : 1 + 4 * K * V].unflatten(1, (4, K, V)),
        "columns first": wide[1:4, : 4 * K * V].unflatten(1, (4, V, K)).transpose(2, 3),
    }
    pool, before = pools[kind], wide.clone()
    assert not decode._is_wide(pool)
    given = {**arguments, "state_indices": slots}
    o, state = gdn_ops.gated_delta_steps(
        **given, state=pool.clone(), inplace=True, backend="tilelang"
    )
    found, updated = gdn_ops.gated_delta_steps(
        **given, state=pool, inplace=True, backend="tilelang"
    )
    assert updated is pool
    assert torch.equal(found, o) and torch.equal(pool, state)
    # Nothing else of the memory has changed, and slot 1 is named by no row.
    pool.copy_(torch.nan * pool)
    assert torch.equal(wide[wide.isfinite()], before[wide.isfinite()])
    assert int(wide.isnan().sum()) == pool.numel()


def test_strided_tokens_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _decoding_arguments(16, 16)
    tokens = {name: arguments[name] for name in "qkv"}
    apart = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tokens.items()}
    gaps = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tokens.items()}
    expected = gdn_ops.gated_delta_steps(**arguments, backend="tilelang")

    def no_copy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.is_contiguous(), "a copy is made"
        return self

    monkeypatch.setattr(Tensor, "contiguous", no_copy)
    for other in (apart, gaps):
        assert not other["q"].is_contiguous()
        found = gdn_ops.gated_delta_steps(**(arguments | other), backend="tilelang")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_rows_that_are_skipped_cost_no_memory_access() -> None:
    # What a skipped row would read and write is out of bounds of the pool.
    arguments = _decoding_arguments(16, 16)
    pool = torch.zeros(1, 4, 16, 16)
    o, _ = gdn_ops.gated_delta_steps(
        **arguments, state=pool, state_indices=torch.tensor([-1, 0, -1]), inplace=True,
        backend="tilelang",
    )  # fmt: skip
    assert bool((o[[0, 2]] == 0).all()) and bool(o[1].any()) and bool(pool.any())


@pytest.mark.parametrize(("B", "T"), [(0, 2), (2, 0)])
def test_without_tokens_the_state_is_as_it_was(B: int, T: int) -> None:
    example = Example(B=B, T=T, H=1, K=16, V=16, initial_state=True)
    arguments = example.arguments()
    del arguments["chunk_size"]
    given = arguments.pop("initial_state")
    steps = functools.partial(gdn_ops.gated_delta_steps, **arguments, backend="tilelang")
    o, state, states = steps(state=given, return_states=True)
    assert torch.equal(state, given) and state is not given
    assert o.shape == (B, T, 1, 16) and states.shape == (B, T, 1, 16, 16)
    assert not bool(steps()[1].any())
    assert steps(state=given, inplace=True)[1] is given


@pytest.mark.parametrize("BV", [8, 16, 32])
def test_no_block_of_columns_changes_what_is_decoded(BV: int) -> None:
    # 48 columns are no multiple of 32.
    example = dataclasses.replace(DECODING, K=32, V=48)
    row = Row(configs.step_key(CPU, 32), StepConfig(BV=BV, threads=32, measured=""))
    with configs.using(row):
        verdict = steps_equal_one_step_after_another("tilelang", example)
    assert verdict.passed, verdict


def test_a_short_call_without_gradients_takes_one_launch() -> None:
    tilelang = backend.TileLang()
    with recording("sm_90a") as launches:
        tilelang.forward(_meta_call(**(SIZES | {"T": configs.MOST_STEPS})))
    assert [launch.kernel.__name__ for launch in launches] == ["tokens"]
    verdict = judge(Example(T=configs.MOST_STEPS, K=16, V=16), "tilelang", gradients=False)
    assert verdict.passed, verdict


# Launches, bytes and memory, from what a call on the meta device would launch.


def test_forward_takes_two_launches_and_four_with_segments() -> None:
    tilelang = backend.TileLang()
    with recording("sm_90a") as launches:
        tilelang.forward(_meta_call(**SIZES))
    assert [launch.kernel.__name__ for launch in launches] == ["solve", "walk"]
    with recording("sm_90a") as launches:
        tilelang.forward(_meta_call(**(SIZES | {"H": 2, "HV": 8, "T": 32768})))
    assert [launch.kernel.__name__ for launch in launches] == ["solve", "walk", "compose", "walk"]


def test_the_forward_moves_at_most_0_55_gigabytes_at_8192_tokens() -> None:
    call = _meta_call(**SIZES)
    assert sum(forward_bytes(call, make_plan(call)).values()) <= 0.55e9


@pytest.mark.parametrize(
    "changes",
    [{}, {"state": True, "qk_l2norm": True}, {"H": 2, "HV": 8, "state": True}],
    ids=["plain", "normalised", "segments"],
)
def test_bytes_are_those_of_the_tensors_that_launches_are_given(changes: dict[str, Any]) -> None:
    call = _meta_call(**(SIZES | changes))
    moved = forward_bytes(call, make_plan(call))
    with torch.no_grad(), recording("sm_90a") as launches:
        backend.TileLang().forward(call)
    assert len(launches) == len(moved)
    for launch, (name, bytes_) in zip(launches, moved.items(), strict=True):
        # What is absent, and where sequences begin, is small.
        tensors = [x for x in launch.args if isinstance(x, Tensor) and x.numel() > 128 * 128]
        if name == "solve" and not call.qk_l2norm:
            tensors.remove(next(x for x in tensors if x.data_ptr() == call.tokens.q.data_ptr()))
        if name == "map":
            # A map does not depend on the queries.
            tensors = tensors[1:]
        assert sum(x.numel() * x.element_size() for x in tensors) == bytes_, name


@pytest.mark.parametrize("changes", [{}, {"rule": "linear", "log_alpha": None}, {"H": 2, "HV": 8}])
def test_saved_tensors_are_as_the_tracer_was_told(changes: dict[str, Any]) -> None:
    tilelang = backend.TileLang()
    call = _meta_call(True, **(SIZES | changes))
    with torch.no_grad(), recording("sm_90a"):
        saved = tilelang.forward(call).saved
    told = tilelang.saved_like(call)
    assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in told]


def test_slots_and_places_are_enough_for_any_lengths() -> None:
    lengths = (0, 17, 64, 1, 200, 63, 0)
    sizes = {"B": 1, "T": sum(lengths), "H": 1, "HV": 1, "K": 16, "V": 16, "N": len(lengths)}
    for C, L in ((32, 1), (32, 2), (64, 4)):
        call = _meta_call(**sizes, chunk_size=C)
        key = configs.sequence_key(CPU, torch.bfloat16, 16)
        row = Row(key, dataclasses.replace(table.SEQUENCE[key], segment=L))
        with configs.using(row):
            found = make_plan(call)
        for tokens, room in ((C, found.slots), (C * L, found.places)):
            taken: list[int] = []
            begin = 0
            for n, length in enumerate(lengths):
                taken += [begin // tokens + n + c for c in range(-(-length // tokens))]
                begin += length
            assert len(set(taken)) == len(taken)
            assert all(0 <= slot < room for slot in taken)


def test_boundaries_are_made_once_per_shape() -> None:
    call = Example(B=3, T=5, K=16, V=16).arguments()
    bound = bind(GATED_DELTA, arguments_of(GATED_DELTA, {"backend": "tilelang", **call}))
    found = plan.cu_of(bound)
    assert found.tolist() == [0, 5, 10, 15] and found.dtype == torch.int32
    assert plan.cu_of(bound) is found


# Segments.


def _segments(**changes: Any) -> int | None:
    """Return the chunks per segment that the rule chooses, or None for one segment."""
    found = make_plan(_meta_call(**(SIZES | changes)))
    assert found.is_segmented == (found.C * found.L < configs.ONE_SEGMENT)
    return found.L if found.is_segmented else None


SMALL = Sizes(B=1, T=64, H=1, HV=1, K=128, V=128, N=1)


def test_v_is_split_where_there_would_be_fewer_programs_than_processors() -> None:
    # 132 multiprocessors; 128 columns.
    device = torch.device("cpu")

    def columns(HV: int, N: int = 1) -> int:
        return configs.columns(device, dataclasses.replace(SMALL, HV=HV, H=HV, N=N), 64)

    assert columns(66) == 64, "132 programs"
    assert columns(65) == 32, "130 programs"
    assert columns(17, N=4) == 64, "136 programs"
    assert columns(1) == 32, "never narrower"
    assert configs.columns(device, SMALL, 16) == 16


def test_a_sequence_is_cut_where_most_of_the_gpu_would_idle() -> None:
    # 132 multiprocessors; blocks of V of a quarter of 128 columns; chunks of 64 tokens.
    assert table.SEQUENCE["sm_90a", 128, "low"].walk.BV == 64
    assert _segments() is None
    assert _segments(HV=17, H=17) is None, "68 programs: not more than half of it idles"
    assert _segments(HV=16, H=16) == 64, "64 programs: 128 chunks in two segments"
    assert _segments(HV=4, H=4) == 16, "16 programs: 8 segments"
    assert _segments(HV=1, H=1) == 8, "4 programs: 33 segments would be too short"
    assert _segments(HV=8, H=8, T=2048) == 8, "32 chunks"
    assert _segments(HV=8, H=8, T=1984) is None, "31 chunks"
    assert _segments(HV=4, H=4, N=4, T=8192) == 16, "64 programs, of 32 chunks each"
    assert _segments(HV=2, H=2, N=4, T=8192) == 8, "32 programs, of 32 chunks each"
    assert _segments(HV=2, H=2, N=8, T=8192) is None, "16 chunks each"


def test_segments_can_be_switched_off_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _segments(HV=4, H=4) == 16
    monkeypatch.setattr(configs, "_cuts", False)
    assert _segments(HV=4, H=4) is None
    key = ("sm_90a", 128, "low")
    with configs.using(Row(key, dataclasses.replace(table.SEQUENCE[key], segment=3))):
        assert _segments() == 3


def test_an_unknown_choice_of_segments_is_refused() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import gdn_ops.backends.tilelang"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"GDN_OPS_TILELANG_SEGMENTS": "no"},
        check=False,
    )
    assert found.stderr.strip().splitlines()[-1] == (
        "ValueError: GDN_OPS_TILELANG_SEGMENTS is 'no', should be one of on, off"
    )


# Bad input.


def _arguments(**changes: Any) -> dict[str, Any]:
    K = changes.pop("K", 16)
    dtype = changes.pop("dtype", torch.float32)
    q = torch.randn(1, 4, 2, K).to(dtype)
    return {"q": q, "k": q, "v": q, "rule": "linear", **changes}


WIDTHS = "multiples of 16 from 16 to 256"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "dtype float64 (supported: bfloat16, float16, float32)"),
        ({"K": 24}, f"K=24 (supported: {WIDTHS}); V=24 (supported: {WIDTHS})"),
        ({"K": 272}, f"K=272 (supported: {WIDTHS}); V=272 (supported: {WIDTHS})"),
        ({"chunk_size": 48}, "chunk_size=48 (supported: 32, 64)"),
        (
            {"chunk_size": 64},
            "chunk_size=64 (at most 32 for float32 with K=16 on sm_90a)",
        ),
    ],
)
def test_what_it_cannot_run_is_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**arguments, backend="tilelang")
    lines = str(error.value).splitlines()
    assert lines[0] == "backend 'tilelang' cannot run gated_delta on these inputs"
    assert lines[2] == f"  tilelang: {reason}"
    assert lines[3] == '  try backend="torch"'
    found = gdn_ops.explain(**arguments, backend="tilelang")
    assert "; ".join(dict(found.reasons)["tilelang"]) == reason
    assert f"   tilelang  {reason}" in str(found).splitlines()


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    backend.tool_reasons.cache_clear()
    yield
    backend.tool_reasons.cache_clear()


def _refusal() -> str:
    """Return what is said against the backend on CPU tensors."""
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**_arguments(), backend="tilelang")
    lines = str(error.value).splitlines()
    assert str(error.value) == "\n".join(
        (
            "backend 'tilelang' cannot run gated_delta on these inputs",
            "  q float32 (1, 4, 2, 16) cpu, v (1, 4, 2, 16), rule linear",
            lines[2],
            '  try backend="torch"',
        )
    )
    return lines[2].removeprefix("  tilelang: ")


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that are said to be installed."""
    found: dict[str, str] = {}
    real = toolchain.importlib.metadata.version
    monkeypatch.setattr(
        toolchain.importlib.metadata, "version", lambda name: found.get(name) or real(name)
    )
    return found


@pytest.mark.usefixtures("fresh_reasons")
@pytest.mark.parametrize("version", ["0.1.14", "0.1.16", "0.2.0", "nightly"])
def test_another_tilelang_is_a_reason(version: str, versions: dict[str, str]) -> None:
    versions["tilelang"] = version
    assert _refusal() == (
        f"tilelang is {version}, should be 0.1.15: pip install 'gdn_ops[tilelang]'"
    )


@pytest.mark.usefixtures("fresh_reasons")
@pytest.mark.parametrize("version", ["0.1.10", "0.1.13"])
def test_a_tvm_ffi_out_of_range_is_a_reason(version: str, versions: dict[str, str]) -> None:
    versions["apache-tvm-ffi"] = version
    assert _refusal() == (
        f"apache-tvm-ffi is {version}, tilelang 0.1.15 needs <0.1.13,>=0.1.11: "
        "pip install 'apache-tvm-ffi<0.1.13,>=0.1.11'"
    )


@pytest.mark.usefixtures("fresh_reasons")
def test_no_cpp_compiler_is_a_reason_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    assert _refusal() == "no C++ compiler, which emulation needs: install g++, or set CXX"


@pytest.mark.usefixtures("fresh_reasons")
def test_no_nvcc_is_a_reason_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_packaged", lambda: None)
    monkeypatch.setattr(toolchain, "_program", lambda home: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    call = _meta_call(**SIZES)
    monkeypatch.setattr(type(call), "device", property(lambda self: torch.device("cuda")))
    tilelang = get_backend("tilelang")
    assert not isinstance(tilelang, str)
    assert tilelang.reasons(call) == [
        "no nvcc, which TileLang compiles with: pip install 'tilelang[nvcc]', or set CUDA_HOME"
    ]


def test_without_tilelang_the_backend_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['tilelang'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'tilelang' else find(n, *a)\n"
        "import gdn_ops, torch\n"
        "print([b.status for b in gdn_ops.list_backends() if b.name == 'tilelang'][0])\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        "try: gdn_ops.gated_delta(q, q, q, rule='linear', backend='tilelang')\n"
        "except gdn_ops.BackendUnsupportedError as error: print(str(error).splitlines()[2])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.splitlines() == [
        "package 'tilelang' is not installed",
        "  tilelang: package 'tilelang' is not installed",
    ]


def test_explaining_a_call_does_not_load_tilelang() -> None:
    code = (
        "import sys, torch, gdn_ops\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        "found = gdn_ops.explain(q, q, q, rule='linear', backend='tilelang')\n"
        "print(found.backend, 'tilelang' in sys.modules)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.split() == ["tilelang", "False"]


def test_cpu_tensors_are_emulated_with_one_warning() -> None:
    from gdn_ops.dispatch import registry

    registry._logged.discard(("emulation", "tilelang", "cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gdn_ops.gated_delta(**_arguments(), backend="tilelang")
        gdn_ops.gated_delta(**_arguments(), backend="tilelang")
    assert [str(w.message) for w in caught] == [
        "backend 'tilelang' emulates its kernels on cpu tensors: for checking, not for speed"
    ]
    assert gdn_ops.explain(**_arguments()).backend == "torch"


def test_a_certificate_names_what_compiles_the_kernels() -> None:
    from gdn_ops.environment.provenance import circumstances

    found = circumstances(backend.TileLang, "cpu")
    assert found["compiler"] not in ("none", "unknown")
    assert {"tilelang", "apache-tvm-ffi", "source"} <= set(found)
    assert circumstances(backend.TileLang, "cuda:0")["compiler"] != found["compiler"]


# Configurations.


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_120a"),
        ((8, 9), "sm_120a"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_every_gpu_gets_a_row_that_it_can_run(
    capability: tuple[int, int], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    configs._target_of.cache_clear()
    assert configs.target(torch.device("cuda", 0)) == row
    configs._target_of.cache_clear()


def test_every_row_names_its_kernels_and_is_source_text() -> None:
    key = ("sm_90a", 64, "low")
    forced = Row(key, dataclasses.replace(table.SEQUENCE[key], segment=4))
    rows = [*table.SEQUENCE.items(), *table.STEP.items(), (forced.key, forced.config)]
    for found, config in rows:
        names = {"Config": Config, "StepConfig": StepConfig, "Tiles": Tiles}
        assert eval("{" + str(Row(found, config)) + "}", names) == {found: config}


def test_there_is_a_row_for_every_width_on_every_target() -> None:
    widths = {configs.width_class(K) for K in range(16, 257, 16)}
    assert set(table.STEP) == {(t, w) for t in configs.TARGETS for w in widths}
    full = {(*key, d) for key in table.STEP for d in ("low", "float32")}
    # Three parts of every operand do not fit 99 KiB for the widest keys.
    assert full - set(table.SEQUENCE) == {("sm_120a", width, "float32") for width in (192, 256)}


def test_a_key_too_wide_for_a_small_gpu_is_a_reason() -> None:
    sizes = SIZES | {"K": 144, "V": 16}
    for dtype, found in (
        ("bfloat16", []),
        ("float32", ["float32 with K=144 on sm_120a (supported: K up to 128)"]),
    ):
        call = _meta_call(**sizes, dtype=getattr(torch, dtype))
        with recording("sm_120a"):
            assert configs.shape_reasons(call) == found
        with recording("sm_90a"):
            assert configs.shape_reasons(call) == []


def test_neighbours_differ_in_one_choice_and_begin_with_the_row() -> None:
    for key in (("sm_90a", 128, "low"), ("sm_90a", 128)):
        config = table.SEQUENCE[key] if len(key) == 3 else table.STEP[key]
        own = Row(key, config)
        rows = configs.neighbours(own)
        assert rows[0] == own
        for row in rows[1:]:
            changed = [
                f.name
                for f in dataclasses.fields(row.config)
                if getattr(row.config, f.name) != getattr(config, f.name)
            ]
            assert len(changed) == 1, row
        assert len(set(rows)) == len(rows)


def test_only_a_row_can_be_used() -> None:
    with pytest.raises(TypeError, match="config is dict, should be one of `tunables`"):
        backend.TileLang().using({})
