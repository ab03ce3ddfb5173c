"""What the TileLang backend launches, moves and keeps, and how it cuts sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from kernel_backends import SIZES, launched, meta_call

pytest.importorskip("tilelang")

from gdn_ops.backends import tilelang as backend
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import plan, table
from gdn_ops.backends.tilelang.host.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates")

CPU = torch.device("cpu")

# Launches, bytes and memory, from what a call on the meta device would launch.


def test_forward_takes_two_launches_and_four_with_segments() -> None:
    tilelang = backend.TileLang()
    assert launched("sm_90a", lambda: tilelang.forward(meta_call(**SIZES))) == ["solve", "states"]
    cut = meta_call(**(SIZES | {"H": 2, "HV": 8, "T": 32768}))
    names = ["solve", "states", "compose", "states"]
    assert launched("sm_90a", lambda: tilelang.forward(cut)) == names


def test_slots_of_chunks_and_segments_are_enough_for_any_lengths() -> None:
    lengths = (0, 17, 64, 1, 200, 63, 0)
    sizes = {"B": 1, "T": sum(lengths), "H": 1, "HV": 1, "K": 16, "V": 16, "N": len(lengths)}
    for C, L in ((32, 1), (32, 2), (64, 4)):
        call = meta_call(**sizes, chunk_size=C)
        key = configs.tables.key(CPU, 16, 16, torch.bfloat16)
        row = Row(key, dataclasses.replace(table.SEQUENCE[key], segment=L))
        with configs.tables.using(row):
            layout = make_plan(call)
        for tokens, room in ((C, layout.chunk_slots), (C * L, layout.segment_slots)):
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
    boundaries = plan.cu_of(bound)
    assert boundaries.tolist() == [0, 5, 10, 15] and boundaries.dtype == torch.int32
    assert plan.cu_of(bound) is boundaries


# Segments.


def _segments(**changes: Any) -> int | None:
    """Return the chunks per segment that the rule chooses, or None for one segment."""
    layout = make_plan(meta_call(**(SIZES | changes)))
    assert layout.is_segmented == (layout.C * layout.L < configs.ONE_SEGMENT)
    return layout.L if layout.is_segmented else None


SMALL = Sizes(B=1, T=64, H=1, HV=1, K=128, V=128, N=1)


def test_v_is_split_where_a_third_of_the_processors_would_idle() -> None:
    # 132 multiprocessors; 128 columns.
    def columns(HV: int, N: int = 1) -> int:
        return configs.columns(CPU, dataclasses.replace(SMALL, HV=HV, H=HV, N=N), 64)

    assert columns(64) == 64, "128 programs: 256 would take two turns"
    assert columns(47) == 64, "94 programs"
    assert columns(46) == 32, "92 programs"
    assert columns(12, N=4) == 64, "96 programs"
    assert columns(1) == 32, "never narrower"
    assert configs.columns(CPU, SMALL, 16) == 16


def test_a_sequence_is_cut_where_most_of_the_gpu_would_idle() -> None:
    # 132 multiprocessors; blocks of V of a quarter of 128 columns; chunks of 64 tokens.
    assert table.SEQUENCE["sm_90a", 128, "low"].states.BV == 64
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
    with configs.tables.using(Row(key, dataclasses.replace(table.SEQUENCE[key], segment=3))):
        assert _segments() == 3
