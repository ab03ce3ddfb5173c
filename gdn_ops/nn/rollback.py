"""Go back to the state after any token of a call, and fork the states of a prompt.

A call with `return_states` keeps what leads to every state in between: of a recurrent layer the
memory after each token, by `gated_delta_steps`; of a convolution the inputs that its windows are
cut from; of attention the keys and values that are not yet written into the ring. Going back
computes nothing anew: it selects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.nn.state import State
from gdn_ops.nn.values import has_values
from gdn_ops.spec.errors import SpecError, SpecTypeError

if TYPE_CHECKING:
    from gdn_ops.nn.attention import KeyValueRing

Counts = int | Tensor
"""Count the tokens of a call that are kept: of all rows, or (B,) int64 of each."""

States = TypeVar("States", bound=tuple[Any, ...])


class MemoryStates(NamedTuple):
    """Hold what leads to the state of a recurrent layer after each of T tokens.

    Attributes:
        start: the state before the first of them.
        inputs: (N, channels, kernel_size - 1 + T), those of the convolution, with the ones before
            the first token; None without a convolution.
        memory: (N, T, HV, K, V), after each token.
    """

    start: State
    inputs: Tensor | None
    memory: Tensor

    def after(self, counts: Counts) -> State:
        """Return the state after the first tokens.

        Args:
            counts: how many of the T tokens, 0 to T.

        Raises:
            SpecError: they are something else.
        """
        tokens, rows = self.memory.shape[1], self.memory.shape[0]
        check_kept_tokens(counts, rows, tokens)
        conv = self.start.conv
        if isinstance(counts, int):
            if conv is not None and self.inputs is not None:
                conv = self.inputs[..., counts : counts + conv.shape[-1]].contiguous()
            # A copy: a view would keep the states after all tokens alive.
            memory = self.memory[:, counts - 1].clone() if counts else self.start.memory
            return State(conv, memory)
        if conv is not None and self.inputs is not None:
            windows = self.inputs.unfold(2, conv.shape[-1], 1) if conv.shape[-1] else None
            every = torch.arange(rows, device=conv.device)
            conv = conv if windows is None else windows[every, :, counts].contiguous()
        every = torch.arange(rows, device=self.memory.device)
        memory = self.memory[every, (counts - 1).clamp(min=0)]
        return State(
            conv, torch.where((counts > 0)[:, None, None, None], memory, self.start.memory)
        )


class RingStates(NamedTuple):
    """Hold what leads to the ring of an attention layer after each of T tokens.

    Attributes:
        start: the ring before the first of them.
        keys, values: (B, heads, T, D), of the tokens, keys rotated by their positions.
    """

    start: KeyValueRing
    keys: Tensor
    values: Tensor

    def after(self, counts: Counts) -> KeyValueRing:
        """Return the ring after the first tokens.

        Args:
            counts: how many of the T tokens, 0 to T.

        Raises:
            SpecError: they are something else.
        """
        rows, _, tokens, _ = self.keys.shape
        check_kept_tokens(counts, rows, tokens)
        read, window = self.start.tokens, self.start.keys.shape[2]
        if isinstance(counts, int) and not read.dim():
            kept = slice(max(0, counts - window), counts)
            slots = (read + torch.arange(tokens, device=read.device)[kept]) % window
            pairs = [(self.start.keys, self.keys), (self.start.values, self.values)]
            keys, values = (
                old.to(new.dtype).index_copy(2, slots, new[:, :, kept]) for old, new in pairs
            )
            return self.start._replace(keys=keys, values=values, tokens=read + counts)
        # The last token of a slot: the largest p < end with p ≡ slot (mod window).
        end = (read + counts)[..., None]
        slot = torch.arange(window, device=read.device)
        place = end - 1 - (end - 1 - slot) % window - read[..., None]
        place = place.expand(rows, -1)
        index, is_new = of_rows(place.clamp(min=0), self.keys), (place >= 0)[:, None, :, None]
        keys, values = (
            torch.where(is_new, new.gather(2, index), old.to(new.dtype)) if tokens else old
            for new, old in ((self.keys, self.start.keys), (self.values, self.start.values))
        )
        return self.start._replace(keys=keys, values=values, tokens=read + counts)


class TokenStates(NamedTuple):
    """Hold what leads to the states of a model after each token of a call.

    Attributes:
        layers: of every layer.
    """

    layers: tuple[MemoryStates | RingStates, ...]

    def after(self, counts: Counts) -> tuple[State | KeyValueRing, ...]:
        """Return the states after the first tokens, as if no others had been seen.

        Args:
            counts: how many of the T tokens, 0 to T: of all rows, or (B,) int64 of each.

        Returns:
            The state of every layer.

        Raises:
            SpecError: they are something else.

        Example:
            >>> import torch
            >>> from gdn_ops.nn import HybridLM
            >>> model = HybridLM("GA", 50, 16, num_heads=2, window=8)
            >>> tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
            >>> with torch.no_grad():
            ...     _, states = model(tokens, return_states=True)
            >>> _, ring = states.after(torch.tensor([2, 5]))
            >>> ring.tokens
            tensor([2, 5])
        """
        return tuple(layer.after(counts) for layer in self.layers)


def fork_state(state: States, rows: Sequence[int] | Tensor | None = None) -> States:
    """Copy the states of a model or of one layer, with rows selected, repeated or in a new order.

    A call changes no state that it is given, so that one state may be continued many times without
    a copy; a fork is for what needs other rows, or memory of its own.

    Args:
        state: what a call returned.
        rows: (n,) integers, which rows in which order: [0, 0, 0] continues one prompt in three
            ways. All of them when not given.

    Returns:
        States like those, in memory of their own.

    Raises:
        SpecError: the state is something else, or it has no such row.

    Example:
        >>> import torch
        >>> from gdn_ops.nn import HybridLM, fork_state
        >>> model = HybridLM("GA", 50, 16, num_heads=2, window=8)
        >>> with torch.no_grad():
        ...     _, state = model(torch.tensor([[3, 1, 4]]))
        ...     logits, _ = model(torch.tensor([[5], [7]]), fork_state(state, [0, 0]))
        >>> logits.shape
        torch.Size([2, 1, 50])
    """
    is_layer = hasattr(state, "_fields")
    layers: tuple[Any, ...] = (state,) if is_layer else tuple(_layers(state))
    index = None if rows is None else _rows(rows, layers)
    forked: list[Any] = [type(layer)(*(_selected(x, index) for x in layer)) for layer in layers]
    copy: Any = forked[0] if is_layer else tuple(forked)
    return cast(States, copy)


def _layers(state: Any) -> Sequence[Any]:
    """Return the states of layers, checked."""
    layers = state if isinstance(state, Sequence) else [state]
    for layer in layers:
        if not hasattr(layer, "_fields") or any(isinstance(x, tuple) for x in layer):
            raise SpecTypeError(
                f"fork_state: state has a {type(layer).__name__}, should have what a call of a "
                f"model or of a layer returned: State or KeyValueRing"
            )
    return layers


def _rows(rows: Any, layers: Sequence[Any]) -> Tensor:
    """Return the rows to select as a tensor, checked."""
    count = next((len(x) for layer in layers for x in layer if x is not None and x.dim()), 0)
    index = torch.as_tensor(rows, dtype=None, device="cpu")
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        _fail("fork_state", f"rows is {rows!r}, should be a list of row numbers")
    if has_values(index) and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= count:
            _fail(
                "fork_state",
                f"rows has values in [{low}, {high}], should be in [0, {count - 1}]: the state is "
                f"of {count} rows",
            )
    return index.long()


def _selected(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Return a copy of the rows of a tensor; what has no rows is of all of them."""
    if x is None:
        return None
    return x.clone() if index is None or not x.dim() else x.index_select(0, index.to(x.device))


