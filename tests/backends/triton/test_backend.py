"""The Triton backend: what the kit cannot draw. Launches, bytes, memory, configurations, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judgement
from kernel_backends import (
    AWKWARD,
    SIZES,
    check_definition,
    check_reason,
    forbid_copies,
    linear_arguments,
    meta_call,
    reasons_on_a_gpu,
    using,
)

pytest.importorskip("triton")

from gdn_ops.backends import triton as backend
from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host import plan, table
from gdn_ops.backends.triton.host.plan import fastest_segment
from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Tiles

pytestmark = pytest.mark.filterwarnings("ignore:backend 'triton' emulates")


# More sequences than are searched at once, empty ones and runs of one token among them.
MANY = tuple(17 if n % 64 == 3 else n % 2 for n in range(140))

ONE_TOKEN = [(2, 6, "bfloat16"), (1, 1, "float32"), (8, 3, "float16"), (3, 8, "bfloat16")]

DEFINED = [
    *(
        dataclasses.replace(AWKWARD, dtype=dtype, chunk_size=chunk_size)
        for dtype in ("bfloat16", "float16", "float32")
        for chunk_size in (16, 32, 64)
    ),
    *(
        Example(T=20, K=K, V=V, gate="extreme", beta="wide", dtype="bfloat16", seed=1)
        for K, V in [(96, 192), (192, 96), (80, 80), (256, 256), (128, 256), (200, 1), (1, 130)]
    ),
    Example(T=sum(MANY), lengths=MANY, K=8, V=8, chunk_size=16, initial_state=True),
    # One token of one head: no other has to be as far from it as descriptors want.
    *(Example(T=1, K=K, V=V, dtype=dtype) for K, V, dtype in ONE_TOKEN),
]


@pytest.mark.parametrize(
    "example", DEFINED, ids=[f"{x.K}-{x.V}-{x.dtype}-{x.chunk_size}" for x in DEFINED]
)
def test_dtypes_chunk_sizes_widths_and_many_sequences_are_the_definition(example: Example) -> None:
    check_definition("triton", example)


CHOICES: dict[str, dict[str, Any]] = {
    "by pointers": {"descriptors": False},
    "by pointers, small chunks": {"descriptors": False, "C": 16},
    "segments of a chunk": {"segment": 1, "C": 16},
    "segments of two chunks, by pointers": {"segment": 2, "C": 16, "descriptors": False},
    "narrow tiles": {
        field.name: Tiles(16, 4, 1)
        for field in dataclasses.fields(table.Config)
        if field.type == "Tiles" and field.name != "prepare"
    },
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("lengths", [None, (70, 0, 17, 33)])
def test_no_configuration_changes_the_function(
    choice: str, lengths: tuple[int, ...] | None
) -> None:
    tokens = AWKWARD.T if lengths is None else sum(lengths)
    example = dataclasses.replace(AWKWARD, dtype="bfloat16", lengths=lengths, T=tokens)
    judgement(example)
    with using("triton", example, **CHOICES[choice]):
        check_definition("triton", example)


def test_boundaries_may_lie_apart() -> None:
    arguments = dataclasses.replace(AWKWARD, lengths=(30, 40), T=70).arguments()
    expected = gdn_ops.gated_delta(**arguments, backend="triton")
    wide = torch.full((6,), -1)
    wide[::2] = arguments["cu_seqlens"]
    arguments["cu_seqlens"] = wide[::2]
    assert torch.equal(gdn_ops.gated_delta(**arguments, backend="triton"), expected)


def test_the_same_call_gives_the_same_bits() -> None:
    for dtype in ("bfloat16", "float32"):
        example = dataclasses.replace(AWKWARD, dtype=dtype)
        first, second = example.run("triton"), example.run("triton")
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rule", ["gated_delta", "delta", "gated"])
def test_the_gradient_of_beta_is_right_where_beta_is_zero_or_tiny(rule: str, dtype: str) -> None:
    # Elsewhere it is a quotient by β.
    example = dataclasses.replace(AWKWARD, dtype=dtype, rule=rule, seed=4)
    arguments = example.arguments()
    beta = arguments["beta"].clone()
    beta[:, ::3], beta[:, 1::5] = 0.0, 1e-9
    gradients = {}
    for backend_, to in (("triton", torch.float32), ("naive", torch.float64)):
        wide = {
            name: x.to(to) if to == torch.float64 and isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        leaf = beta.to(to).requires_grad_()
        o = gdn_ops.gated_delta(**wide | {"beta": leaf}, backend=backend_)
        (gradients[backend_],) = torch.autograd.grad(o.to(to).square().sum(), leaf)
    got, expected = gradients["triton"].double(), gradients["naive"]
    most = 2.0**-5 if dtype == "bfloat16" else 1e-4
    for at in (beta == 0.0, beta == torch.tensor(1e-9), beta > 1e-6):
        assert int(at.sum()) > 9
        assert (got[at] - expected[at]).norm() <= most * expected[at].norm()


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


def test_forward_takes_two_launches_and_backward_three() -> None:
    triton = backend.Triton()
    call = meta_call(True, **SIZES | {"B": 4})
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        forward = [launch.kernel.__name__ for launch in launches]
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
    names = [launch.kernel.__name__ for launch in launches]
    assert forward == ["prepare", "walk"]
    # What would fill more than a 256th of the memory is not kept: the backward walks again.
    assert names[2:] == ["walk", "walk_back", "token_gradients"]


def test_a_long_sequence_of_few_heads_is_cut_into_segments() -> None:
    triton, few = backend.Triton(), SIZES | {"T": 32768, "H": 2, "HV": 8}
    call = meta_call(True, **few)
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
        for whole in (SIZES | {"B": 4}, few | {"T": 1024}):
            triton.forward(meta_call(**whole))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:4] == ["prepare", "walk", "compose", "walk"]
    assert names[4:8] == ["walk_back", "compose", "walk_back", "token_gradients"]
    assert names[8:] == ["prepare", "walk"] * 2
    # 16 segments of 8 heads, in two blocks of columns: 15 are walked for the state at their end,
    # by two blocks of V, and 14 of them for their map, by two blocks of K.
    grids = [launch.grid for launch in launches[1:7]]
    walked = (16 * 8, 2)
    assert grids == [(8, 15 * 2 + 14 * 2), (8, 8), walked, (8, 15 * 2), (8, 8), walked]


def test_a_cut_sequence_whose_states_are_too_large_to_keep_is_walked_again_beside_composing() -> (
    None
):
    triton = backend.Triton()
    call = meta_call(True, **SIZES | {"T": 262144, "H": 2, "HV": 8})
    with torch.no_grad(), recording("sm_90") as launches:
        out = triton.forward(call)
        triton.backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[4:] == ["walk_back", "walk", "walk_back", "token_gradients"]
    # 8 programs of 16 columns of V stand before the two that walk 64 columns each.
    slots = plan.make_plan(call).segment_slots
    assert launches[5].grid == (slots * 8, 8 + 2)


@pytest.mark.parametrize("kept", ["auto", "on", "off"])
def test_states_are_kept_where_the_memory_allows_it(
    kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_kept", kept)
    # U and the states of a chunk and head take 48 KiB in bfloat16.
    most = configs.tables.memory(torch.device("meta")) // 256 // (48 * 1024)
    for chunks in (most // 64, most // 64 + 1):
        made = plan.make_plan(meta_call(True, **SIZES | {"T": 64 * chunks}))
        assert made.keep == (kept == "on" or (kept == "auto" and chunks * 64 <= most))
    assert not plan.make_plan(meta_call(False, **SIZES)).keep


@pytest.mark.parametrize(
    ("heads", "chunks", "segment"),
    [(64, 128, 64), (32, 128, 43), (8, 512, 32), (256, 128, 0), (32, 16, 0), (32, 0, 0)],
)
def test_sequences_are_cut_where_two_walks_end_first(heads: int, chunks: int, segment: int) -> None:
    # 264 programs at a time, two blocks of columns.
    assert fastest_segment(264, heads, 2, 2, chunks) == segment


@pytest.mark.parametrize(
    ("heads", "chunks", "segment"),
    [(32, 128, 32), (64, 128, 64), (8, 512, 64), (128, 128, 0), (256, 128, 0), (8, 8, 0)],
)
def test_stages_are_cut_for_maps_of_all_segments(heads: int, chunks: int, segment: int) -> None:
    assert fastest_segment(264, heads, 2, 2, chunks, is_staged=True) == segment


# Bad input.


@pytest.mark.usefixtures("fresh_reasons")
@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0", "nightly"])
def test_a_triton_out_of_range_is_a_reason(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: version)
    reason = f"triton {version} is installed (supported: 3.6 to 3.9)"
    check_reason("triton", linear_arguments(), reason)


@pytest.mark.usefixtures("fresh_reasons")
def test_no_c_compiler_is_a_reason_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    expected = ("no C compiler, which Triton launches with: install gcc or clang, or set CC",)
    assert backend.tool_reasons("cuda") == expected
    assert reasons_on_a_gpu("triton", monkeypatch) == list(expected)


def test_ieee_products_are_the_definition_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.float32_products == "tf32x3"
    monkeypatch.setattr(configs, "float32_products", "ieee")
    check_definition("triton", AWKWARD)


# Explain what makes a call slower than it need be.


def explained(**changes: Any) -> tuple[str, ...]:
    example = Example(T=64, K=128, V=128, dtype="bfloat16")
    arguments = example.arguments() | changes
    arguments.pop("state", None)
    return tuple(gdn_ops.explain(**arguments, backend="triton").notes)


def test_tiles_that_are_read_by_pointers_are_explained() -> None:
    assert explained() == ()
    k = Example(T=64, K=128, V=128, dtype="bfloat16").arguments()["k"]
    wide = torch.nn.functional.pad(k, (1, 0))
    assert explained(k=wide[..., 1:]) == ("k not aligned to 16 bytes: tiles are read by pointers",)


def test_a_triton_without_descriptors_reads_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HAS_DESCRIPTORS", False)
    version = backend.importlib.metadata.version("triton")
    text = f"triton {version} has no tensor descriptors: tiles are read by pointers"
    assert explained() == (text,)
    with torch.no_grad(), recording("sm_90") as launches:
        backend.Triton().forward(meta_call(**SIZES))
    assert [launch.kwargs.get("TMA", False) for launch in launches] == [False] * len(launches)
    check_definition("triton", Example(T=70, K=16, V=16, dtype="bfloat16"))
