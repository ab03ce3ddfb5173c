"""A model whose sequences are split over ranks computes the loss and gradients of one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parallel.ranks import Ranks
from tests.parallel.test_sequence import fragments
from tests.parallel.workers import (
    ModelCase,
    compiled_logits,
    loss_of,
    model_gradients,
    model_states,
)


@st.composite
def models(draw: st.DrawFn, ranks: int) -> ModelCase:
    lengths = draw(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=4))
    tokens = draw(st.integers(0, 20)) if lengths is None else sum(lengths)
    options: dict[str, Any] = {"rule": draw(st.sampled_from(["gated_delta", "delta", "gated"]))}
    options["short_conv"] = draw(st.sampled_from([0, 1, 2, 4]))
    return ModelCase(
        draw(st.sampled_from(["G", "GA", "MGA", "A"])),
        draw(fragments(tokens, ranks)),
        rows=draw(st.integers(1, 3)) if lengths is None else 1,
        lengths=None if lengths is None else tuple(lengths),
        window=draw(st.sampled_from([1, 2, 5, 16])),
        checkpoint=draw(st.booleans()),
        strategy=draw(st.sampled_from(["pipeline", "gather"])),
        seed=draw(st.integers(0, 99)),
        options=tuple(options.items()),
    )


def on_one_process(case: ModelCase) -> dict[str, Tensor]:
    """Return the loss and gradients of all tokens, sequence by sequence."""
    model, (tokens, labels) = case.model(), case.data()
    cuts = case.boundaries or [0, case.tokens]
    loss = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        own = slice(start, stop)
        loss = loss + loss_of(model, tokens[:, own], labels[:, own], False)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad
             for n, p in model.named_parameters()}  # fmt: skip
    return {"loss": loss.detach(), **grads}


def check_equal(found: Tensor, expected: Tensor, name: str, most: float = 1e-9) -> None:
    scale = float(expected.norm()) + 1e-3
    assert float((found - expected).norm()) <= most * scale, name


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_loss_and_gradients_equal_those_of_one_process(ranks: Ranks, count: int) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(models(count))
    def check(case: ModelCase) -> None:
        parts = ranks.run(count, model_gradients, case)
        for name, expected in on_one_process(case).items():
            check_equal(sum(part[name] for part in parts), expected, name)

    check()


@pytest.mark.parametrize("pattern", ["G", "GA"])
@pytest.mark.parametrize("count", [2, 3])
def test_states_behind_the_sequences_are_those_of_one_process(
    ranks: Ranks, pattern: str, count: int
) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(fragments(17, count), st.integers(1, 2))
    def check(runs: Any, rows: int) -> None:
        case = ModelCase(pattern, runs, rows=rows, window=5)
        model, (tokens, labels) = case.model(), case.data()
        with torch.no_grad():
            logits, states = model(tokens)
            following, _ = model(labels[:, :3], states)
            for whole, after in ranks.run(count, model_states, case):
                check_equal(whole, logits, "logits")
                continued, _ = model(labels[:, :3], after)
                check_equal(continued, following, "logits of what follows")

    check()


def test_a_compiled_model_exchanges_outside_of_its_graphs(ranks: Ranks) -> None:
    case = ModelCase("GA", (((0, 5),), ((5, 9),)))
    for found, own, whole, of_one in ranks.run(2, compiled_logits, case):
        check_equal(found, own, "logits of a rank", 1e-5)
        # Outside of the context the compiled model is that of one process again.
        check_equal(whole, of_one, "logits", 1e-5)
