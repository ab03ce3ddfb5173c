"""Compile by Triton without a GPU: as a launch does, and with defaults that are right."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import (  # noqa: E402
    Launching,
    compile_for,
    compiled,
    sequence,
)
from gdn_ops.aot.gpu_limits import Product  # noqa: E402
from gdn_ops.aot.jobs import launches_of  # noqa: E402
from gdn_ops.aot.machine_code import Code, Counts  # noqa: E402
from gdn_ops.aot.sass import Usage  # noqa: E402
from gdn_ops.aot.source_loops import SourceLoop  # noqa: E402
from gdn_ops.backends.triton import Triton  # noqa: E402
from gdn_ops.backends.triton.aot.accesses import Accesses, accesses, moved  # noqa: E402
from gdn_ops.backends.triton.aot.compiler import (  # noqa: E402
    TARGETS,
    specialised,
)
from gdn_ops.backends.triton.aot.loops import grid_of, loops_of  # noqa: E402
from gdn_ops.backends.triton.aot.usage import amd_usage, products  # noqa: E402
from gdn_ops.backends.triton.host.config import tables  # noqa: E402
from gdn_ops.backends.triton.host.launcher import launch  # noqa: E402
from gdn_ops.dispatch.registry import get_backend  # noqa: E402
from gdn_ops.kernel_support.launches import Launch, recording  # noqa: E402
from gdn_ops.kernel_support.tuning import Row  # noqa: E402
from kernel_backends import SIZES, meta_call  # noqa: E402
from triton_kernels import bad  # noqa: E402


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_what_does_not_compile_is_a_failure_though_it_runs_in_an_emulation() -> None:
    x = torch.zeros(1)
    launch(bad.defined_in_one_branch, (1,), x, 3)
    assert x.item() == 1.5
    launches = functools.partial(
        launch, bad.defined_in_one_branch, (1,), x.to("meta"), 3, enable_fp_fusion=True
    )
    row = compiled("triton", "sm_90", lambda call: launches())
    assert row.failures == (
        "does not compile: CompilationError: NameError('x is not defined'), in: tl.store(X_, x)",
    )
    assert [(x.grid, x.bytes, x.prediction) for x in row.launches] == [((1,), 4, None)]


# The specialisation is that of a launch.


@contextmanager
def driver_for(target: str) -> Iterator[None]:
    """Give Triton's own warm-up enough of a driver: one GPU that cannot launch."""
    driver = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        yield
    bad.gather.device_caches.clear()


GATHERS = {
    "aligned": (meta(64), meta(64), None, 64, 32, 0.5),
    "a view that is not aligned": (meta(64)[1:], meta(64), None, 64, 32, 0.5),
    "odd": (meta(64), meta(64), meta(64), 63, 7, 0.5),
    "one": (meta(64), meta(64), None, 64, 1, 1.0),
    "wide": (meta(64), meta(2**31), None, 2**40, 1, 1.0),
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_specialisation_is_the_one_that_a_launch_makes(target: str) -> None:
    hashes = {}
    for name, args in GATHERS.items():
        with recording(target) as launches:
            launch(bad.gather, (1,), *args, N=64, num_warps=2, enable_fp_fusion=True)
        source, options, _ = specialised(launches[0], target)
        ours = triton.compile(source, target=TARGETS[target], options=options.__dict__)
        with driver_for(target):
            theirs = bad.gather.warmup(*args, N=64, num_warps=2, enable_fp_fusion=True, grid=(1,))
        assert ours.hash == theirs.hash, name
        hashes[name] = ours.hash
    assert len(set(hashes.values())) == len(GATHERS)


def keys(target: str, **sizes: Any) -> set[tuple[str, str]]:
    """Return what the launches of a call are compiled for, forward and backward."""
    backend, call = Triton(), meta_call(True, **SIZES | sizes)
    with torch.no_grad(), recording(target) as launches:
        out = backend.forward(call)
        backend.backward(
            call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state)
        )
    return {(launch.kernel.__name__, repr(specialised(launch, target)[2])) for launch in launches}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "sizes",
    [{"T": 1000}, {"T": 17}, {"B": 3, "T": 1001}, {"H": 13, "HV": 39}, {"H": 1, "HV": 24}],
    ids=str,
)
@pytest.mark.parametrize("segment", [0, 5], ids=["whole", "segments"])
def test_no_length_batch_or_number_of_heads_compiles_anything_new(
    target: str, sizes: dict[str, int], segment: int
) -> None:
    key = (target, 128, "low")
    with tables.using(Row(key, replace(tables.rows[key], segment=segment))):
        assert keys(target, **sizes) <= keys(target)


