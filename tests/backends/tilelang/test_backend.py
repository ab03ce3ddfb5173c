"""The TileLang backend: what it cannot run, what it stands on, and its configurations."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.kernel_support.launches import recording
from kernel_backends import SIZES, check_reason, linear_arguments, meta_call
from processes import printed

pytest.importorskip("tilelang")

from gdn_ops.backends import tilelang as backend
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import table, toolchain

pytestmark = pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates")

CPU = torch.device("cpu")


@pytest.mark.usefixtures("fresh_reasons")
@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        *(
            ("tilelang", version, "should be 0.1.15: pip install 'gdn_ops[tilelang]'")
            for version in ("0.1.14", "0.1.16", "0.2.0", "nightly")
        ),
        *(
            (
                "apache-tvm-ffi",
                version,
                "tilelang 0.1.15 needs <0.1.13,>=0.1.11: "
                "pip install 'apache-tvm-ffi<0.1.13,>=0.1.11'",
            )
            for version in ("0.1.10", "0.1.13")
        ),
    ],
)
def test_another_version_is_a_reason(
    package: str, version: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = toolchain.importlib.metadata.version
    monkeypatch.setattr(
        toolchain.importlib.metadata,
        "version",
        lambda name: version if name == package else real(name),
    )
    check_reason("tilelang", linear_arguments(), f"{package} is {version}, {reason}")


def test_explaining_a_call_does_not_load_tilelang() -> None:
    code = (
        "import sys, torch, gdn_ops\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        "found = gdn_ops.explain(q, q, q, rule='linear', backend='tilelang')\n"
        "print(found.backend, 'tilelang' in sys.modules)\n"
    )
    assert printed(code).split() == ["tilelang", "False"]


def test_a_certificate_names_what_compiles_the_kernels() -> None:
    from gdn_ops.environment.provenance import circumstances

    facts = circumstances(backend.TileLang, "cpu")
    assert facts["compiler"] not in ("none", "unknown")
    assert {"tilelang", "apache-tvm-ffi", "source"} <= set(facts)
    assert circumstances(backend.TileLang, "cuda:0")["compiler"] != facts["compiler"]


# Configurations.


def test_there_is_a_row_for_every_width_on_every_target() -> None:
    widths = {configs.width_class(K) for K in range(16, 257, 16)}
    assert set(table.STEP) == {(t, w) for t in configs.TARGETS for w in widths}
    full = {(*key, d) for key in table.STEP for d in ("low", "float16", "float32")}
    # Several parts of every operand do not fit 99 KiB for the widest keys.
    missing = {("sm_120a", width, "float32") for width in (192, 256)}
    assert full - set(table.SEQUENCE) == missing | {("sm_120a", 256, "float16")}


def test_a_key_too_wide_for_a_small_gpu_is_a_reason() -> None:
    sizes = SIZES | {"K": 144, "V": 16}
    for dtype, reasons in (
        ("bfloat16", []),
        ("float16", []),
        ("float32", ["float32 with K=144 on sm_120a (supported: K up to 128)"]),
    ):
        call = meta_call(**sizes, dtype=getattr(torch, dtype))
        with recording("sm_120a"):
            assert configs.shape_reasons(call) == reasons
        with recording("sm_90a"):
            assert configs.shape_reasons(call) == []


def test_only_a_row_can_be_used() -> None:
    with pytest.raises(TypeError, match="config is dict, should be one of `tunables`"):
        backend.TileLang().using({})
