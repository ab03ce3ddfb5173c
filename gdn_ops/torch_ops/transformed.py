"""Run calls under the transforms of torch.func and in forward mode.

`vmap` folds the mapped axis into the batch, or into the packed sequences, so that a backend runs
one larger call. `grad` and `vjp` run the backend's backward, after its forward once more: what the
forward saves does not survive a fold. Whatever is differentiated further, and every call with a
tangent, goes through `Backend.pure`, which torch differentiates itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call import transforms
from gdn_ops.call.bind import Call, Tokens
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import select
from gdn_ops.dispatch.results import (
    checked_forward,
    checked_grads,
    checked_pure,
    checked_step,
    checked_steps,
)
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.torch_ops.eager import (
    SECOND_ORDER,
    as_sequence,
    full_precision,
    is_symbolic,
    is_traced,
)
from gdn_ops.torch_ops.operators import schema_fields

Tensors = Sequence[Tensor | None]

TOKENS = len(Tokens._fields)
"""Locate the state among the tensors of a call; gradients of results follow it."""


@dataclass(frozen=True, eq=False)
class Plain:
    """Hold a call without the tensors that are transformed, and the backend that runs it.

    It is opaque to torch, which would look for tensors in a tuple or a named tuple.

    Attributes:
        backend: what runs the call.
        call: the call.
        is_folded: whether it is larger than the one that the backend was selected for.
    """

    backend: Backend
    call: Call
    is_folded: bool = False

    def bound(self, tensors: Tensors) -> Call:
        """Return the call on tensors, to run it now.

        Raises:
            BackendUnsupportedError: the backend does not run a call so large.
        """
        call = self.on(tensors)
        if self.is_folded:
            select(call, self.backend.name)
        return call

    def on(self, tensors: Tensors) -> Call:
        """Return the call on tensors: those of tokens, then the state."""
        return self.call.with_tensors(Tokens(*tensors[:TOKENS]), tensors[TOKENS])  # type: ignore[arg-type]

    def folded(self, rows: int) -> Plain:
        """Return the call of all mapped rows at once."""
        call, sizes = self.call, self.call.sizes
        if call.cu_seqlens is None:
            sizes = replace(sizes, B=rows * sizes.B, N=rows * sizes.N)
            call = replace(call, sizes=sizes)
        else:
            starts = sizes.T * torch.arange(rows + 1, device=call.device)
            each = call.cu_seqlens[:-1] + starts[:-1, None]
            boundaries = torch.cat((each.flatten(), starts[-1:])).to(call.cu_seqlens.dtype)
            sizes = replace(sizes, T=rows * sizes.T, N=rows * sizes.N)
            call = replace(call, sizes=sizes, cu_seqlens=boundaries)
        return Plain(self.backend, call, is_folded=True)


def fold(plain: Plain, rows: int, dims: Sequence[int | None], tensors: Tensors) -> list[Any]:
    """Return the tensors of a mapped call with the mapped axis in that of rows, or of tokens.

    Args:
        plain: the call of one mapped row.
        rows: how many are mapped.
        dims: which axis of a tensor is mapped, or None.
        tensors: tokens, the state, and perhaps the gradients of o and of the final state.
    """
    out: list[Any] = []
    for i, (x, dim) in enumerate(zip(tensors, dims, strict=True)):
        if x is None:
            out.append(None)
            continue
        x = x.expand(rows, *x.shape) if dim is None else x.movedim(dim, 0)
        is_of_tokens = i < TOKENS or i == TOKENS + 1
        if is_of_tokens and plain.call.cu_seqlens is not None:
            out.append(x.flatten(0, 2).unsqueeze(0))
        else:
            out.append(x.flatten(0, 1))
    return out


def unfold(plain: Plain, rows: int, x: Tensor, is_of_tokens: bool) -> Tensor:
    """Return a result of a folded call with the mapped axis first."""
    s = plain.call.sizes
    if not is_of_tokens:
        return x.reshape(rows, s.N, *x.shape[1:])
    if plain.call.cu_seqlens is not None:
        return x.reshape(rows, 1, s.T, *x.shape[2:])
    return x.reshape(rows, s.B, *x.shape[1:])


class _KeepingInputs(torch.autograd.Function):
    """Keep the call and its tensors for a backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        plain, *tensors = inputs
        ctx.plain = plain
        ctx.save_for_backward(*tensors)


