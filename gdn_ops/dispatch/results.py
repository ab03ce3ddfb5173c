"""Define the results of a backend, and check that it returns them: a wrong one is named here.

The checks look at types, shapes and dtypes, of which no device is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.call.structure import dtype_name

if TYPE_CHECKING:
    from gdn_ops.dispatch.backend import Backend


class Forward(NamedTuple):
    """Hold the results of a backend's forward.

    Attributes:
        o: (B, T, HV, V), dtype of v.
        final_state: (N, HV, K, V) in the compute dtype.
        saved: tensors kept for its backward; empty unless the call needs gradients.
    """

    o: Tensor
    final_state: Tensor
    saved: tuple[Tensor, ...] = ()


class Summarised(NamedTuple):
    """Hold what a call without an initial state makes of any: S_T = M S_0 + R (docs/math.md §6).

    Attributes:
        M: (N, HV, K, K) in the compute dtype; (N, HV, 1, 1), a number, for rules without an error
            term whose decay is one of the head.
        R: (N, HV, K, V) in the compute dtype.
        kept: tensors kept for the second stage.
    """

    M: Tensor
    R: Tensor
    kept: tuple[Tensor, ...] = ()


class Grads(NamedTuple):
    """Hold the gradients of a call's tokens and of its state; None where it has no such tensor."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    alpha: Tensor | None = None
    log_alpha: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None
    state: Tensor | None = None


def checked_forward(backend: Backend, call: Call, out: Any) -> Forward:
    """Return what `forward` returned.

    Raises:
        TypeError: it is no Forward of the tensors that the call has.
    """
    if not isinstance(out, Forward):
        _refuse(backend, "forward", _kind(out), "a gdn_ops.Forward(o, final_state, saved)")
    s, v = call.sizes, call.tokens.v
    _check_tensor(backend, "forward", "o", out.o, v.shape, v.dtype)
    shape = (s.N, s.HV, s.K, s.V)
    _check_tensor(backend, "forward", "final_state", out.final_state, shape, call.compute_dtype)
    saved: Any = out.saved
    if not isinstance(saved, (tuple, list)) or not all([isinstance(x, Tensor) for x in saved]):
        given = saved if not isinstance(saved, (tuple, list)) else _first_other(saved)
        within = "" if given is saved else f"{type(saved).__name__} with "
        _refuse(backend, "forward", f"saved as {within}{_kind(given)}", "a tuple of tensors")
    return out


def map_size(call: Call) -> int:
    """Return the rows of M in S_T = M S_0 + R: K, or 1 where M is a number times the identity.

    Without an error term it is such a number, but for a decay of every key channel.
    """
    is_matrix = call.rule.has_erase or call.widths.decay == "channel"
    return call.sizes.K if is_matrix else 1


def checked_summary(backend: Backend, call: Call, out: Any) -> Summarised:
    """Return what `summarise` returned.

    Raises:
        TypeError: it is no Summarised of the tensors that the call asks for.
    """
    if not isinstance(out, Summarised):
        _refuse(backend, "summarise", _kind(out), "a Summarised(M, R, kept)")
    s, dtype, size = call.sizes, call.compute_dtype, map_size(call)
    _check_tensor(backend, "summarise", "M", out.M, (s.N, s.HV, size, size), dtype)
    _check_tensor(backend, "summarise", "R", out.R, (s.N, s.HV, s.K, s.V), dtype)
    return out


