"""Define the public functions: each binds a call, selects a backend and runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Never, TypeVar, overload

from torch import Tensor

from gdn_ops.call.bind import Arguments, Call, Targets, Tokens, arguments_of, bind, signature
from gdn_ops.call.out import checked_out, starting_state, targets_of
from gdn_ops.call.pointers import refuse_unknown
from gdn_ops.call.subclasses import is_distributed
from gdn_ops.dispatch import plans, registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.explain import Explanation, explain_call
from gdn_ops.environment import certificate as certificate  # registers its veto
from gdn_ops.spec.docs import docstring
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops import eager, tracing


@overload
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    erase: Tensor | None = ...,
    write: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    initial_state: Tensor | None = ...,
    has_initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
    chunk_size: int | None = ...,
    out: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    erase: Tensor | None = ...,
    write: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    initial_state: Tensor | None = ...,
    has_initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
    chunk_size: int | None = ...,
    out: tuple[Tensor, Tensor] | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA, unknown)
    if has_initial_state is not None:
        initial_state = starting_state(GATED_DELTA, initial_state, has_initial_state)
    arguments = Arguments(
        Tokens(q, k, v, alpha, log_alpha, beta, erase, write),
        initial_state,
        cu_seqlens,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        return_state=return_state,
        backend=registry.resolve(backend),
    )
    if out is not None:
        o, state = _run_into(arguments, out)
    else:
        o, state = _run(GATED_DELTA, arguments, eager.run_sequence, tracing.traced_sequence)
    return (o, state) if return_state else o


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    **unknown: Never,
) -> tuple[Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA_STEP, unknown)
    arguments = Arguments(
        Tokens(q, k, v, alpha, log_alpha, beta, erase, write),
        state,
        state_indices=state_indices,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        inplace=inplace,
        backend=registry.resolve(backend),
    )
    if out is None:
        return _run(GATED_DELTA_STEP, arguments, eager.run_step, tracing.traced_step)
    place = checked_out(GATED_DELTA_STEP, eager.autocast(arguments), out)
    return place.write(*_run(GATED_DELTA_STEP, arguments, eager.run_step, tracing.traced_step))


@overload
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    state: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    erase: Tensor | None = ...,
    write: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    state_indices: Tensor | None = ...,
    inplace: bool = ...,
    return_states: Literal[False] = ...,
    out: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    state: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    erase: Tensor | None = ...,
    write: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    state_indices: Tensor | None = ...,
    inplace: bool = ...,
    return_states: Literal[True],
    out: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    return_states: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    **unknown: Never,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA_STEPS, unknown)
    arguments = Arguments(
        Tokens(q, k, v, alpha, log_alpha, beta, erase, write),
        state,
        state_indices=state_indices,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        inplace=inplace,
        return_states=return_states,
        backend=registry.resolve(backend),
    )
    place = None if out is None else checked_out(GATED_DELTA_STEPS, eager.autocast(arguments), out)
    results = _run(GATED_DELTA_STEPS, arguments, eager.run_steps, tracing.traced_steps)
    o, new_state, states = results
    if place is not None:
        o, new_state = place.write(o, new_state)
    if not return_states:
        return o, new_state
    assert states is not None
    return o, new_state, states


Results = TypeVar("Results")


def _run(
    spec: OpSpec,
    arguments: Arguments,
    run: Callable[[Backend, Call], Results],
    trace: Callable[[Arguments], Results],
    targets: Targets | None = None,
) -> Results:
    """Run a call as one before it, or else trace it, or bind it and select its backend.

    Its backend may write results to `targets`.
    """
    key = signature(spec, arguments)
    plan = plans.find(key)
    results: Results | None = None if plan is None else plan.repeated(arguments)
    if results is not None:
        return results
    given = eager.autocast(arguments)
    if eager.is_traced(given.tokens.q):
        return trace(given)
    call = bind(spec, given, key if given is arguments else None)
    backend = registry.select(call, given.backend)
    plans.keep(key, arguments, call, backend)
    if targets is not None:
        call = replace(call, targets=targets)
    return run(backend, call)


def _run_into(arguments: Arguments, out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a call of `gated_delta` into memory of the caller; return o and the final state."""
    given = eager.autocast(arguments)
    place = checked_out(GATED_DELTA, given, out, with_state=bool(given.return_state))
    targets = targets_of(place, given)
    run, trace = eager.run_sequence, tracing.traced_sequence
    return place.write(*_run(GATED_DELTA, arguments, run, trace, targets))


