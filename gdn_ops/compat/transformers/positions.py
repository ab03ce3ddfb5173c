"""Refuse what a model is told of packed sequences by one of its arguments alone.

Attention layers tell sequences apart by `position_ids`, linear attention by `seq_idx`: a model
that is told by one of them mixes sequences in the layers that go by the other, in silence. Values
are looked at on the CPU, and outside of compiled graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.compat.transformers import left_padding
from gdn_ops.nn.packing import check_mask_values
from gdn_ops.nn.values import has_values
from gdn_ops.spec.errors import SpecError

POSITIONS = "position_ids"
MASK = "attention_mask"
INPUTS = ("input_ids", "inputs_embeds")
"""A model has one of them, a layer has none."""

PADDED = "_gdn_ops_right_padded"
"""Attribute of a cache: the row that was padded on the right, by the index of the layer."""


def with_positions(forward: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Return a model's forward, wrapped so that its arguments are checked.

    Its parameters have these names, in order.
    """

    @functools.wraps(forward)
    def forward_with_positions(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not torch.compiler.is_compiling():
            named = dict(zip(names, arguments, strict=False)) | keywords
            check_positions(named)
            if _has_attention(self):
                check_left_padding(named)
        return forward(self, *arguments, **keywords)

    return forward_with_positions


def check_positions(named: dict[str, Any]) -> None:
    """Check that the arguments of a model agree on where packed sequences begin.

    Raises:
        SpecError: they do not, or a mask has padding between tokens, or padding that is read a
            token at a time, or a mask of four dimensions hides more than the future.
    """
    mask, positions, numbers = (named.get(name) for name in (MASK, POSITIONS, "seq_idx"))
    if isinstance(mask, dict):
        # One for each kind of layer, as `generate` makes them for a static cache.
        linear = mask.get("linear_attention")
        mask = mask.get("full_attention") if linear is None else linear
    if isinstance(mask, Tensor):
        _check_mask(mask, named)
    given: Any = positions
    positions = _of_text(given)
    if positions is None and numbers is None:
        return
    restarts = None if positions is None else _restarts(positions, mask)
    if numbers is None:
        if restarts is not None and restarts.any():
            row, token = (int(i) for i in restarts.nonzero()[0])
            _fail(
                f"{POSITIONS} start again at token {token + 1} of row {row} without seq_idx, "
                f"should go up by one, or be given with seq_idx: linear attention would run on "
                f"from one packed sequence into the next; "
                f"DataCollatorWithFlattening(return_seq_idx=True) gives it"
            )
        return
    if not isinstance(numbers, Tensor) or not has_values(numbers) or numbers.dim() != 2:
        return
    changes = numbers.diff().ne(0)
    if not changes.any():
        return
    if isinstance(mask, Tensor):
        _fail(
            f"{MASK} is given with packed sequences, should be None: attention layers would not "
            f"keep them apart"
        )
    if not _has_inputs(named):
        return
    if restarts is None:
        _fail(
            f"{POSITIONS} is None, should start again with every sequence of seq_idx: attention "
            f"layers tell sequences apart by them"
        )
    elif given.dim() == 3 and len(given) != 4:
        _fail(
            f"{POSITIONS} has shape {tuple(given.shape)}, should be (B, T), or (4, B, T) with "
            f"those of text first: attention layers tell packed sequences apart by those of text"
        )
    elif not torch.equal(changes, restarts):
        _fail(
            f"{POSITIONS} tell of sequences of {_lengths(restarts)} tokens, should be those of "
            f"seq_idx, {_lengths(changes)}: attention layers tell sequences apart by them"
        )


def check_left_padding(named: dict[str, Any]) -> None:
    """Check that a model that continues from a cache is told of the padding in it.

    Raises:
        SpecError: the padding is on the left, and the mask does not have it.
    """
    for value in named.values():
        if hasattr(value, left_padding.PADDED):
            left_padding.check(value, named.get(MASK), _sizes(named)[1])


def _has_attention(model: Any) -> bool:
    """Return whether a model has layers other than linear attention, as far as it tells."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", config)
    kinds = getattr(text, "layer_types", None)
    return not kinds or any(kind != "linear_attention" for kind in kinds)


def _has_inputs(named: dict[str, Any]) -> bool:
    """Return whether arguments are those of a model, not of one of its layers."""
    return any(named.get(name) is not None for name in INPUTS)


def _check_mask(mask: Tensor, named: dict[str, Any]) -> None:
    """Check the mask of a model or a layer that is called with these arguments."""
    rows, tokens = _sizes(named)
    fits = mask.dim() == 2 and mask.shape[0] in (1, rows) and mask.shape[1] >= tokens
    if rows is not None and not (fits or mask.dim() == 4):
        _fail(
            f"{MASK} has shape {tuple(mask.shape)}, should be (B, T) = ({rows}, {tokens}), with "
            f"the tokens of a cache in front"
        )
    if not has_values(mask):
        return
    if mask.dim() == 4:
        _check_causal(mask)
    elif mask.dim() == 2:
        check_mask_values("accelerate", MASK, mask)
        if tokens != 1 or not any(getattr(x, PADDED, None) for x in named.values()):
            # Layers say it of a cache that was filled from such rows.
            _check_between(mask)
        if tokens == 1 and _fills_a_cache(named):
            _check_token(mask)


def _sizes(named: dict[str, Any]) -> tuple[int | None, int]:
    """Return B and T of a model's inputs; None and 0 for those of a layer."""
    given = next((named[name] for name in INPUTS if named.get(name) is not None), None)
    is_known = isinstance(given, Tensor) and given.dim() > 1
    return (given.shape[0], given.shape[1]) if is_known else (None, 0)  # type: ignore[union-attr]


def _check_between(mask: Tensor) -> None:
    """Refuse padding between tokens, which the short convolution would take for tokens.

    The mask of a model has the tokens of earlier turns in front of those of this call.
    """
    kept = mask.ne(0)
    starts = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    rows = starts.gt(1).nonzero()
    if len(rows):
        _fail(
            f"{MASK} has padding between tokens in row {int(rows[0])}, should have it on the left: "
            f"the short convolution would take the padding for tokens"
        )


def _fills_a_cache(named: dict[str, Any]) -> bool:
    """Return whether a call leaves a cache behind, as far as its arguments tell."""
    is_given = any(hasattr(value, "has_previous_state") for value in named.values())
    return is_given or bool(named.get("use_cache"))


def _check_token(mask: Tensor) -> None:
    """Refuse a single token that is padding on the left: models do not tell layers of it.

    Behind other tokens it is one of a row that has ended.
    """
    rows = mask.ne(0).any(1).logical_not().nonzero()
    if len(rows):
        _fail(
            f"{MASK} has padding on the left in row {int(rows[0])} that is read a token at a time, "
            f"should have it read with tokens behind it: linear attention would take the padding "
            f"for tokens; a prefill_chunk_size of more than 1 does"
        )


def _of_text(positions: Any) -> Tensor | None:
    """Return positions (B, T) of text of more than one token, or None where they are not known."""
    if not isinstance(positions, Tensor) or not has_values(positions):
        return None
    text: Tensor = positions
    if text.dim() == 3:
        # Of text, time, height and width; or of the last three, which are equal for text.
        rows = text.unbind(0)
        if len(rows) not in (1, 4) and not all(torch.equal(row, rows[0]) for row in rows[1:]):
            return None
        text = rows[0]
    return text if text.dim() == 2 and text.shape[1] > 1 else None


def _restarts(positions: Tensor, mask: Any) -> Tensor:
    """Return where the next position is not one more, (B, T - 1); padding has no position."""
    steps = positions.diff().ne(1)
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        return steps
    kept = mask[:, -positions.shape[1] :].ne(0)
    if kept.shape[1] != positions.shape[1]:
        return torch.zeros_like(steps)
    return steps & kept[:, 1:] & kept[:, :-1]


def _lengths(changes: Tensor) -> list[int]:
    """Return the lengths of sequences that change behind these tokens of the first row."""
    ends = [int(i) + 1 for i in changes[0].nonzero().flatten()] + [changes.shape[1] + 1]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _check_causal(mask: Tensor) -> None:
    """Check that a mask (B, heads, T, S) hides the future and nothing else."""
    tokens, keys = mask.shape[2:]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float16).min / 2
    # Behind the keys of a static cache there is room for later ones.
    past = min(int(seen[0, 0, 0].sum()) - 1, keys - tokens) if seen.numel() else 0
    causal = torch.ones(tokens, keys, dtype=torch.bool, device=mask.device).tril(past)
    if tokens > 1 and not seen.eq(causal).all():
        _fail(
            f"{MASK} has shape {tuple(mask.shape)} and hides more than the future, should be "
            f"(B, T) with 0 where a token is padding: linear attention sees no mask of pairs; "
            f"seq_idx and {POSITIONS} tell of packed sequences"
        )


def _fail(message: str) -> NoReturn:
    raise SpecError(f"accelerate: {message}")
