"""Read the description of a language model from `gdn_ops.nn.HybridLM`.

Parts are read by their names, and refused by them where they have become something else, such as an
adapter. As for models of transformers, every parameter has to be used, and the exported graph is
compared with the model (`writing`).
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from gdn_ops.export.language_models.plan import (
    Attention,
    Decay,
    Dense,
    GatedDelta,
    LanguageModel,
    Layer,
    Linear,
    Norm,
)
from gdn_ops.export.language_models.reading import LABEL
from gdn_ops.export.node.attributes import why_beta
from gdn_ops.export.node.schema import SEQUENCE
from gdn_ops.nn.attention import SlidingWindowAttention
from gdn_ops.nn.convolution import ShortConvolution
from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.gates import DecayGate
from gdn_ops.nn.hybrid import Block, HybridLM, SwiGLU
from gdn_ops.nn.norm import GatedRMSNorm
from gdn_ops.nn.sources import Source
from gdn_ops.spec.errors import SpecError

_Kind = TypeVar("_Kind", bound=nn.Module)


def hybrid_of(model: Any) -> HybridLM | None:
    """Return the HybridLM that a model is, or that torch.compile has wrapped; None for others."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, HybridLM) else None


def read_hybrid(model: HybridLM) -> LanguageModel:
    """Return the description of a HybridLM.

    Args:
        model: with any pattern but E, and any options of its layers but erase_write.

    Raises:
        SpecError: a part has no ONNX form; the text names it.
    """
    return _Reader(model).read()


def _fail(message: str) -> NoReturn:
    raise SpecError(f"{LABEL}: {message}")


