"""Run bound calls on a backend: with autograd, without autocast, through a pool of states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gdn_ops.call import transforms
from gdn_ops.call.bind import Arguments, Call, Tokens
from gdn_ops.call.memory import apart
from gdn_ops.call.subclasses import is_masked
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.decode_fallbacks import through_rows
from gdn_ops.dispatch.results import checked_forward, checked_grads, checked_step, checked_steps
from gdn_ops.spec.ops import GATED_DELTA

SECOND_ORDER = (
    "second derivatives of gated_delta need eager mode and a backend that has them: "
    'backend="torch" or backend="naive"'
)

BATCHED_GRADIENTS = (
    "is_grads_batched of torch.autograd.grad (vectorize=True of torch.autograd.functional) does "
    "not reach a backward in one go: torch.func.jacrev and torch.func.hessian do"
)


# Asked once, at import: Dynamo of torch 2.11 does not trace the question.
_WITHOUT_AUTOCAST = frozenset(
    kind for kind in ("lazy", "meta", "vulkan") if not torch.amp.is_autocast_available(kind)
)


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is active for a device type; some, like meta, have none."""
    return device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that keeps autocast out of a backend's own arithmetic."""
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast(arguments: Arguments) -> Arguments:
    """Cast, if autocast is on, q, k, v to its dtype and narrow gates and states to float32.

    A state that is updated in place stays what it is. Without autocast the arguments themselves
    are returned.
    """
    q, k, v, alpha, log_alpha, beta, erase, write = arguments.tokens
    if not isinstance(q, Tensor) or not is_autocast_on(q.device.type):
        return arguments
    low = torch.get_autocast_dtype(q.device.type)
    q, k, v = _to_low(q, low), _to_low(k, low), _to_low(v, low)
    tokens = Tokens(
        q, k, v, _widened(alpha), _widened(log_alpha), _widened(beta), _widened(erase),
        _widened(write),
    )  # fmt: skip
    state = arguments.state if arguments.inplace else _widened(arguments.state)
    # torch.compile of torch 2.8 traces no _replace.
    others: list[Any]
    _, _, *others = arguments
    return Arguments(tokens, state, *others)


def _to_low(x: Any, low: torch.dtype) -> Any:
    is_cast = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    if is_cast and type(x) is not Tensor and is_masked(x):
        return x  # it is refused by name, and has no bfloat16
    return x.to(low) if is_cast else x


def _widened(x: Any) -> Any:
    is_narrow = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
    return x.to(torch.float32) if is_narrow else x


def is_traced(q: Any) -> bool:
    """Return whether a graph is traced or recorded, or q is on meta or of a tensor subclass."""
    if torch.compiler.is_compiling():
        return True
    if not isinstance(q, Tensor):
        return False
    if is_symbolic(q):
        return True
    # Record what transforms make of a call, not the call.
    return bool(transforms.modes()) and transforms.is_recording() and not transforms.are_active()


def is_symbolic(q: Tensor) -> bool:
    """Return whether a tensor is on meta or of a subclass, as those that a compiler traces with."""
    return q.is_meta or (type(q) not in (Tensor, torch.nn.Parameter) and not q.is_nested)


class _Function(torch.autograd.Function):
    """Run a sequence call on a backend that brings its own backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Detached, so that a backend which compiles does not look for the gradients of non-leaves.
        out = checked_forward(backend, call, backend.forward(_on(call, _detached(tensors))))
        ctx.backend, ctx.count = backend, len(tensors)
        # Keep what is tried while tuning: the backward may run on another thread.
        ctx.context = copy_context()
        ctx.call = _on(call, tuple(None for _ in tensors))
        ctx.save_for_backward(*tensors, *out.saved)
        return out.o, out.final_state

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:
        backend: Backend = ctx.backend
        d_o, d_state = d_o.resolve_neg(), d_state.resolve_neg()  # memory is read, as in `bind`
        # Read once: under activation checkpointing a second read is an error.
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        if transforms.is_grads_batched(d_o, d_state):
            raise RuntimeError(f"backend {backend.name!r}: {BATCHED_GRADIENTS}")
        second = torch.is_grad_enabled()
        if second and not backend.limits.second_grad:
            raise RuntimeError(f"backend {backend.name!r}: {SECOND_ORDER}")
        grads: Sequence[Tensor | None]
        if second and backend.limits.forward_mode:
            from gdn_ops.torch_ops import transformed  # stands on this module

            grads = transformed.differentiable_backward(backend, ctx.call, tensors, d_o, d_state)
        else:
            call = _on(ctx.call, tensors if second else _detached(tensors))
            with full_precision(d_o.device.type):
                kept_states = None if second else saved
                grads = ctx.context.copy().run(backend.backward, call, kept_states, d_o, d_state)
            grads = checked_grads(backend, tensors, grads)
        wanted = zip(grads, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(grad if needed else None for grad, needed in wanted)


def _on(call: Call, tensors: tuple[Any, ...]) -> Call:
    """Return the call on other tensors, the state last."""
    return call.with_tensors(Tokens(*tensors[:-1]), tensors[-1])


def _detached(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x.detach() if x is not None and x.requires_grad else x for x in tensors)


def run_sequence(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a bound `gated_delta` call eagerly; return (o, final_state)."""
    if call.transforms is not transforms.NONE:
        from gdn_ops.torch_ops import transformed  # stands on this module

        return transformed.run_sequence(backend, call)
    if is_autocast_on(call.device.type):
        with torch.autocast(call.device.type, enabled=False):
            return run_sequence(backend, call)
    if call.needs_grad and not backend.differentiable:
        return _Function.apply(backend, call, *call.tokens, call.state)  # type: ignore[no-untyped-call, no-any-return]
    if call.needs_grad:
        return tied(call, *checked_forward(backend, call, backend.forward(call))[:2])
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        out = checked_forward(backend, call, backend.forward(call))
    return out.o, out.final_state


