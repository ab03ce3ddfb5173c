"""Apply causal softmax attention inside a window, with rotary positions and a key-value ring.

y_t = W Σ_j softmax_j(q_tᵀ k_j / √D) v_j,   t − window < j ≤ t,   q, k rotated by their positions
"""

from __future__ import annotations

from typing import NamedTuple, Never, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.call.scalars import as_python
from gdn_ops.call.structure import dtype_name
from gdn_ops.nn import split_tokens
from gdn_ops.nn.names import UNPADDED, own_options, refuse_input, refuse_option
from gdn_ops.nn.rollback import RingStates, of_rows
from gdn_ops.nn.shares import Splittable, entering
from gdn_ops.nn.state import made_in
from gdn_ops.nn.values import (
    check_counts,
    check_flags,
    check_kept,
    check_made,
    check_numbers,
    check_sequences,
    check_tensor,
    check_weights,
)
from gdn_ops.parallel.context import Active, active
from gdn_ops.spec.errors import SpecError, SpecTypeError

ROPE_BASE = 10000.0
"""Base of the rotary positions, as published."""

SMALLEST_BLOCK = 128
"""Bound the queries that are attended to together from below: fewer would be slow."""

CPU_BLOCK, CPU_BLOCKS = 256, 8
"""Take so many queries together on a CPU, or of windows beyond 2048 an eighth of one.

All queries of a block are given the keys of its first one too, so that blocks of a whole window do
twice the work. Measured at windows of 16 to 2048 and 4k to 16k tokens; elsewhere not measured, and
blocks are windows."""


class KeyValueRing(NamedTuple):
    """Hold the last `window` keys and values: token t stands in slot t mod window.

    Attributes:
        keys: (B, heads, window, D), rotated by their positions.
        values: (B, heads, window, D).
        tokens: () int64, how many tokens have been read, or (B,) where rows differ; on the device,
            so that decoding waits for nothing.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor


torch.serialization.add_safe_globals([KeyValueRing])


class Past(NamedTuple):
    """Hold what attention reads before its own tokens.

    Attributes:
        keys, values: (B, heads, tokens, D), at most window − 1 of them, oldest first; those before
            the first token of a sequence mean nothing.
        tokens: how many tokens there have been, in all rows or (B, 1, 1, 1) in each.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor | int


