"""The TileLang backend: what it cannot run, what it stands on, and its configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Row
from kernel_backends import (
    SIZES,
    check_absence,
    check_emulation,
    check_reason,
    linear_arguments,
    meta_call,
    row_of,
)
from processes import printed

pytest.importorskip("tilelang")

from gdn_ops.backends import tilelang as backend
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import table, toolchain
from gdn_ops.backends.tilelang.host.shapes import Config, StepConfig, Tiles

pytestmark = pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates")

CPU = torch.device("cpu")

# Bad input.


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
    check_reason("tilelang", linear_arguments(**changes), reason)


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    backend.tool_reasons.cache_clear()
    yield
    backend.tool_reasons.cache_clear()


def _refusal() -> str:
    """Return what is said against the backend on CPU tensors."""
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**linear_arguments(), backend="tilelang")
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
    call = meta_call(**SIZES)
    monkeypatch.setattr(type(call), "device", property(lambda self: torch.device("cuda")))
    tilelang = get_backend("tilelang")
    assert not isinstance(tilelang, str)
    assert tilelang.reasons(call) == [
        "no nvcc, which TileLang compiles with: pip install 'tilelang[nvcc]', or set CUDA_HOME"
    ]


def test_without_tilelang_the_backend_is_not_installed() -> None:
    check_absence("tilelang")


def test_explaining_a_call_does_not_load_tilelang() -> None:
    code = (
        "import sys, torch, gdn_ops\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        "found = gdn_ops.explain(q, q, q, rule='linear', backend='tilelang')\n"
        "print(found.backend, 'tilelang' in sys.modules)\n"
    )
    assert printed(code).split() == ["tilelang", "False"]


def test_cpu_tensors_are_emulated_with_one_warning() -> None:
    check_emulation("tilelang")


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
def test_every_gpu_gets_a_row_that_it_can_run(capability: tuple[int, int], row: str) -> None:
    assert row_of(configs, capability) == row


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
        call = meta_call(**sizes, dtype=getattr(torch, dtype))
        with recording("sm_120a"):
            assert configs.shape_reasons(call) == found
        with recording("sm_90a"):
            assert configs.shape_reasons(call) == []


def test_neighbours_differ_in_one_choice_and_begin_with_the_row() -> None:
    for key in (("sm_90a", 128, "low"), ("sm_90a", 128)):
        config = table.SEQUENCE[key] if len(key) == 3 else table.STEP[key]
        own = Row(key, config)
        rows = configs.tables.neighbours(own)
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