class _Reader:
    """Read a model, and note which of its parameters have been used."""

    def __init__(self, model: HybridLM) -> None:
        self.model = model
        self.source = Source(LABEL, model)
        self._frequencies: dict[tuple[int, float], Tensor] = {}

    def read(self) -> LanguageModel:
        """Return the description; the head is the embedding itself, so that it is written once."""
        self._part("embedding", nn.Embedding)
        embedding = self.source.tensor("embedding.weight")
        layers = tuple(self._layer(f"blocks.{i}") for i in range(len(self.model.blocks)))
        read = LanguageModel(
            "HybridLM", embedding, layers, self._norm("norm", nn.RMSNorm), embedding, longest=0
        )
        for name in self.source.unread():
            _fail(
                f"nothing in the graph would read {name} of HybridLM: the part that it belongs to "
                f"has no ONNX form"
            )
        return read

    def _part(self, name: str, *kinds: type[_Kind]) -> _Kind:
        """Return a part of the model, which is one of some kinds and computes what they do."""
        part = self.model.get_submodule(name)
        for kind in kinds:
            if isinstance(part, kind) and type(part).forward is kind.forward:
                return part
        known = " or ".join(kind.__name__ for kind in kinds)
        _fail(f"{name} is a {type(part).__name__}, should be a {known}: it has no ONNX form")

    def _layer(self, name: str) -> Layer:
        block = self._part(name, Block)
        before = self._norm(f"{name}.mixer_norm", nn.RMSNorm)
        mixer: Any = self._part(f"{name}.mixer", GatedDeltaNet, SlidingWindowAttention)
        is_delta = isinstance(mixer, GatedDeltaNet)
        read = self._delta if is_delta else self._attention
        mixed = read(f"{name}.mixer", mixer)
        if block.mlp is None:
            return Layer(mixed, None, before, None, None, None)
        self._part(f"{name}.mlp", SwiGLU)
        gate, up, down = (
            self._linear(f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        before_mlp = self._norm(f"{name}.mlp_norm", nn.RMSNorm)
        dense = Dense(Linear.stacked(gate, up), down)
        return Layer(mixed, dense, before, None, before_mlp, None)

    def _norm(self, name: str, kind: type[nn.Module]) -> Norm:
        self._part(name, kind)
        return Norm(self.source.tensor(f"{name}.weight"), self.source.norm_eps(name))

    def _linear(self, name: str) -> Linear:
        return Linear(*self.source.linear(name))

    def _delta(self, name: str, layer: GatedDeltaNet) -> GatedDelta:
        """Read a GatedDeltaNet, whatever its options leave out.

        Raises:
            SpecError: it has an erase and a write gate in place of β.
        """
        if layer.erase_write:
            _fail(f"{name} has erase_write = True, should have False: {why_beta(SEQUENCE)}")
        q, k, v = (self._linear(f"{name}.{part}_proj") for part in "qkv")
        qkv, weight, bias = self._convolution(name, layer, Linear.stacked(q, k, v))
        gate, norm, decay, gate_widening = layer.output_gate, None, None, None
        others: list[Linear] = []
        if gate is not None:
            inner, gate_widening = self._projection(f"{name}.g_proj")
            others.append(inner)
        others.append(self._linear(f"{name}.b_proj"))
        if layer.decay is not None:
            inner, decay = self._decay(name)
            others.append(inner)
        if layer.output_norm:
            norm = self._norm(f"{name}.o_norm", GatedRMSNorm)
            gate = None if gate is None else self.source.output_gate(f"{name}.o_norm")
        return GatedDelta(
            layer.num_heads, layer.num_value_heads, layer.head_dim, layer.value_dim,
            Linear.stacked(qkv, *others), weight, bias, decay,
            2.0 if layer.allow_neg_eigval else 1.0, norm, gate,
            self._linear(f"{name}.o_proj"), layer.rule, layer.feature_map, layer.qk_norm,
            gate_widening,
        )  # fmt: skip

    def _decay(self, name: str) -> tuple[Linear, Decay]:
        """Return what a decay has of the inputs of its layer, and the decay."""
        gate = self._part(f"{name}.decay", DecayGate)
        rate = self.source.tensor(f"{name}.decay.A_log").float().exp()
        bias = self.source.tensor(f"{name}.decay.dt_bias")
        if gate.channels is not None:
            rate = rate.repeat_interleave(gate.channels)
        inner, widening = self._projection(f"{name}.a_proj")
        return inner, Decay(rate, bias, gate.lower_bound, widening)

    def _projection(self, name: str) -> tuple[Linear, Linear | None]:
        """Return a projection; or of two matrices, with a narrow width between, each."""
        if not isinstance(self.model.get_submodule(name), nn.Sequential):
            return self._linear(name), None
        parts = self._part(name, nn.Sequential)
        if len(parts) != 2:
            _fail(f"{name} has {len(parts)} parts, should have 2: it has no ONNX form")
        return self._linear(f"{name}.0"), self._linear(f"{name}.1")

    def _convolution(
        self, name: str, layer: GatedDeltaNet, qkv: Linear
    ) -> tuple[Linear, Tensor | None, Tensor | None]:
        """Return the rows of q, k and v, and the weight and bias of a convolution behind them.

        One that sees a single token has no state and is a factor and a bias of each row.
        """
        if layer.conv is None:
            return qkv, None, None
        conv = self._part(f"{name}.conv", ShortConvolution)
        if conv.activation is not None:
            _fail(
                f"{name}.conv.activation is {conv.activation!r}, should be None: the feature map "
                f"follows the convolution"
            )
        weight = self.source.tensor(f"{name}.conv.weight")
        bias = None if conv.bias is None else self.source.tensor(f"{name}.conv.bias")
        if weight.shape[1] > 1:
            return qkv, weight, bias
        if qkv.bias is not None:
            scaled = qkv.bias * weight[:, 0]
            bias = scaled if bias is None else scaled + bias
        return Linear(qkv.weight * weight, bias), None, None

    def _attention(self, name: str, layer: SlidingWindowAttention) -> Attention:
        q, k, v, output = (self._linear(f"{name}.{part}_proj") for part in "qkvo")
        heads, width = layer.num_heads, layer.head_dim
        return Attention(
            heads, heads, width, Linear.stacked(q, k, v), False, None, None,
            self._rotary(width, layer.rope_base), 1.0, width**-0.5, layer.window, output,
        )  # fmt: skip

    def _rotary(self, width: int, base: float) -> Tensor:
        """Return the rotary frequencies (width / 2,), one tensor for all layers that share them."""
        if (width, base) not in self._frequencies:
            half = width // 2
            place = torch.arange(half, dtype=torch.float32, device="cpu")
            self._frequencies[width, base] = base ** (-place / half)
        return self._frequencies[width, base]
