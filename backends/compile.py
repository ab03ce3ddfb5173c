"""Run the chunkwise form through torch.compile, which fuses the torch backend's functions.

One chunk is compiled, not a sequence: a new T never recompiles, because no operand tells by its
strides what it is a part of. Every shape class (rows x key heads, R, C, K, V, dtype, rule, zeros or
not) has a compiled function of its own with static shapes; its first call costs seconds, logged at
INFO. It needs a C++ compiler on CPUs. It is compiled for as many threads as the caller has then, in
a thread that is kept for that, outside the modes of the caller, which never compile it again.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gdn_ops.backends.torch import Torch, channels, channels_backward
from gdn_ops.backends.torch.chunk_backward import SegmentGrads, backward_segment
from gdn_ops.backends.torch.chunk_forward import Segment, forward_segment
from gdn_ops.backends.torch.decode import StepOptions, advance_token, decode_one
from gdn_ops.backends.torch.segments import SegmentPlan
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.decode_fallbacks import one_by_one
from gdn_ops.dispatch.forks import end_openmp_threads
from gdn_ops.spec.switches import unset_if_empty

logger = logging.getLogger("gdn_ops")

Result = TypeVar("Result")
Constants = tuple[Any, ...]
Tensors = tuple[Tensor | None, ...]
Function = Callable[[Tensors, Any], Any]
"""A function of its tensors, and of constants that are compiled in."""

_functions: dict[tuple[Any, ...], Function] = {}
_numbers = itertools.count()
_here = threading.local()
_is_forked = False
_worker: ThreadPoolExecutor | None = None
"""Its one thread compiles, and lives on: torch 2.11 crashes once the first to trace has ended."""
_lock = threading.RLock()
"""Held by that thread while it compiles, and by a fork."""

RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])

GUARDS_STATE = RELEASE < (2, 9)
"""Tells whether torch compiles again, guards or not, where function modes are not as they were."""

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST),
    *(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG),
)
"""Errors of a disk that is full or read-only, and of a cache that cannot be a folder."""

CURE = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"

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
        if call.needs_grad or call.widths.apart:
            # With erase and write a step has more to read than kernels to launch: plain torch.
            return decode_one(call)
        options = StepOptions.of(call)
        tensors = (*call.tokens[:6], call.state)
        return _run(_step, tensors, options)  # type: ignore[no-any-return]

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        return one_by_one(call, self._step_of_a_copied_token)

    def _step_of_a_copied_token(self, call: Call) -> tuple[Tensor, Tensor]:
        # The strides of a token tell how many there are; those of its copy do not, so that a
        # new T compiles nothing.
        copies = call.tokens.map(lambda x: x.clone(memory_format=torch.contiguous_format))
        return self.decode_one(call.with_tensors(copies, call.state))


def _run(function: Function, tensors: Tensors, constants: Constants) -> Any:
    """Run `function`, compiled for the shapes of `tensors` and with `constants` fixed."""
    shapes = tuple(
        None if x is None else (*x.shape, x.stride(), x.dtype, x.device) for x in tensors
    )
    key = (function, constants, shapes, Compile.compiler)
    compiled = _functions.get(key)
    if compiled is None:
        compiled = _elsewhere(lambda: _compiled(key, function, tensors, constants))
    return compiled(tensors, constants)


def _compiled(
    key: tuple[Any, ...], function: Function, tensors: Tensors, constants: Constants
) -> Function:
    """Return the function of a key; compile it unless that has just been done."""
    known = _functions.get(key)
    if known is not None:
        return known
    start = time.perf_counter()
    built = _build(function)
    _prepare(built, tensors, constants)
    seconds = time.perf_counter() - start
    logger.info("compiled %s for %s in %.1f s", function.__name__, key[2], seconds)
    compiled = _functions[key] = _without_modes(built)
    return compiled


@contextmanager
def _disk_named() -> Iterator[None]:
    """Name the cure where torch.compile cannot write what it compiles."""
    try:
        yield
    except Exception as error:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
        if type(error).__name__ == "InductorError" and re.search(r"\s", folder):
            raise RuntimeError(
                f"compile: the C++ compiler cannot read from {folder!r}, whose name has a space; "
                f"{CURE}"
            ) from error
        disk = getattr(error, "inner_exception", error)
        if isinstance(disk, OSError) and disk.errno in DISK_ERRORS:
            raise RuntimeError(f"compile: cannot write to disk: {disk}; {CURE}") from error
        raise


def _build(function: Function) -> Function:
    """Return a copy of `function` that compiles itself when `_prepare` calls it.

    A copy of the code object per shape class keeps the classes apart in torch.compile, which
    counts recompilations per code object and gives up after a few. It has no guards: what they
    would check is in the key, or does not matter to a function that was traced outside every mode
    on tensors that share nothing. For the same reason nothing else may compile it.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        function.__name__,
    )
    compiler = torch._dynamo.lookup_backend(Compile.compiler)

    def compile_here(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if not getattr(_here, "is_compiling", False):
            raise RuntimeError("torch.compile has forgotten what it has compiled")
        return compiler(graph, inputs)

    # torch.compile takes the filter out of the options, of every compiler.
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(copy, backend=compile_here, options=options, dynamic=False, fullgraph=True)


def _prepare(built: Function, tensors: Tensors, constants: Constants) -> None:
    """Run a function on stand-ins, which compiles it unless it is compiled.

    The tensors of a call may be one and the same, or be inference tensors, or need gradients.
    """
    _here.is_compiling = True
    try:
        stand_ins = tuple(None if x is None else _stand_in(x) for x in tensors)
        with _as_compiled() if GUARDS_STATE else nullcontext():
            built(stand_ins, constants)
    finally:
        _here.is_compiling = False


def _stand_in(x: Tensor) -> Tensor:
    """Return zeros that have the shape and the strides of x, in memory of their own."""
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    numbers = torch.zeros(reach + 1 if x.numel() else 0, dtype=x.dtype, device=x.device)
    return numbers.as_strided(x.shape, x.stride())


@contextmanager
def _as_compiled() -> Iterator[None]:
    """Run without gradients and function modes."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def _without_modes(built: Function) -> Function:
    """Wrap a compiled function for calls under any mode."""

    def run(tensors: Tensors, constants: Constants) -> Any:
        try:
            with _as_compiled():
                return built(tensors, constants)
        except torch._dynamo.exc.TorchDynamoException:
            # It was about to compile again: after torch.compiler.reset(), or because a release of
            # torch does so under a mode of this thread.
            inference = torch.is_inference_mode_enabled()
            return _elsewhere(lambda: again(tensors, constants, inference))

    def again(tensors: Tensors, constants: Constants, inference: bool) -> Any:
        _prepare(built, tensors, constants)
        with torch.inference_mode(inference), _as_compiled():
            return built(tensors, constants)

    return run


def _elsewhere(run: Callable[[], Result]) -> Result:
    """Run in the worker's thread, which has none of the modes of this one, and return the result.

    Ctrl-C leaves this function at once; the other thread ends what it does.
    """
    global _worker
    threads = torch.get_num_threads()

    @_disk_named()
    def locked() -> Result:
        # torch and Triton would write to the current folder.
        unset_if_empty("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        # Import within the handler: it makes the folder of the cache.
        from torch._inductor import config

        # The worker's own number may be old. A fork has not got its parent's pool of compilers.
        changes = {} if config.cpp.threads > 0 else {"cpp.threads": threads}
        changes |= {"compile_threads": 1} if _is_forked else {}
        try:
            with _lock, config.patch(changes), torch.no_grad():
                return run()
        finally:
            # More threads than processors make GNU's OpenMP wait by sleeping, in every thread.
            end_openmp_threads()

    if _worker is None:
        with _lock:
            _worker = _worker or ThreadPoolExecutor(1, "gdn_ops-compile")
    # The configuration of torch.compile may be a context variable.
    return _worker.submit(copy_context().run, locked).result()


def _after_fork() -> None:
    global _lock, _is_forked, _worker
    _lock, _is_forked, _worker = threading.RLock(), True, None


if hasattr(os, "register_at_fork"):
    # A forked process would inherit half of a compilation, and a lock that nobody gives back.
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_after_fork,
    )


def _step(tensors: Tensors, options: Constants) -> tuple[Tensor, Tensor]:
    return advance_token(*tensors, options=StepOptions(*options))  # type: ignore[arg-type]


def _forward_chunk(tensors: Any, constants: Constants) -> Tensor:
    """Run one chunk of (*x, state, out), write its output into `out`, and return the new state.

    Args:
        tensors: those of a Segment, the state, and `out`, (1, G, R, C, V).
        constants: scale and has_erase.
    """
    scale, has_erase = constants
    state, out = tensors[-2:]
    return forward_segment(Segment(*tensors[:-2]), state, scale, has_erase, (out,), inplace=False)


def _wide_chunk(tensors: Any, constants: Constants) -> tuple[Tensor, Tensor]:
    """Run one chunk of (*x, state) whose gates are wide; return its output and the new state.

    The output is copied by the caller: inductor of torch 2.13 writes a wrong second head group
    where it fuses that copy, into memory of other strides, with the product before it.
    """
    *operands, state = tensors
    return channels.run_segment(Segment(*operands), state, *constants)


def _backward_chunk(tensors: Any, constants: Constants) -> SegmentGrads:
    """Return the gradients of one chunk of (*x, state, d_o, d_state)."""
    x = Segment(*tensors[:-3])
    if x.is_wide():
        return channels_backward.backward_segment(x, *tensors[-3:], *constants)
    return backward_segment(x, *tensors[-3:], *constants)


def _forward(
    x: Segment, state: Tensor, scale: float, has_erase: bool, out: Sequence[Tensor]
) -> Tensor:
    (view,) = out
    rows, heads, _, tokens, _ = view.shape
    if x.is_wide():
        o, state = _run(_wide_chunk, (*_laid_out(x), state), (scale, has_erase))
        view.copy_(o[0].unflatten(0, view.shape[:3])[..., :tokens, :])
        return state
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
    return _run(_forward_chunk, (*x, state, out), (scale, has_erase))  # type: ignore[no-any-return]


def _empty_output(x: Segment) -> Tensor:
    """Return an empty (1, G, R, C, V) that lies in memory like a chunk of o in one row."""
    n, G, R, C, V = x.v.shape
    return x.v.new_empty((n, C, G, R, V)).permute(0, 2, 3, 1, 4)


def _laid_out(x: Segment) -> Segment:
    """Return a segment whose tensors do not tell from their strides what they are a part of."""
    gates = {
        name: y.contiguous()
        for name, y in (("alpha", x.alpha), ("erase", x.erase), ("write", x.write))
        if y is not None
    }
    x = x._replace(**gates) if gates else x
    if x.v.is_contiguous():
        return x
    # There is one chunk; a new first axis gets its stride from the others.
    tokens_first = x.v.movedim(3, 1).contiguous()[0].unsqueeze(0)
    return x._replace(v=tokens_first.movedim(1, 3))


def _advance(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    if x.is_wide():
        return _run(_wide_chunk, (*_laid_out(x), state), (scale, has_erase))[1]  # type: ignore[no-any-return]
    # The function of a forward, whose output nobody reads: one without would be compiled once T has
    # more chunks than states are kept.
    return _run_chunk(x, state, _empty_output(x), scale, has_erase)


def _backward(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    x = _laid_out(x)
    tensors = (*x, state, d_o, d_state)
    return _run(_backward_chunk, tensors, (scale, has_erase))  # type: ignore[no-any-return]


BACKEND = Compile
