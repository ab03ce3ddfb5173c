"""Write the layers of a language model as ONNX nodes.

Values are (B, T, width) float32 between the parts. What differs between flavours, such as norms and
attention, is asked of the flavour.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from onnx import TensorProto

from gdn_ops.export.language_models.flavours import Flavour
from gdn_ops.export.language_models.graph import Graph
from gdn_ops.export.language_models.plan import (
    Attention,
    Decay,
    Dense,
    Experts,
    GatedDelta,
    LanguageModel,
    Layer,
    Linear,
    Norm,
)
from gdn_ops.export.model.folder import (
    CAPACITY,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    TOKEN_IDS,
    TOTAL,
)
from gdn_ops.export.model.naming import recurrent_names
from gdn_ops.export.model.single import BATCH, TOKENS
from gdn_ops.export.node.attributes import checked_attributes
from gdn_ops.export.node.schema import DOMAIN, SEQUENCE

_HIDDEN = -1e9
"""Hide a key from a query: added to its score, it makes its weight exactly 0."""

_SMALLEST_SUM = 1e-6
"""Bound sums of absolute values from below before they divide, as GatedDeltaNet's qk_norm."""


@dataclass
class Shared:
    """Hold values that layers share.

    Attributes:
        is_token: (B, T, 1), 1 for a token and 0 for padding.
        bias: (B, 1, T, total), added to scores of attention, by its window.
        length: (1,) int64, tokens behind the call, padding included.
        positions: (B, T, 1) float32, of tokens, padding not counted.
    """

    is_token: str
    bias: dict[int | None, str]
    length: str
    positions: str


class Seen(NamedTuple):
    """Hold what tells tokens from padding.

    Attributes:
        is_there: (B, total) bool, of all tokens.
        positions: (B, T) int64, of those of the call; -1 before a text, or 0 where the call has
            the first token of the text too.
    """

    is_there: str
    positions: str


