"""Count what models remember of a text, in bytes: states, and keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_ops.bench.paper.attention import FullAttention, KeyValueCache
from gdn_ops.bench.paper.skeletons import MIXERS, Shape, build, state_behind
from gdn_ops.nn import PAPER, GatedDeltaNet, HybridLM

FORMULAS = {
    "G": "4 HV K V + b (2 H K + HV V) (kernel - 1)",
    "A": "2 b width window + 8",
    "F": "2 b width tokens",
}
"""Bytes of one layer and one text, by its letter in a pattern, b bytes a number: the memory in
float32 and the last inputs of the convolution; a ring of keys and values, whose slots are there
from the start, with its counter; all keys and values."""


@dataclass(frozen=True)
class Kept:
    """Hold how much a model remembers of one text.

    Attributes:
        model: a name of MIXERS or of `gdn_ops.nn.PAPER`.
        context: tokens of the text.
        bytes: of all tensors of the state, counted.
        formula: the same, by FORMULAS.
        keys_values: bytes of the keys and values of full attention in every layer of that model,
            in its width and dtype.
    """

    model: str
    context: int
    bytes: int
    formula: int
    keys_values: int


def bytes_of(state: Iterable[Any]) -> int:
    """Return the bytes of all tensors in the states of layers, without free room of a cache."""
    total = 0
    for held in state:
        parts = held
        if isinstance(held, KeyValueCache):
            parts = (held.keys[:, :, : held.tokens], held.values[:, :, : held.tokens])
        total += sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
    return total


def formula_of(model: HybridLM, context: int, dtype: torch.dtype) -> int:
    """Return the bytes that FORMULAS say of all layers."""
    total, b = 0, dtype.itemsize
    for block in model.blocks:
        mixer: Any = block.mixer
        if isinstance(mixer, GatedDeltaNet):
            keys = mixer.num_heads * mixer.head_dim
            values = mixer.num_value_heads * mixer.value_dim
            total += 4 * values * mixer.head_dim
            if mixer.conv is not None:
                total += b * (2 * keys + values) * (mixer.conv.kernel_size - 1)
        elif isinstance(mixer, FullAttention):
            total += 2 * b * mixer.hidden_size * context
        else:
            total += 2 * b * mixer.hidden_size * mixer.window + 8
    return total


def kept(name: str, model: HybridLM, context: int, dtype: torch.dtype) -> Kept:
    """Return how much a model remembers of a text of some length."""
    full = 2 * dtype.itemsize * model.hidden_size * context * len(model.blocks)
    counted = bytes_of(state_behind(model, context))
    return Kept(name, context, counted, formula_of(model, context, dtype), full)


def memory_of(
    mixers: Iterable[str], shape: Shape, contexts: Iterable[int], dtype: torch.dtype
) -> list[Kept]:
    """Return how much the models of a run remember, and the published ones in bfloat16.

    They are built without memory of their own: sizes are all that counts.
    """
    contexts, found = tuple(contexts), []
    for name in mixers:
        model = build(name, shape, device="meta", dtype=dtype)
        found += [kept(name, model, context, dtype) for context in contexts]
    if set(mixers) >= set(MIXERS):
        for name, options in PAPER.items():
            model = HybridLM(**options, device="meta", dtype=torch.bfloat16)
            found += [kept(name, model, context, torch.bfloat16) for context in contexts]
    return found


def equal_context(found: Iterable[Kept]) -> dict[str, float]:
    """Return, by model, the context whose keys and values take as much as what it remembers.

    Models that remember more of a longer text have none.
    """
    by_model: dict[str, list[Kept]] = {}
    for one in found:
        by_model.setdefault(one.model, []).append(one)
    return {
        name: group[0].bytes * group[0].context / group[0].keys_values
        for name, group in by_model.items()
        if len({one.bytes for one in group}) == 1 and group[0].bytes != group[0].keys_values
    }
