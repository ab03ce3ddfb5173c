"""Run the chunkwise form through torch.compile, which fuses the torch backend's functions.

One chunk is compiled, not a sequence: a new T never recompiles. Every shape class (rows x
key heads, R, C, K, V, dtype, rule, zeros or not) has a compiled function of its own with
static shapes; its first call costs seconds, logged at INFO. It needs a C++ compiler on CPUs.
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
from gdn_ops.backends.torch.chunk_forward import Segment, advance_segment, forward_segment
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
            pad_segments=True,
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
    whole = view
    if view.shape[3] < x.tokens():
        # The last chunk is padded; a shorter output would be a shape class of its own.
        whole = view.new_empty(*view.shape[:3], x.tokens(), view.shape[4])
    function = _compiled(_forward_chunk, (scale, has_erase), (*x, state, whole))
    state = function(x, state, whole, scale, has_erase)
    if whole is not view:
        view.copy_(whole[..., : view.shape[3], :])
    return state


def _advance(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    function = _compiled(advance_segment, (scale, has_erase), (*x, state))
    return function(x, state, scale, has_erase)  # type: ignore[no-any-return]


def _backward(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    function = _compiled(backward_segment, (scale, has_erase), (*x, state, d_o, d_state))
    return function(x, state, d_o, d_state, scale, has_erase)  # type: ignore[no-any-return]


BACKEND = Compile
