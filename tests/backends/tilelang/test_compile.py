"""Compile TileLang kernels without a GPU, and find what is wrong for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import message_of

tilelang = pytest.importorskip("tilelang")

from ahead_of_time import Launching, compile_for, compiled  # noqa: E402
from command_line import Result, run  # noqa: E402
from gdn_ops import Backend  # noqa: E402
from gdn_ops.aot import jobs, sampling  # noqa: E402
from gdn_ops.backends.tilelang.aot import accesses, cubin  # noqa: E402
from gdn_ops.backends.tilelang.aot.loops import loops_of  # noqa: E402
from gdn_ops.backends.tilelang.host import toolchain  # noqa: E402
from gdn_ops.backends.tilelang.host.launcher import launch, trace  # noqa: E402
from gdn_ops.dispatch.registry import get_backend  # noqa: E402
from gdn_ops.kernel_support.launches import Launch  # noqa: E402
from gdn_ops.spec.cases import GPU_CASES  # noqa: E402
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP  # noqa: E402
from tilelang_kernels import compiled as kernels  # noqa: E402

GPUS = ("sm_90a", "sm_80")
TILE = {"M": 64, "N": 64, "K": 64, "dtype": "bfloat16", "threads": 128}
CALM = {"M": 16, "N": 64, "threads": 64}


def what_is_missing() -> str:
    try:
        cubin.check("sm_80")
    except FileNotFoundError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())


def compile_kernel(make: Any, constants: dict[str, Any], target: str) -> cubin.Compiled:
    """Compile the kernel that a factory makes, or return the cached result."""
    return cubin.compiled(trace(make, constants), target)


def launching(make: Any, **constants: Any) -> Any:
    """Return what launches the kernel that a factory makes."""
    return lambda call: launch(make, constants, call.tokens.v)


def multiplying(dtype: str) -> Any:
    """Return what launches a product of two square tiles."""
    tile = torch.empty(64, 64, dtype=getattr(torch, dtype), device="meta")
    sums = torch.empty(64, 64, device="meta")
    return lambda call: launch(kernels.product, TILE | {"dtype": dtype}, tile, tile, sums)


@pytest.mark.parametrize("target", GPUS)
def test_a_step_with_gates_of_channels_is_fit_and_moves_them(target: str) -> None:
    kinds = ("log_alpha", "channels", "erase and write", "erase and write channels")
    drawn = sampling.samples([GATED_DELTA_STEP.cases[1]], everything=True)
    backend = get_backend("tilelang")
    assert isinstance(backend, Backend)
    by_label = {sample.label: sample for sample in drawn}
    chosen = [by_label[f"gated_delta_step {kind}"] for kind in kinds]
    assert [sampling.reasons_against(backend, sample) for sample in chosen] == [[]] * 4
    rows = compile_for("tilelang", target, backend, chosen)
    assert all(row.failures == () and row.spills == row.stack == 0 for row in rows)
    gates = [tuple(row.options[name] for name in ("channels", "erases", "writes")) for row in rows]
    assert gates == [
        (False, "none", "none"),
        (True, "none", "none"),
        (False, "scalar", "scalar"),
        (True, "channel", "channel"),
    ]
    # A decay of channels is K floats for each row and head; erase and write are two for one beta.
    sizes = GATED_DELTA_STEP.cases[1].sizes
    moved = [launch.bytes for row in rows for launch in row.launches]
    floats = [(n - moved[0]) // (4 * sizes.B * sizes.HV) for n in moved]
    assert floats == [0, sizes.K - 1, 1, 2 * sizes.K + sizes.V - 2]


# What is wrong is found.


@pytest.mark.parametrize("target", GPUS)
def test_bytes_that_are_spilled_are_reported(target: str) -> None:
    # A warp must hold all of x: 320 registers a thread.
    used = compile_kernel(kernels.normalise, {"M": 80, "N": 128, "threads": 32}, target)
    assert used.usage.registers == 255
    assert used.usage.spills > 0 and used.stored > 0 and used.loaded > 0


def test_a_product_of_float32_tiles_is_a_failure_for_it_is_one_in_tf32() -> None:
    row = compiled("tilelang", "sm_80", multiplying("float32"))
    assert row.instructions.keys() == {"HMMA"}
    assert row.failures == ("a float32 product of 64 x 64 by 64 x 64 is one in TF32",)


def test_what_does_not_compile_is_a_failure_that_shows_the_line() -> None:
    row = compiled("tilelang", "sm_90a", launching(kernels.two_layouts, N=64))
    assert row.kernel == "two_layouts" and row.options == {"N": 64}
    assert row.failures == (
        "does not compile: InternalError: Get different layout for d, "
        'in: d = T.alloc_fragment((N, N), "float32")',
    )
    row = compiled("tilelang", "sm_90a", launching(kernels.misspelt, N=64))
    assert row.kernel == "misspelt"
    assert row.failures == (
        "does not compile: AttributeError: module 'tilelang.language' has no attribute "
        "'alloc_share', in: a = T.alloc_share((N, N), \"float32\")",
    )


def test_what_nvcc_refuses_is_an_error_with_what_it_says() -> None:
    with pytest.raises(RuntimeError) as error:
        cubin.assembled('extern "C" __global__ void f() { nowhere = 1; }', "sm_80")
    (line,) = str(error.value).splitlines()
    assert 'error: identifier "nowhere" is undefined' in line


SERIAL = """
extern "C" __global__ void serial(float* y, unsigned long long a, unsigned long long b) {
  __shared__ float s[256];
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;");
    d[0] += 1;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  s[threadIdx.x] = d[0];
  for (int i = 0; i < 4; ++i) y[i * blockDim.x + threadIdx.x] = d[i] + s[255 - threadIdx.x];
}
"""
"""Changes an accumulator while a product may still add to it."""


def test_what_ptxas_says_costs_time_is_a_failure_of_a_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = cubin.read(1000, 128, *cubin.assembled(SERIAL, "sm_90a"))
    assert kernel.usage.instructions == {"HGMMA": 4}
    # What the host asks for and what the source declares.
    assert kernel.shared == 1000 + 256 * 4
    (remark,) = kernel.remarks
    assert remark.startswith("wgmma.mma_async instructions are serialized due to ")
    monkeypatch.setattr(cubin, "compiled", lambda *_: kernel)
    launches = multiplying("bfloat16")
    assert compiled("tilelang", "sm_90a", launches).failures == (remark,)
    assert compiled("tilelang", "sm_90a", launches, is_reference=False).failures == ()


def test_the_threads_of_a_program_are_those_that_its_source_declares() -> None:
    text = 'extern "C" __global__ void __launch_bounds__(256, 1) states_kernel(const int* cu) {'
    assert cubin.threads_of(text) == 256
    message = "the source has no __launch_bounds__"
    assert message_of(ValueError, cubin.threads_of, "void f() {}") == message


# Targets and tools.


def command(*arguments: str) -> Result:
    """Run `gdn-ops compile` for the backend."""
    return run("compile", "--backend", "tilelang", *arguments)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sm_90", "target 'sm_90' is compiled without wgmma and its like: use sm_90a"),
        ("gfx942", "unknown target 'gfx942', known: sm_90a, sm_80, sm_100a, sm_120a"),
    ],
)
def test_a_target_is_refused_that_is_unknown_or_would_lose_wgmma(target: str, message: str) -> None:
    backend = Launching(launching(kernels.normalise, **CALM))
    assert message_of(ValueError, compile_kernel, kernels.product, TILE, target) == message
    assert message_of(ValueError, compile_for, "tilelang", target, backend, []) == message
    result = command("--target", target)
    assert result.exit_code == 2
    assert result.stderr == f"gdn-ops: {message}\n"


def test_a_missing_nvcc_is_an_error_that_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    text = f"{toolchain.NO_NVCC}; it is {str(tmp_path)!r}, which has no bin/nvcc"
    target, backend = "sm_90a", Launching(launching(kernels.normalise, **CALM))
    assert message_of(FileNotFoundError, compile_kernel, kernels.product, TILE, target) == text
    assert message_of(FileNotFoundError, compile_for, "tilelang", target, backend, []) == text
    result = command("--target", target)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gdn-ops: {toolchain.NO_NVCC}; it is ")


# Results are kept.


def test_a_result_is_kept_and_read_instead_of_compiling_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    first = compile_kernel(kernels.normalise, CALM, "sm_80")
    (file,) = tmp_path.glob("gdn_ops/usage/*.json")

    def again(*_: Any) -> Any:
        raise AssertionError("it is compiled again")

    monkeypatch.setattr(cubin, "lowered", again)
    monkeypatch.setattr(cubin, "assembled", again)
    assert compile_kernel(kernels.normalise, CALM, "sm_80") == first
    for constants, target in ((CALM | {"M": 32}, "sm_80"), (CALM, "sm_90a")):
        with pytest.raises(AssertionError, match="it is compiled again"):
            compile_kernel(kernels.normalise, constants, target)
    file.unlink()
    with pytest.raises(AssertionError, match="it is compiled again"):
        compile_kernel(kernels.normalise, CALM, "sm_80")


def test_what_does_not_compile_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    with pytest.raises(Exception, match="Get different layout"):
        compile_kernel(kernels.two_layouts, {"N": 64}, "sm_90a")
    assert not list(tmp_path.glob("gdn_ops/usage/*"))


def test_other_versions_are_other_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = kernels.normalise(tilelang.language, **CALM)
    files = {cubin._kept(function, "sm_80")}
    monkeypatch.setattr(tilelang, "__version__", "0.1.16")
    files.add(cubin._kept(function, "sm_80"))
    monkeypatch.undo()
    monkeypatch.setattr(cubin, "_version_of_nvcc", lambda: "14.0")
    files.add(cubin._kept(function, "sm_80"))
    assert len(files) == 3


def test_offsets_take_64_bits_where_sizes_are_not_known() -> None:
    source, shared = cubin.lowered(kernels.normalise(tilelang.language, **CALM), "sm_80")
    stores = [line for line in source.splitlines() if "(Y + " in line]
    assert stores and all("(int64_t)" in line for line in stores)
    assert shared == 0


# The grid of a launch, its bytes and its loops are those of the traced kernel.


def test_a_grid_and_the_bytes_follow_from_the_arguments() -> None:
    x = torch.empty(100, 64, device="meta")
    made = Launch(kernels.normalise, (), (x, x), CALM)
    function = trace(kernels.normalise, CALM)
    assert accesses.grid(made, function) == (7,)
    assert accesses.moved(made, function) == (100 * 64 * 4, 100 * 64 * 4)
    # Its second operand is transposed; the product is only written.
    tensors = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta"),) * 2
    sums = torch.empty(64, 64, device="meta")
    made = Launch(kernels.product, (), (*tensors, sums), TILE)
    assert accesses.moved(made, trace(kernels.product, TILE)) == (2 * 8192, 16384)


def launches_of_case(name: str) -> dict[str, tuple[Launch, Any]]:
    """Return the launches of a case's training by kernel, and their kernels traced."""
    backend = get_backend("tilelang")
    assert isinstance(backend, Backend)
    cases = {case.name: case for case in (*GATED_DELTA.cases, *GPU_CASES)}
    training = list(sampling.samples([cases[name]]))[1]
    made = [one.launch for one in jobs.launches_of(backend, training, "sm_90a")]
    return {
        f"{x.kernel.__name__} {x.kwargs.get('mode', '')}".strip(): (x, trace(x.kernel, x.kwargs))
        for x in made
    }


