"""Machine code is read with NVIDIA's tools, and judged by what a GPU forbids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import message_of
from gdn_ops.aot import sass
from gdn_ops.aot.gpu_limits import Product, refusal, with_failures
from gdn_ops.aot.machine_code import Code, Counts
from gdn_ops.aot.processors import GPUS
from gdn_ops.aot.results import CompiledKernel
from gdn_ops.aot.sass import Usage, find_tool, nvidia_usage


def test_usage_is_read_from_what_cuobjdump_prints() -> None:
    resources = " Function f:\n  REG:254 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:608 TEXTURE:0"
    code = """
        /*0010*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/  STL.64 [R1+0x8], R2 ;
        /*0040*/  LDL R2, [R1+0x8] ;
        /*0050*/  UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12] ;
        /*0060*/  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
    """
    counts = {"HGMMA": 1, "HMMA": 2, "UTCHMMA": 1}
    used = nvidia_usage(resources, code)
    own = Counts(instructions=6, matrix=4, hgmma=1, multiply_adds=16384 + 2 * 2048, spills=2)
    assert used == Usage(254, 1, 24, counts, Code(own))
    assert Usage.of(json.loads(json.dumps(used.values()))) == used


def tool(folder: Path, mode: int = 0o755) -> Path:
    folder.mkdir()
    path = folder / "cuobjdump"
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def test_a_tool_is_looked_for_where_the_caller_says_then_in_the_toolkit_then_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = tmp_path / "toolkit"
    toolkit.mkdir()
    in_toolkit, on_path = tool(toolkit / "bin"), tool(tmp_path / "path")
    near = tool(tmp_path / "near")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert find_tool("cuobjdump") == on_path
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert find_tool("cuobjdump") == in_toolkit
    assert find_tool("cuobjdump", [tmp_path, near.parent]) == near
    on_path.chmod(0o644)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(sass, "_roots", lambda package: [])
    if not Path("/usr/local/cuda/bin/cuobjdump").exists():
        with pytest.raises(FileNotFoundError, match=r"^cuobjdump was not found on PATH, in "):
            find_tool("cuobjdump")


def test_a_tool_that_nothing_has_is_an_error_that_says_what_brings_it() -> None:
    assert message_of(FileNotFoundError, find_tool, "cuobjdumb") == (
        "cuobjdumb was not found on PATH, in CUDA_HOME, in /usr/local/cuda nor in a wheel: the "
        "package triton brings it (pip install 'gdn_ops[triton]'), and so does a CUDA toolkit"
    )


def row(target: str = "sm_90a", **fields: object) -> CompiledKernel:
    return CompiledKernel("kernel", "sample", target, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "bytes_"),
    [("sm_80", 166912), ("sm_90a", 232448), ("sm_100a", 232448), ("sm_120a", 101376)],
)
def test_all_shared_memory_of_a_target_may_be_used_and_no_byte_more(
    target: str, bytes_: int
) -> None:
    assert GPUS[target].program_shared == bytes_
    assert with_failures(row(target, shared=bytes_), [], True, {}).failures == ()
    text = f"shared memory is {bytes_ + 1} bytes, should be at most {bytes_} on {target}"
    assert with_failures(row(target, shared=bytes_ + 1), [], False, {}).failures == (text,)


def test_spills_fail_a_reference_beyond_what_is_granted() -> None:
    spilling = row(spills=7)
    assert with_failures(spilling, [], False, {}).failures == ()
    assert with_failures(spilling, [], True, {}).failures == ("spills are 7, should be none",)
    granted = with_failures(spilling, [], True, {("kernel", "sm_90a"): (7, "why")})
    assert granted.failures == () and granted.note == "why"
    refused = with_failures(spilling, [], True, {("kernel", "sm_90a"): (6, "why")})
    assert refused.failures == ("spills are 7, should be at most 6",) and refused.note == ""
    assert with_failures(row("sm_80"), [], True, {("kernel", "sm_80"): (6, "why")}).note == ""


@pytest.mark.parametrize(
    ("target", "product", "instructions", "failures"),
    [
        (
            *("sm_90a", Product(64, 16, 32, "bfloat16"), {"HMMA": 8}),
            ("no HGMMA on sm_90a, but a bfloat16 product of 64 x 32 by 32 x 16",),
        ),
        ("sm_90", Product(64, 64, 64, "f16"), {"HGMMA": 1}, ()),
        ("sm_90a", Product(63, 64, 64, "float16"), {"HMMA": 8}, ()),
        ("sm_90a", Product(64, 64, 64, "float32"), {}, ()),
        ("sm_100a", Product(64, 64, 64, "bfloat16"), {"HMMA": 8}, ()),
    ],
)
def test_a_product_in_16_bits_with_64_rows_must_use_the_matrix_unit_of_hopper(
    target: str, product: Product, instructions: dict[str, int], failures: tuple[str, ...]
) -> None:
    judged_row = with_failures(row(target, instructions=instructions), [product], False, {})
    assert judged_row.failures == failures


def test_a_target_without_its_letter_is_refused_for_what_it_leaves_out() -> None:
    known = ("sm_80", "sm_90a")
    assert refusal("sm_90", known) == (
        "target 'sm_90' is compiled without wgmma and its like: use sm_90a"
    )
    assert (
        refusal("sm_70", known)
        == "unknown target 'sm_70', known: sm_80, sm_90a; did you mean 'sm_80'?"
    )
