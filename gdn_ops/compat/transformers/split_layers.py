"""Compute the layers of transformers on tokens that are split over ranks.

Attention reads the keys and values of all ranks, each in its sequence up to the token itself; the
delta rule and the short convolution exchange what `gdn_ops.parallel` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from gdn_ops.call.structure import dtype_name
from gdn_ops.compat.transformers.signatures import mentions, modules_of
from gdn_ops.compat.transformers.split_calls import ARCHITECTURES, layer_arguments, refuse
from gdn_ops.nn import split_tokens
from gdn_ops.nn.convolution import convolve
from gdn_ops.parallel import exchange
from gdn_ops.parallel.context import Active, active
from gdn_ops.parallel.failures import reported
from gdn_ops.parallel.split import Piece
from gdn_ops.torch_ops.eager import full_precision

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""Name in a module of transformers' attention functions by name."""

IMPLEMENTATION = "sdpa"
"""The one that computes on split tokens."""

NAME = "attention of transformers"

Function = Callable[..., Any]


def attention_classes(module: ModuleType) -> list[type[nn.Module]]:
    """Return the classes of a module that call an attention function of the registry."""
    return [cls for cls in modules_of(module) if mentions(vars(cls)["forward"], (REGISTRY,))]


def obstacle(module: ModuleType, architecture: str, convolutions: Collection[str]) -> str | None:
    """Return why the models of a module do not compute on split tokens, or None.

    Args:
        module: the module.
        architecture: its model folder.
        convolutions: names of its functions that are replaced.
    """
    if architecture not in ARCHITECTURES:
        return f"a model of {architecture} is called, should be of {', '.join(ARCHITECTURES)}"
    if "causal_conv1d_fn" not in convolutions:
        return (
            f"the short convolution of {architecture} is transformers' own, should be a function "
            f"that is replaced, as with transformers 5.15 and newer,"
        )
    if not has_attention_functions(module):
        return f"{architecture} has no {REGISTRY} with {IMPLEMENTATION!r}, should have it"
    return None


def has_attention_functions(module: ModuleType) -> bool:
    """Return whether a module has attention functions by name, that on split tokens among them."""
    registry: Any = vars(module).get(REGISTRY)
    return hasattr(registry, "_local_mapping") and IMPLEMENTATION in registry


def registry_with_split(registry: Any) -> Any:
    """Return attention functions like those of a module, of which one computes on split tokens.

    It is what transformers makes where a model has functions of its own: an instance whose entries
    come before those of all models.
    """
    own = type(registry)()
    own._local_mapping.update(registry._local_mapping)
    own[IMPLEMENTATION] = split_attention(registry[IMPLEMENTATION])
    return own


def attention_arguments(
    reason: str | None, active: Active, layer: Any, named: dict[str, Any]
) -> dict[str, Any]:
    """Check and return the arguments of an attention layer, by name.

    Args:
        reason: why layers of its module cannot compute on split tokens, or None.
        active: the context.
        layer: the layer.
        named: the arguments.

    Raises:
        SpecError: its function computes on the tokens of one rank, or an argument is refused.
    """
    used = getattr(layer.config, "_attn_implementation", None)
    if used != IMPLEMENTATION:
        refuse(
            f"the attention implementation is {used!r}, should be {IMPLEMENTATION!r} under "
            f"sequence_parallel: model.set_attn_implementation({IMPLEMENTATION!r})"
        )
    return layer_arguments(reason, active, layer, named)


def split_attention(original: Function) -> Function:
    """Return an attention function of transformers that computes on split tokens, if they are.

    Args:
        original: the one that computes elsewhere.
    """

    @functools.wraps(original)
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Any:
        split = active()
        if split is None:
            return original(module, query, key, value, *arguments, **options)
        for name in ("position_bias", "softcap", "s_aux"):
            if options.get(name) is not None:
                refuse(f"{name} of attention is given, should be None under sequence_parallel")
        if not options.get("is_causal", getattr(module, "is_causal", True)):
            refuse("attention is not causal, should be causal under sequence_parallel")
        names = {"dropout": "dropout", "scaling": "scale", "sliding_window": "window"}
        given = {own: options[name] for name, own in names.items() if name in options}
        o = attend(split, query, key, value, **given)
        return o.transpose(1, 2).contiguous(), None

    return attention


def attend(
    active: Active,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend from the tokens of this rank to those before them in their sequences, on all ranks.

    Args:
        active: the context.
        q: (B, heads, T_local, K).
        k: (B, key heads, T_local, K); each of them is read by as many heads that follow each other.
        v: (B, key heads, T_local, V).
        dropout: probability with which a weight is left out.
        scale: of the products of q and k, by default 1/√K.
        window: how many tokens each attends to, itself included; None for all before it.

    Returns:
        (B, heads, T_local, V).

    Raises:
        ParallelError: the ranks disagree, or an exchange failed.
    """
    split = active.split
    with reported(split.group, NAME):
        joined = torch.cat([k, v], -1)
        needs_grad = torch.is_grad_enabled() and joined.requires_grad
        facts = {
            "(B, key heads, K + V)": str((*joined.shape[:2], joined.shape[3])),
            "the dtype": dtype_name(joined.dtype),
            "whether gradients are needed": str(needs_grad),
            "split": repr(split),
            "cu_seqlens": str(list(split.boundaries)),
        }
        exchange.agree(split.group, NAME, facts)
        whole = split.whole(joined, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    keys, values = whole.split([k.shape[3], v.shape[3]], -1)
    outputs = []
    for piece in split.local_pieces:
        seen, mask = _seen(split.boundaries[piece.sequence], piece, window, q.device)
        own = (q[:, :, piece.own], keys[:, :, seen], values[:, :, seen])
        outputs.append(
            functional.scaled_dot_product_attention(
                *own, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        )
    return torch.cat(outputs, 2)


def _seen(first: int, piece: Piece, window: int | None, device: torch.device) -> tuple[slice, Any]:
    """Return which tokens a piece reads, of a sequence from its first one on, and the mask."""
    if window is None:
        # Without a mask in memory where torch has a kernel for it.
        return slice(first, piece.stop), causal_lower_right(piece.length, piece.stop - first)
    first = max(first, piece.start - window + 1)
    own = torch.arange(piece.start, piece.stop, device=device)[:, None]
    behind = own - torch.arange(first, piece.stop, device=device)
    return slice(first, piece.stop), (behind >= 0) & (behind < window)


def split_convolution(
    active: Active, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool, backend: str
) -> Tensor:
    """Convolve the tokens of this rank, (B, T_local, D), behind those before its pieces.

    Args:
        active: the context.
        x: (B, T_local, D).
        weight: (D, k), its last column being of the token itself.
        bias: (D,) or None.
        silu: whether the result is activated.
        backend: of the rule.
    """
    with full_precision(x.device.type):
        own = split_tokens.convolved(active, [x], weight.shape[1] - 1)
        y, _ = convolve(
            own.parts[0], weight, bias, own.past,
            silu=silu, backend=backend, cu_seqlens=own.cu_seqlens,
        )  # fmt: skip
    return y.reshape(x.shape)