def of_rows(index: Tensor, x: Tensor) -> Tensor:
    """Expand an index (B, n) of each row to (B, heads, n, D), as x (B, heads, T, D) is gathered."""
    return index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def check_kept_tokens(counts: Any, rows: int, tokens: int) -> None:
    """Check how many tokens of a call are kept.

    Args:
        counts: should be an integer or (rows,) int64, 0 to `tokens`.
        rows: of the call.
        tokens: of the call.

    Raises:
        SpecError: they are something else.
    """
    should = f"should be 0 to {tokens}, the tokens of the call"
    if isinstance(counts, Tensor):
        if counts.dtype != torch.int64 or tuple(counts.shape) != (rows,):
            _fail(
                "after",
                f"counts is {dtype_name(counts.dtype)} of shape {tuple(counts.shape)}, should be "
                f"int64 of shape (B,) = ({rows},)",
            )
        if has_values(counts) and rows:
            low, high = (int(x) for x in counts.aminmax())
            if low < 0 or high > tokens:
                _fail("after", f"counts has values in [{low}, {high}], {should}")
        return
    if isinstance(counts, bool) or not isinstance(counts, int):
        kind = type(counts).__name__
        raise SpecTypeError(f"after: counts has type {kind}, should be an integer or a tensor")
    if not 0 <= counts <= tokens:
        _fail("after", f"counts is {counts}, {should}")


def _fail(owner: str, text: str) -> NoReturn:
    raise SpecError(f"{owner}: {text}")