def test_loops_are_those_of_the_source() -> None:
    made = launches_of_case("qwen-16-64-8192x4")
    grids = {name: accesses.grid(*pair) for name, pair in made.items()}
    # 128 chunks for each of 4 sequences, and a slot more for each.
    assert grids["solve"] == grids["token_gradients"] == (4 * 128 + 4, 16)
    assert grids["states output"] == grids["state_gradients gradients"] == (2 * 4, 64)
    walked, traced = made["states output"]
    unsized = walked._replace(args=(*walked.args[:-1], None))
    message = "blockIdx.x has grid * 2 programs, should be a number"
    assert message_of(ValueError, accesses.grid, unsized, traced) == message
    loops = {name: loops_of(*pair, has_copiers=False) for name, pair in made.items()}
    trips = {name: [loop.trips for loop in own or ()] for name, own in loops.items()}
    # A search among 4 takes 2 steps; 4 value heads of a key head, in 2 blocks of columns.
    assert trips["solve"] == [2, 4]
    assert trips["states output"] == trips["states states"] == [2, 128]
    assert trips["token_gradients"] == [2, 8]
    copied = loops_of(*made["solve"], has_copiers=True)
    assert copied is not None
    assert [loop.trips for loop in copied] == [2, 4, 0, 0]
    assert [loop.is_constant for loop in copied] == [False, False, True, False]
    turned = loops_of(*made["solve"], has_copiers=True, copiers_first=True)
    assert turned is not None
    assert [loop.trips for loop in turned] == [2, 0, 2, 4]
    assert [loop.is_constant for loop in turned] == [False, False, True, False]
    launch_of_solve, traced = made["solve"]
    unknown = launch_of_solve._replace(kernel=kernels.product)
    assert loops_of(unknown, traced, has_copiers=False) is None


def test_a_walk_in_segments_has_the_chunks_of_one() -> None:
    made = launches_of_case("qwen-2-8-32768")
    walked = made["states output"]
    L = walked[0].args[[p.name for p in walked[1].params].index("L")]
    loops = loops_of(*walked, has_copiers=False)
    assert loops is not None and [loop.trips for loop in loops] == [0, L]
    composed = loops_of(*made["compose"], has_copiers=False)
    assert composed is not None and composed[0].trips == 512 // L


# The backend itself.


def test_the_command_compiles_a_named_case(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    arguments = ("tiny-step", "--backend", "tilelang", "--target", "sm_80", "--out", str(path))
    result = run("compile", *arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert data["backend"] == "tilelang"
    assert data["versions"]["tilelang"] == tilelang.__version__
    assert "cuda" in data["versions"]["compiler"]
    (row,) = data["kernels"]
    assert row["kernel"] == "tokens" and row["target"] == "sm_80" and row["failures"] == []
    assert row["registers"] > 0 and row["options"]["K"] == 32