def explain(*args: Any, op: str | Callable[..., Any] = "gated_delta", **kwargs: Any) -> Explanation:
    """Say which backend would run a call and why no other does.

    Of DTensors it says so for the largest part of the call that a device runs.

    Args:
        args, kwargs: the arguments of the call.
        op: which op is called, by name or as the function: "gated_delta", "gated_delta_step",
            "gated_delta_steps". The function may also stand before the arguments of the call:
            `explain(gated_delta_step, q, k, v)`.

    Returns:
        An Explanation; `print` it for a table.

    Raises:
        SpecError: the call breaks the spec, or there is no such op.
        TypeError: the op has no such argument.

    Example:
        >>> import torch
        >>> from gdn_ops import explain
        >>> q = torch.randn(1, 100, 4, 16)
        >>> explain(q, q, q, rule="linear", backend="torch").backend
        'torch'
    """
    if args and callable(args[0]) and not isinstance(args[0], Tensor):
        first, *args = args  # type: ignore[assignment]
        if op not in ("gated_delta", first, getattr(first, "__name__", None)):
            raise SpecError(
                "explain: the op is given twice, first and as op=, should be given once"
            )
        op = first
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    if name not in _FUNCTIONS:
        what = f"has type {type(op).__name__}" if name is None else f"is {name!r}"
        raise SpecError(f"explain: op {what}, should be one of {', '.join(_FUNCTIONS)}")
    spec, function = _FUNCTIONS[name]
    unknown = [key for key in kwargs if key not in {arg.name for arg in spec.args}]
    try:
        if unknown:
            refuse_unknown(spec, unknown)
        named = inspect.signature(function).bind(*args, **kwargs).arguments
    except SpecTypeError as error:
        raise SpecTypeError(f"explain: {error}; op= says which op is called") from None
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}; op= says which op is called") from None
    mask, out = named.pop("has_initial_state", None), named.pop("out", None)
    if mask is not None:
        named["initial_state"] = starting_state(spec, named.get("initial_state"), mask)
    arguments = arguments_of(spec, named)
    if out is not None:
        with_state = spec is GATED_DELTA and bool(arguments.return_state)
        checked_out(spec, eager.autocast(arguments), out, with_state=with_state)
    return _explained(spec, arguments)


def _explained(spec: OpSpec, arguments: Arguments) -> Explanation:
    """Explain a call, which may be warned of at the caller of `explain`."""
    given = eager.autocast(arguments)
    is_split = is_distributed(given.tokens.q)
    if is_split:
        from gdn_ops.torch_ops import sharded  # imports torch.distributed.tensor

        given = sharded.part_of(spec, given)
    call = bind(spec, given, check_values=not is_split)
    return explain_call(call, registry.resolve(arguments.backend))


_FUNCTIONS: dict[str, tuple[OpSpec, Callable[..., Any]]] = {
    "gated_delta": (GATED_DELTA, gated_delta),
    "gated_delta_step": (GATED_DELTA_STEP, gated_delta_step),
    "gated_delta_steps": (GATED_DELTA_STEPS, gated_delta_steps),
}
"""The spec and the public function of every op, by its name."""

for _spec, _function in _FUNCTIONS.values():
    _function.__doc__ = docstring(_spec)
    # Arguments that an op does not have are taken only to be refused. Python would name missing
    # ones first, though they are there by another name: here they are None, which is refused too.
    _signature = inspect.signature(_function)
    _own = [p for p in _signature.parameters.values() if p.name != "unknown"]
    _function.__signature__ = _signature.replace(parameters=_own)  # type: ignore[attr-defined]
    _function.__defaults__ = (None,) * 3 + (_function.__defaults__ or ())
