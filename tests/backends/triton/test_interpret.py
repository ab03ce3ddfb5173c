"""The emulation of Triton kernels: control flow and arguments, mistakes shown, nothing patched."""

from __future__ import annotations

import linecache
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from gdn_ops.backends.triton.emulation import functions, language  # noqa: E402
from gdn_ops.backends.triton.host.launcher import launch  # noqa: E402
from gdn_ops.kernel_support.launches import Launch, recorded_target, recording  # noqa: E402
from triton_kernels import arithmetic, control, helpers  # noqa: E402

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Control flow, helpers, arguments.


@pytest.mark.parametrize("n", [0, 1, 5, 16])
def test_loops_over_bounds_known_at_run_time(n: int) -> None:
    x = torch.zeros(6, dtype=torch.int64)
    launch(control.loops, (1,), x, n, 3)
    wide = sum(range(1, n, 3)) * 2147483647
    assert x.tolist() == [n * (n - 1) // 2, wide, 4, 9, 16, max(n, 1).bit_length() - 1]


def test_branches_on_data_and_early_returns() -> None:
    x = torch.tensor([-5, 7, 3, 101, 102], dtype=torch.int32)
    y = torch.full((5, 2), 9, dtype=torch.int32)
    launch(control.branches, (5, 2), x, y)
    assert y.tolist() == [[-1, -1], [9, 9], [0, 1], [100, 100], [0, 1]]


def test_helpers_of_other_files_run_and_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.linspace(-1, 1, 16), torch.empty(16)
    launch(control.with_helpers, (1,), x, y, N=16)
    torch.testing.assert_close(y, x + 1 + x * x + 0.5)
    monkeypatch.setattr(control, "BIAS", tl.constexpr(2.0))
    monkeypatch.setattr(helpers, "half", helpers.square)
    monkeypatch.setattr(helpers, "square", control.affine)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'by'"):
        launch(control.with_helpers, (1,), x, y, N=16)
    monkeypatch.setattr(helpers, "square", helpers.half)
    launch(control.with_helpers, (1,), x, y, N=16)
    torch.testing.assert_close(y, 4 * x * x + 1 + x * x + 2.0)
    monkeypatch.undo()
    launch(control.with_helpers, (1,), x, y, N=16)
    torch.testing.assert_close(y, x + 1 + x * x + 0.5)


def test_absent_pointers_and_defaults() -> None:
    x, z, y = torch.randn(32), torch.randn(32), torch.empty(32)
    launch(control.with_default, (2,), x, y)
    assert torch.equal(y, x * 2)
    launch(control.with_default, (2,), x, y, z, 3, num_warps=4, num_stages=2, enable_fp_fusion=True)
    torch.testing.assert_close(y, x * 3 + z)
    launch(control.with_default, (1, 0), x, y, z)
    torch.testing.assert_close(y, x * 3 + z, msg="a grid with no program ran one")


def test_views_are_read_and_written_where_they_are() -> None:
    base = torch.zeros(64)
    x, y = torch.arange(16.0), base[20:36]
    launch(control.with_default, (1,), x, y)
    assert torch.equal(base[20:36], x * 2)
    assert base[:20].abs().sum() == base[36:].abs().sum() == 0


# Mistakes are shown.


def test_an_access_outside_of_the_tensors_is_an_error() -> None:
    base = torch.zeros(96)
    x, y = base[:32], base[64:]
    launch(control.shifted, (1,), x, y, 28, 0, 4, N=16)
    for read, write, n, message in (
        (28, 0, 5, "reads 4 bytes, 0 bytes behind the end of X_"),
        (-1, 0, 5, "reads 4 bytes, 4 bytes before X_"),
        (0, 34, 1, "writes 4 bytes, 8 bytes behind the end of Y_"),
    ):
        with pytest.raises(IndexError) as caught:
            launch(control.shifted, (1,), x, y, read, write, n, N=16)
        assert str(caught.value) == message
        where = "in program (0, 0, 0) of (1, 1, 1) of the kernel shifted"
        assert caught.value.__notes__ == [where]
    assert base.abs().sum() == 0


def test_what_lies_between_the_rows_of_a_view_is_inside() -> None:
    x, y = torch.arange(64.0).reshape(8, 8)[:, :2], torch.zeros(16)
    launch(control.shifted, (1,), x, y, 40, 0, 16, N=16)
    assert y.tolist() == list(range(40, 56))
    with pytest.raises(IndexError, match=r"reads 4 bytes, 0 bytes behind the end of X_"):
        launch(control.shifted, (1,), x, y, 43, 0, 16, N=16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.uint8])
