"""Describe a decoder-only language model: what its layers compute, and with which weights.

What is read from a model of transformers, or of `gdn_ops.nn`, ends here; what is written to ONNX
begins here. Weights are torch tensors, neither copied nor converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """Describe an RMS norm: weight ⊙ x / sqrt(mean(x²) + eps), over the last axis.

    Attributes:
        weight: (width,), what x is multiplied by: with the 1 of norms that add one.
        eps: added to the mean of squares.
    """

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Linear:
    """Describe y = W x + bias.

    Attributes:
        weight: (out, in).
        bias: (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def stacked(cls, *linears: Linear) -> Linear:
        """Return one linear map that has the rows of several, zeros where one has no bias."""
        weight = torch.cat([x.weight for x in linears])
        if all(x.bias is None for x in linears):
            return cls(weight)
        biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in linears]
        return cls(weight, torch.cat(biases))


@dataclass(frozen=True, eq=False)
class Decay:
    """Describe log α = −rate ⊙ softplus(a + bias), or lower_bound sigmoid(rate ⊙ (a + bias)).

    Attributes:
        rate: exp(A_log), (HV,), or with one of every key channel (HV K,).
        bias: as long.
        lower_bound: below 0, or None for the first form.
        widening: makes a, as wide, of what the inputs of the layer have for it; None where they
            have a itself.
    """

    rate: Tensor
    bias: Tensor
    lower_bound: float | None = None
    widening: Linear | None = None

    @property
    def rows(self) -> int:
        """Return how many rows of the inputs of the layer it has."""
        made = len(self.rate) if self.widening is None else self.widening.weight.shape[1]
        return int(made)


@dataclass(frozen=True, eq=False)
class GatedDelta:
    """Describe a layer of the gated delta rule, or of one that leaves its decay or erasing out.

    q, k = qk_norm(feature_map(conv(W x)));  v = SiLU(conv(W x));
    log α = decay(W_a x);  β = beta_scale sigmoid(W_b x);
    y = W_out (norm(rule(q, k, v)) ⊙ gate(W_z x)).

    Attributes:
        heads: H, of keys and queries.
        value_heads: HV.
        key_width: K.
        value_width: V.
        inputs: the rows of W for q, k, v, z, b and a, in this order; none for z where there is no
            output gate, none for a where the rule has no decay.
        conv_weight: (2 H K + HV V, kernel), depthwise, the last column for the newest token; None
            for no convolution.
        conv_bias: (2 H K + HV V,), or None.
        decay: None where the rule has none.
        beta_scale: 1, or 2 where β reaches up to 2.
        norm: of each value head, or None.
        output_gate: "silu", "sigmoid" or None.
        output: W_out.
        rule: a member of the family: "gated_delta", "delta", "gated" or "linear".
        feature_map: the activation of q and k: "silu", "relu", "elu" (1 + ELU) or "none".
        qk_norm: "l2", "l1" or None.
        gate_widening: makes z of what the inputs have for it; None where they have z itself.
    """

    heads: int
    value_heads: int
    key_width: int
    value_width: int
    inputs: Linear
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    decay: Decay | None
    beta_scale: float
    norm: Norm | None
    output_gate: str | None
    output: Linear
    rule: str = "gated_delta"
    feature_map: str = "silu"
    qk_norm: str | None = "l2"
    gate_widening: Linear | None = None

    @property
    def has_channels(self) -> bool:
        """Return whether every key channel has a decay of its own."""
        return self.decay is not None and len(self.decay.rate) > self.value_heads

    @property
    def channels(self) -> int:
        """Return the width of q, k and v together."""
        return 2 * self.heads * self.key_width + self.value_heads * self.value_width


@dataclass(frozen=True, eq=False)
class Attention:
    """Describe a layer of causal softmax attention.

    Attributes:
        heads: of queries.
        key_heads: of keys and values; query head h reads key head h // (heads / key_heads).
        width: of a head.
        inputs: the rows of W for q, k, v and, where there is one, the gate.
        is_gated: whether the output is multiplied by sigmoid(gate).
        q_norm, k_norm: over a head, or over all heads where they are as wide; or None.
        frequencies: (rotated width / 2,), radians per position; None for no rotation.
        rotary_scale: factor on cosines and sines.
        scale: factor on products of queries and keys.
        window: how many tokens a query sees, itself included; None for all.
        output: W_out.
    """

    heads: int
    key_heads: int
    width: int
    inputs: Linear
    is_gated: bool
    q_norm: Norm | None
    k_norm: Norm | None
    frequencies: Tensor | None
    rotary_scale: float
    scale: float
    window: int | None
    output: Linear


@dataclass(frozen=True, eq=False)
class Dense:
    """Describe y = W_down (SiLU(W_gate x) ⊙ W_up x).

    Attributes:
        gate_up: the rows of W_gate and then those of W_up.
        down: W_down.
    """

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Experts:
    """Describe a mixture of experts: the `active` ones with the largest probabilities, weighted.

    Attributes:
        router: (experts, hidden).
        active: experts of a token.
        normalises: whether the weights of a token are divided by their sum.
        gate_up: (experts, 2 inner, hidden).
        down: (experts, hidden, inner).
        shared: what all tokens run too, or None.
        shared_gate: (1, hidden), the shared output is multiplied by its sigmoid; or None.
    """

    router: Tensor
    active: int
    normalises: bool
    gate_up: Tensor
    down: Tensor
    shared: Dense | None
    shared_gate: Tensor | None


@dataclass(frozen=True, eq=False)
class Layer:
    """Describe x ← x + after(mixer(before(x))), then the same with an MLP.

    Attributes:
        mixer: of tokens.
        mlp: of channels, or None for none.
        before_mixer, after_mixer, before_mlp, after_mlp: norms, None for none.
    """

    mixer: GatedDelta | Attention
    mlp: Dense | Experts | None
    before_mixer: Norm | None
    after_mixer: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """Describe logits = W_head norm(layers(embedding[tokens])).

    Attributes:
        architecture: what it was read from, as its configuration calls it.
        embedding: (vocabulary, hidden).
        layers: bottom first.
        norm: behind the last layer.
        head: (vocabulary, hidden); the same tensor as the embedding where they are tied.
        longest: positions that the model is made for.
        eos: tokens that end a text.
        bos: the token that begins a text, or None.
        pad: the token that fills rows, or None.
    """

    architecture: str
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Tensor
    longest: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None

    @property
    def hidden(self) -> int:
        """Return the width of the residual stream."""
        return int(self.embedding.shape[1])

    @property
    def vocabulary(self) -> int:
        """Return how many tokens there are."""
        return int(self.embedding.shape[0])
