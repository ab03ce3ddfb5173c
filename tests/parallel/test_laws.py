"""Laws of split calls, what is exchanged and kept, and mutants that the comparisons catch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdn_ops import GATED_DELTA
from gdn_ops.testing.example import Example
from gdn_ops.testing.runs import installed
from gdn_ops.testing.strategies import calls
from tests.parallel.mutants import MUTANTS, mutated_call, mutated_model
from tests.parallel.ranks import Ranks
from tests.parallel.test_models import check_equal, on_one_process
from tests.parallel.test_sequence import assembled, judged
from tests.parallel.workers import (
    Case,
    ModelCase,
    bits,
    forward_and_gradients,
    kept_bytes,
    model_gradients,
    order_of_parts,
    over_a_mesh,
    reset_at,
    traffic,
)

STRATEGIES = ("pipeline", "gather")
RULES = ("gated_delta", "delta", "gated", "linear")

# Two sequences that cross three ranks, the last rank in two fragments.
RUNS = (((0, 7),), ((9, 16), (20, 22)), ((7, 9), (16, 20)))
EXAMPLE = Example(T=22, lengths=(12, 10), H=2, R=2, K=4, V=6, initial_state=True, gate="slow")


# Two ranks that have nothing to do at the end, forward or backward.
WALKED = Case(
    Example(T=200, H=4, R=2, K=4, V=6, initial_state=True, gate="slow"),
    (((0, 70),), ((70, 90),), ((90, 200),)), "pipeline", "cpp",
)  # fmt: skip


def case_of(strategy: str, **changes: Any) -> Case:
    return Case(EXAMPLE, RUNS, strategy, "torch", **changes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_the_same_bits_every_time(ranks: Ranks, strategy: str) -> None:
    for found in ranks.run(3, bits, case_of(strategy)):
        half = len(found) // 2
        assert all(map(torch.equal, found[:half], found[half:]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
def test_a_reset_at_a_boundary_stops_every_influence(
    ranks: Ranks, rule: str, strategy: str
) -> None:
    # α is 0 at token 6, the first one of rank 1; what is behind it sees nothing of what is before.
    first, second = (ranks.run(3, reset_at, 6, 18, rule, strategy, seed) for seed in (0, 1))
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        o, state, d_v, d_initial = one
        assert torch.equal(state, other[1])
        assert torch.equal(o, other[0]) == (rank > 0)
        # The loss reads what is behind the reset alone.
        assert bool((d_v == 0).all()) == (rank == 0)
        assert bool((d_initial == 0).all())


@pytest.mark.parametrize("rule", RULES)
def test_a_pipeline_sends_the_states_at_cuts_and_their_gradients(ranks: Ranks, rule: str) -> None:
    example = Example(rule=rule, T=22, B=2, H=2, R=2, K=4, V=6, gate="slow")
    runs = (((0, 7),), ((7, 16),), ((16, 22),))
    sent = ranks.run(3, traffic, Case(example, runs, "pipeline", "torch"))
    state = 2 * 4 * 4 * 6 * 4  # B, HV, K, V float32
    forward = [x.get("states of gated_delta", 0) for x in sent]
    backward = [x.get("gradients of states", 0) for x in sent]
    assert forward == [state, state, 0] and backward == [0, state, state]


@pytest.mark.parametrize("rule", RULES)
def test_summaries_are_gathered_once_a_direction(ranks: Ranks, rule: str) -> None:
    example = Example(rule=rule, T=22, B=2, H=2, R=2, K=4, V=6, gate="slow")
    runs = (((0, 7),), ((7, 16),), ((16, 22),))
    sent = ranks.run(3, traffic, Case(example, runs, "gather", "torch"))
    of_map = 4 * 4 if rule in ("gated_delta", "delta") else 1
    summary = 2 * 4 * (4 * 6 + of_map) * 4  # B, HV, K V + K K (or a number), float32
    for x in sent:
        assert x["summaries of gated_delta"] == x["gradients of summaries"] == 2 * summary


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_rank_keeps_falls_with_their_number(ranks: Ranks, strategy: str) -> None:
    tokens = 2048
    kept = {count: max(ranks.run(count, kept_bytes, tokens, strategy)) for count in (1, 2, 4)}
    for count in (2, 4):
        assert kept[count] <= 1.1 * kept[1] / count, kept


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_alone_may_read_the_final_states(ranks: Ranks, strategy: str) -> None:
    case = case_of(strategy, holder=1, has_one_reader=True)
    judged(case, assembled(case, ranks.run(3, forward_and_gradients, case)))


def test_ranks_that_idle_at_the_end_walk_first(ranks: Ranks) -> None:
    # Rank 0 waits for two others at the end of a forward, rank 1 for one; backward the other way.
    found = ranks.run(3, order_of_parts, WALKED)
    assert found == [
        ["walk", "walk", "forward", "forward", "forward", "forward", *["backward"] * 4],
        ["walk", "forward", "forward", "forward", "forward", "walk_back", *["backward"] * 4],
        ["forward"] * 4 + ["walk_back", "walk_back"] + ["backward"] * 4,
    ]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_walked_states_are_those_of_one_process(ranks: Ranks, count: int) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        limits = installed("cpp").limits
        example = data.draw(calls(GATED_DELTA, limits, max_tokens=300))
        cuts = data.draw(
            st.lists(st.integers(0, example.T), min_size=count - 1, max_size=count - 1)
        )
        runs = itertools.pairwise((0, *sorted(cuts), example.T))
        case = Case(example, tuple((run,) for run in runs), "pipeline", "cpp")
        judged(case, assembled(case, ranks.run(count, forward_and_gradients, case)))

    check()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_without_tokens_takes_part(ranks: Ranks, strategy: str) -> None:
    example = Example(T=3, B=2, K=4, V=4, initial_state=True)
    for runs in (((), ((0, 3),), ()), ((), (), ()), (((0, 1),), (), ((1, 3),))):
        shorter = Example(**{**vars(example), "T": sum(b - a for of in runs for a, b in of)})
        case = Case(shorter, runs, strategy, "torch")
        judged(case, assembled(case, ranks.run(3, forward_and_gradients, case)))


OF_CALLS = {
    "a missing reverse map": "gather",
    "maps dropped": "gather",
    "maps in the wrong order": "gather",
    "a state of the last heads dropped": "pipeline",
    "a gradient of states dropped": "pipeline",
    "states of other heads": "pipeline",
    "final states not summed": "pipeline",
    "a walked state dropped": "pipeline",
    "a walked gradient dropped": "pipeline",
}
OF_MODELS = ("a halo dropped", "a halo one token early", "the gradient of a halo dropped")


def test_every_mutant_is_tried() -> None:
    assert set(MUTANTS) == {*OF_CALLS, *OF_MODELS}


@pytest.mark.parametrize("name", OF_CALLS)
def test_a_broken_exchange_of_states_is_caught(ranks: Ranks, name: str) -> None:
    case = case_of(OF_CALLS[name])
    if "walked" in name:
        case = WALKED
    judged(case, assembled(case, ranks.run(3, forward_and_gradients, case)))
    with pytest.raises(AssertionError):
        judged(case, assembled(case, ranks.run(3, mutated_call, name, case)))


@pytest.mark.parametrize("pattern", ["G", "A"])
@pytest.mark.parametrize("name", OF_MODELS)
def test_a_broken_halo_is_caught(ranks: Ranks, name: str, pattern: str) -> None:
    case = ModelCase(pattern, RUNS, lengths=(12, 10), window=5)
    expected = on_one_process(case)

    def check(parts: list[dict[str, torch.Tensor]]) -> None:
        for key, of_one in expected.items():
            check_equal(sum(part[key] for part in parts), of_one, key)

    check(ranks.run(3, model_gradients, case))
    with pytest.raises(AssertionError):
        check(ranks.run(3, mutated_model, name, case))


def test_a_dimension_of_a_mesh_is_a_group(ranks: Ranks) -> None:
    for refused, found, expected in ranks.run(8, over_a_mesh, 2, 21):
        assert refused == (
            "SpecError: SequenceSplit: group is a DeviceMesh of 2 dimensions, should be of one: "
            "take a dimension, as mesh['sequence']"
        )
        check_equal(found, expected, "o", 1e-5)