def rotate(x: Tensor, positions: Tensor, base: float = ROPE_BASE) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by the angles position · base^(−2i/D).

    Args:
        x: (B, heads, T, D), D even.
        positions: (T,) int64, or (B, 1, T) where rows differ.
        base: of the wavelengths.

    Returns:
        Like x; angles are float32, float64 for float64 inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    place = torch.arange(half, dtype=dtype, device=x.device)
    angle = positions.to(dtype)[..., None] * base ** (-place / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class SlidingWindowAttention(Splittable):
    """Apply multi-head attention to the last `window` tokens, the token itself included.

    Time and memory are linear in the length: queries are taken in blocks of at most about a window.

    Args:
        hidden_size: width of the input and output.
        num_heads: heads; each is hidden_size / num_heads wide.
        window: tokens that a token sees, itself included.
        rope_base: of the rotary positions.
        device, dtype: of the parameters.

    Raises:
        SpecError: an option has a wrong value, or the sizes do not fit.
    """

    columns, rows = ("q_proj", "k_proj", "v_proj"), "o_proj"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int = 2048,
        *,
        rope_base: float = ROPE_BASE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if unknown:
            refuse_option("SlidingWindowAttention", unknown, _OPTIONS)
        check_counts("SlidingWindowAttention", hidden_size=hidden_size)
        check_counts("SlidingWindowAttention", least=0, num_heads=num_heads, window=window)
        check_numbers("SlidingWindowAttention", rope_base=rope_base)
        check_made("SlidingWindowAttention", device, dtype)
        if rope_base == 0:
            _fail("rope_base is 0, should be above 0")
        if num_heads < 1 or hidden_size % (2 * num_heads):
            _fail(
                f"num_heads is {num_heads}, should divide hidden_size = {hidden_size} into heads "
                f"of an even width"
            )
        if window < 1:
            _fail(f"window is {window}, should be at least 1, the token itself")
        hidden_size, num_heads, window = map(as_python, (hidden_size, num_heads, window))
        self.hidden_size, self.num_heads, self.window = hidden_size, num_heads, window
        self.head_dim, self.rope_base = hidden_size // num_heads, as_python(rope_base)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
            for _ in range(4)
        )

    def split_sizes(self) -> dict[str, int]:
        return {"num_heads": self.num_heads}

    def zero_state(self, rows: int) -> KeyValueRing:
        """Return the empty ring, before any token.

        Raises:
            SpecError: `rows` is no integer, or negative.
        """
        check_counts("SlidingWindowAttention.zero_state", least=0, rows=rows)
        return self._empty_ring(rows, *made_in(self.o_proj, self))

    def _empty_ring(self, rows: int, dtype: torch.dtype, device: torch.device) -> KeyValueRing:
        shape = (rows, self.num_heads // self.shards, self.window, self.head_dim)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        return KeyValueRing(empty, empty, torch.zeros((), dtype=torch.int64, device=device))

    def forward(
        self,
        x: Tensor,
        state: KeyValueRing | None = None,
        *,
        return_states: bool = False,
        **unknown: Never,
    ) -> tuple[Tensor, KeyValueRing | RingStates]:
        """Attend within whole sequences, or continue them by any number of tokens.

        Args:
            x: (B, T, hidden_size).
            state: what an earlier call returned, or None to start. It is not changed.
            return_states: whether to keep what leads to the ring after any of the tokens.

        Returns:
            y like x, and the ring after the last token, or RingStates with `return_states`.

        Raises:
            SpecError: an argument is of the wrong type, or a shape does not fit.
        """
        if unknown:
            known = ("x", "state", "return_states")
            refuse_input("SlidingWindowAttention", unknown, known, UNPADDED)
        check_flags("SlidingWindowAttention", return_states=return_states)
        self._check(x, state)
        x = entering(self, x)
        split = active()
        if split is not None:
            if return_states:
                _fail("return_states is True, should be False under sequence_parallel")
            return self._attend_split(x, split, state)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        ring = self._empty_ring(x.shape[0], k.dtype, k.device) if state is None else state
        # (T,), or (B, T) where rows differ
        positions = ring.tokens[..., None] + torch.arange(x.shape[1], device=x.device)
        places = positions if positions.dim() == 1 else positions[:, None]
        q, k = (rotate(y, places, self.rope_base) for y in (q, k))
        if return_states:
            o = self._attend(q, k, v, None if state is None else self._past(state, k))
            return self._project(o), RingStates(ring, k, v)
        written = self._write(ring, k, v, positions)
        if state is not None and x.shape[1] == 1:
            o = self._attend_to_ring(q, written)
        else:
            o = self._attend(q, k, v, None if state is None else self._past(state, k))
        return self._project(o), written

    def _project(self, o: Tensor) -> Tensor:
        """Project o (B, heads, T, D) to (B, T, hidden_size)."""
        check_weights("SlidingWindowAttention", "o", o, o_proj=self.o_proj)
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(-2))
        return y

    def _attend_split(
        self, x: Tensor, split: Active, state: KeyValueRing | None
    ) -> tuple[Tensor, KeyValueRing]:
        """Attend from tokens that are split over ranks."""
        split_tokens.check_local("SlidingWindowAttention", split, x, state=state)
        positions = split.split.positions(x.device)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(y, positions, self.rope_base) for y in (q, k))
        k_flat, v_flat = (y.transpose(1, 2).flatten(-2) for y in (k, v))
        outputs = [q[:, :, :0]]
        for window in split_tokens.windows(split, k_flat, v_flat, self.window - 1):
            keys, values = (
                y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for y in (window.keys, window.values)
            )
            own = window.own
            before = Past(keys, values, window.tokens)
            outputs.append(self._attend(q[:, :, own], k[:, :, own], v[:, :, own], before))
        o = self._project(torch.cat(outputs, 2))
        return o, self._ring_of_split(split, k_flat, v_flat)

    def _ring_of_split(self, split: Active, k: Tensor, v: Tensor) -> KeyValueRing:
        """Return the ring behind all sequences, or of none, given (B, T_local, hidden_size)."""
        if not split.return_state:
            return self._empty_ring(0, k.dtype, k.device)
        count = min(self.window, split.split.tokens)
        keys, values = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y in split_tokens.last_tokens("SlidingWindowAttention", split, [k, v], count)
        )
        empty = self._empty_ring(keys.shape[0], k.dtype, k.device)
        before = split.split.tokens - count
        ring = KeyValueRing(empty.keys, empty.values, empty.tokens + before)
        return self._write(ring, keys, values, before + torch.arange(count, device=k.device))

    def _write(self, ring: KeyValueRing, k: Tensor, v: Tensor, positions: Tensor) -> KeyValueRing:
        """Return the ring after writing k, v (B, heads, T, D) over tokens outside of the window."""
        # Of more than a window of tokens the first would be overwritten by the last.
        slots, kept = positions[..., -self.window :] % self.window, slice(-self.window, None)
        pairs = [(x.to(y.dtype), y[:, :, kept]) for x, y in ((ring.keys, k), (ring.values, v))]
        if slots.dim() == 1:
            keys, values = (x.index_copy(2, slots, y) for x, y in pairs)
        else:
            keys, values = (x.scatter(2, of_rows(slots, y), y) for x, y in pairs)
        return KeyValueRing(keys, values, ring.tokens + positions.shape[-1])

    def _attend_to_ring(self, q: Tensor, ring: KeyValueRing) -> Tensor:
        """Attend from one query (B, heads, 1, D), for which the order of slots does not matter."""
        is_written = torch.arange(self.window, device=q.device) < ring.tokens[..., None]
        mask = is_written[None] if is_written.dim() == 1 else is_written[:, None, None]
        return functional.scaled_dot_product_attention(q, ring.keys, ring.values, attn_mask=mask)

    def _past(self, ring: KeyValueRing, like: Tensor) -> Past:
        """Return the last window − 1 tokens of a ring, in the dtype of new keys."""
        before = torch.arange(1 - self.window, 0, device=like.device)
        slots = (ring.tokens[..., None] + before) % self.window
        if slots.dim() == 1:
            keys, values = (y[:, :, slots].to(like.dtype) for y in (ring.keys, ring.values))
            return Past(keys, values, ring.tokens)
        index = of_rows(slots, ring.keys)
        keys, values = (y.gather(2, index).to(like.dtype) for y in (ring.keys, ring.values))
        return Past(keys, values, ring.tokens[:, None, None, None])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, before: Past | None) -> Tensor:
        """Attend from queries (B, heads, T, D) to the keys of their windows, block by block."""
        attention, tokens = functional.scaled_dot_product_attention, q.shape[2]
        if tokens == 0:
            return q
        if before is None and tokens <= self.window:
            return attention(q, k, v, is_causal=True)
        past = 0
        place = torch.arange(k.shape[2], device=q.device)
        if before is not None:
            past = before.keys.shape[2]
            place = torch.arange(-past, tokens, device=q.device)
            k, v = torch.cat([before.keys, k], 2), torch.cat([before.values, v], 2)

        def mask(rows: slice, seen: slice) -> Tensor:
            distance = place[past:][rows, None] - place[None, seen]
            is_seen = (distance >= 0) & (distance < self.window)
            return is_seen if before is None else is_seen & (place[None, seen] + before.tokens >= 0)

        block = _queries_of_a_block(self.window, q.device)
        if tokens <= block:
            return attention(q, k, v, mask(slice(None), slice(None)))
        # Cut keys where blocks of queries end: gradients of slices would each be as long as they.
        outputs, uneven = [], past % block
        starts = range(uneven, past + tokens, block)
        cuts = [uneven, *(min(block, past + tokens - start) for start in starts)]
        k_parts, v_parts = k.split(cuts, 2), v.split(cuts, 2)
        for i, queries in enumerate(q.split(block, 2)):
            rows = slice(i * block, i * block + queries.shape[2])
            last = past // block + i + 1
            parts = slice(max(0, last - -(-(self.window - 1) // block)), last + 1)
            seen = slice(sum(cuts[: parts.start]), rows.stop + past)
            keys, values = (torch.cat(y[parts], 2) for y in (k_parts, v_parts))
            outputs.append(attention(queries, keys, values, mask(rows, seen)))
        return torch.cat(outputs, 2)

    def _check(self, x: Tensor, state: KeyValueRing | None) -> None:
        owner = "SlidingWindowAttention"
        check_sequences(owner, x, self.hidden_size, "hidden_size")
        check_weights(owner, "x", x, q_proj=self.q_proj, k_proj=self.k_proj, v_proj=self.v_proj)
        if state is None:
            return
        if not isinstance(state, KeyValueRing):
            raise SpecTypeError(
                f"{owner}: state has type {type(state).__name__}, should be the "
                f"gdn_ops.nn.KeyValueRing that an earlier call returned"
            )
        check_tensor(owner, "state.keys", state.keys)
        check_tensor(owner, "state.values", state.values)
        check_tensor(owner, "state.tokens", state.tokens)
        expected = (x.shape[0], self.num_heads // self.shards, self.window, self.head_dim)
        for name in ("keys", "values"):
            shape = tuple(getattr(state, name).shape)
            if shape != expected:
                _fail(
                    f"state.{name} has shape {shape}, should be (B, heads, window, D) = {expected}"
                )
        check_kept(owner, x, {"state.keys": state.keys, "state.values": state.values})
        tokens = state.tokens
        is_shaped = tuple(tokens.shape) in ((), (x.shape[0],))
        if not is_shaped or tokens.dtype != torch.int64 or tokens.device != x.device:
            _fail(
                f"state.tokens is {dtype_name(tokens.dtype)} of shape {tuple(tokens.shape)} on "
                f"{tokens.device}, should be int64 of shape () or (B,) = ({x.shape[0]},) on "
                f"{x.device}"
            )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, num_heads={self.num_heads}, window={self.window}"


def _fail(message: str) -> NoReturn:
    raise SpecError(f"SlidingWindowAttention: {message}")


_OPTIONS = own_options(SlidingWindowAttention)


def _queries_of_a_block(window: int, device: torch.device) -> int:
    """Return how many queries are attended to together."""
    if device.type == "cpu":
        window = min(window, max(CPU_BLOCK, window // CPU_BLOCKS))
    return max(SMALLEST_BLOCK, window)
