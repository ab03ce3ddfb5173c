"""Going back to the state after any token of a call leaves no trace, and forks go on as alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from errors import message_of, refusal
from gdn_ops import SpecError
from gdn_ops.nn import GatedDeltaNet, SlidingWindowAttention, State, fork_state
from gdn_ops.parallel import SequenceSplit, sequence_parallel
from hybrid_models import (
    PATTERNS,
    VOCABULARY,
    WINDOW,
    assert_states,
    greedy,
    make,
    tensors,
    tokens_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Make a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rejected_tokens_leave_no_trace_bit_for_bit(pattern: str, dtype: torch.dtype) -> None:
    model, tokens = make(pattern).to(dtype), tokens_of(3, 14)
    other = tokens.clone()
    counts = torch.tensor([1, 3, 6])
    for row, count in enumerate(counts.tolist()):
        other[row, 7 + count :] = (other[row, 7 + count :] + 5) % VOCABULARY
    with torch.no_grad():
        _, state = model(tokens[:, :7])
        ours, theirs = (model(x[:, 7:], state, return_states=True)[1] for x in (tokens, other))
    for kept in (counts, 1):
        pairs = zip(tensors(ours.after(kept)), tensors(theirs.after(kept)), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    differs = zip(tensors(ours.after(7)), tensors(theirs.after(7)), strict=True)
    assert not all(torch.equal(x, y) for x, y in differs)


@pytest.mark.parametrize("more", [7, 2 * WINDOW + 3])
@pytest.mark.parametrize("before", [0, 2, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_state_gone_back_to_is_that_of_reading_no_more(
    pattern: str, before: int, more: int
) -> None:
    model, tokens = make(pattern), tokens_of(2, before + more)
    with torch.no_grad():
        state = model(tokens[:, :before])[1] if before else None
        logits, states = model(tokens[:, before:], state, return_states=True)
        expected, whole = model(tokens[:, before:], state)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        assert_states(states.after(more), whole)
        for count in range(1, more):
            _, alone = model(tokens[:, before : before + count], state)
            assert_states(states.after(count), alone)
            assert_states(states.after(torch.tensor([count, count])), alone)
        if state is not None:
            for kept in (0, torch.tensor([0, 0])):
                assert_states(states.after(kept), state, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_that_read_different_numbers_of_tokens_go_on_as_alone(pattern: str) -> None:
    model, tokens, more = make(pattern), tokens_of(3, 6), tokens_of(3, 9, seed=2)
    counts, read = [1, 4, 6], 0
    with torch.no_grad():
        _, states = model(tokens, return_states=True)
        state = states.after(torch.tensor(counts))
        for step in (1, 1, 3, 1, 2):
            logits, state = model(more[:, read : read + step], state)
            read += step
            for row, count in enumerate(counts):
                text = torch.cat([tokens[row, :count], more[row, :read]])[None]
                expected = model(text)[0][0, -step:]
                torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"short_conv": 0}, {"short_conv": 1}, {"rule": "linear"}, {"num_value_heads": 4}],
    ids=str,
)
def test_a_layer_goes_back_whatever_its_parts_are(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = GatedDeltaNet(16, 2, head_dim=4, **options).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        y, states = layer(x, return_states=True)
        torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=1e-13)
        expected = layer(x[:, :4])[1]
    assert_states([states.after(4)], [expected])
    assert_states([states.after(torch.tensor([4, 4]))], [expected])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_is_read_once_and_continued_many_times(pattern: str) -> None:
    model, prefix, ends = make(pattern), tokens_of(1, 9), tokens_of(3, 4, seed=2)
    whole = torch.cat([prefix.expand(3, -1), ends], 1)
    expected = greedy(model, whole, 10)[:, 9:]
    with torch.no_grad():
        _, state = model(prefix)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    kept = [x.clone() for x in tensors(state)]
    for one in (state, fork_state(state), loaded):
        for row in range(3):
            alone = greedy(model, ends[row : row + 1], 10, state=one)
            assert torch.equal(alone[0], expected[row])
        together = fork_state(one, [0, 0, 0])
        for more in ({}, {"draft_tokens": 3}, {"draft": make(pattern), "draft_tokens": 3}):
            assert torch.equal(greedy(model, ends, 10, state=together, **more), expected)
    assert all(torch.equal(x, y) for x, y in zip(tensors(state), kept, strict=True))


def test_a_fork_has_memory_of_its_own_and_its_rows_in_order() -> None:
    model = make("GA")
    with torch.no_grad():
        _, states = model(tokens_of(3, 6), return_states=True)
    state = states.after(torch.tensor([2, 6, 4]))
    fork = fork_state(state, [2, 0, 2])
    assert fork[1].tokens.tolist() == [4, 2, 4]
    assert torch.equal(fork[0].memory, state[0].memory[[2, 0, 2]])
    layer = fork_state(state[0])
    assert isinstance(layer, State)
    layer.memory.zero_()
    fork[1].keys.zero_()
    assert float(state[0].memory.abs().min()) > 0
    assert float(state[1].keys.abs().max()) > 0


def after(counts: Any) -> Any:
    with torch.no_grad():
        return make("GA")(tokens_of(2, 4), return_states=True)[1].after(counts)


REFUSED: dict[str, Callable[[], Any]] = {
    "after: counts is 5, should be 0 to 4, the tokens of the call": lambda: after(5),
    "after: counts has values in [1, 5], should be 0 to 4, the tokens of the call": (
        lambda: after(torch.tensor([1, 5]))
    ),
    "after: counts is int64 of shape (3,), should be int64 of shape (B,) = (2,)": (
        lambda: after(torch.tensor([1, 1, 1]))
    ),
    "after: counts has type float, should be an integer or a tensor": lambda: after(1.0),
    "fork_state: rows has values in [0, 2], should be in [0, 1]: the state is of 2 rows": (
        lambda: fork_state(after(1), [0, 2])
    ),
    "fork_state: rows is [0.5], should be a list of row numbers": (
        lambda: fork_state(after(1), [0.5])
    ),
    "fork_state: state has a Tensor, should have what a call of a model or of a layer returned: "
    "State or KeyValueRing": lambda: fork_state([torch.zeros(1)]),
    "GatedDeltaNet: mask is given, should be None with return_states: rows have one length": (
        lambda: GatedDeltaNet(16, 2)(
            torch.zeros(1, 2, 16), mask=torch.ones(1, 2), return_states=True
        )
    ),
}


@pytest.mark.parametrize(("message", "action"), REFUSED.items())
def test_what_does_not_fit_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


def test_states_of_tokens_split_over_ranks_are_refused(one_rank: None) -> None:
    split, x = SequenceSplit.contiguous(4), torch.zeros(1, 4, 16)
    with sequence_parallel(split):
        assert refusal(GatedDeltaNet(16, 2), x, return_states=True) == (
            "GatedDeltaNet: return_states is True, should be False under sequence_parallel"
        )
        assert refusal(SlidingWindowAttention(16, 2, 4), x, return_states=True) == (
            "SlidingWindowAttention: return_states is True, should be False under sequence_parallel"
        )
