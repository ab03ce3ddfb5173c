"""Make the call of a decode op that an example describes: its tokens, and its state in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.numerics import compute_dtype
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Judgement, judgement_of, unit_roundoff
from gdn_ops.testing.runs import token_slice


def laid_out(state: Tensor, layout: str) -> Tensor:
    """Return a copy of states (..., HV, K, V) that lies in memory as a layout says.

    See `gdn_ops.testing.example.STATE_LAYOUTS`.
    """
    if layout == "transposed":
        return state.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "gaps":
        wide = state.new_full((*state.shape[:-1], 2 * state.shape[-1] + 1), torch.nan)
        return wide[..., 1::2].copy_(state)
    if layout == "heads_last":
        last = state.movedim(-3, -1).clone(memory_format=torch.contiguous_format)
        return last.movedim(-1, -3)
    return state.clone(memory_format=torch.contiguous_format)


def window(state: Tensor, name: str, example: Example) -> Tensor | None:
    """Return the part of states (B, HV, K, V) that has the shape of an argument, as a view.

    None where the tokens of the example are more than fit.
    """
    T = example.T
    if name in ("q", "k"):
        return None if example.V < T else state[:, : example.H, :, :T].permute(0, 3, 1, 2)
    if name == "gate" and example.channels:
        return None if example.V < T else state[..., :T].permute(0, 3, 1, 2)
    if example.K < T:
        return None
    rows = state[:, :, :T].transpose(1, 2)
    return rows if name == "v" else rows[..., 0]


@dataclass(frozen=True)
class Decoding:
    """Hold one call of a decode op, made from an example.

    Attributes:
        example: the example, without packed sequences.
        tokens: the arguments but the state, with a token axis; NaN in rows that are skipped.
        state: the rows' states (B, HV, K, V), or None.
        slots: (B,) int64, or None where there is no pool.
        live: (B,) bool, the rows that are not skipped.
    """

    example: Example
    tokens: dict[str, Any]
    state: Tensor | None
    slots: Tensor | None
    live: Tensor

    @staticmethod
    def of(example: Example) -> Decoding:
        """Return the call of an example, whose state holds the argument that shares its memory."""
        example = replace(example, lengths=None)
        tokens = example.arguments()
        tokens.pop("chunk_size")
        state = tokens.pop("initial_state", None)
        if state is not None and example.state_dtype is not None:
            state = state.to(getattr(torch, example.state_dtype))
        device = tokens["v"].device
        slots = torch.arange(example.B, dtype=torch.int64, device=device)
        if example.slots is not None:
            slots = torch.tensor(example.slots, dtype=torch.int64, device=device)
        live = slots >= 0
        for name in ("q", "k", "v"):
            tokens[name][~live] = torch.nan
        call = Decoding(example, tokens, state, None if example.slots is None else slots, live)
        shared, place = call.shared(), call.place(state)
        if shared is not None and place is not None:
            held = slots < example.B
            place[held] = tokens[shared][slots[held]]
        return call

    def shared(self) -> str | None:
        """Return the name of the argument that can share the memory of the state, or None.

        A state is finite: the logarithm of a decay of 0 cannot be a part of it.
        """
        e = self.example
        gate = "log_alpha" if e.log_gate else "alpha"
        name = gate if e.shared == "gate" else e.shared
        if name not in self.tokens or self.state is None or not bool(self.live.all()):
            return None
        given = self.tokens[name]
        can_be = given.dtype == self.state.dtype and bool(given.isfinite().all())
        return name if can_be and self.place(self.state) is not None else None

    def place(self, state: Tensor | None) -> Tensor | None:
        """Return the view of the rows' states, or of a pool, that the shared argument may be."""
        if state is None or self.example.shared is None:
            return None
        return window(state[: self.example.B], self.example.shared, self.example)

    def tokens_in(self, state: Tensor | None) -> dict[str, Any]:
        """Return the arguments but the state; what shares the memory of the state is a view."""
        name = self.shared()
        return self.tokens if name is None else self.tokens | {name: self.place(state)}

    def own_state(self) -> Tensor | None:
        """Return a copy of the rows' states, which lies in memory as the example says."""
        return None if self.state is None else laid_out(self.state, self.example.state_layout)

    def pool(self) -> tuple[Tensor, Tensor]:
        """Return (buffer, pool): NaN but for the rows' states and what shares their memory.

        The pool is a part of the buffer, with NaN before and behind, and between the slots too
        if the example is strided.
        """
        assert self.state is not None and self.slots is not None
        layers = 2 if self.example.strided else 1
        shape = (self.example.pool + 2, layers, *self.state.shape[1:])
        buffer = torch.full(shape, torch.nan, dtype=self.state.dtype, device=self.state.device)
        buffer = laid_out(buffer, self.example.state_layout)
        pool = buffer[1:-1, 0]
        pool[self.slots[self.live]] = self.state[self.live]
        name, place = self.shared(), self.place(pool)
        if name is not None and place is not None:
            place.copy_(self.tokens[name])
        return buffer, pool

    def indices(self) -> Tensor | None:
        """Return `state_indices`, as int32 or int64 depending on the seed; None without a pool."""
        if self.slots is None:
            return None
        return self.slots.to(torch.int32 if self.example.seed % 2 else torch.int64)

    def judgement(self, tokens: int) -> Judgement:
        """Return the reference and the allowances of the live rows after some tokens."""
        arguments = token_slice(self.tokens, slice(0, tokens))
        arguments = {
            name: x[self.live] if isinstance(x, Tensor) else x for name, x in arguments.items()
        }
        wide = compute_dtype(self.tokens["q"].dtype)
        stored = wide if self.state is None else self.state.dtype
        if self.state is not None:
            arguments["initial_state"] = self.state[self.live].to(wide)
        rows = int(self.live.sum())
        judged = judgement_of(arguments, None, replace(self.example, B=rows, T=tokens, slots=None))
        if stored == wide:
            return judged
        # The state is rounded once more, when it is stored.
        size = judged.scale["final_state"]
        least = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
        rounding = unit_roundoff(stored) * size + least * (self.example.K * self.example.V) ** 0.5
        allowance = {**judged.allowance, "final_state": judged.allowance["final_state"] + rounding}
        return replace(judged, allowance=allowance)
