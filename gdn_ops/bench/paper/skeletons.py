"""Build models that differ in their token mixers only: the contenders of `gdn-ops bench paper`.

Every one is a HybridLM of the same width, number of layers, MLPs and vocabulary. Key heads are 96
wide and value heads 192, one for each 128 of the width: the published 0.75 and 1.5 widths in all.
Heads of attention are 128 wide, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gdn_ops.bench.paper.attention import FullAttention, KeyValueCache
from gdn_ops.nn import GatedDeltaNet, HybridLM, KeyValueRing, State
from gdn_ops.ops import explain
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.names import unknown
from gdn_ops.spec.ops import GATED_DELTA

HEAD = 128
"""Width of the model for each head of its mixers."""

KEY = 96
"""Width of a key head, 0.75 HEAD; a value head is twice as wide."""

ATTENTION = "attention"
"""The contender that every other one is compared with."""


@dataclass(frozen=True)
class Mixer:
    """Describe one kind of model.

    Attributes:
        label: its name in tables and plots.
        pattern: of HybridLM; "F" is full attention in every layer.
        rule: of its layers G.
        text: what it is.
    """

    label: str
    pattern: str
    rule: str
    text: str


MIXERS = {
    "gdn": Mixer("GDN", "G", "gated_delta", "Gated DeltaNet in every layer"),
    "deltanet": Mixer("DeltaNet", "G", "delta", "the same layer with the delta rule, no decay"),
    "mamba2": Mixer(
        "Mamba2's recurrence", "G", "gated", "the same layer with the decay-only rule of Mamba2"
    ),
    "linear": Mixer("linear attention", "G", "linear", "the same layer, no decay and no delta"),
    ATTENTION: Mixer("attention", "F", "gated_delta", "full softmax attention, torch's SDPA"),
    "h1": Mixer("GDN-H1", "GA", "gated_delta", "GDN and attention in a window, in turns"),
    "h2": Mixer(
        "GDN-H2", "MGA", "gated_delta", "decay-only rule, GDN and attention in a window, in turns"
    ),
}
"""The contenders, by the names that `--mixers` takes."""


@dataclass(frozen=True)
class Shape:
    """Describe the models, without their mixers.

    Attributes:
        width: of the model, a multiple of HEAD.
        layers: a multiple of the lengths of all patterns, 6.
        window: tokens that the attention of hybrids sees.
        vocabulary: tokens.
    """

    width: int
    layers: int
    window: int
    vocabulary: int

    @property
    def inner(self) -> int:
        """Return the inner width of every MLP: 8/3 of the width, rounded up to 64."""
        return -(-8 * self.width // (3 * 64)) * 64

    @property
    def heads(self) -> int:
        """Return the heads of a mixer."""
        return self.width // HEAD


def check_mixers(names: tuple[str, ...]) -> None:
    """Refuse names that are no contenders.

    Raises:
        SpecError: there is one.
    """
    for name in names:
        if name not in MIXERS:
            raise SpecError(unknown("mixer", name, MIXERS))


def build(name: str, shape: Shape, *, backend: str = "auto", **made: Any) -> HybridLM:
    """Return a model with random weights.

    Args:
        name: of MIXERS.
        shape: of the model.
        backend: of its recurrent layers.
        made: device and dtype of the parameters.
    """
    kind = MIXERS[name]
    torch.manual_seed(0)
    model = HybridLM(
        kind.pattern.replace("F", "A"),
        shape.vocabulary,
        shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        head_dim=KEY,
        window=shape.window,
        mlp_size=shape.inner,
        rule=kind.rule,
        backend=backend,
        **made,
    )
    if kind.pattern == "F":
        for block in model.blocks:
            block.mixer = with_weights(FullAttention(shape.width, shape.heads, **made), block.mixer)
    return model


def with_weights(module: nn.Module, like: Any) -> nn.Module:
    """Return a module with the parameters of another one."""
    module.load_state_dict(like.state_dict())
    return module


def layer(name: str, width: int, *, backend: str = "auto", **made: Any) -> nn.Module:
    """Return one mixer alone, of a model of some width: GDN, or full attention."""
    torch.manual_seed(0)
    if name == ATTENTION:
        return FullAttention(width, width // HEAD, **made)
    rule = MIXERS[name].rule
    return GatedDeltaNet(width, width // HEAD, head_dim=KEY, rule=rule, backend=backend, **made)


def count_parameters(model: HybridLM) -> dict[str, int]:
    """Return the numbers of parameters: of all mixers, and of everything else."""
    of_mixers: list[nn.Module] = [block.get_submodule("mixer") for block in model.blocks]
    mixers = sum(p.numel() for mixer in of_mixers for p in mixer.parameters())
    return {"mixers": mixers, "others": sum(p.numel() for p in model.parameters()) - mixers}


def state_behind(model: HybridLM, tokens: int, cache: Any = None) -> tuple[Any, ...]:
    """Return the state of a model behind a text of random content, without reading one.

    Args:
        model: what `build` returned.
        tokens: of the text.
        cache: keys and values of every layer to use, from `full_cache`; new ones if None.
    """
    states: list[Any] = []
    for i, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        if isinstance(mixer, FullAttention):
            held = mixer.empty_cache(1, tokens + 1) if cache is None else cache[i]
            states.append(KeyValueCache(held.keys, held.values, tokens))
            continue
        zero = mixer.zero_state(1)
        if isinstance(zero, State):
            conv = None if zero.conv is None else torch.randn_like(zero.conv)
            states.append(State(conv, torch.randn_like(zero.memory)))
        else:
            keys, values = torch.randn_like(zero.keys), torch.randn_like(zero.values)
            states.append(KeyValueRing(keys, values, zero.tokens + tokens))
    return tuple(states)


def full_cache(model: HybridLM, tokens: int) -> list[KeyValueCache] | None:
    """Return random keys and values of every layer, with room for one token more.

    None where a model keeps none.
    """
    mixers: list[Any] = [block.mixer for block in model.blocks]
    if not all(isinstance(mixer, FullAttention) for mixer in mixers):
        return None
    caches = [mixer.empty_cache(1, tokens + 1) for mixer in mixers]
    for held in caches:
        held.keys.normal_()
        held.values.normal_()
    return caches


def backend_of(name: str, shape: Shape, backend: str, **made: Any) -> str | None:
    """Return the backend that runs the rule of a model's recurrent layers; None without any."""
    kind = MIXERS[name]
    if kind.pattern == "F":
        return None
    device, dtype = made["device"], made["dtype"]
    heads = (1, 64, shape.heads)
    q, k = (torch.zeros(*heads, KEY, device=device, dtype=dtype) for _ in range(2))
    v = torch.zeros(*heads, 2 * KEY, device=device, dtype=dtype)
    given: dict[str, Any] = {"beta": torch.ones(heads, device=device, dtype=torch.float32)}
    if GATED_DELTA.rule[kind.rule].has_decay:
        given["log_alpha"] = torch.zeros(heads, device=device, dtype=torch.float32)
    return explain(q, k, v, **given, rule=kind.rule, qk_l2norm=True, backend=backend).backend
