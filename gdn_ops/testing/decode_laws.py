"""State the laws of docs/math.md §8 for decode ops: one step, a few steps, pools of states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import gdn_ops
from gdn_ops.spec.errors import SpecError
from gdn_ops.testing.decoding import Decoding
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Judgement, Verdict, worst
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
    call = Decoding.of(replace(example, lengths=None, T=1, initial_state=True, slots=None))

    def step(state: Tensor | None, inplace: bool) -> tuple[Tensor, ...]:
        tokens = single(call.tokens_in(state))
        o, new = gdn_ops.gated_delta_step(**tokens, state=state, inplace=inplace, backend=backend)
        return o.unsqueeze(1), new

    return worst(_verdicts(call, [call.judgement(1)], step, inplace=True))


def an_overlapping_state_is_refused(backend: str, example: Example) -> Verdict:
    """Law 3, memory: a state or pool with elements at one address is not updated in place."""
    call = Decoding.of(replace(example, lengths=None, T=min(example.T, 3), initial_state=True))
    given = call.state if call.slots is None else call.pool()[1]
    assert given is not None
    axes = [axis for axis, size in enumerate(given.shape) if size > 1]
    if not axes or not given.numel():
        return Verdict.exact(True, "no two elements")
    axis = axes[example.seed % len(axes)]
    state = given.narrow(axis, 0, 1).expand(given.shape)
    options: dict[str, Any] = {"state": state, "state_indices": call.indices(), "inplace": True}
    tokens = call.tokens
    calls: list[Callable[[], object]] = [
        lambda: gdn_ops.gated_delta_steps(**tokens, **options, backend=backend)
    ]
    if call.example.T == 1:
        token = single(tokens)
        calls.append(lambda: gdn_ops.gated_delta_step(**token, **options, backend=backend))
    for run in calls:
        try:
            run()
        except SpecError as error:
            if "share memory" in str(error):
                continue
            return Verdict.exact(False, f"the message does not speak of memory: {error}")
        return Verdict.exact(False, f"axis {axis} of the state is expanded, and was accepted")
    return Verdict.exact(True, "refused")


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Integer dtypes by their size in bytes."""


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit, NaN included."""
    bits = _BITS[x.itemsize]
    return x.dtype == y.dtype and torch.equal(x.view(bits), y.view(bits))


def _broken_fence(
    call: Decoding, before: Tensor, buffer: Tensor, pool: Tensor, new: Tensor, inplace: bool
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
    call = Decoding.of(example)
    wanted = [call.judgement(1)]

    def step(state: Tensor | None, inplace: bool) -> tuple[Tensor, ...]:
        o, new = gdn_ops.gated_delta_step(
            **single(call.tokens_in(state)),
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
    call = Decoding.of(replace(example, lengths=None, T=min(example.T, 20)))
    wanted = [call.judgement(t + 1) for t in range(call.example.T)]

    def steps(state: Tensor | None, inplace: bool) -> tuple[Tensor, ...]:
        return gdn_ops.gated_delta_steps(  # type: ignore[no-any-return]
            **call.tokens_in(state),
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
    call: Decoding,
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
        state = call.own_state()
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
        # A kernel may add 0 to it: -0 becomes 0.
        yield Verdict.exact(torch.equal(final, start), "final_state")
