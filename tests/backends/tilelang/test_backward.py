"""The backward of the TileLang backend: what the kit cannot draw. Segments, bits, memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Row, Tiles
from gdn_ops.testing import Example
from gdn_ops.testing.example import Results, run
from gdn_ops.testing.oracle import judgement
from kernel_backends import PACKED, check_definition, meta_call, using

pytest.importorskip("tilelang")

from gdn_ops.backends import tilelang as backend
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import plan, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates"),
    pytest.mark.usefixtures("one_thread"),
]

OF_TOKENS = ("d_q", "d_k", "d_v", "d_beta", "d_alpha")
LENGTHS = PACKED.lengths or ()

CHUNKS = Example(
    T=130, H=1, R=2, K=48, V=80, dtype="bfloat16", gate="extreme", initial_state=True, seed=4
)
"""Two chunks of 64, and two tokens."""


def _same(results: Results, expected: Results) -> None:
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


# Segments and configurations.


@pytest.mark.parametrize(
    ("changes", "choice"),
    [
        ({}, {"segment": 1}),
        ({}, {"segment": 2}),
        ({"gate": "slow", "log_gate": True, "qk_l2norm": True}, {"segment": 1}),
        ({"rule": "delta"}, {"segment": 1}),
        ({"rule": "gated", "gate": "slow"}, {"segment": 1}),
        ({"lengths": None, "B": 2, "T": 130, "initial_state": False}, {"segment": 2}),
        ({}, {"state_gradients": Tiles(16, 4, 0), "token_gradients": Tiles(16, 4, 0)}),
        ({}, {"state_gradients": Tiles(128, 8, 1), "token_gradients": Tiles(128, 8, 2)}),
        ({}, {"C": 32}),
    ],
    ids=repr,
)
def test_no_configuration_changes_the_gradients(
    changes: dict[str, Any], choice: dict[str, Any]
) -> None:
    example = dataclasses.replace(PACKED, **changes)
    judgement(example)
    with using("tilelang", example, **choice):
        check_definition("tilelang", example)


def test_a_column_of_v_does_not_depend_on_the_block_that_it_is_in() -> None:
    expected = PACKED.run("tilelang")
    with using("tilelang", PACKED, state_gradients=Tiles(16, 4, 0)):
        _same(PACKED.run("tilelang"), expected)


# Bits.


def _without(x: Tensor, name: str, length: int, begin: int, n: int) -> Tensor:
    """Return what one packed sequence has of an argument or a result."""
    return x[n : n + 1] if name.endswith("state") else x[:, begin : begin + length]


@pytest.mark.parametrize("segment", [None, 1])
def test_a_sequence_has_the_gradients_that_it_has_alone(segment: int | None) -> None:
    arguments, cotangents = PACKED.arguments(), PACKED.cotangents()
    with using("tilelang", PACKED, segment=segment):
        packed = run(arguments, "tilelang", cotangents)
        begin = 0
        for n, length in enumerate(LENGTHS):
            alone = {
                name: _without(x, name, length, begin, n)
                for name, x in arguments.items()
                if isinstance(x, Tensor) and name != "cu_seqlens"
            }
            given = {"cu_seqlens": torch.tensor([0, length])}
            d_o, d_state = (
                _without(x, name, length, begin, n)
                for name, x in zip(("o", "final_state"), cotangents, strict=True)
            )
            results = run(arguments | given | alone, "tilelang", (d_o, d_state))
            _same(results, {k: _without(x, k, length, begin, n) for k, x in packed.items()})
            begin += length


def test_no_number_reaches_another_sequence() -> None:
    # The third sequence ends within a chunk, after which the next one's tokens follow.
    arguments, (d_o, d_state) = PACKED.arguments(), PACKED.cotangents()
    expected = run(arguments, "tilelang", (d_o, d_state))
    begin, end = sum(LENGTHS[:3]), sum(LENGTHS[:4])
    spoilt = {name: arguments[name].clone() for name in ("q", "k", "v", "beta")}
    d_o, d_state = d_o.clone(), d_state.clone()
    for x in (*spoilt.values(), d_o):
        x[:, begin:end] = torch.nan
    d_state[3] = torch.inf
    results = run(arguments | spoilt, "tilelang", (d_o, d_state))
    for name, x in expected.items():
        if name.endswith("state"):
            others = [0, 1, 2, 4, 5]
            assert torch.equal(results[name][others], x[others]), name
        else:
            assert torch.equal(results[name][:, :begin], x[:, :begin]), name
            assert torch.equal(results[name][:, end:], x[:, end:]), name
    assert bool(results["d_q"][:, begin:end].isnan().all())


@pytest.mark.parametrize("at", [1, 63, 64, 100])
def test_a_reset_passes_no_gradient_back(at: int) -> None:
    example = dataclasses.replace(CHUNKS, gate="slow", seed=2)
    arguments, (d_o, d_state) = example.arguments(), example.cotangents()
    arguments["alpha"][:, at] = 0.0
    d_o[:, :at] = 0.0
    results = run(arguments, "tilelang", (d_o, d_state))
    for name in OF_TOKENS:
        assert not bool(results[name][:, :at].any()), name
        assert bool(results[name][:, at:].any()), name
    assert not bool(results["d_initial_state"].any())
    # The gate that is 0 has a gradient all the same: it would let the past through.
    assert bool((results["d_alpha"][:, at] != 0).all())


@pytest.mark.parametrize("at", [5, 64, 90])
def test_what_is_asked_of_the_past_changes_no_bit_of_the_present(at: int) -> None:
    arguments, (d_o, d_state) = CHUNKS.arguments(), CHUNKS.cotangents()
    expected = run(arguments, "tilelang", (d_o, d_state))
    changed = d_o.clone()
    changed[:, :at] *= -3.0
    results = run(arguments, "tilelang", (changed, d_state))
    for name in OF_TOKENS:
        assert torch.equal(results[name][:, at:], expected[name][:, at:]), name
        assert not torch.equal(results[name][:, :at], expected[name][:, :at]), name


@pytest.mark.parametrize("segment", [None, 1])
def test_tokens_of_no_sequence_are_not_written(
    segment: int | None, allocated: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a program writes past the end of its sequence, the next one's program would hide.
    end = LENGTHS[0]
    boundaries = torch.tensor([0, end], dtype=torch.int32)
    monkeypatch.setattr(plan, "cu_of", lambda call: boundaries)
    with using("tilelang", PACKED, segment=segment):
        results = run(PACKED.arguments(), "tilelang", PACKED.cotangents())
    for name in ("o", *OF_TOKENS):
        assert bool(results[name][:, :end].isfinite().all()), name
        assert bool(results[name][:, end:].isnan().all()), name
    for name in ("final_state", "d_initial_state"):
        assert bool(results[name][0].isfinite().all()), name
        assert bool(results[name][1:].isnan().all()), name


# Launches.


@pytest.mark.parametrize("segment", [None, 2])
def test_backward_takes_three_launches_and_five_with_segments(segment: int | None) -> None:
    tilelang = backend.TileLang()
    call = meta_call(True, B=1, T=512, H=2, HV=4, K=128, V=128)
    key = ("sm_90a", 128, "low")
    row = Row(key, dataclasses.replace(table.SEQUENCE[key], segment=segment))
    with torch.no_grad(), recording("sm_90a") as launches, configs.tables.using(row):
        out = tilelang.forward(call)
        before = len(launches)
        grads = tilelang.backward(
            call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state)
        )
    names = [launch.kernel.__name__ for launch in launches[before:]]
    between = [] if segment is None else ["state_gradients", "compose"]
    assert names == ["states", *between, "state_gradients", "token_gradients"]
    modes = [launch.kwargs.get("mode") for launch in launches[before:]]
    assert modes == ["states", *(["shift", None] if between else []), "gradients", None]
    assert grads.q is not None and grads.q.shape == call.tokens.q.shape and grads.state is None
