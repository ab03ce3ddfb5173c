"""Write the parts of a layer that differ between flavours of a graph.

portable       operators of ai.onnx alone, and our own with its function body
onnxruntime    operators of com.microsoft where they are faster
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from onnx import GraphProto, TensorProto

from gdn_ops.export.language_models.graph import Graph
from gdn_ops.export.language_models.plan import Attention, Experts

MICROSOFT: Final = "com.microsoft"


class Flavour:
    """Write the parts of a portable graph; other flavours override some of them.

    Attributes:
        name: what users call it.
        body: the function body of our nodes.
        imports: domains that the graph needs beside ai.onnx and ours, with their versions.
        shares_keys: whether keys and values are written into the buffers that they are read from.
        has_positions: whether the positions of tokens are an input.
    """

    name = "portable"
    body = "standard"
    imports: tuple[tuple[str, int], ...] = ()
    shares_keys = False
    has_positions = False

    def conv_state(self, channels: int, kernel: int) -> tuple[int, int]:
        """Return the shape of the state of a convolution, for one row."""
        return channels, kernel - 1

    def norm(self, g: Graph, x: str, weight: str, eps: float) -> str:
        """Write an RMS norm over the last axis."""
        # In the form that onnxruntime knows: it makes one operator of it.
        squares = g("Pow", x, g.constant(2, np.float32), name="squares")
        mean = g("ReduceMean", squares, g.constant([-1]), name="mean", keepdims=1)
        shifted = g("Add", mean, g.constant(eps, np.float32), name="shifted")
        unit = g("Div", x, g("Sqrt", shifted), name="unit")
        return str(g("Mul", unit, weight, name="norm"))

    def convolution(
        self,
        g: Graph,
        x: str,
        weight: str,
        bias: str,
        before: str,
        after: str,
        *,
        has_silu: bool = True,
    ) -> str:
        """Write a depthwise causal convolution, with SiLU or without.

        Args:
            g: the graph.
            x: (B, T, C).
            weight: (C, 1, kernel).
            bias: (C,), or "".
            before, after: the state: the tokens before the call, and behind it.
            has_silu: whether SiLU follows.

        Returns:
            (B, T, C).
        """
        columns = g("Transpose", x, name="columns", perm=[0, 2, 1])
        whole = g("Concat", before, columns, name="with_past", axis=2)
        channels, _, kernel = g.shape(weight)
        kept = g.constant([1 - kernel])
        end, axis = g.constant([2**62]), g.constant([2])
        g("Slice", whole, kept, end, axis, outputs=[after], name="conv_state")
        y = g("Conv", whole, weight, *([bias] if bias else []), name="conv", group=channels)
        if has_silu:
            y = g("Mul", y, g("Sigmoid", y, name="conv_sigmoid"), name="conv_silu")
        return str(g("Transpose", y, name="convolved", perm=[0, 2, 1]))

    def attention(
        self,
        g: Graph,
        d: Attention,
        qkv: Sequence[str],
        past: Sequence[str],
        present: Sequence[str],
        bias: str,
        length: str,
    ) -> str:
        """Write softmax attention over all keys so far.

        Args:
            g: the graph.
            d: the layer.
            qkv: q (B, T, heads, width), k (B, T, key_heads, width), v (B, T, key_heads * width).
            past, present: keys and values (B, key_heads, tokens, width) before and behind the call.
            bias: (B, 1, T, total), added to scores.
            length: (1,) int64, total.

        Returns:
            (B, T, heads * width).
        """
        q, k, v = qkv
        groups = d.heads // d.key_heads
        v = g("Reshape", v, g.constant([0, 0, d.key_heads, d.width]), name="v_heads")
        kept = []
        for x, old, new in zip((k, v), past, present, strict=True):
            own = g("Transpose", x, name="own", perm=[0, 2, 1, 3])
            whole = g("Concat", old, own, outputs=[new], name="whole", axis=2)
            kept.append(g("Unsqueeze", whole, g.constant([2]), name="of_groups"))
        shape = g.constant([0, 0, d.key_heads, groups, d.width])
        q = g("Reshape", q, shape, name="q_groups")
        q = g("Transpose", q, name="q_first", perm=[0, 2, 3, 1, 4])
        q = g("Mul", q, g.constant(d.scale, np.float32), name="q_scaled")
        columns = g("Transpose", kept[0], name="k_columns", perm=[0, 1, 2, 4, 3])
        scores = g("MatMul", q, columns, name="scores")
        row = g("Unsqueeze", bias, g.constant([1]), name="bias_of_groups")
        weights = g("Softmax", g("Add", scores, row, name="seen"), name="weights", axis=-1)
        o = g("MatMul", weights, kept[1], name="read")
        o = g("Transpose", o, name="tokens_first", perm=[0, 3, 1, 2, 4])
        return str(g("Reshape", o, g.constant([0, 0, d.heads * d.width]), name="attended"))

    def experts(self, g: Graph, d: Experts, rows: str, scores: str) -> str:
        """Write the sum of the active experts: a Loop over those that some token has.

        Args:
            g: the graph.
            d: the experts.
            rows: (tokens, hidden).
            scores: (tokens, experts), of which a softmax gives the probabilities.

        Returns:
            (tokens, hidden).
        """
        probabilities = g("Softmax", scores, name="probabilities", axis=-1)
        count = g.constant([d.active])
        shares, chosen = g("TopK", probabilities, count, outputs=2, name="top", axis=-1)
        if d.normalises:
            total = g("ReduceSum", shares, g.constant([-1]), name="top_sum", keepdims=1)
            shares = g("Div", shares, total, name="shares")
        flat = g("Reshape", chosen, g.constant([-1]), name="chosen")
        present = g("Unique", flat, name="present", sorted=1)
        trips = g("Squeeze", g("Shape", present, name="trips"), g.constant([0]), name="trip_count")
        zeros = g("Mul", rows, g.constant(0, np.float32), name="nothing")
        body = _one_expert(g, d, rows, shares, chosen, present)
        always = g.constant(True, np.bool_)
        return str(g("Loop", trips, always, zeros, name="expert_sum", body=body))


def _one_expert(
    g: Graph, d: Experts, rows: str, shares: str, chosen: str, present: str
) -> GraphProto:
    """Return the body of a Loop that adds what one expert makes of its tokens."""
    inside = g.inner("expert")
    trip = inside.add_input(inside.local("trip"), TensorProto.INT64, ())
    going = inside.add_input(inside.local("going"), TensorProto.BOOL, ())
    before = inside.add_input(inside.local("sum"), TensorProto.FLOAT, ("n", "hidden"))
    expert = inside("Gather", present, trip, name="expert", axis=0)
    is_own = inside("Equal", chosen, expert, name="is_own")
    where = inside("NonZero", is_own, name="where")
    places = inside("Transpose", where, name="places", perm=[1, 0])
    token = inside("Gather", where, g.constant(0), name="token", axis=0)
    x = inside("Gather", rows, token, name="x", axis=0)
    gate_up = inside("Gather", g.weight("gate_up", d.gate_up, is_transposed=True), expert, axis=0)
    down = inside("Gather", g.weight("down", d.down, is_transposed=True), expert, axis=0)
    inner = int(d.down.shape[2])
    both = inside("MatMul", x, gate_up, name="both")
    gate, up = inside("Split", both, g.constant([inner, inner]), outputs=2, name="halves", axis=-1)
    silu = inside("Mul", gate, inside("Sigmoid", gate), name="silu")
    y = inside("MatMul", inside("Mul", silu, up, name="product"), down, name="y")
    share = inside("GatherND", shares, places, name="share")
    share = inside("Unsqueeze", share, g.constant([1]), name="share_column")
    y = inside("Mul", y, share, name="weighted")
    index = inside("Unsqueeze", token, g.constant([1]), name="index")
    after = inside("ScatterND", before, index, y, name="added", reduction="add")
    still = inside("Identity", going, name="still")
    inside.returns((still, TensorProto.BOOL, ()), (after, TensorProto.FLOAT, ("n", "hidden")))
    return inside.finished("expert")


class Onnxruntime(Flavour):
    """Write operators of com.microsoft where onnxruntime has faster ones."""

    name = "onnxruntime"
    body = "ort"
    imports = ((MICROSOFT, 1),)
    shares_keys = True
    has_positions = True

    def conv_state(self, channels: int, kernel: int) -> tuple[int, int]:
        """Return the shape of the state of a convolution, for one row: as tokens lie."""
        return kernel - 1, channels

    def convolution(
        self,
        g: Graph,
        x: str,
        weight: str,
        bias: str,
        before: str,
        after: str,
        *,
        has_silu: bool = True,
    ) -> str:
        """Write a depthwise causal convolution, with SiLU or without, as one operator."""
        y, activation = g.local("conv"), "silu" if has_silu else "none"
        g(
            "CausalConvWithState", x, weight, bias, before, outputs=[y, after],
            domain=MICROSOFT, name="conv_with_state",
            activation=activation, ndim=1, channels_last=1,
        )  # fmt: skip
        return y

    def attention(
        self,
        g: Graph,
        d: Attention,
        qkv: Sequence[str],
        past: Sequence[str],
        present: Sequence[str],
        bias: str,
        length: str,
    ) -> str:
        """Write GroupQueryAttention, whose keys and values stay in the buffers that they are in."""
        q, k, v = qkv
        q = g("Reshape", q, g.constant([0, 0, d.heads * d.width]), name="q_flat")
        k = g("Reshape", k, g.constant([0, 0, d.key_heads * d.width]), name="k_flat")
        total = g("Cast", length, name="length", to=TensorProto.INT32)
        last = g("Sub", total, g.constant([1], np.int32), name="last")
        rows = g("Shape", q, name="rows", start=0, end=1)
        o = g.local("attended")
        tokens = g("Cast", g("Shape", q, start=1, end=2), name="tokens", to=TensorProto.INT32)
        # Without the tokens of each row, it reads several rows from an empty past alone.
        g(
            "GroupQueryAttention", q, k, v, *past, g("Expand", last, rows, name="last_of_rows"),
            g("Squeeze", total, g.constant([0]), name="total"), "", "", "", bias,
            "", "", "", "", "", g("Expand", tokens, rows, name="tokens_of_rows"),
            outputs=[o, *present], domain=MICROSOFT, name="attention",
            num_heads=d.heads, kv_num_heads=d.key_heads, scale=d.scale,
        )  # fmt: skip
        return o

    def experts(self, g: Graph, d: Experts, rows: str, scores: str) -> str:
        """Write the experts as one operator, which wants the rows of gate and up in turns."""
        count, inner, hidden = d.down.shape[0], d.down.shape[2], d.down.shape[1]
        halves = d.gate_up.unflatten(1, (2, inner))
        turns = halves.transpose(1, 2).reshape(count, 2 * inner, hidden)
        return str(
            g(
                "MoE", rows, scores, g.weight("gate_up", turns), "", g.weight("down", d.down),
                domain=MICROSOFT, k=d.active, activation_type="swiglu", swiglu_fusion=1,
                activation_alpha=1.0, activation_beta=0.0,
                normalize_routing_weights=int(d.normalises),
            )
        )  # fmt: skip


FLAVOURS: Final = {flavour.name: flavour for flavour in (Flavour(), Onnxruntime())}
"""Every flavour by its name."""
