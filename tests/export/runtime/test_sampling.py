"""Tokens are drawn by the law that temperature, top_k and top_p give, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from errors import message_of, refusal
from exported_models import prompts, session
from gdn_ops import SpecTypeError
from gdn_ops.export.runtime.sampling import Sampling

Array = np.ndarray[Any, Any]

LOGITS = np.array([0.3, -1.2, 1.1, 0.0, -0.4, 0.8], np.float32)
DRAWS = 6000

FAMILY = "qwen3_next-2:1"


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    weights: Array = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


def drawn(sampling: Sampling, count: int = DRAWS) -> Array:
    """Return how often each token is drawn from the same logits by one row."""
    generators = sampling.generators(1)
    tokens = [int(sampling.draw(LOGITS[None], generators)[0]) for _ in range(count)]
    return np.bincount(tokens, minlength=len(LOGITS))


def chi_square(counts: Array, law: Array) -> float:
    """Return Pearson's statistic; infinite where a token is drawn that a law does not give."""
    if counts[law == 0].any():
        return float("inf")
    expected = (law * counts.sum())[law > 0]
    return float(((counts[law > 0] - expected) ** 2 / expected).sum())


def cut(law: Array, kept: list[int]) -> Array:
    """Return a law within some tokens."""
    inside = np.zeros_like(law)
    inside[kept] = law[kept]
    return inside / inside.sum()


# The largest are tokens 2, 5 and 0, with 0.36, 0.27 and 0.16 of the mass.
LAWS = {
    "softmax": (Sampling(1.0), softmax(LOGITS)),
    "cold": (Sampling(0.5), softmax(LOGITS, 0.5)),
    "hot": (Sampling(3.0), softmax(LOGITS, 3.0)),
    "top_k": (Sampling(1.0, top_k=3), cut(softmax(LOGITS), [2, 5, 0])),
    "top_p": (Sampling(1.0, top_p=0.6), cut(softmax(LOGITS), [2, 5])),
    "top_p of more": (Sampling(1.0, top_p=0.65), cut(softmax(LOGITS), [2, 5, 0])),
    "both": (Sampling(2.0, top_k=3, top_p=0.7), cut(softmax(LOGITS, 2.0), [2, 5])),
}


@pytest.mark.parametrize("name", LAWS)
def test_frequencies_are_those_of_the_law(name: str) -> None:
    sampling, law = LAWS[name]
    counts = drawn(sampling)
    # A right sampler is above 20.5 once in a thousand seeds, where the law gives six tokens.
    assert chi_square(counts, law) < 20.5
    # And every other law is far from these frequencies.
    others = [other for other_name, (_, other) in LAWS.items() if not np.allclose(other, law)]
    assert len(others) >= 5
    assert min(chi_square(counts, other) for other in others) > 30


def test_rows_draw_by_the_law_independently_of_each_other() -> None:
    sampling = Sampling(1.0, seed=5)
    tokens = sampling.draw(np.repeat(LOGITS[None], DRAWS, 0), sampling.generators(DRAWS))
    assert chi_square(np.bincount(tokens, minlength=6), softmax(LOGITS)) < 20.5
    pairs = np.bincount(tokens[::2] * 6 + tokens[1::2], minlength=36)
    law = np.outer(softmax(LOGITS), softmax(LOGITS)).ravel()
    # 35 degrees of freedom; 66.6 once in a thousand.
    assert chi_square(pairs, law) < 66.6


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-9), Sampling(1e-3)],
)
def test_the_most_likely_token_is_taken_where_no_other_is_left(sampling: Sampling) -> None:
    assert drawn(sampling, 200).tolist() == [0, 0, 200, 0, 0, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_no_temperature_is_too_small_or_too_large(temperature: float) -> None:
    counts = drawn(Sampling(temperature), 600)
    law = softmax(LOGITS, 1e9) if temperature > 1 else np.eye(6)[2]
    assert chi_square(counts, law) < 20.5


def test_equal_logits_are_taken_in_their_order() -> None:
    logits = np.zeros((1, 6), np.float32)
    sampling = Sampling(1.0, top_k=2)
    generators = sampling.generators(1)
    assert {int(sampling.draw(logits, generators)[0]) for _ in range(50)} == {0, 1}
    assert Sampling().draw(logits, generators).tolist() == [0]


HOT = {"temperature": 2.0, "seed": 7}


def test_a_seed_repeats_and_another_one_draws_anew() -> None:
    made = session(FAMILY)
    first = made.generate(prompts(), 24, **HOT)
    assert made.generate(prompts(), 24, **HOT) == first
    other = made.generate(prompts(), 24, temperature=2.0, seed=8)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_row_draws_the_same_whatever_rows_are_beside_it() -> None:
    made = session(FAMILY)
    first = made.generate(prompts(), 24, **HOT)
    others = made.generate([prompts()[1][:1], prompts()[1], prompts()[0]], 24, **HOT)
    assert others[1] == first[1]
    assert others[0] != first[0]
    assert made.generate(prompts()[0], 24, **HOT) == first[0]
    # Rows of one prompt differ: each has a seed of its own.
    same = made.generate([prompts()[0]] * 3, 24, **HOT)
    assert len({tuple(row) for row in same}) == 3


def test_first_tokens_of_a_model_have_the_frequencies_of_its_logits() -> None:
    made = session(FAMILY)
    prompt, rows = prompts()[2], 1500
    (logits,), _ = made.read([prompt])
    added = made.generate([prompt] * rows, 1, temperature=1.5, top_k=6, seed=2)
    law = cut(softmax(logits, 1.5), np.argsort(-logits)[:6].tolist())
    counts = np.bincount([row[0] for row in added], minlength=len(law))
    assert chi_square(counts, law) < 20.5
    assert chi_square(counts, cut(softmax(logits, 0.5), np.flatnonzero(law).tolist())) > 30


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, should be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan, should be 0 or more"),
        ({"temperature": float("inf")}, "temperature is inf, should be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, should be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5, should be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, should be at least 0"),
        ({"seed": -1}, "seed is -1, should be at least 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, should be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, Any], text: str) -> None:
    call = {"prompts": [3], "max_new_tokens": 1, **options}
    for method in (session(FAMILY).generate, session(FAMILY).stream):
        assert refusal(method, **call) == f"ModelSession.generate: {text}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": "hot"}, "temperature has type str, should be a number"),
        ({"temperature": True}, "temperature has type bool, should be a number"),
        ({"top_p": None}, "top_p has type NoneType, should be a number"),
        ({"top_k": 1.5}, "top_k has type float, should be an integer"),
        ({"seed": "a"}, "seed has type str, should be an integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens has type float, should be an integer"),
        ({"stop": 5}, "stop has type int, should be a list of tokens"),
        ({"stop": "."}, "stop has type str, should be a list of tokens"),
        ({"stop": ["."]}, "a token of stop has type str, should be an integer"),
    ],
)
def test_an_argument_of_another_type_is_refused(options: dict[str, Any], text: str) -> None:
    call = {"prompts": [3], "max_new_tokens": 1, **options}
    found = message_of(SpecTypeError, session(FAMILY).generate, **call)
    assert found == f"ModelSession.generate: {text}"
