"""Speculation generates what the model alone does: the same tokens, the same chances."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import HybridLM, PromptLookup, drafts, generation, hybrid, rollback
from hybrid_models import PATTERNS, VOCABULARY, WINDOW, greedy, make, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")


def calls_of(model: HybridLM, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return what a function returns, and how often it called a model."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    result = run()
    handle.remove()
    return result, len(calls)


# The same tokens.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_tokens_are_those_without_a_draft(pattern: str, rows: int, seed: int) -> None:
    model, prompt = make(pattern, seed), tokens_of(rows, 6, seed)
    plain = greedy(model, prompt, 25)
    drafts: dict[str, dict[str, Any]] = {
        "prompt lookup": {"draft_tokens": 3},
        "always another": {"draft": lambda text: [(int(text[-1]) + 7) % VOCABULARY] * 4},
        "nothing at all": {"draft": lambda text: text[:0]},
        "a small model": {"draft": make("G", 9, 8), "draft_tokens": 2},
        "the model": {"draft": make(pattern, seed), "draft_tokens": 7},
        # More than attention sees.
        "the model, far ahead": {"draft": make(pattern, seed), "draft_tokens": 2 * WINDOW + 1},
    }
    eos = int(plain[0, 12])
    ended = greedy(model, prompt, 25, eos_token_id=eos)
    for name, options in drafts.items():
        assert torch.equal(greedy(model, prompt, 25, **options), plain), name
        assert torch.equal(greedy(model, prompt, 25, eos_token_id=eos, **options), ended), name


def test_calls_are_as_many_as_drafts_are_bad() -> None:
    model, prompt = make("GA"), tokens_of(1, 6)
    plain, count = calls_of(model, lambda: greedy(model, prompt, 25))
    assert count == 25
    same = {"draft": make("GA"), "draft_tokens": 3}
    _, count = calls_of(model, lambda: greedy(model, prompt, 25, **same))
    # One token behind the prompt, then four a call.
    assert count == 1 + 6

    def known(text: Tensor) -> Tensor:
        return plain[0, len(text) : len(text) + 5]

    _, count = calls_of(model, lambda: greedy(model, prompt, 25, draft=known, draft_tokens=5))
    assert count == 1 + 4
    wrong = {"draft": lambda text: (known(text) + 1) % VOCABULARY, "draft_tokens": 5}
    tokens, count = calls_of(model, lambda: greedy(model, prompt, 25, **wrong))
    assert count == 25
    assert torch.equal(tokens, plain)


def test_rows_keep_what_agrees_in_each() -> None:
    model, prompt = make("MGA"), tokens_of(3, 6)
    plain = greedy(model, prompt, 24)

    def draft(text: Tensor) -> Tensor:
        """Know the first row, half of the second, nothing of the third."""
        row = int((prompt == text[:6]).all(1).nonzero()[0])
        tokens = plain[row, len(text) : len(text) + 4].clone()
        tokens[(4, 2, 0)[row] :] = (tokens[(4, 2, 0)[row] :] + 1) % VOCABULARY
        return tokens

    tokens, count = calls_of(model, lambda: greedy(model, prompt, 24, draft=draft))
    assert torch.equal(tokens, plain)
    # The third row needs a call for each of its tokens.
    assert count == 24


def test_a_row_that_ended_repeats_its_last_token() -> None:
    model, prompt = make("GA"), tokens_of(2, 6)
    plain = greedy(model, prompt, 25)
    eos = int(plain[0, 10])
    ended = greedy(model, prompt, 25, eos_token_id=eos)
    for row in range(2):
        ends = (plain[row, 6:] == eos).nonzero()
        first = 6 + int(ends[0]) if len(ends) else 31
        assert torch.equal(ended[row, :first], plain[row, :first])
        assert bool((ended[row, first:] == eos).all())
    assert bool((ended[0, 11:] == eos).all())
    last = int(ended[0, 10])
    _, count = calls_of(model, lambda: greedy(model, prompt[:1], 25, eos_token_id=last))
    assert count <= 5


# Sampling.


def chi_square(model: HybridLM, prompt: Tensor, drawn: Tensor, temperature: float) -> float:
    """Return Σ (seen − expected)² / expected over all continuations by drawn.shape[1] tokens."""
    size, count = model.embedding.num_embeddings, drawn.shape[1]
    texts = torch.cartesian_prod(*[torch.arange(size)] * count)
    read = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    with torch.no_grad():
        logits = model(read)[0][:, prompt.shape[1] - 1 : -1]
    each = (logits / temperature).softmax(-1).gather(2, texts[..., None])[..., 0].prod(1)
    places = (drawn * size ** torch.arange(count - 1, -1, -1)).sum(1)
    seen, expected = torch.bincount(places, minlength=len(texts)), each * len(drawn)
    # Count together what is too rare for the law of large numbers.
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    assert len(expected) > 30
    seen, expected = (x if rare.any() else x[:-1] for x in (seen, expected))
    return float(((seen - expected) ** 2 / expected).sum())


def small(pattern: str, seed: int) -> HybridLM:
    torch.manual_seed(seed)
    model = HybridLM(pattern, 4, 8, num_heads=1, head_dim=8, window=3, mlp_size=0).double()
    # The weight of logits, too: every token is likely enough to be counted.
    torch.nn.init.normal_(model.embedding.weight, std=0.2)
    return model


LIMIT = 120.0
"""Above the chi-square of 63 degrees of freedom in all but 2 of 100000 cases."""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["plain", "a model", "a function"])
def test_draws_are_from_the_distribution_of_the_model(name: str, temperature: float) -> None:
    model, prompt = small("GA", 1), torch.tensor([[2, 0]])
    drafts = {"plain": {}, "a model": {"draft": small("G", 5)}, "a function": {"draft": follow}}
    tokens = drawn_with(model, prompt, temperature, **drafts[name])
    assert chi_square(model, prompt, tokens, temperature) < LIMIT


def follow(text: Tensor) -> list[int]:
    return [(int(text[-1]) + 1) % 4, 0]


def drawn_with(model: HybridLM, prompt: Tensor, temperature: float, **options: Any) -> Tensor:
    random = torch.Generator().manual_seed(0)
    rows = prompt.expand(4000, -1)
    more = {"draft_tokens": 2} if options else {}
    tokens = model.generate(rows, 3, temperature=temperature, generator=random, **options, **more)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("wrong", ["never rejects", "draws anew from all"])
def test_a_wrong_way_to_draw_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small("GA", 1), torch.tensor([[2, 0]])
    if wrong == "never rejects":
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape) - 1)
    else:
        monkeypatch.setattr(generation, "remainder", lambda p, q: p)
    for draft in (small("G", 5), follow):
        tokens = drawn_with(model, prompt, 1.0, draft=draft)
        assert chi_square(model, prompt, tokens, 1.0) > 1.5 * LIMIT


def test_a_temperature_is_that_of_the_draft_too() -> None:
    model, prompt = small("GA", 1), torch.tensor([[2, 0]]).expand(50, -1)
    random = torch.Generator().manual_seed(0)
    options = {"temperature": 0.5, "generator": random, "draft_tokens": 5}
    draft = {"draft": small("GA", 1)}
    _, count = calls_of(model, lambda: model.generate(prompt, 13, **options, **draft))
    # Equal distributions: nothing is rejected, but for what rounding of the last digit does.
    assert count <= 1 + 3


# Prompt lookup.


def test_prompt_lookup_proposes_what_followed_the_longest_words_last() -> None:
    look = PromptLookup(3, longest=2)
    assert look(torch.tensor([1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2])).tolist() == [6, 7, 8]
    # "9 2" does not stand before; "2" does.
    assert look(torch.tensor([1, 2, 3, 4, 5, 9, 2])).tolist() == [3, 4, 5]
    # The latest with three tokens behind it, in a text that goes round.
    assert look(torch.tensor([1, 2] * 5)).tolist() == [1, 2, 1]
    assert look(torch.tensor([5, 5])).tolist() == [5]
    assert look(torch.tensor([1, 2, 3])).tolist() == []
    assert look(torch.tensor([1])).tolist() == []


# Refusals.


def speculate(**options: Any) -> Tensor:
    return make("GA").generate(tokens_of(2, 4), 9, temperature=0, **options)


REFUSED: dict[str, Callable[[], Any]] = {
    "HybridLM.generate: draft_tokens is 0, should be a positive integer": (
        lambda: speculate(draft_tokens=0)
    ),
    "HybridLM.generate: draft_tokens is 2.5, should be a positive integer": (
        lambda: speculate(draft_tokens=2.5)
    ),
    "HybridLM.generate: draft has vocab_size = 23, should have 19, that of the model": (
        lambda: speculate(draft=HybridLM("G", 23, 8, num_heads=1))
    ),
    "HybridLM.generate: draft has type str, should be a HybridLM, a function from tokens to "
    "tokens, or None": lambda: speculate(draft="ngram"),
    "HybridLM.generate: the draft returned tokens in [3, 19], should return tokens in "
    "[0, vocab_size - 1] = [0, 18]": lambda: speculate(draft=lambda text: [3, 19]),
    "HybridLM.generate: the draft returned tokens in [-1, -1], should return tokens in "
    "[0, vocab_size - 1] = [0, 18]": lambda: speculate(draft=lambda text: torch.tensor([-1])),
    "HybridLM.generate: the draft returned 3 tokens, should return at most 2": (
        lambda: speculate(draft=lambda text: [1, 2, 3], draft_tokens=2)
    ),
    "HybridLM.generate: the draft returned float32 of shape (1,), should return integers of "
    "shape (n,)": lambda: speculate(draft=lambda text: [0.5]),
    "HybridLM.generate: the draft returned int64 of shape (1, 1), should return integers of "
    "shape (n,)": lambda: speculate(draft=lambda text: [[1]]),
    "HybridLM.generate: the draft returned a str, should return a list or a tensor of tokens": (
        lambda: speculate(draft=lambda text: "no")
    ),
    "HybridLM.generate: eos_token_id is 19, should be below vocab_size = 19": (
        lambda: speculate(eos_token_id=19)
    ),
    "HybridLM.generate: got an unknown argument 'assistant_model', should be draft": (
        lambda: speculate(assistant_model=None)
    ),
    "PromptLookup: num_tokens is 0, should be a positive integer": lambda: PromptLookup(0),
    "PromptLookup: tokens has shape (1, 3), should be (length,)": (
        lambda: PromptLookup()(tokens_of(1, 3))
    ),
}


@pytest.mark.parametrize(("message", "action"), REFUSED.items())
def test_what_does_not_fit_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


@pytest.mark.parametrize("module", [drafts, hybrid, rollback], ids=lambda module: module.__name__)
def test_examples_of_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0
