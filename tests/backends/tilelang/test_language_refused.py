"""What a GPU would not do, or not so, is refused on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import message_of

pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.emulation.language import CPU
from gdn_ops.backends.tilelang.host.launcher import launch
from tilelang_kernels import wrong
from tilelang_kernels.launching import needs_compiler, traced

PRODUCT: dict[str, Any] = {
    "name": "gemm",
    "shapes": ((16, 16), (16, 8), (16, 8)),
    "dtypes": ("float16", "float16", "float32"),
    "scopes": "ssf",
    "options": (),
}
"""A product of tiles that a GPU has an instruction for."""

REDUCTION: dict[str, Any] = {"scopes": "ff", "dtypes": ("float32", "float32")}


@pytest.mark.parametrize(
    ("constants", "text"),
    [
        (
            {"shapes": ((32, 16), (16, 8), (16, 8))},
            "T.gemm: {} is (32, 16) and {} is (16, 8), should be (M, K) and (K, N) for {} of "
            "(M, N) = (16, 8)",
        ),
        (
            {"shapes": ((16, 8), (8, 8), (16, 8))},
            "T.gemm: M, N, K are 16, 8, 8, should be multiples of 16, 8 and 16",
        ),
        (
            {"dtypes": ("float32",) * 3},
            "T.gemm: {} is float32 and {} is float32, should both be bfloat16 or both float16; "
            "a GPU rounds float32 to TF32",
        ),
        (
            {"dtypes": ("float16", "bfloat16", "float32")},
            "T.gemm: {} is float16 and {} is bfloat16, should both be bfloat16 or both float16; "
            "a GPU rounds float32 to TF32",
        ),
        ({"dtypes": ("bfloat16",) * 3}, "T.gemm: {} is bfloat16, should be float32"),
        ({"scopes": "sff"}, "T.gemm: {} is in local.fragment memory, should be in shared"),
        ({"scopes": "sss"}, "T.gemm: {} is in shared memory, should be in local.fragment"),
        (
            {"shapes": ((16,), (16, 8), (16, 8))},
            "T.gemm: {} has shape (16,), should be a matrix of a size that is a constant",
        ),
        (
            {
                "name": "copy",
                "shapes": ((16, 8), (8, 16)),
                "scopes": "sf",
                "dtypes": ("float16", "float32"),
            },
            "T.copy: {} gives (16, 8) elements and {} takes (8, 16), should be the same but for "
            "axes of 1",
        ),
        (
            REDUCTION | {"name": "reduce_sum", "shapes": ((16, 8), (8,))},
            "T.reduce_sum: {} is float32 [8], should be float32 [16, 1], with or without the 1",
        ),
        (
            REDUCTION
            | {"name": "reduce_max", "shapes": ((16, 8), (16,)), "dtypes": ("float32", "float16")},
            "T.reduce_max: {} is float16 [16], should be float32 [16, 1], with or without the 1",
        ),
        (
            REDUCTION | {"name": "cumsum", "shapes": ((16, 8), (8, 16))},
            "T.cumsum: {} has shape [8, 16], should be [16, 8]",
        ),
    ],
)
def test_a_tile_operation_that_a_gpu_has_not_is_refused(
    constants: dict[str, Any], text: str
) -> None:
    message = message_of(ValueError, traced, wrong.tile_operation, **{**PRODUCT, **constants})
    assert message == text.replace("{}", "a tile")


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (
            wrong.one_for_all,
            "iterations of T.Parallel race: those over j write the same element of total",
        ),
        (
            wrong.neighbour,
            "iterations of T.Parallel race: one writes tile[i], another reads tile[i - 1]",
        ),
        (wrong.nested, "a tile operation is inside of T.Parallel, should be outside"),
    ],
)
def test_a_race_and_a_product_inside_of_a_parallel_loop_are_refused(kernel: Any, text: str) -> None:
    assert message_of(ValueError, traced, kernel) == text


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("read the result", "c is read before its product has been waited for"),
        ("read it after a branch", "c is read before its product has been waited for"),
        ("write the result", "c is written before its product has been waited for"),
        ("write an operand", "a is written while a product runs that may read there"),
        ("write another tile", "b is written while a product runs that may read there"),
        ("end the kernel", "a product has not been waited for where a loop, or the kernel, ends"),
    ],
)
def test_what_is_done_beside_a_product_of_it_is_refused(then: str, text: str) -> None:
    assert message_of(ValueError, traced, wrong.unawaited, then=then) == text


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("end the loop", "a product has not been waited for where a loop, or the kernel, ends"),
        ("wait", "a is loaded again while a product of it may run"),
    ],
)
def test_a_loop_may_not_load_what_a_product_of_it_reads(then: str, text: str) -> None:
    assert message_of(ValueError, traced, wrong.unawaited_in_loop, then=then) == text


@needs_compiler
def test_one_wait_is_for_all_products_before_it() -> None:
    x = torch.randint(-4, 5, (4, 16, 16), generator=torch.Generator().manual_seed(7)).bfloat16()
    y = torch.empty(16, 16)
    launch(wrong.unawaited, {"then": "wait"}, x[0], y)
    assert torch.equal(y, 3 * (x[0].float() @ x[0].float()))
    launch(wrong.unawaited_in_loop, {"then": "wait and hold"}, x, y)
    assert torch.equal(y, torch.zeros(16, 16))


@needs_compiler
def test_what_only_looks_like_a_race_is_none() -> None:
    x = torch.randint(0, 9, (8, 16), generator=torch.Generator().manual_seed(6)).float()
    expected = x.cumsum(1)
    expected[:, 8:] = expected[:, :8] + expected[:, 15:]
    launch(wrong.orderly, {}, x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("kernel", "constants", "what"),
    [
        *(
            (wrong.named, {"name": name}, f"T.{name}")
            for name in (
                *("atomic_add", "Persistent", "alloc_barrier", "get_thread_binding", "shfl_down"),
                *("view", "call_extern", "gemm_sp", "import_source", "tma_copy", "wgmma_gemm"),
                *("any_of", "print"),
            )
        ),
        (wrong.clamped, {}, "tl.clamp"),
        (wrong.viewed, {}, "square, a view of a tile,"),
        (wrong.low_number, {}, "parameter y of bfloat16"),
        (wrong.tile_of, {"dtype": "float8_e4m3fn"}, "tile tile of float8_e4m3fn"),
    ],
)
def test_what_has_no_emulation_says_so(kernel: Any, constants: dict[str, Any], what: str) -> None:
    message = message_of(NotImplementedError, traced, kernel, **constants)
    assert message == f"{what} has no emulation on CPU tensors"


def test_a_name_that_tilelang_does_not_have_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gem'"):
        CPU.gem  # noqa: B018


@pytest.mark.parametrize("name", ["annotate_layout", "use_swizzle", "sync_threads", "set_max_nreg"])
def test_a_hint_does_nothing(name: str) -> None:
    assert "gdn_ops_call" in traced(wrong.named, name=name).text


@pytest.mark.parametrize("threads", [0, 48, 2048])
def test_a_number_of_threads_that_no_gpu_has_is_refused(threads: int) -> None:
    message = message_of(ValueError, traced, wrong.named, name="sync_threads", threads=threads)
    assert message == f"T.Kernel: threads={threads}, should be a multiple of 32 up to 1024"
