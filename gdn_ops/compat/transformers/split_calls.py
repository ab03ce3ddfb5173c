"""Check and complete the calls of models and layers whose tokens are split over ranks.

Inside `gdn_ops.parallel.sequence_parallel` the split tells positions and packed sequences. What a
call would say beside it, and what would read the tokens of one rank alone, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.compat.transformers.positions import INPUTS, MASK, POSITIONS
from gdn_ops.parallel.context import Active, active
from gdn_ops.spec.errors import SpecError

ARCHITECTURES = (
    *("bailing_hybrid", "kimi_linear", "lara_mini", "olmo_hybrid"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next"),
)
"""Model folders whose models mix tokens in attention and linear attention alone: they are tested.
Qwen4-Exp also reads n-grams and selects keys, and GLM-5.3-Flash selects keys."""

HEADS = ("Model", "ForCausalLM", "ForConditionalGeneration")
"""End the names of classes whose outputs are per token, and whose loss is a sum over tokens."""

OF_TOKENS = (
    *("cache", "past_key_values", "cache_params", MASK),
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"),
)
"""Arguments that layers and models read beside their tokens."""

OF_IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")

Prepare = Callable[[Active, Any, dict[str, Any]], dict[str, Any]]
"""Check the arguments of a module by name, given context and module; return what to pass."""


def with_split(
    forward: Callable[..., Any],
    names: tuple[str, ...],
    prepare: Prepare,
    elsewhere: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return a forward, wrapped so that its arguments are prepared inside of sequence_parallel.

    Args:
        forward: of a class; its parameters have these names, in order.
        names: those.
        prepare: checks its arguments.
        elsewhere: computes outside of sequence_parallel; by default the forward itself.
    """
    outside = forward if elsewhere is None else elsewhere

    # A compiled model runs as it is written: ranks exchange, which no graph holds.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def inside(
        split: Active, self: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        named = dict(zip(names, arguments, strict=False)) | keywords
        return forward(self, **prepare(split, self, named))

    @functools.wraps(forward)
    def forward_with_split(self: Any, *arguments: Any, **keywords: Any) -> Any:
        split = active()
        if split is None:
            return outside(self, *arguments, **keywords)
        return inside(split, self, arguments, keywords)

    return forward_with_split


def refuse(text: str) -> NoReturn:
    """Raise a SpecError of a call under sequence_parallel."""
    raise SpecError(f"accelerate: {text}")


def layer_arguments(
    reason: str | None, active: Active, layer: Any, named: dict[str, Any]
) -> dict[str, Any]:
    """Check and return the arguments of a layer, by name.

    Args:
        reason: why layers of its module cannot compute on split tokens, or None.
        active: the context.
        layer: the layer.
        named: the arguments.

    Raises:
        SpecError: the layer cannot, or an argument does not belong there.
    """
    if reason is not None:
        refuse(f"{reason} under sequence_parallel")
    for name in OF_TOKENS:
        value = named.get(name)
        is_nothing = isinstance(value, dict) and all(x is None for x in value.values())
        if value is not None and not is_nothing:
            refuse(f"{name} is given, should be None under sequence_parallel: {_why(name)}")
    _check_tokens(active, named)
    return named


def _why(name: str) -> str:
    if name == MASK:
        return "sequences have no padding, and the split tells packed ones apart"
    if name in ("cache", "past_key_values", "cache_params"):
        return "tokens are split, and a cache holds all of one sequence"
    return "the split tells packed sequences apart"


def _check_tokens(active: Active, named: dict[str, Any]) -> None:
    split = active.split
    # Every rank knows it, and none waits for the others.
    empty = [rank for rank in range(split.ranks) if not any(split.pieces_of(rank))]
    if empty:
        refuse(
            f"rank {empty[0]} has no tokens in {split}, should have some: layers of transformers "
            f"cannot shape them"
        )
    for name in (*INPUTS, "hidden_states"):
        x = named.get(name)
        if not isinstance(x, Tensor) or x.dim() < 2:
            continue
        if x.shape[1] != split.local_tokens:
            refuse(
                f"{name} has T={x.shape[1]} tokens, should have {split.local_tokens}: those of "
                f"rank {split.rank} in {split}"
            )
        if split.is_packed and x.shape[0] != 1:
            refuse(f"{name} has B={x.shape[0]} rows, should be 1: sequences are packed")


def model_arguments(
    reason: str | None, active: Active, model: Any, named: dict[str, Any]
) -> dict[str, Any]:
    """Check the arguments of a model by name, and return them with what the split tells.

    Args:
        reason: why models of its module cannot compute on split tokens, or None.
        active: the context.
        model: the model.
        named: the arguments.

    Returns:
        Those, with the positions of the tokens, masks of nothing and no cache.

    Raises:
        SpecError: the model cannot, or an argument does not belong there.
    """
    layer_arguments(reason, active, model, named)
    name = type(model).__name__
    if not name.endswith(HEADS):
        refuse(
            f"{name} is called under sequence_parallel, should be a class whose name ends with "
            f"one of {', '.join(HEADS)}"
        )
    config = getattr(model.config, "text_config", model.config)
    _check_options(config, named)
    _check_loss(named)
    x = next((named[name] for name in INPUTS if named.get(name) is not None), None)
    if x is None:
        # The model itself says that its tokens are missing.
        return named
    own = active.split.positions(x.device)
    given = named.get(POSITIONS)
    if given is not None and not (given.shape[-1] == len(own) and bool(given.eq(own).all())):
        refuse(f"{POSITIONS} are others than those of the split, should be split.positions()")
    # Without masks of its own a model makes some, of the tokens of one rank.
    masks = dict.fromkeys(config.layer_types)
    positions = own.expand(x.shape[0], -1) if given is None else given
    told = {POSITIONS: positions, MASK: masks, "use_cache": False}
    if named.get("shift_labels") is not None:
        # The loss views them, and what split.local cuts out of rows may lie apart.
        told["shift_labels"] = named["shift_labels"].contiguous()
    return named | told


def _check_options(config: Any, named: dict[str, Any]) -> None:
    """Check arguments that ask for what is not a sum over the tokens of ranks."""
    for name in OF_IMAGES:
        if named.get(name) is not None:
            refuse(f"{name} is given, should be None under sequence_parallel: tokens are of text")
    if named.get("use_cache"):
        refuse("use_cache is True, should be False under sequence_parallel: there is no cache")
    kept = named.get("logits_to_keep")
    if kept is not None and not (isinstance(kept, int) and kept == 0):
        refuse(
            "logits_to_keep is given, should be 0 under sequence_parallel: the last tokens are on "
            "one rank"
        )
    routed = named.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if routed is None else routed:
        refuse(
            "output_router_logits is True, should be False under sequence_parallel: the auxiliary "
            "loss is not a sum over tokens"
        )


def _check_loss(named: dict[str, Any]) -> None:
    """Check that the loss of a rank is its share of the loss of all tokens."""
    if named.get("labels") is None:
        return
    if named.get("shift_labels") is None:
        refuse(
            "labels are given without shift_labels, should be given with them under "
            "sequence_parallel: the token after the last one of a rank is on another"
        )
    if named.get("num_items_in_batch") is None:
        refuse(
            "labels are given without num_items_in_batch, should be given with it under "
            "sequence_parallel: the loss of a rank is its share of the sum over all tokens"
        )