def test_what_a_mask_leaves_undefined_is_no_number_that_could_be_right(dtype: torch.dtype) -> None:
    x, y = torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype)
    launch(control.masked, (1,), x, y, 10, N=16)
    assert not y[:10].any()
    assert y[10:].isnan().all() if dtype.is_floating_point else (y[10:] == x[10:] - 1).all()


def test_kernels_print_and_assert(capsys: pytest.CaptureFixture[str]) -> None:
    launch(control.speaking, (1,), torch.tensor([3], dtype=torch.int32), 4)
    assert capsys.readouterr().out.split() == ["(0,", "0,", "0)", "x", "is:", "[3]"]
    with pytest.raises(AssertionError, match=r"^x is too large"):
        launch(control.speaking, (1,), torch.tensor([3], dtype=torch.int32), 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: launch(control.branch_on_a_block, (1,), x, N=16),
            ValueError,
            "a block of shape (16,) has no truth value: combine blocks with & | ~",
        ),
        (
            lambda x: launch(control.changing_type, (1,), x, 3),
            TypeError,
            "total is int32 before a loop and fp32 after a turn of it; a loop keeps types",
        ),
        (
            lambda x: launch(control.growing, (1,), x, 2, N=16),
            TypeError,
            "y is fp32 before a loop and fp32 of shape (16,) after a turn of it; "
            "a loop keeps types",
        ),
        (
            lambda x: launch(control.chained, (1,), x, 2),
            SyntaxError,
            "chained: a chained comparison does not compile before Triton 3.9: 0 < n < 3",
        ),
        (
            lambda x: launch(control.two_names, (1,), x),
            SyntaxError,
            "two_names: an assignment to several names does not compile: a = b = tl.load(X_)",
        ),
        (
            lambda x: launch(control.with_default, (1,), x, x, n_warps=4, what=3),
            TypeError,
            "with_default has no argument n_warps, what",
        ),
        (
            lambda x: launch(control.with_default, (1,), x, "y"),
            TypeError,
            "Y_ is a str, should be a tensor, a number or None",
        ),
        (
            lambda x: launch(control.with_default, (1,), x, x.to("meta")),
            ValueError,
            "Y_ is on meta, should be on cpu like the first tensor",
        ),
        (
            lambda x: launch(control.with_default, (1,), x.to("meta"), x),
            ValueError,
            "with_default: the first tensor is on the meta device, should be on cuda or cpu",
        ),
        (
            lambda x: launch(control.with_default, (1, 65536), x, x),
            ValueError,
            "with_default: grid is (1, 65536), should be at most (2147483647, 65535, 65535)",
        ),
        (
            lambda x: launch(InterpretedFunction(control.shifted.fn), (1,), x),
            TypeError,
            "shifted was made under TRITON_INTERPRET=1: unset it, it is not needed here and its "
            "bfloat16 is wrong",
        ),
        (
            lambda x: launch(len, (1,), x),
            TypeError,
            "kernel is a builtin_function_or_method, should be made by triton.jit",
        ),
    ],
)
def test_a_mistake_is_named(call: Any, error: type[Exception], message: str) -> None:
    x = torch.ones(16)
    with pytest.raises(error) as caught:
        call(x)
    assert str(caught.value) == message
    assert torch.equal(x, torch.ones(16))


# Nothing is patched.


def language_as_it_is() -> list[dict[str, Any]]:
    spaces = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, control, helpers, arithmetic)
    return [dict(vars(space)) for space in spaces]


