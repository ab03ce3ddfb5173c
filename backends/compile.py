"""Run the chunkwise form through torch.compile, which fuses the torch backend's functions.

One chunk is compiled, not a sequence: a new T never recompiles, because no operand tells by its
strides what it is a part of. Every shape class (rows x key heads, R, C, K, V, dtype, rule, zeros or
not) has a compiled function of its own with static shapes; its first call costs seconds, logged at
INFO. It needs a C++ compiler on CPUs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdn_ops.backends.torch import Torch
from gdn_ops.backends.torch.chunk_backward import SegmentGrads, backward_segment
from gdn_ops.backends.torch.chunk_forward import Segment, forward_segment
from gdn_ops.backends.torch.decode import StepOptions, advance_token, decode_one
from gdn_ops.backends.torch.segments import SegmentPlan
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.decode_fallbacks import one_by_one

logger = logging.getLogger("gdn_ops")

CHUNKING = {"cpu": (32, 1), "*": (64, 1)}
"""(tokens per chunk, chunks per segment, which is always 1). cpu: measured on two AVX-512 cores
at K=V=128, H/HV=16/32, T=2048, where 32 and 64 are about equal; others: not measured."""


class Compile(Torch):
    """Run the torch backend's segment functions through torch.compile, one chunk at a time."""

    name = "compile"
    traceable_step = False
    compiler: ClassVar[str] = "inductor"

    chunking = CHUNKING
    chunking_without_gradients: ClassVar[Mapping[str, tuple[int, int]]] = {}
    chunks_to_try = (1,)

    def plan(self, call: Call) -> SegmentPlan:
        if torch.is_grad_enabled():
            # Second derivatives differentiate the plain functions, in the segments of those.
            return Torch().plan(call)
        return replace(
            super().plan(call),
            is_static=True,
            side_by_side=Torch().plan(call),
            forward=_forward,
            advance=_advance,
            backward=_backward,
        )

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.needs_grad:
            return decode_one(call)
        options = StepOptions.of(call)
        tensors = (*call.tokens, call.state)
        function = _compiled(advance_token, tuple(options), tensors)
        return function(*tensors, options=options)  # type: ignore[no-any-return]

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        return one_by_one(call, self._step_of_a_copied_token)

    def _step_of_a_copied_token(self, call: Call) -> tuple[Tensor, Tensor]:
        # The strides of a token tell how many there are; those of its copy do not, so that a
        # new T compiles nothing.
        copies = call.tokens.map(lambda x: x.clone(memory_format=torch.contiguous_format))
        return self.decode_one(call.with_tensors(copies, call.state))


_functions: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _compiled(
    function: Callable[..., Any], constants: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
) -> Callable[..., Any]:
    """Return `function`, compiled for the shapes of `tensors` and with `constants` fixed.

    A copy of the code object per shape class keeps the classes apart in torch.compile, which
    counts recompilations per code object and gives up after a few.
    """
    shapes = tuple(
        None if x is None else (*x.shape, x.stride(), x.dtype, x.device) for x in tensors
    )
    key = (function, constants, shapes, Compile.compiler)
    compiled = _functions.get(key)
    if compiled is None:
        compiled = _functions[key] = _timed(_build(function), function.__name__, shapes)
    return compiled


def _build(function: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{len(_functions)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, backend=Compile.compiler, dynamic=False, fullgraph=True)


def _timed(function: Callable[..., Any], name: str, shapes: tuple[Any, ...]) -> Callable[..., Any]:
    """Wrap a compiled function so that it logs the seconds of its first call, which compiles."""
    compiled = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled:
            return function(*args, **kwargs)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        compiled = True
        seconds = time.perf_counter() - start
        logger.info("compiled %s for %s in %.1f s", name, shapes, seconds)
        return result

    return run


def _forward_chunk(x: Segment, state: Tensor, out: Tensor, scale: float, has_erase: bool) -> Tensor:
    """Run one chunk; write its output into `out` (rows, H, R, C, V) and return the new state."""
    return forward_segment(x, state, scale, has_erase, (out,), inplace=False)


def _forward(
    x: Segment, state: Tensor, scale: float, has_erase: bool, out: Sequence[Tensor]
) -> Tensor:
    (view,) = out
    rows, heads, _, tokens, _ = view.shape
    # A shorter output, that of the last chunk, would be a shape class of its own, and so would each
    # distance in memory from one row of a batch to the next.
    if rows == 1 and tokens == x.tokens() and view.dtype == x.v.dtype:
        return _run_chunk(x, state, view, scale, has_erase)
    whole = _empty_output(x)
    state = _run_chunk(x, state, whole, scale, has_erase)
    view.copy_(whole[0].unflatten(0, (rows, heads))[..., :tokens, :])
    return state


def _run_chunk(x: Segment, state: Tensor, out: Tensor, scale: float, has_erase: bool) -> Tensor:
    x = _laid_out(x)
    function = _compiled(_forward_chunk, (scale, has_erase), (*x, state, out))
    return function(x, state, out, scale, has_erase)  # type: ignore[no-any-return]


def _empty_output(x: Segment) -> Tensor:
    """Return an empty (1, G, R, C, V) that lies in memory like a chunk of o in one row."""
    n, G, R, C, V = x.v.shape
    return x.v.new_empty((n, C, G, R, V)).permute(0, 2, 3, 1, 4)


def _laid_out(x: Segment) -> Segment:
    """Return a segment whose v does not tell from its strides what it is a part of."""
    if x.v.is_contiguous():
        return x
    # There is one chunk; a new first axis gets its stride from the others.
    tokens_first = x.v.movedim(3, 1).contiguous()[0].unsqueeze(0)
    return x._replace(v=tokens_first.movedim(1, 3))


def _advance(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    # The function of a forward, whose output nobody reads: one without would be compiled once T has
    # more chunks than states are kept.
    return _run_chunk(x, state, _empty_output(x), scale, has_erase)


def _backward(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    x = _laid_out(x)
    function = _compiled(backward_segment, (scale, has_erase), (*x, state, d_o, d_state))
    return function(x, state, d_o, d_state, scale, has_erase)  # type: ignore[no-any-return]


BACKEND = Compile