def test_sources_are_translated_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []
    make_ir = triton.compiler.ASTSource.make_ir

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return make_ir(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(triton.compiler.ASTSource, "make_ir", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # Results that are in Triton's cache are not translated again.
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    x, samples = meta(64), [sequence(T=t) for t in (4095, 4096)]
    options = {"N": 16, "enable_fp_fusion": True}
    backend = Launching(
        lambda call: launch(bad.gather, (1,), x, x, None, call.sizes.T, 3, 1.0, **options)
    )
    assert len(compile_for("triton", "sm_90", backend, samples)) == 2
    assert most == [1, 1]


# What a compiler prints is read.


def test_usage_on_amd_is_read_from_the_assembly() -> None:
    assembly = """
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        v_smfmac_f32_16x16x32_bf16 v[0:3], v[4:5], v[6:9], v10
    .agpr_count: 46
    .private_segment_fixed_size: 16
    .vgpr_count:     302
    .vgpr_spill_count: 3
    """
    own = Counts(instructions=2, matrix=2, multiply_adds=32 * 32 * 8 + 16 * 16 * 32)
    assert amd_usage(assembly) == Usage(302, 3, 16, {"MFMA": 1, "SMFMA": 1}, Code(own))
    with pytest.raises(ValueError, match=r"^the assembly has no .vgpr_count$"):
        amd_usage("s_endpgm")


def test_products_are_read_from_the_representation_of_a_kernel() -> None:
    text = """
    %a = tt.dot %k, %t, %c, inputPrecision = tf32 : tensor<64x128xbf16> * tensor<128x32xbf16> -> tensor<64x32xf32> loc(#loc)
    %b = tt.dot %k, %t, %c : tensor<2x16x64xf32> * tensor<2x64x16xf32> -> tensor<2x16x16xf32>
    %d = arith.addf %a, %a : tensor<64x32xf32>
    """  # noqa: E501
    assert products(text) == [Product(64, 32, 128, "bf16"), Product(16, 16, 64, "f32")]


TTIR = """
  tt.func public @walk(%k: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %k_token: i32, %o: !tt.ptr<f32>, %s: !tt.ptr<f32>, %unused: !tt.ptr<f32>) attributes {noinline = false} {
    %0 = tt.get_program_id x : i32
    %from_k = tt.addptr %k, %0 : !tt.ptr<bf16>, i32
    %tiles = tt.make_tensor_descriptor %from_k, [%k_token], [%c1_i64] : <bf16>, <tensor<64xbf16>>
    %from_s = tt.splat %s : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    %S = tt.load %from_s, %mask : tensor<64x!tt.ptr<f32>>
    %to_o = tt.splat %o : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    %S_1:2 = scf.for %i = %0 to %c8 step %c1 iter_args(%x = %S, %to = %to_o) -> (tensor<64xf32>, tensor<64x!tt.ptr<f32>>) : i32 {
      %tile = tt.descriptor_load %tiles[%i] : !tt.tensordesc<tensor<64xbf16>> -> tensor<64xbf16>
      tt.store %to, %x, %mask : tensor<64x!tt.ptr<f32>>
      %next = tt.addptr %to, %c64 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
      scf.yield %x, %next : tensor<64xf32>, tensor<64x!tt.ptr<f32>>
    }
    %old = tt.atomic_rmw fadd, acq_rel, gpu, %from_s, %S_1#0, %mask : (tensor<64x!tt.ptr<f32>>, tensor<64xf32>, tensor<64xi1>) -> tensor<64xf32>
"""  # noqa: E501


def test_what_is_read_and_written_follows_from_the_pointers() -> None:
    found = accesses(TTIR)
    assert found == Accesses(frozenset({"k", "s"}), frozenset({"o", "s"}))
    tensors = (meta(8), 2, meta(16, dtype=torch.float32), meta(4, dtype=torch.float32), meta(99))
    kernel = SimpleNamespace(arg_names=["k", "k_token", "o", "s", "unused"])
    made = Launch(kernel, (1,), tensors, {"num_warps": 4})
    assert moved(made, found) == (8 * 2 + 4 * 4, 16 * 4 + 4 * 4)


def test_what_cannot_be_followed_is_not_known() -> None:
    unknown = TTIR.replace("%to_o = tt.splat %o", "%to_o = tt.elsewhere %there")
    assert accesses(unknown) is None
    assert moved(Launch(SimpleNamespace(arg_names=[]), (1,), (), {}), None) is None


# The loops of a launch are those of its source.


def training_launches(**choice: Any) -> list[Launch]:
    """Return the launches of a training call."""
    backend = get_backend("triton")
    assert not isinstance(backend, str)
    call = replace(sequence(**choice).call, needs_grad=True)
    made = launches_of(backend, replace(sequence(), call=call), "sm_90")
    return [one.launch for one in made]


def launch_loops(**choice: Any) -> dict[str, Any]:
    """Return the loops of the launches of a training call, by kernel."""
    return {x.kernel.__name__: loops_of(x) for x in training_launches(**choice)}


def test_loops_are_those_of_the_source() -> None:
    loops = launch_loops(T=1000, HV=64)
    heads, columns = ("value heads", 4), SourceLoop("columns of V", 2, (), is_constant=True)
    chunks = (SourceLoop("chunks", 16, is_kept=True),)
    nested = SourceLoop(*heads, (columns,), is_kept=True)
    fours = SourceLoop("four value heads", 1, is_kept=True)
    own = SourceLoop("chunks", 1, (fours,), is_kept=True)
    squares = SourceLoop("four squares", 1, is_kept=True)
    of_k = SourceLoop("columns of K", 2, is_constant=True)
    rows = SourceLoop("rows of pairs", 4, (columns, of_k), is_constant=True)
    kinds = SourceLoop("kinds of rare gates", 0, (rows,), is_kept=True, may_rest=True)
    rare = SourceLoop(*heads, (kinds,), is_kept=True)
    assert loops == {
        "prepare": (SourceLoop("tasks", 1, (own, squares), is_kept=True),),
        **dict.fromkeys(("walk", "walk_back"), chunks),
        "token_gradients": (*(nested,) * 5, rare, fours),
    }


def test_loops_of_segments_are_shorter() -> None:
    loops = launch_loops(T=32768, H=2, HV=8)
    assert loops["walk"] == loops["walk_back"] == (SourceLoop("chunks", 32, is_kept=True),)
    # Of 16 segments, two need no product.
    rows = SourceLoop("rows of M", 4, (), is_constant=True)
    segments = SourceLoop("segments", 14, (rows,), is_kept=True, may_rest=True)
    assert loops["compose"] == (segments,)


def test_loops_of_a_walk_beside_programs_that_compose_are_its_own() -> None:
    walk = launch_loops(T=262144, H=2, HV=8)["walk"]
    rows = SourceLoop("rows of M", 0, (), is_constant=True)
    segments = SourceLoop("segments", 0, (rows,), is_kept=True, may_rest=True)
    assert walk[0] == segments and [loop.name for loop in walk[1:]] == ["chunks"]


def test_the_grid_of_a_walk_is_without_the_programs_that_compose_beside_it() -> None:
    launches = training_launches(T=262144, H=2, HV=8)
    walks = [launch for launch in launches if launch.kernel.__name__ == "walk"]
    assert [launch.kwargs["COMPOSED"] for launch in walks] == [0, 0, 8]
    assert [grid_of(launch)[1] - launch.grid[1] for launch in walks] == [0, 0, -8]


def test_loops_of_a_kernel_without_an_entry_are_not_known() -> None:
    made = Launch(bad.gather, (1,), (meta(64), meta(64), None, 64, 32, 0.5), {"N": 64})
    assert loops_of(made) is None