def compile_helpers(n: int) -> bytes:
    source = triton.compiler.ASTSource(
        fn=control.with_helpers,
        signature={"X_": "*fp32", "Y_": "*fp32", "N": "constexpr"},
        constexprs={(2,): n},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
    assert compiled.metadata.target.arch == 90
    return compiled.asm["cubin"]  # type: ignore[no-any-return]


def test_a_launch_leaves_triton_and_the_kernels_as_they_were() -> None:
    before = language_as_it_is()
    x, y = torch.randn(16), torch.empty(16)
    launch(control.with_helpers, (1,), x, y, N=16)
    with pytest.raises(IndexError):
        launch(control.shifted, (1,), x, y, 28, 0, 5, N=16)
    for old, new in zip(before, language_as_it_is(), strict=True):
        assert {n: id(v) for n, v in new.items()} == {n: id(v) for n, v in old.items()}


def test_a_kernel_compiles_after_it_was_emulated_and_runs_after_it_was_compiled() -> None:
    x, y = torch.linspace(-1, 1, 16), torch.empty(16)
    for n in (16, 32):
        launch(control.with_helpers, (1,), x, y, N=16)
        torch.testing.assert_close(y, x + 1 + x * x + 0.5)
        assert len(compile_helpers(n)) > 1000
    launch(control.with_helpers, (1,), x, y, N=16)


def test_threads_that_emulate_a_kernel_for_the_first_time_rewrite_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill, ready = linecache.updatecache, threading.Barrier(8)

    def slow(filename: str, module_globals: Any = None) -> Any:
        # As it is while a file is read: not in the cache.
        linecache.cache.pop(filename, None)
        time.sleep(0.002)
        return fill(filename, module_globals)

    monkeypatch.setattr(linecache, "updatecache", slow)
    monkeypatch.setattr(functions, "_twins", {})
    linecache.clearcache()

    def work(n: int) -> Any:
        x, y = torch.linspace(-1, 1, 16) + n, torch.empty(16)
        ready.wait()
        launch(control.with_helpers, (1,), x, y, N=16)
        return x, y, functions.emulated(control.with_helpers)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len({id(function) for _, _, function in results}) == 1
    for x, y, _ in results:
        torch.testing.assert_close(y, x + 1 + x * x + 0.5)


def test_threads_emulate_different_grids_and_compile_at_the_same_time() -> None:
    ready = threading.Barrier(4)

    def emulate(n: int) -> None:
        x = torch.randn(n * 16)
        ready.wait()
        for _ in range(10):
            y = torch.full((n * 16,), float("nan"))
            launch(control.with_default, (n,), x, y)
            assert torch.equal(y, x * 2), n

    def compile_() -> None:
        ready.wait()
        compile_helpers(64)
        compile_helpers(128)

    with ThreadPoolExecutor(4) as pool:
        for work in [*(pool.submit(emulate, n) for n in (3, 5, 8)), pool.submit(compile_)]:
            work.result(timeout=60)


def test_a_function_is_translated_once() -> None:
    first = functions.emulated(control.with_helpers)
    assert functions.emulated(control.with_helpers) is first
    assert first is not control.with_helpers.fn
    names = first.__globals__
    assert names["tl"] is language.tl
    assert names["tl"] is not tl and names["tl"].tensor is not tl.tensor
    # Lines are those of the file, so that a traceback shows the line of the kernel.
    assert first.__code__.co_filename == control.__file__
    lines = [line for *_, line in first.__code__.co_lines() if line is not None]
    source = [number for *_, number in control.with_helpers.fn.__code__.co_lines() if number]
    assert min(lines) >= min(source) and max(lines) == max(source)


# Launches are noted.


def test_launches_on_meta_tensors_are_noted_with_their_target() -> None:
    x, y = torch.empty(16, device="meta"), torch.empty(16, device="meta")
    assert recorded_target() is None
    with recording("sm_90") as launches:
        assert recorded_target() == "sm_90"
        with recording("gfx942") as inner:
            launch(control.with_default, (1,), x, y, num_warps=2)
        launch(control.with_helpers, (2, 3), x, y, N=16)
        z = torch.zeros(16)
        launch(control.with_default, (1,), torch.ones(16), z)
    assert recorded_target() is None
    assert z.sum() == 32
    assert inner == [Launch(control.with_default, (1,), (x, y), {"num_warps": 2})]
    assert launches == [Launch(control.with_helpers, (2, 3), (x, y), {"N": 16})]
