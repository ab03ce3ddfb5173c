"""Decoding with the TileLang backend: tokens, pools, strides, and what is skipped."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import gdn_ops
from errors import message_of
from gdn_ops.kernel_support.tuning import Row, StepConfig
from gdn_ops.testing import Example
from gdn_ops.testing.decode_laws import (
    a_pool_equals_separate_states,
    steps_equal_one_step_after_another,
)
from kernel_backends import forbid_copies

pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import decode

pytestmark = pytest.mark.filterwarnings("ignore:backend 'tilelang' emulates")

CPU = torch.device("cpu")


DECODING = Example(B=3, T=5, H=2, R=3, K=48, V=80, initial_state=True, strided=True, seed=7)

DECODED = [
    dataclasses.replace(DECODING, dtype=dtype, state_dtype=state)
    for dtype in ("bfloat16", "float16", "float32")
    for state in (None, "bfloat16")
] + [
    dataclasses.replace(DECODING, K=16, V=16, gate="zero", qk_l2norm=True),
    dataclasses.replace(DECODING, K=128, V=128, B=1, dtype="bfloat16", gate="extreme"),
    dataclasses.replace(DECODING, K=256, V=32, B=1, R=1, log_gate=True, gate="extreme"),
    dataclasses.replace(DECODING, rule="delta", beta="none", T=1),
    dataclasses.replace(DECODING, rule="gated", initial_state=False),
    dataclasses.replace(DECODING, rule="linear", scale=-2.0, qk_l2norm=True, dtype="bfloat16"),
]

CHANNELS = [
    dataclasses.replace(DECODING, channels=True, **changes)
    for changes in (
        {},
        {"gate": "extreme", "log_gate": True, "dtype": "bfloat16"},
        {"gate": "zero", "K": 16, "V": 16, "qk_l2norm": True, "dtype": "float16"},
        {"gate": "zero", "log_gate": True, "rule": "gated", "initial_state": False, "K": 32},
    )
]
"""Decays of channels: fewer and more of them than threads, exact zeros, and log decays of -inf."""

APART = [
    dataclasses.replace(DECODING, **{"beta": "wide", **changes})
    for changes in (
        {"apart": "channels", "channels": True, "dtype": "bfloat16"},
        {"apart": "channels", "K": 16, "V": 16, "qk_l2norm": True, "dtype": "float16"},
        {"apart": "erase", "channels": True, "log_gate": True, "gate": "extreme", "K": 32},
        {"apart": "write", "rule": "delta", "beta": "binary", "initial_state": False},
        {"apart": "scalars", "gate": "zero", "K": 256, "V": 32, "B": 1, "R": 1},
    )
]
"""Erase and write in place of beta: of channels, of heads, one of them alone; zeros, beyond 1."""

POOLED = DECODED[:2] + DECODED[-3:-2] + CHANNELS[1:3] + APART[:1]


@pytest.mark.parametrize("example", DECODED + CHANNELS + APART, ids=repr)
def test_decoded_tokens_are_the_definition(example: Example) -> None:
    verdict = steps_equal_one_step_after_another("tilelang", example)
    assert verdict.passed, verdict


@pytest.mark.parametrize("example", POOLED, ids=repr)
def test_a_pool_is_advanced_where_it_lies(example: Example) -> None:
    pooled = dataclasses.replace(example, slots=(4, -1, 0), pool=6, initial_state=True)
    for law in (a_pool_equals_separate_states, steps_equal_one_step_after_another):
        verdict = law("tilelang", pooled)
        assert verdict.passed, verdict


def _decoding_arguments(K: int, V: int) -> dict[str, Any]:
    arguments = Example(B=3, T=2, H=2, R=2, K=K, V=V, dtype="bfloat16", seed=4).arguments()
    del arguments["chunk_size"]
    return arguments


@pytest.mark.parametrize("kind", ["odd rows", "an odd start", "columns first"])
def test_a_pool_of_any_strides_is_updated_in_place(kind: str) -> None:
    K, V = 16, 32
    arguments, slots = _decoding_arguments(K, V), torch.tensor([2, -1, 0])
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 4 * K * V + 3, generator=generator)
    pools = {
        "odd rows": wide[1:4, : 4 * K * V].unflatten(1, (4, K, V)),
        "an odd start": wide[1:4, 1 : 1 + 4 * K * V].unflatten(1, (4, K, V)),
        "columns first": wide[1:4, : 4 * K * V].unflatten(1, (4, V, K)).transpose(2, 3),
    }
    pool, before = pools[kind], wide.clone()
    assert not decode._is_wide(pool)
    given = {**arguments, "state_indices": slots}
    o, state = gdn_ops.gated_delta_steps(
        **given, state=pool.clone(), inplace=True, backend="tilelang"
    )
    written, updated = gdn_ops.gated_delta_steps(
        **given, state=pool, inplace=True, backend="tilelang"
    )
    assert updated is pool
    assert torch.equal(written, o) and torch.equal(pool, state)
    # Nothing else of the memory has changed, and slot 1 is named by no row.
    pool.copy_(torch.nan * pool)
    assert torch.equal(wide[wide.isfinite()], before[wide.isfinite()])
    assert int(wide.isnan().sum()) == pool.numel()


def test_strided_tokens_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _decoding_arguments(16, 16)
    tokens = {name: arguments[name] for name in "qkv"}
    apart = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tokens.items()}
    gaps = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tokens.items()}
    expected = gdn_ops.gated_delta_steps(**arguments, backend="tilelang")
    forbid_copies(monkeypatch)
    for other in (apart, gaps):
        assert not other["q"].is_contiguous()
        results = gdn_ops.gated_delta_steps(**(arguments | other), backend="tilelang")
        assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


def test_rows_that_are_skipped_cost_no_memory_access() -> None:
    # What a skipped row would read and write is out of bounds of the pool.
    arguments = _decoding_arguments(16, 16)
    pool = torch.zeros(1, 4, 16, 16)
    o, _ = gdn_ops.gated_delta_steps(
        **arguments, state=pool, state_indices=torch.tensor([-1, 0, -1]), inplace=True,
        backend="tilelang",
    )  # fmt: skip
    assert bool((o[[0, 2]] == 0).all()) and bool(o[1].any()) and bool(pool.any())


@pytest.mark.parametrize(("B", "T"), [(0, 2), (2, 0)])
def test_without_tokens_the_state_is_as_it_was(B: int, T: int) -> None:
    example = Example(B=B, T=T, H=1, K=16, V=16, initial_state=True)
    arguments = example.arguments()
    del arguments["chunk_size"]
    given = arguments.pop("initial_state")
    steps = functools.partial(gdn_ops.gated_delta_steps, **arguments, backend="tilelang")
    o, state, states = steps(state=given, return_states=True)
    assert torch.equal(state, given) and state is not given
    assert o.shape == (B, T, 1, 16) and states.shape == (B, T, 1, 16, 16)
    assert not bool(steps()[1].any())
    assert steps(state=given, inplace=True)[1] is given


def test_a_channel_that_decays_to_nothing_is_forgotten_and_no_other() -> None:
    arguments = _decoding_arguments(16, 16) | {"beta": torch.zeros(3, 2, 4)}
    state = torch.full((3, 4, 16, 16), 3.0)
    alpha = torch.ones(3, 2, 4, 16)
    # The first token halves channel 2, the second one drops channel 5.
    alpha[:, 0, :, 2], alpha[:, 1, :, 5] = 0.5, 0.0
    expected = state.clone()
    expected[:, :, 2], expected[:, :, 5] = 1.5, 0.0
    for gates in ({"alpha": alpha}, {"alpha": None, "log_alpha": alpha.log()}):
        _, new = gdn_ops.gated_delta_steps(**(arguments | gates), state=state, backend="tilelang")
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)
        assert not bool(new[:, :, 5].any())


def test_an_erase_and_a_write_act_on_their_own_channels() -> None:
    # The key and the state are ones: S'ᵀ (e ⊙ k) sums e over K.
    ones, state = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 16, 16)
    erase, write = torch.zeros_like(ones), torch.zeros_like(ones)
    erase[..., 3], write[..., 5] = 0.25, 2.0
    _, new = gdn_ops.gated_delta_steps(
        ones, ones, ones, erase=erase, write=write, rule="delta", state=state, backend="tilelang"
    )
    expected = torch.full((1, 1, 16, 16), 0.75)
    expected[..., 5] += 2.0
    assert torch.equal(new, expected)


DECAY = "channel decay in gated_delta (supported: none, scalar)"
STRENGTH = (
    "channel erase in gated_delta (supported: none, scalar)",
    "channel write in gated_delta (supported: scalar)",
    "erase and write in gated_delta (supported: beta)",
)


@pytest.mark.parametrize(
    ("wide", "against"),
    [(("alpha", "beta"), (DECAY,)), (("alpha", "erase", "write"), (DECAY, *STRENGTH))],
    ids=["KDA", "GDN-2"],
)
def test_a_sequence_of_channels_is_refused_and_a_step_is_not(
    wide: tuple[str, ...], against: tuple[str, ...]
) -> None:
    q = torch.ones(1, 4, 2, 16)
    gates = {name: torch.ones(1, 4, 2) if name == "beta" else torch.ones_like(q) for name in wide}
    given = {**gates, "backend": "tilelang"}
    assert dict(gdn_ops.explain(q, q, q, **given).reasons)["tilelang"] == against
    text = message_of(
        gdn_ops.BackendUnsupportedError, lambda: gdn_ops.gated_delta(q, q, q, **given)
    )
    assert f"tilelang: {'; '.join(against)}\n" in text
    o, _ = gdn_ops.gated_delta_steps(q, q, q, **given)
    assert torch.equal(o, gdn_ops.gated_delta_steps(q, q, q, **given | {"backend": "naive"})[0])


@pytest.mark.parametrize("BV", [8, 16, 32])
def test_no_block_of_columns_changes_what_is_decoded(BV: int) -> None:
    # 48 columns are no multiple of 32.
    example = dataclasses.replace(DECODING, K=32, V=48)
    row = Row(configs.tables.key(CPU, 32, 32), StepConfig(BV=BV, warps=1, measured=""))
    with configs.tables.using(row):
        verdict = steps_equal_one_step_after_another("tilelang", example)
    assert verdict.passed, verdict
