"""State the laws of docs/math.md §8 for decode ops: one step, a few steps, pools of states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gdn_ops
from gdn_ops.call.numerics import compute_dtype
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Judgement, Verdict, judgement, judgement_of, unit_roundoff, worst
from gdn_ops.testing.runs import compare, single, token_slice


def single_steps_equal_one_prefill(backend: str, example: Example) -> Verdict:
    """Law 3: T single steps equal one prefill."""
    example = replace(example, lengths=None, T=min(example.T, 20))
    arguments = example.arguments()
    arguments.pop("chunk_size")
    state = arguments.pop("initial_state", None)
    if state is None:
        s = example.sizes
        wide = torch.float64 if example.dtype == "float64" else torch.float32
        state = torch.zeros(s.N, s.HV, s.K, s.V, dtype=wide, device=arguments["v"].device)
    outputs = []
    for t in range(example.T):
        token = single(token_slice(arguments, slice(t, t + 1)))
        o, state = gdn_ops.gated_delta_step(**token, state=state, backend=backend)
        outputs.append(o)
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(arguments["v"])
    got = {"o": o, "final_state": state}
    return compare(example, got, example.run(backend, gradients=False))


def an_in_place_step_equals_a_step(backend: str, example: Example) -> Verdict:
    """Law 3, in place: the state tensor itself is updated, to the same values."""
    example = replace(example, lengths=None, T=1, initial_state=True)
    arguments = example.arguments()
    arguments.pop("chunk_size")
    state = arguments.pop("initial_state")
    token = single(arguments)
    mine = state.clone()
    o, returned = gdn_ops.gated_delta_step(**token, state=mine, inplace=True, backend=backend)
    if returned is not mine:
        return Verdict.exact(False, "the returned state is not the given tensor")
    got = {"o": o.unsqueeze(1), "final_state": mine}
    return judgement(example, False).judge(got)


@dataclass(frozen=True)
class _Decoding:
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
    def of(example: Example) -> _Decoding:
        example = replace(example, lengths=None)
        tokens = example.arguments()
        tokens.pop("chunk_size")
        state = tokens.pop("initial_state", None)
        if state is not None and example.state_dtype is not None:
            state = state.to(getattr(torch, example.state_dtype))
        device = tokens["v"].device
        if example.slots is None:
            return _Decoding(
                example, tokens, state, None, torch.ones(example.B, dtype=torch.bool, device=device)
            )
        slots = torch.tensor(example.slots, dtype=torch.int64, device=device)
        for name in ("q", "k", "v"):
            tokens[name][slots < 0] = torch.nan
        return _Decoding(example, tokens, state, slots, slots >= 0)

    def pool(self) -> tuple[Tensor, Tensor]:
        """Return (buffer, pool): NaN but for the rows' states in their slots.

        The pool is a part of the buffer, with NaN before and behind, and between the slots too
        if the example is strided.
        """
        assert self.state is not None and self.slots is not None
        layers = 2 if self.example.strided else 1
        shape = (self.example.pool + 2, layers, *self.state.shape[1:])
        buffer = torch.full(shape, torch.nan, dtype=self.state.dtype, device=self.state.device)
        pool = buffer[1:-1, 0]
        pool[self.slots[self.live]] = self.state[self.live]
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


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Integer dtypes by their size in bytes."""


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit, NaN included."""
    bits = _BITS[x.itemsize]
    return x.dtype == y.dtype and torch.equal(x.view(bits), y.view(bits))


def _broken_fence(
    call: _Decoding, before: Tensor, buffer: Tensor, pool: Tensor, new: Tensor, inplace: bool
) -> Iterator[Verdict]:
    """Yield a failing verdict for each change to memory that no row names.

    The call was given `pool`, a part of `buffer`, which was `before`; it returned `new`.
    """
    assert call.slots is not None
    if inplace != (new is pool):
        is_pool = "is the given pool, and should not" if new is pool else "is not the given pool"
        yield Verdict.exact(False, f"the returned state {is_pool}")
    named = call.slots[call.live]
    others = torch.ones(pool.shape[0], dtype=torch.bool, device=pool.device)
    others[named] = False
    if not _same_bits(new[others], before[1:-1, 0][others]):
        yield Verdict.exact(False, "a slot that no row names has changed")
    kept = before.clone()
    if inplace:
        kept[1:-1, 0][named] = pool[named]
    if not _same_bits(kept, buffer):
        yield Verdict.exact(
            False, "memory beside the slots has changed" if inplace else "the pool has changed"
        )


def a_pool_equals_separate_states(backend: str, example: Example) -> Verdict:
    """Law 3, pool: rows that name slots of a pool equal rows with states; no other slot changes."""
    example = replace(example, lengths=None, T=1, initial_state=True)
    if example.slots is None:
        example = replace(example, slots=tuple(reversed(range(example.B))), pool=example.B + 1)
    call = _Decoding.of(example)
    wanted = [call.judgement(1)]

    def step(state: Tensor | None, inplace: bool) -> tuple[Tensor, ...]:
        o, new = gdn_ops.gated_delta_step(
            **single(call.tokens),
            state=state,
            state_indices=call.indices(),
            inplace=inplace,
            backend=backend,
        )
        return o.unsqueeze(1), new

    return worst(v for inplace in (False, True) for v in _verdicts(call, wanted, step, inplace))


def steps_equal_one_step_after_another(backend: str, example: Example) -> Verdict:
    """Law 3, a few steps: o and the state after every token equal those of single steps."""
    if example.slots is not None:
        example = replace(example, initial_state=True)
    call = _Decoding.of(replace(example, lengths=None, T=min(example.T, 20)))
    wanted = [call.judgement(t + 1) for t in range(call.example.T)]

    def steps(state: Tensor | None, inplace: bool) -> tuple[Tensor, ...]:
        return gdn_ops.gated_delta_steps(  # type: ignore[no-any-return]
            **call.tokens,
            state=state,
            state_indices=call.indices(),
            inplace=inplace,
            # A backend may well take other ways with and without the states: one each.
            return_states=inplace == bool(example.seed // 2 % 2),  # type: ignore[call-overload]
            backend=backend,
        )

    ways = (False, True) if call.state is not None else (False,)
    return worst(v for inplace in ways for v in _verdicts(call, wanted, steps, inplace))


def _verdicts(
    call: _Decoding,
    wanted: list[Judgement],
    run: Callable[[Tensor | None, bool], tuple[Tensor, ...]],
    inplace: bool,
) -> Iterator[Verdict]:
    """Run a decode op and yield the verdicts on its results and on the memory beside them.

    `run` takes a state or a pool, and whether to update it in place; it returns o (B, T, HV, V),
    the new state, and perhaps the states after every token. `wanted` judges them after each.
    """
    given, live = call.state, call.live
    if call.slots is not None:
        buffer, pool = call.pool()
        before = buffer.clone()
        o, new, *states = run(pool, inplace)
        yield from _broken_fence(call, before, buffer, pool, new, inplace)
        final = new[call.slots[live]]
    else:
        state = None if given is None else given.clone()
        o, new, *states = run(state, inplace)
        if inplace and new is not state:
            yield Verdict.exact(False, "the returned state is not the given tensor")
        elif not (inplace or given is None or state is None or _same_bits(state, given)):
            yield Verdict.exact(False, "the given state has changed")
        final = new[live]
    if any(bool((x[~live] != 0).any()) for x in (o, *states)):
        yield Verdict.exact(False, "o or states of a skipped row are not 0")
    for t, judged in enumerate(wanted):
        yield judged.judge({"o": o[live, : t + 1]})
        for x in states:
            yield judged.judge({"final_state": x[live, t]})
    if wanted:
        yield wanted[-1].judge({"final_state": final})
    else:
        start = torch.zeros_like(final) if given is None else given[live]
        yield Verdict.exact(_same_bits(final, start), "final_state")
