"""Speculation with models of transformers: the same tokens, caches set back, exact refusals."""

from __future__ import annotations

import contextlib
import copy
import doctest
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat_models import FAMILIES, SMALL, model, tokens
from errors import message_of
from gdn_ops import SpecError
from gdn_ops.compat.transformers import accelerate, speculation, speculative_generate
from gdn_ops.compat.transformers.cache_forks import ADVANCED, REPLACED, CacheFork

transformers = pytest.importorskip("transformers")
from transformers import cache_utils  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

PROMPT, COUNT, VOCABULARY = 9, 64, 97


@pytest.fixture(autouse=True, scope="module")
def _known_caches() -> None:
    knows_states(SMALL)


def knows_states(family: str) -> None:
    """Skip where a family has a cache class of its own, which is refused."""
    kinds = {type(layer).__name__ for layer in getattr(read(tokens(1, 3), family), "layers", [])}
    if not kinds or not kinds <= {*REPLACED, *ADVANCED}:
        pytest.skip("caches of this transformers have no layers whose states are known")


def greedy(tiny: Any, ids: Tensor, count: int = COUNT) -> Tensor:
    return tiny.generate(ids, do_sample=False, max_new_tokens=count)


def known(text: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a draft that knows what follows, but for every eleventh token."""
    wrong = text.clone()
    wrong[:, PROMPT::11] = (wrong[:, PROMPT::11] + 1) % VOCABULARY

    def draft(row: Tensor) -> Tensor:
        place = int((text[:, :PROMPT] == row[:PROMPT]).all(1).nonzero()[0])
        return wrong[place, len(row) : len(row) + 4]

    return draft


def calls_of(tiny: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return what a function returns, and how often it called a model."""
    calls: list[int] = []
    handle = tiny.register_forward_hook(lambda *_: calls.append(1))
    result = run()
    handle.remove()
    return result, len(calls)


CASES = [(family, 2, True) for family in FAMILIES]
CASES += [("qwen3_next-2:1", 1, False), (SMALL, 1, False), ("olmo_hybrid-1:1", 1, False)]


@pytest.mark.parametrize(("family", "rows", "accelerated"), CASES)
def test_64_greedy_tokens_are_those_of_generate(family: str, rows: int, accelerated: bool) -> None:
    knows_states(family)
    tiny, ids = model(family), tokens(rows, PROMPT)
    expected = greedy(tiny, ids)
    with accelerate() if accelerated else contextlib.nullcontext():
        for draft in (None, known(expected)):
            ours = speculative_generate(tiny, ids, max_new_tokens=COUNT, draft=draft)
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("other", [SMALL, "olmo_hybrid-1:1"])
def test_a_model_drafts_for_another_and_for_itself(other: str) -> None:
    knows_states(other)
    tiny, draft, ids = model(SMALL), copy.deepcopy(model(other)), tokens(1, PROMPT)
    expected = greedy(tiny, ids, 41)
    options = {"draft": draft, "num_draft_tokens": 7}
    with accelerate():
        ours, count = calls_of(
            tiny, lambda: speculative_generate(tiny, ids, max_new_tokens=41, **options)
        )
    assert torch.equal(ours, expected)
    # One token behind the prompt, then eight a call.
    assert count == 1 + 5 if other == SMALL else count > 10


def test_a_rejected_token_costs_no_call_of_its_own() -> None:
    tiny, ids = model(SMALL), tokens(1, PROMPT)
    expected = greedy(tiny, ids)
    _, count = calls_of(
        tiny,
        lambda: speculative_generate(tiny, ids, max_new_tokens=COUNT, draft=known(expected)),
    )
    # 63 tokens behind the first, five a call, and at most one call more at each of six mistakes.
    assert count <= 1 + 13 + 6

    def wrong(row: Tensor) -> Tensor:
        return (expected[0, len(row) : len(row) + 4] + 1) % VOCABULARY

    ours, count = calls_of(
        tiny, lambda: speculative_generate(tiny, ids, max_new_tokens=COUNT, draft=wrong)
    )
    assert torch.equal(ours, expected)
    assert count == COUNT


def test_rows_end_as_those_of_generate_do() -> None:
    tiny, ids = model(SMALL), tokens(2, PROMPT)
    plain = greedy(tiny, ids)
    for ends in ([int(plain[0, 20])], [int(plain[0, 20]), int(plain[1, 30])], []):
        expected = tiny.generate(
            ids, do_sample=False, max_new_tokens=COUNT, eos_token_id=ends or None
        )
        for draft in (None, known(plain)):
            ours = speculative_generate(
                tiny, ids, max_new_tokens=COUNT, draft=draft, eos_token_id=ends
            )
            assert torch.equal(ours, expected)


def held(cache: Any) -> list[Tensor]:
    """Return every tensor of a cache."""
    values = [value for layer in cache.layers for value in vars(layer).values()]
    values += [x for value in values if isinstance(value, dict) for x in value.values()]
    return [x for x in values if isinstance(x, Tensor)]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_set_back_is_bit_for_bit_what_it_was(family: str, accelerated: bool) -> None:
    knows_states(family)
    tiny, ids = model(family), tokens(2, PROMPT)
    names = inspect.signature(tiny.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    with torch.no_grad(), accelerate() if accelerated else contextlib.nullcontext():
        cache = getattr(tiny(ids, use_cache=True), name)
        before = [x.clone() for x in held(cache)]
        fork = CacheFork("test", cache)
        once = tiny(ids[:, :3], **{name: cache}).logits
        for length in (1, 4, 1):
            tiny(ids[:, :length], **{name: cache})
        assert not all(
            x.shape == y.shape and torch.equal(x, y)
            for x, y in zip(held(cache), before, strict=True)
        )
        fork.restore()
        for x, y in zip(held(cache), before, strict=True):
            assert torch.equal(x, y)
        assert torch.equal(tiny(ids[:, :3], **{name: cache}).logits, once)
        fork.restore()
        assert all(torch.equal(x, y) for x, y in zip(held(cache), before, strict=True))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_prefix_is_read_once_and_continued_many_times(accelerated: bool) -> None:
    tiny, prefix = model(SMALL), tokens(1, 12)
    with accelerate() if accelerated else contextlib.nullcontext():
        cache = read(prefix)
        for seed in (3, 4):
            ids = torch.cat([prefix, tokens(1, 5, seed)], 1)
            ours = speculative_generate(tiny, ids, max_new_tokens=20, cache=copy.deepcopy(cache))
            assert torch.equal(ours, greedy(tiny, ids, 20))


# Refusals.


def speculate(ids: Tensor | None = None, tiny: Any = None, **options: Any) -> Tensor:
    tiny = model(SMALL) if tiny is None else tiny
    ids = tokens(1, PROMPT) if ids is None else ids
    return speculative_generate(tiny, ids, **{"max_new_tokens": 5, **options})


def with_setting(**settings: Any) -> Any:
    changed = copy.deepcopy(model(SMALL))
    vars(changed.generation_config).update(settings)
    return changed


def read(ids: Tensor, family: str = SMALL) -> Any:
    """Return the cache that a model makes of tokens."""
    with torch.no_grad():
        output = model(family)(ids, use_cache=True)
    return output.cache if "cache" in output else output.past_key_values


def own_cache() -> Any:
    cache = cache_utils.DynamicCache(config=model(SMALL).config)
    # A subclass may hold more than its parent does.
    cache.layers[3] = type("OwnLayer", (cache_utils.DynamicLayer,), {})()
    return cache


def larger() -> Any:
    config = copy.deepcopy(model(SMALL).config)
    config.vocab_size = 98
    return type(model(SMALL))(config)


KNOWN = (
    "should be a DynamicCache whose layers are of DynamicLayer, DynamicSlidingWindowLayer, "
    "DynamicIndexedLayer, LinearAttentionLayer"
)

REFUSED: dict[str, Callable[[], Any]] = {
    "speculative_generate: num_draft_tokens is 0, should be a positive integer": (
        lambda: speculate(num_draft_tokens=0)
    ),
    "speculative_generate: max_new_tokens is 0, should be a positive integer": (
        lambda: speculate(max_new_tokens=0)
    ),
    "speculative_generate: draft has vocab_size = 98, should have 97, that of the model": (
        lambda: speculate(draft=larger())
    ),
    "speculative_generate: the draft returned tokens in [3, 97], should return tokens in "
    "[0, vocab_size - 1] = [0, 96]": lambda: speculate(draft=lambda row: [3, 97]),
    "speculative_generate: the draft returned 5 tokens, should return at most 4": (
        lambda: speculate(draft=lambda row: [3] * 5)
    ),
    "speculative_generate: draft has type str, should be a model of transformers, a function from "
    "tokens to tokens, or None": lambda: speculate(draft="lookup"),
    "speculative_generate: draft has type Linear, should be a model of transformers": (
        lambda: speculate(draft=nn.Linear(2, 2))
    ),
    "speculative_generate: model has type Linear, should be a model of transformers": (
        lambda: speculate(tiny=nn.Linear(2, 2))
    ),
    "speculative_generate: input_ids has shape (9,), should be (B, T), both above 0": (
        lambda: speculate(tokens(1, PROMPT)[0])
    ),
    "speculative_generate: input_ids has dtype int32, should be int64": (
        lambda: speculate(tokens(1, PROMPT).int())
    ),
    "speculative_generate: input_ids has values in [1, 97], should be in [0, vocab_size - 1] = "
    "[0, 96]": lambda: speculate(torch.tensor([[1, 97]])),
    "speculative_generate: layer 3 of the cache is a OwnLayer, whose states are unknown, "
    f"{KNOWN}": lambda: speculate(cache=own_cache()),
    f"speculative_generate: the cache is a tuple, whose states are unknown, {KNOWN}": (
        lambda: speculate(cache=((), ()))
    ),
    "speculative_generate: cache holds 9 tokens, should hold fewer than T = 9": (
        lambda: speculate(cache=read(tokens(1, 9)))
    ),
    "speculative_generate: generation_config.repetition_penalty is 1.2, should be 1.0: only the "
    "most likely token is taken": lambda: speculate(tiny=with_setting(repetition_penalty=1.2)),
}


@pytest.mark.parametrize(("message", "action"), REFUSED.items())
def test_what_does_not_fit_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


def test_the_example_of_the_docstring_runs() -> None:
    result = doctest.testmod(speculation)
    assert result.attempted > 3
    assert result.failed == 0