def run_step(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a bound `gated_delta_step` call eagerly; return (o, state)."""
    if call.transforms is not transforms.NONE:
        from gdn_ops.torch_ops import transformed  # stands on this module

        return transformed.run_step(backend, call)
    if is_autocast_on(call.device.type):
        with torch.autocast(call.device.type, enabled=False):
            return run_step(backend, call)
    if not call.needs_grad and torch.is_grad_enabled():
        with torch.no_grad():
            return decode_one(backend, call)
    if not call.needs_grad:
        return decode_one(backend, call)
    if backend.differentiable or backend.traceable_step:
        return tied(call, *decode_one(backend, call))
    o, state = run_sequence(backend, as_sequence(call))
    return o.squeeze(1), state if call.state is None else state.to(call.state.dtype)


def tied(call: Call, o: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of a call, each of them a function of every input, for autograd.

    Plain torch code makes results that depend on what they are computed from only: a state never
    on q, and without tokens o on nothing. What has no influence has a gradient of zeros.
    """
    inputs = [x for x in (*call.tokens, call.state) if x is not None and x.requires_grad]
    if not call.has_tokens:
        return _with_graph(o, inputs), _with_graph(state, inputs)
    return o, _with_graph(state, [x for x in inputs if x is call.tokens.q])


def _with_graph(result: Tensor, inputs: list[Tensor]) -> Tensor:
    """Return a result plus 0, the sum of no elements of every input."""
    for x in inputs:
        result = result + x.flatten()[:0].sum().to(result.dtype)
    return result


def run_steps(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a bound `gated_delta_steps` call eagerly; return (o, state, states or None)."""
    if call.transforms is not transforms.NONE:
        from gdn_ops.torch_ops import transformed  # stands on this module

        return transformed.run_steps(backend, call)
    with full_precision(call.device.type), torch.no_grad():
        return decode_many(backend, call)


def to_be_updated(call: Call) -> Call:
    """Return a call in place that may write its state at any time; autograd hears of the update."""
    assert call.state is not None
    # Kernels write where torch does not look: a backward that needs the old state would be wrong.
    increment_version(call.state)
    return apart(call)


def decode_one(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Decode one token, also on a pool that the backend does not support."""
    if call.inplace and not torch.compiler.is_compiling():
        call = to_be_updated(call)
    if call.state_indices is not None and not backend.limits.pools:
        o, state, _ = through_rows(
            call, lambda rows: (*checked_step(backend, rows, backend.decode_one(rows)), None)
        )
        return o, state
    if call.state_indices is not None:
        call = call.on_own_pool()
    return checked_step(backend, call, backend.decode_one(call))


def decode_many(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Decode a few tokens, also on a pool that the backend does not support."""
    if call.inplace and not torch.compiler.is_compiling():
        call = to_be_updated(call)
    if call.state_indices is not None and not backend.limits.pools:
        return through_rows(
            call, lambda rows: checked_steps(backend, rows, backend.decode_many(rows))
        )
    if call.state_indices is not None:
        call = call.on_own_pool()
    return checked_steps(backend, call, backend.decode_many(call))


def as_sequence(call: Call) -> Call:
    """Turn a call of a step into a call of a sequence of one token."""
    return replace(call, op=GATED_DELTA, tokens=call.tokens.map(lambda x: x.unsqueeze(1)))
