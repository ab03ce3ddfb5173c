"""A cache filled from rows with padding on the left is continued with it, or not at all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from compat_models import FAMILIES, SMALL, model, relative, tokens
from errors import message_of
from gdn_ops.compat.transformers import accelerate

PADDING = 4
MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[1, :PADDING] = 0
ONES = torch.ones(2, 10, dtype=torch.int64)
WHOLE = torch.cat([MASK, ONES[:, :1]], 1)

FORGETFUL: dict[str, tuple[Tensor | None, str]] = {
    "none": (None, "is None"),
    "the new token alone": (ONES[:, :1], "has shape (2, 1)"),
    "too short": (MASK, "has shape (2, 9)"),
    "ones": (ONES, "begins with 0 tokens of padding"),
}


def told(tiny: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that gives a cache: transformers calls it by one name or the other."""
    is_cache = "cache" in inspect.signature(tiny.forward).parameters
    return {"cache" if is_cache else "past_key_values": cache}


def continued(tiny: Any, mask: Tensor | None, filled: Tensor = MASK) -> Tensor:
    """Return the logits of one token more than the nine that filled a cache."""
    rows = tokens(2, 10)
    cache = tiny(rows[:, :9], attention_mask=filled, use_cache=True).past_key_values
    result: Tensor = tiny(rows[:, 9:], attention_mask=mask, **told(tiny, cache)).logits[:, -1]
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_continued_with_the_mask_of_all_tokens(family: str) -> None:
    tiny = model(family)
    with accelerate():
        alone = tiny(tokens(2, 10)[1:, PADDING:]).logits[0, -1]
        assert relative(continued(tiny, WHOLE)[1], alone) < 1e-5


@pytest.mark.parametrize("case", FORGETFUL)
def test_a_mask_that_forgets_the_padding_is_refused(case: str) -> None:
    mask, given = FORGETFUL[case]
    with accelerate():
        message = message_of(gdn_ops.SpecError, continued, model(SMALL), mask)
    assert message == (
        f"accelerate: attention_mask {given} in a call that continues from a cache, should be that "
        f"of all tokens, whose row 1 begins with 4 tokens of padding: attention layers would take "
        f"the padding in the cache for tokens"
    )


def test_rows_may_change_places_and_leave() -> None:
    tiny, rows = model(SMALL), tokens(2, 10)
    with accelerate():
        kept = continued(tiny, WHOLE)
        for chosen in ([1, 0], [1]):
            cache = tiny(rows[:, :9], attention_mask=MASK, use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor(chosen))
            again = tiny(rows[chosen, 9:], attention_mask=WHOLE[chosen], **told(tiny, cache))
            assert relative(again.logits[:, -1], kept[chosen]) < 1e-5


def test_a_cache_without_padding_needs_no_mask() -> None:
    tiny = model(SMALL)
    with accelerate():
        expected = continued(tiny, ONES, ONES[:, :9])
        for mask in (None, ONES):
            assert torch.equal(continued(tiny, mask, ONES[:, :9]), expected)


def test_a_cache_that_is_filled_anew_forgets_its_padding() -> None:
    tiny, rows = model(SMALL), tokens(2, 10)
    with accelerate():
        cache = tiny(rows[:, :9], attention_mask=MASK, use_cache=True).past_key_values
        if not hasattr(cache, "reset"):
            pytest.skip("caches of this transformers cannot be filled anew")
        cache.reset()
        tiny(rows[:, :9], **told(tiny, cache))
        tiny(rows[:, 9:], **told(tiny, cache))