class LayerWriter:
    """Write a language model into a graph.

    Args:
        graph: where nodes are added.
        flavour: how parts are written.
        splits_head: whether the head is a matrix of its own where it is the embedding too: then it
            can be quantised.
    """

    def __init__(self, graph: Graph, flavour: Flavour, *, splits_head: bool = False) -> None:
        self.graph, self.flavour, self._splits_head = graph, flavour, splits_head
        self.states: dict[str, str] = {}
        self._rotations: dict[int, tuple[str, str]] = {}

    def write(self, model: LanguageModel, *, all_logits: bool) -> None:
        """Write a model.

        Args:
            model: what is written.
            all_logits: whether there are logits behind every token, or behind the last alone.
        """
        g = self.graph
        ids = g.add_input(TOKEN_IDS, TensorProto.INT64, (BATCH, TOKENS))
        mask = g.add_input(MASK, TensorProto.INT64, (BATCH, TOTAL))
        mixers = [layer.mixer for layer in model.layers]
        windows = {mixer.window: None for mixer in mixers if isinstance(mixer, Attention)}
        shared = self._shared(ids, mask, windows)
        x = g("Gather", g.weight("embedding", model.embedding), ids, name="embedding_of", axis=0)
        for i, layer in enumerate(model.layers):
            g.enter(f"layers.{i}")
            x = self._layer(i, layer, x, shared)
        g.enter("")
        if not all_logits:
            x = g("Slice", x, g.constant([-1]), g.constant([2**62]), g.constant([1]), name="last")
        x = self._norm(x, model.norm)
        tokens = TOKENS if all_logits else 1
        logits = g.add_output(LOGITS, TensorProto.FLOAT, (BATCH, tokens, model.vocabulary))
        self._head(x, model, logits)

    def _head(self, x: str, model: LanguageModel, logits: str) -> None:
        """Write the logits; the embedding, where it is the head too, is not written twice."""
        g = self.graph
        hidden, vocabulary = model.hidden, model.vocabulary
        if self._splits_head:
            weight = g.weight("head", model.head, is_transposed=True)
            g("MatMul", x, weight, outputs=[logits], name="scores")
            return
        rows = g("Reshape", x, g.constant([-1, hidden]), name="rows")
        weight = g.weight("head", model.head)
        flat = g("Gemm", rows, weight, name="scores", transB=1)
        sizes = g("Shape", x, name="size", start=0, end=2)
        shape = g("Concat", sizes, g.constant([vocabulary]), name="size", axis=0)
        g("Reshape", flat, shape, outputs=[logits], name="logits_of")

    def _shared(self, ids: str, mask: str, windows: Collection[int | None]) -> Shared:
        """Write what layers share, for the windows of those with attention."""
        g = self.graph
        tokens = g("Shape", ids, name="tokens", start=1, end=2)
        total = g("Shape", mask, name="total", start=1, end=2)
        past = g("Sub", total, tokens, name="past")
        seen = self._seen(mask, past, total)
        end, axis = g.constant([2**62]), g.constant([1])
        own = g("Slice", seen.is_there, past, end, axis, name="own_tokens")
        as_float = g("Cast", own, name="own_tokens_float", to=TensorProto.FLOAT)
        is_token = g("Unsqueeze", as_float, g.constant([2]), name="is_token")
        if not windows:
            return Shared(is_token, {}, total, "")
        positions = g("Max", seen.positions, g.constant(0), name="positions")
        positions = g("Cast", positions, name="positions_float", to=TensorProto.FLOAT)
        positions = g("Unsqueeze", positions, g.constant([2]), name="positions_column")
        bias = self._bias(seen.is_there, past, total, windows)
        return Shared(is_token, bias, total, positions)

    def _seen(self, mask: str, past: str, total: str) -> Seen:
        """Write which tokens are there, and the positions of those of the call.

        A runtime that passes positions may pass a mask of ones alone when it decodes: then what is
        before the first position of a row is padding.
        """
        g = self.graph
        if not self.flavour.has_positions:
            counted = g("CumSum", mask, g.constant(1), name="counted")
            from_zero = g("Sub", counted, g.constant(1), name="from_zero")
            own = g(
                "Slice", from_zero, past, g.constant([2**62]), g.constant([1]), name="own_positions"
            )
            return Seen(str(g("Cast", mask, name="is_there", to=TensorProto.BOOL)), str(own))
        given = g.add_input(POSITIONS, TensorProto.INT64, (3, BATCH, TOKENS))
        own = g("Gather", given, g.constant(0), name="own_positions", axis=0)
        start, end, axis = (g.constant([x]) for x in (-1, 2**62, 1))
        last = g("Slice", own, start, end, axis, name="last_position")
        padding = g("Sub", g("Sub", total, g.constant([1])), last, name="padding")
        count = g("Squeeze", total, g.constant([0]), name="scalar")
        columns = g("Range", g.constant(0), count, g.constant(1), name="columns")
        return Seen(str(g("GreaterOrEqual", columns, padding, name="is_there")), str(own))

    def _bias(
        self, is_there: str, past: str, total: str, windows: Collection[int | None]
    ) -> dict[int | None, str]:
        """Write what hides padding, later tokens and those before a window from a query."""
        g = self.graph
        first, last = (g("Squeeze", x, g.constant([0]), name="scalar") for x in (past, total))
        keys = g("Range", g.constant(0), last, g.constant(1), name="keys")
        queries = g("Range", first, last, g.constant(1), name="queries")
        column = g("Unsqueeze", queries, g.constant([1]), name="queries_column")
        is_before = g("LessOrEqual", keys, column, name="is_before")
        rows = g("Unsqueeze", is_there, g.constant([1, 2]), name="is_there_row")
        all_seen = g("And", rows, is_before, name="seen")
        zero, hidden = (g.constant(x, np.float32) for x in (0, _HIDDEN))
        bias: dict[int | None, str] = {}
        for window in windows:
            seen = all_seen
            if window is not None:
                oldest = g("Sub", column, g.constant(window), name="before_window")
                seen = g("And", seen, g("Greater", keys, oldest, name="in_window"), name="seen")
            bias[window] = g("Where", seen, zero, hidden, name="bias")
        return bias

    def _layer(self, i: int, layer: Layer, x: str, shared: Shared) -> str:
        g = self.graph
        y = self._norm(x, layer.before_mixer)
        if isinstance(layer.mixer, GatedDelta):
            y = self._gated_delta(i, layer.mixer, y, shared)
        else:
            y = self._attention(i, layer.mixer, y, shared)
        x = g("Add", x, self._norm(y, layer.after_mixer), name="mixed")
        if layer.mlp is None:
            return str(x)
        y = self._norm(x, layer.before_mlp)
        y = self._mlp(layer.mlp, y)
        return str(g("Add", x, self._norm(y, layer.after_mlp), name="transformed"))

    def _norm(self, x: str, norm: Norm | None) -> str:
        if norm is None:
            return x
        weight = self.graph.weight("norm.weight", norm.weight)
        return self.flavour.norm(self.graph, x, weight, norm.eps)

    def _linear(self, x: str, linear: Linear, name: str) -> str:
        g = self.graph
        weight = g.weight(f"{name}.weight", linear.weight, is_transposed=True)
        y = g("MatMul", x, weight, name=name)
        if linear.bias is not None:
            y = g("Add", y, g.weight(f"{name}.bias", linear.bias), name=f"{name}_biased")
        return str(y)

    def _split(self, x: str, sizes: Sequence[int], name: str) -> list[str]:
        g = self.graph
        return [*g("Split", x, g.constant(sizes), outputs=len(sizes), name=name, axis=-1)]

    def _heads(self, x: str, heads: int, width: int) -> str:
        """Return (B, T, heads, width)."""
        g = self.graph
        return str(g("Reshape", x, g.constant([0, 0, heads, width]), name="heads"))

    def _flat(self, x: str, width: int) -> str:
        """Return (B, T, width)."""
        g = self.graph
        return str(g("Reshape", x, g.constant([0, 0, width]), name="flat"))

    def _state(self, before: str, after: str, shape: Sequence[str | int]) -> tuple[str, str]:
        """Add a state of fixed size, as input and output."""
        self.states[before] = after
        self.graph.add_input(before, TensorProto.FLOAT, shape)
        self.graph.add_output(after, TensorProto.FLOAT, shape)
        return before, after

    def _gated_delta(self, i: int, d: GatedDelta, x: str, shared: Shared) -> str:
        """Write a layer of the gated delta rule; padding before a text leaves its states zero."""
        g = self.graph
        values = d.value_heads * d.value_width
        # A bias would make padding of zeros something else, so it is removed behind it.
        is_biased = d.inputs.bias is not None
        if not is_biased:
            x = g("Mul", x, shared.is_token, name="unpadded")
        qkv, z, b, a = self._delta_inputs(d, x)
        if is_biased:
            qkv = g("Mul", qkv, shared.is_token, name="unpadded")
        q, k, v = self._convolved(i, d, qkv)
        log_alpha, beta = self._gates(d, a, b, shared)
        old, new = recurrent_names(i)
        self._state(old, new, (BATCH, d.value_heads, d.key_width, d.value_width))
        sizes = {"H": d.heads, "HV": d.value_heads, "K": d.key_width, "V": d.value_width}
        attributes = checked_attributes(
            str(SEQUENCE), SEQUENCE, sizes, d.rule, None, qk_l2norm=d.qk_norm == "l2",
            decay="channel" if d.has_channels else "scalar",
        )  # fmt: skip
        inputs = (q, k, v, log_alpha, beta, old)
        o = g.local(d.rule)
        g(SEQUENCE.name, *inputs, outputs=[o, new], domain=DOMAIN, **attributes.as_onnx())
        if d.norm is not None:
            o = self.flavour.norm(g, o, g.weight("o_norm.weight", d.norm.weight), d.norm.eps)
        if d.output_gate is not None:
            z = self._heads(z, d.value_heads, d.value_width)
            o = g("Mul", o, self._activated(z, d.output_gate), name="gated")
        return self._linear(self._flat(o, values), d.output, "output")

    def _delta_inputs(self, d: GatedDelta, x: str) -> tuple[str, str, str, str]:
        """Write q, k and v as one, z, b and a; "" for those that the layer does not have."""
        sizes = {
            "qkv": d.channels,
            "z": 0 if d.output_gate is None else d.value_heads * d.value_width,
            "b": d.value_heads,
            "a": 0 if d.decay is None else d.decay.rows,
        }
        if d.gate_widening is not None:
            sizes["z"] = d.gate_widening.weight.shape[1]
        there = {name: size for name, size in sizes.items() if size}
        parts = self._split(self._linear(x, d.inputs, "inputs"), [*there.values()], "parts")
        found = dict(zip(there, parts, strict=True))
        if d.gate_widening is not None:
            found["z"] = self._linear(found["z"], d.gate_widening, "z")
        if d.decay is not None and d.decay.widening is not None:
            found["a"] = self._linear(found["a"], d.decay.widening, "a")
        return found["qkv"], found.get("z", ""), found["b"], found.get("a", "")

    def _convolved(self, i: int, d: GatedDelta, qkv: str) -> tuple[str, str, str]:
        """Convolve, activate and normalise: return q, k (B, T, H, K) and v (B, T, HV, V)."""
        g = self.graph
        keys, values = d.heads * d.key_width, d.value_heads * d.value_width
        is_silu = d.feature_map == "silu"
        if d.conv_weight is not None:
            conv = self._state(
                f"past_key_values.{i}.conv_state", f"present.{i}.conv_state",
                (BATCH, *self.flavour.conv_state(*d.conv_weight.shape)),
            )  # fmt: skip
            weight = g.weight("conv.weight", d.conv_weight.unsqueeze(1))
            bias = "" if d.conv_bias is None else g.weight("conv.bias", d.conv_bias)
            qkv = self.flavour.convolution(g, qkv, weight, bias, *conv, has_silu=is_silu)
        elif is_silu:
            qkv = self._activated(qkv, "silu")
        q, k, v = self._split(qkv, [keys, keys, values], "qkv")
        if not is_silu:
            q, k = (self._activated(y, d.feature_map) for y in (q, k))
            v = self._activated(v, "silu")
        q, k = (self._heads(y, d.heads, d.key_width) for y in (q, k))
        if d.qk_norm == "l1":
            q, k = (self._l1_normalised(y) for y in (q, k))
        return q, k, self._heads(v, d.value_heads, d.value_width)

    def _l1_normalised(self, x: str) -> str:
        """Divide by the sum of the absolute values over the last axis."""
        g = self.graph
        total = g("ReduceL1", x, g.constant([-1]), name="sum_of_absolutes", keepdims=1)
        total = g("Max", total, g.constant(_SMALLEST_SUM, np.float32), name="divisor")
        return str(g("Div", x, total, name="l1_normalised"))

    def _gates(self, d: GatedDelta, a: str, b: str, shared: Shared) -> tuple[str, str]:
        """Write the logarithm of the decay, "" where there is none, and beta."""
        g = self.graph
        log_alpha = "" if d.decay is None else self._log_alpha(d.decay, a)
        if d.has_channels:
            log_alpha = self._heads(log_alpha, d.value_heads, d.key_width)
        beta = g("Sigmoid", b, name="beta")
        if d.beta_scale != 1:
            beta = g("Mul", beta, g.constant(d.beta_scale, np.float32), name="beta_scaled")
        if d.conv_bias is not None:
            # The convolution makes values of padding: with beta 0 they are not written.
            beta = g("Mul", beta, shared.is_token, name="beta_of_tokens")
        return log_alpha, str(beta)

    def _log_alpha(self, decay: Decay, a: str) -> str:
        """Write the logarithm of a decay, as wide as a."""
        g = self.graph
        raw = g("Add", a, g.weight("dt_bias", decay.bias), name="step_raw")
        if decay.lower_bound is None:
            step = g("Softplus", raw, name="step")
            return str(g("Mul", step, g.weight("rate", -decay.rate), name="log_alpha"))
        share = g("Sigmoid", g("Mul", raw, g.weight("rate", decay.rate), name="scaled"))
        return str(g("Mul", share, g.constant(decay.lower_bound, np.float32), name="log_alpha"))

    def _activated(self, x: str, name: str) -> str:
        """Apply "silu", "sigmoid", "relu", "elu" (1 + ELU) or "none"."""
        g = self.graph
        if name == "none":
            return x
        if name == "relu":
            return str(g("Relu", x, name="relu"))
        if name == "elu":
            return str(g("Add", g("Elu", x), g.constant(1, np.float32), name="elu"))
        gate = g("Sigmoid", x, name="sigmoid")
        return str(g("Mul", x, gate, name="silu")) if name == "silu" else str(gate)

    def _attention(self, i: int, d: Attention, x: str, shared: Shared) -> str:
        g = self.graph
        queries, keys = d.heads * d.width, d.key_heads * d.width
        sizes = [queries, keys, keys, *([queries] if d.is_gated else [])]
        q, k, v, *gate = self._split(self._linear(x, d.inputs, "inputs"), sizes, "parts")
        q = self._rotated(self._head_norm(q, d.q_norm, d.heads, d.width), d, shared)
        k = self._rotated(self._head_norm(k, d.k_norm, d.key_heads, d.width), d, shared)
        past = [f"past_key_values.{i}.{name}" for name in ("key", "value")]
        present = [f"present.{i}.{name}" for name in ("key", "value")]
        self.states |= dict(zip(past, present, strict=True))
        before, after = (CAPACITY, CAPACITY) if self.flavour.shares_keys else (PAST, TOTAL)
        for names, add, tokens in ((past, g.add_input, before), (present, g.add_output, after)):
            for name in names:
                add(name, TensorProto.FLOAT, (BATCH, d.key_heads, tokens, d.width))
        bias = shared.bias[d.window]
        o = self.flavour.attention(g, d, (q, k, v), past, present, bias, shared.length)
        if gate:
            o = g("Mul", o, g("Sigmoid", gate[0], name="gate"), name="gated")
        return self._linear(o, d.output, "output")

    def _head_norm(self, x: str, norm: Norm | None, heads: int, width: int) -> str:
        """Normalise over each head, or over all together; return (B, T, heads, width)."""
        if norm is None or norm.weight.numel() == width:
            return self._norm(self._heads(x, heads, width), norm)
        return self._heads(self._norm(x, norm), heads, width)

    def _rotated(self, x: str, d: Attention, shared: Shared) -> str:
        """Rotate the first channels of (B, T, heads, width) by the positions of the tokens."""
        g = self.graph
        if d.frequencies is None:
            return x
        cosines, sines = self._rotation(d.frequencies, d.rotary_scale, shared)
        half = d.frequencies.numel()
        rest = d.width - 2 * half
        first, second, *others = self._split(x, [half, half, *([rest] if rest else [])], "halves")
        turned = [
            g("Sub", g("Mul", first, cosines), g("Mul", second, sines), name="turned"),
            g("Add", g("Mul", second, cosines), g("Mul", first, sines), name="turned"),
        ]
        return str(g("Concat", *turned, *others, name="rotated", axis=-1))

    def _rotation(self, frequencies: torch.Tensor, scale: float, shared: Shared) -> tuple[str, str]:
        """Return cosines and sines (B, T, 1, half), written once for all layers."""
        g, key = self.graph, frequencies.data_ptr()
        if key not in self._rotations:
            angles = g("Mul", shared.positions, g.weight("frequencies", frequencies), name="angles")
            angles = g("Unsqueeze", angles, g.constant([2]), name="angles_of_heads")
            both = [g(name, angles) for name in ("Cos", "Sin")]
            if scale != 1:
                both = [g("Mul", y, g.constant(scale, np.float32)) for y in both]
            self._rotations[key] = (both[0], both[1])
        return self._rotations[key]

    def _mlp(self, d: Dense | Experts, x: str) -> str:
        return self._dense(d, x, "mlp") if isinstance(d, Dense) else self._experts(d, x)

    def _dense(self, d: Dense, x: str, name: str) -> str:
        g = self.graph
        both = self._linear(x, d.gate_up, f"{name}.gate_up")
        inner = len(d.gate_up.weight) // 2
        gate, up = self._split(both, [inner, inner], "gate_up")
        product = g("Mul", self._activated(gate, "silu"), up, name="product")
        return self._linear(product, d.down, f"{name}.down")

    def _experts(self, d: Experts, x: str) -> str:
        """Write a mixture of experts, over the tokens of all rows as one list."""
        g = self.graph
        hidden = int(d.router.shape[1])
        rows = g("Reshape", x, g.constant([-1, hidden]), name="rows")
        scores = g("MatMul", rows, g.weight("router", d.router, is_transposed=True), name="router")
        y = self.flavour.experts(g, d, rows, scores)
        y = g("Reshape", y, g("Shape", x, name="size"), name="experts")
        if d.shared is None:
            return str(y)
        shared = self._dense(d.shared, x, "shared")
        if d.shared_gate is not None:
            gate = self._linear(x, Linear(d.shared_gate), "shared_gate")
            shared = g("Mul", shared, g("Sigmoid", gate, name="share"), name="shared_gated")
        return str(g("Add", y, shared, name="all_experts"))