class _Forward(_KeepingInputs):
    """Run a call of any op on a backend; its gradients are those of `_Backward`."""

    @staticmethod
    def forward(plain: Plain, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call = plain.bound(tensors)
        results: tuple[Tensor | None, ...]
        if is_traced(call.tokens.q):
            return operated(plain.backend, call)
        with full_precision(call.device.type):
            backend = plain.backend
            if call.op is GATED_DELTA:
                results = checked_forward(backend, call, backend.forward(call))[:2]
            elif call.op is GATED_DELTA_STEP:
                results = checked_step(backend, call, backend.decode_one(call))
            else:
                results = checked_steps(backend, call, backend.decode_many(call))
        given = {id(x) for x in tensors}
        # A state that no token changes may be returned as it was given, which torch refuses.
        return tuple(x.view_as(x) if id(x) in given else x for x in results if x is not None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plain: Plain, *tensors: Tensor | None) -> Any:
        rows, all_rows = info.batch_size, plain.folded(info.batch_size)
        results = _Forward.apply(all_rows, *fold(plain, rows, in_dims[1:], tensors))  # type: ignore[no-untyped-call]
        mapped = tuple(unfold(plain, rows, x, i != 1) for i, x in enumerate(results))
        return mapped, (0,) * len(mapped)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:
        plain, tensors = ctx.plain, ctx.saved_tensors
        is_step = plain.call.op is GATED_DELTA_STEP
        if is_step:
            plain = replace(plain, call=as_sequence(plain.call))
            tensors = [*_with_token_axis(tensors[:TOKENS]), tensors[TOKENS]]
            d_o = d_o.unsqueeze(1)
        grads = differentiable_backward(plain.backend, plain.call, tensors, d_o, d_state)
        if is_step:
            grads = [x if x is None or i == TOKENS else x.squeeze(1) for i, x in enumerate(grads)]
        wanted = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return None, *(grad if needed else None for grad, needed in wanted)


def differentiable_backward(
    backend: Backend, call: Call, tensors: Tensors, d_o: Tensor, d_state: Tensor
) -> list[Tensor | None]:
    """Return the gradients of a sequence call by its tokens and its state, differentiable again.

    Args:
        backend: what ran it.
        call: without its tensors.
        tensors: tokens and the state; there is a gradient of each that is there.
        d_o, d_state: the gradients of its results.

    Raises:
        BackendUnsupportedError: a tensor has a tangent, and the backend has none.
    """
    call = replace(call, needs_grad=True)
    if transforms.are_active():
        given = [x for x in (*tensors, d_o, d_state) if x is not None]
        under = transforms.transforms_of(given)
        if under.has_tangent:
            plain = Plain(backend, replace(call, transforms=under))
            select(plain.on(tensors), backend.name)
            return _pushed_backward(plain, tensors, d_o, d_state)
    plain = Plain(backend, call)
    grads = iter(_Backward.apply(plain, *tensors, d_o, d_state))  # type: ignore[no-untyped-call]
    return [None if x is None else next(grads) for x in tensors]


def _pushed_backward(
    plain: Plain, tensors: Tensors, d_o: Tensor, d_state: Tensor
) -> list[Tensor | None]:
    """Return the gradients by the tensors that are there, in plain torch, for their tangents."""
    present = [i for i, x in enumerate(tensors) if x is not None]
    with full_precision(d_o.device.type):
        grads = _pure_gradients(plain, present)(*(tensors[i] for i in present), d_o, d_state)
    found = dict(zip(present, grads, strict=True))
    return [found.get(i) for i in range(len(tensors))]


class _Backward(_KeepingInputs):
    """Return the gradients of a sequence call by the tensors that are there."""

    @staticmethod
    def forward(plain: Plain, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call, (d_o, d_state) = plain.bound(tensors), tensors[TOKENS + 1 :]
        assert d_o is not None and d_state is not None
        if is_traced(call.tokens.q):
            return operated_backward(plain.backend, call, d_o, d_state)
        with full_precision(call.device.type):
            backend = plain.backend
            saved = checked_forward(backend, call, backend.forward(call)).saved
            returned = backend.backward(call, saved, d_o, d_state)
        grads = checked_grads(backend, tensors[: TOKENS + 1], returned)
        present = zip(grads, tensors, strict=False)
        return tuple(
            torch.zeros_like(x) if grad is None else grad for grad, x in present if x is not None
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, plain: Plain, *tensors: Tensor | None) -> Any:
        rows, all_rows = info.batch_size, plain.folded(info.batch_size)
        results = _Backward.apply(all_rows, *fold(plain, rows, in_dims[1:], tensors))  # type: ignore[no-untyped-call]
        present = [i for i, x in enumerate(tensors[: TOKENS + 1]) if x is not None]
        mapped = tuple(
            unfold(plain, rows, x, i < TOKENS) for i, x in zip(present, results, strict=True)
        )
        return mapped, (0,) * len(mapped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        plain: Plain = ctx.plain
        limits = plain.backend.limits
        if not (limits.second_grad and limits.forward_mode):
            raise RuntimeError(f"backend {plain.backend.name!r}: {SECOND_ORDER}")
        present = [i for i, x in enumerate(tensors) if x is not None]
        with full_precision(plain.call.device.type):
            gradients = _pure_gradients(plain, present)
            pull = torch.func.vjp(gradients, *(tensors[i] for i in present))[1]
        found = dict(zip(present, pull(grads), strict=True))
        return None, *(found.get(i) for i in range(len(tensors)))


def _pure_gradients(plain: Plain, present: list[int]) -> Callable[..., Any]:
    """Return the gradients of a call as a function that torch differentiates.

    Args:
        plain: the call.
        present: which of the tokens and the state the function takes, and returns the gradients
            of; last it takes the gradients of the results.
    """

    def results(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(present, inputs, strict=False))
        call = plain.on([given.get(i) for i in range(TOKENS + 1)])
        return checked_pure(plain.backend, call, plain.backend.pure(call))

    def gradients(*inputs: Tensor) -> Any:
        return torch.func.vjp(results, *inputs[:-2])[1](inputs[-2:])

    return gradients


def operated(backend: Backend, call: Call) -> tuple[Tensor, ...]:
    """Run a call as an operator, which a graph holds as one node."""
    o, state, *others = getattr(torch.ops.gdn_ops, call.op.name)(
        *_schema_values(backend, call), *((False,) if call.op is GATED_DELTA else ())
    )
    return (o, state, *others) if call.return_states else (o, state)


def operated_backward(
    backend: Backend, call: Call, d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of a sequence call by the tensors that are there, from operators."""
    values = _schema_values(backend, call)
    saved = torch.ops.gdn_ops.gated_delta(*values, True)[2]
    return tuple(torch.ops.gdn_ops.gated_delta_backward(*values, saved, d_o, d_state))


def _schema_values(backend: Backend, call: Call) -> list[Any]:
    """Return the arguments of the operator of a call, for the backend that was selected."""
    others = {"rule": str(call.rule), "backend": backend.name}
    tokens = call.tokens._asdict()
    return [
        tokens[field] if field in tokens else others.get(field, getattr(call, field, None))
        for field in schema_fields(call.op)
    ]


def _with_token_axis(tensors: Tensors) -> list[Tensor | None]:
    return [None if x is None else x.unsqueeze(1) for x in tensors]


def _apply(backend: Backend, call: Call) -> tuple[Tensor, ...]:
    plain = Plain(backend, replace(call.with_tensors(_NO_TOKENS, None), needs_grad=False))
    results: tuple[Tensor, ...] = _Forward.apply(plain, *call.tokens, call.state)  # type: ignore[no-untyped-call]
    return results


_NO_TOKENS: Any = Tokens(*(None for _ in Tokens._fields))  # type: ignore[arg-type]


def run_sequence(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a `gated_delta` call under transforms; return (o, final_state)."""
    if call.transforms.has_tangent or _is_recorded(backend, call):
        with full_precision(call.device.type):
            return checked_pure(backend, call, backend.pure(call))
    o, state = _apply(backend, call)[:2]
    return o, state


def _is_recorded(backend: Backend, call: Call) -> bool:
    """Return whether `make_fx` records a call in plain torch; a compiler records one node."""
    if not (backend.limits.forward_mode and transforms.is_recording()):
        return False
    return not (torch.compiler.is_compiling() or is_symbolic(transforms.innermost(call.tokens.q)))


def run_backward(backend: Backend, call: Call, d_o: Tensor, d_state: Tensor) -> list[Tensor]:
    """Return the gradients of a `gated_delta` call by the tensors that are there."""
    plain, tensors = call.with_tensors(_NO_TOKENS, None), (*call.tokens, call.state)
    grads = differentiable_backward(backend, plain, tensors, d_o, d_state)
    return [x for x in grads if x is not None]


def run_step(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a `gated_delta_step` call under transforms; return (o, state)."""
    if call.transforms.has_tangent:
        o, state = run_sequence(backend, as_sequence(call))
        return o.squeeze(1), state if call.state is None else state.to(call.state.dtype)
    o, state = _apply(backend, call)[:2]
    return o, state


def run_steps(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a `gated_delta_steps` call under `vmap`; return (o, state, states or None)."""
    o, state, *states = _apply(backend, call)
    return o, state, states[0] if states else None