def checked_start(backend: Backend, call: Call, out: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return what `summarise_gradients` returned.

    Raises:
        TypeError: it is not the gradient of the initial state, and what is kept.
    """
    method = "summarise_gradients"
    if not isinstance(out, tuple) or len(out) != 2:
        _refuse(backend, method, _kind(out), "a tuple (gradient, kept)")
    s = call.sizes
    shape = (s.N, s.HV, s.K, s.V)
    _check_tensor(backend, method, "the gradient", out[0], shape, call.compute_dtype)
    return out


def checked_walk(backend: Backend, method: str, call: Call, out: Any) -> Tensor:
    """Return what `walk` or `walk_back` returned.

    Raises:
        TypeError: it is no state, or gradient of one, of the call.
    """
    s = call.sizes
    shape = (s.N, s.HV, s.K, s.V)
    _check_tensor(backend, method, "the result", out, shape, call.compute_dtype)
    return out  # type: ignore[no-any-return]


def checked_grads(
    backend: Backend, tensors: Sequence[Tensor | None], grads: Any
) -> Sequence[Tensor | None]:
    """Return what `backward` returned.

    Args:
        backend: what returned it.
        tensors: the tokens and the state of the call, in the order of Grads.
        grads: what it returned.

    Raises:
        TypeError: it is not a gradient per tensor, each of the shape and the dtype of its tensor.
    """
    names = Grads._fields
    if not isinstance(grads, (tuple, list)) or len(grads) != len(names):
        is_other = not isinstance(grads, (tuple, list))
        given = _kind(grads) if is_other else f"{len(grads)} gradients"
        should = f"a gdn_ops.Grads of {len(names)}: {', '.join(names)}"
        _refuse(backend, "backward", given, should)
    for name, x, grad in zip(names, tensors, grads, strict=True):
        if x is not None and grad is not None:
            _check_tensor(backend, "backward", f"the gradient of {name}", grad, x.shape, x.dtype)
    return grads


def checked_step(backend: Backend, call: Call, out: Any) -> tuple[Tensor, Tensor]:
    """Return what `decode_one` returned.

    Raises:
        TypeError: it is not (o, state) like v and like the given state.
    """
    if torch.compiler.is_compiling():
        return out  # type: ignore[no-any-return]
    if not isinstance(out, tuple) or len(out) != 2:
        _refuse(backend, "decode_one", _kind(out), "a tuple (o, state)")
    _check_decoded(backend, "decode_one", call, out)
    return out


def checked_steps(backend: Backend, call: Call, out: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `decode_many` returned.

    Raises:
        TypeError: it is not (o, state, states), states being None unless they are asked for.
    """
    if not isinstance(out, tuple) or len(out) != 3:
        _refuse(backend, "decode_many", _kind(out), "a tuple (o, state, states or None)")
    _check_decoded(backend, "decode_many", call, out)
    states, s = out[2], call.sizes
    if call.return_states:
        shape = (s.B, s.T, s.HV, s.K, s.V)
        _check_tensor(backend, "decode_many", "states", states, shape, out[1].dtype)
    elif states is not None:
        _refuse(backend, "decode_many", f"states as {_kind(states)}", "None: none are asked for")
    return out


def checked_pure(backend: Backend, call: Call, out: Any) -> tuple[Tensor, Tensor]:
    """Return what `pure` returned.

    Raises:
        TypeError: it is not (o, final_state).
    """
    if not isinstance(out, tuple) or len(out) != 2:
        _refuse(backend, "pure", _kind(out), "a tuple (o, final_state)")
    s, v = call.sizes, call.tokens.v
    _check_tensor(backend, "pure", "o", out[0], v.shape, v.dtype)
    shape = (s.N, s.HV, s.K, s.V)
    _check_tensor(backend, "pure", "final_state", out[1], shape, call.compute_dtype)
    return out


def _check_decoded(backend: Backend, method: str, call: Call, out: tuple[Any, ...]) -> None:
    """Check the output and the new state of a decode op."""
    s, v, given = call.sizes, call.tokens.v, call.state
    _check_tensor(backend, method, "o", out[0], v.shape, v.dtype)
    if given is not None:
        _check_tensor(backend, method, "state", out[1], given.shape, given.dtype)
    else:
        shape = (s.B, s.HV, s.K, s.V)
        _check_tensor(backend, method, "state", out[1], shape, call.compute_dtype)


def _check_tensor(
    backend: Backend, method: str, name: str, x: Any, shape: Any, dtype: torch.dtype
) -> None:
    if isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype:
        return
    should = f"a tensor {tuple(shape)} of {dtype_name(dtype)}"
    _refuse(backend, method, f"{name} as {_kind(x)}", should)


def _first_other(values: Sequence[Any]) -> Any:
    """Return the first value that is no tensor."""
    return next(x for x in values if not isinstance(x, Tensor))


def _kind(x: Any) -> str:
    """Return what a result is, as text: "None", "a tensor (2, 3) of float32", "a tuple of 3"."""
    if x is None:
        return "None"
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} of {dtype_name(x.dtype)}"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a value of type {type(x).__name__}"


def _refuse(backend: Backend, method: str, given: str, should: str) -> NoReturn:
    raise TypeError(f"backend {backend.name!r}: {method} returns {given}, should return {should}")
