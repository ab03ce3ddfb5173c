"""What ranks send is what the cost model counts."""

from __future__ import annotations

import pytest

from gdn_ops.parallel.cost import Strategy, choose, exchange_bytes
from gdn_ops.spec.language import Sizes
from tests.parallel.cost_workers import sent_bytes
from tests.parallel.ranks import Ranks

KINDS = {
    "pipeline": ("states of gated_delta", "gradients of states"),
    "gather": ("summaries of gated_delta", "gradients of summaries"),
}
SIZES = (Sizes(1, 33, 2, 4, 8, 12, 1), Sizes(3, 24, 3, 3, 16, 4, 3))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_gather_the_bytes_that_the_model_counts(
    ranks: Ranks, count: int, dtype: str, zigzag: bool
) -> None:
    for sizes in SIZES:
        found = ranks.run(count, sent_bytes, sizes, "gather", zigzag, dtype)
        counted = exchange_bytes("gather", sizes, count, pieces=2 * count - 1 if zigzag else None)
        # What goes to several ranks counts once for each.
        sent = counted.given * (count - 1)
        assert found == [dict.fromkeys(KINDS["gather"], sent)] * count
        # All give as much as the others: that is what is received.
        assert counted.received == sent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_hand_on_the_bytes_that_the_model_counts(
    ranks: Ranks, count: int, dtype: str
) -> None:
    there, back = KINDS["pipeline"]
    for sizes in SIZES:
        found = ranks.run(count, sent_bytes, sizes, "pipeline", False, dtype)
        state = exchange_bytes("pipeline", sizes, count).given
        assert [sent.get(there, 0) for sent in found] == [state] * (count - 1) + [0]
        assert [sent.get(back, 0) for sent in found] == [0] + [state] * (count - 1)
        zigzag = ranks.run(count, sent_bytes, sizes, "pipeline", True, dtype)
        most = exchange_bytes("pipeline", sizes, count, pieces=2 * count - 1).given
        # The first rank has the end of the chain, and the runs of the last one are one.
        assert [sent[there] for sent in zigzag] == [state] + [2 * state] * (count - 2) + [state]
        assert max(sent[there] for sent in zigzag) == most


def test_a_rule_without_an_error_term_gathers_a_number_for_each_map(ranks: Ranks) -> None:
    for sizes in SIZES:
        found = ranks.run(3, sent_bytes, sizes, "gather", False, "float32", "gated")
        sent = 2 * exchange_bytes("gather", sizes, 3, erases=False).given
        assert found == [dict.fromkeys(KINDS["gather"], sent)] * 3


def test_one_rank_sends_nothing(ranks: Ranks) -> None:
    strategies: tuple[Strategy, ...] = ("pipeline", "gather")
    for strategy in strategies:
        assert ranks.run(1, sent_bytes, SIZES[0], strategy, True, "float32") == [{}]
        assert exchange_bytes(strategy, SIZES[0], 1).given == 0


@pytest.mark.parametrize(
    ("count", "heads", "strategy"), [(2, 4, "pipeline"), (4, 8, "pipeline"), (4, 4, "gather")]
)
def test_auto_takes_what_the_model_chooses(
    ranks: Ranks, count: int, heads: int, strategy: str
) -> None:
    sizes = Sizes(1, 4096, heads, heads, 16, 16, 1)
    assert choose(sizes, count).strategy == strategy
    found = ranks.run(count, sent_bytes, sizes, "auto", False, "float32")
    assert {kind for sent in found for kind in sent} == set(KINDS[strategy])
