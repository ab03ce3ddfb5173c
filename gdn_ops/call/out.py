"""Check memory of a caller for results, and which sequences start from their initial state.

No backend hears of either: results are written where the caller wants them when all is read, and
a sequence that starts from nothing has zeros for its initial state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.call import transforms
from gdn_ops.call.bind import Arguments, Targets, requires_grad
from gdn_ops.call.memory import is_frozen, lies_in, overlaps_itself
from gdn_ops.call.numerics import compute_dtype
from gdn_ops.call.scalars import as_python
from gdn_ops.call.structure import dtype_name, fail, shown
from gdn_ops.call.subclasses import is_distributed
from gdn_ops.spec.errors import SpecTypeError
from gdn_ops.spec.language import OpSpec


class Out(NamedTuple):
    """Hold the memory that a caller owns for results.

    Attributes:
        o: like v.
        final_state: (N, HV, K, V), or None where it is not asked for; it may be the initial state.
    """

    o: Tensor
    final_state: Tensor | None = None

    def write(self, o: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
        """Write the results of a call, and return them where they are."""
        if o is not self.o:
            self.o.copy_(o)
        if self.final_state is None:
            return self.o, final_state
        return self.o, self.final_state.copy_(final_state)


def checked_out(spec: OpSpec, arguments: Arguments, out: Any, *, with_state: bool = False) -> Out:
    """Check the memory that a call is to write its results to, before anything is written.

    Args:
        spec: the op.
        arguments: those of the call, of which nothing has been checked.
        out: the argument of that name.
        with_state: whether it is a pair, the second for the final state.

    Raises:
        SpecError: the call cannot write there.
    """
    if with_state:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            what = f"has {len(out)} items" if isinstance(out, (tuple, list)) else shown(out)
            fail(
                spec,
                f"out {what}, should be a pair of tensors for o and final_state: "
                f"return_state is True",
                SpecTypeError,
            )
        named = {"out[0]": out[0], "out[1]": out[1]}
    else:
        named = {"out": out}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            fail(spec, f"{name} {shown(x)}, should be a torch.Tensor", SpecTypeError)
        if torch.is_grad_enabled() and (x.requires_grad or requires_grad(arguments)):
            fail(spec, f"{name} is given, should be None where gradients are needed; call under "
                 f"torch.no_grad()")  # fmt: skip
    given = Out(*named.values())
    _check_place(spec, arguments, given.o, next(iter(named)))
    if given.final_state is not None:
        _check_final_state(spec, arguments, given)
    return given


def _check_place(spec: OpSpec, arguments: Arguments, out: Tensor, name: str) -> None:
    """Check that o can be written: it is like v, and every element has memory of its own."""
    v: Any = arguments.tokens.v
    if not isinstance(v, Tensor):
        return  # binding the call says so
    _check_memory(spec, out, name, v.device)
    if out.shape != v.shape:
        fail(spec, f"{name} has shape {tuple(out.shape)}, should be {tuple(v.shape)}, that of v")
    if out.dtype != v.dtype:
        fail(
            spec,
            f"{name} has dtype {dtype_name(out.dtype)}, should be {dtype_name(v.dtype)}, the "
            f"dtype of v",
        )


def _check_memory(spec: OpSpec, out: Tensor, name: str, device: torch.device) -> None:
    """Check that a tensor is a plain one on a device, whose elements have memory each."""
    if is_distributed(out):
        fail(spec, f"{name} is a DTensor, should be None beside DTensors: results are new ones")
    if not torch.compiler.is_compiling() and transforms.any_active():
        fail(spec, f"{name} is given, should be None under vmap, grad, vjp and jvp")
    if out.device != device:
        fail(spec, f"{name} is on {out.device}, should be on {device}, the device of v")
    if overlaps_itself(out):
        fail(
            spec,
            f"{name} has shape {tuple(out.shape)} and strides {tuple(out.stride())}, so that "
            f"elements share memory; results need memory for every element",
        )
    if not torch.compiler.is_compiling() and is_frozen(out):
        fail(
            spec,
            f"{name} was made under torch.inference_mode(), which alone may write to it: call "
            f"under it, or pass {name}.clone()",
        )


def _check_final_state(spec: OpSpec, arguments: Arguments, out: Out) -> None:
    """Check that a final state can be written: it has the state's shape, and memory beside o."""
    q: Any = arguments.tokens.q
    v: Any = arguments.tokens.v
    state, packed = out.final_state, arguments.cu_seqlens
    assert state is not None
    if not isinstance(q, Tensor) or not isinstance(v, Tensor) or min(q.dim(), v.dim()) < 4:
        return  # binding the call says so
    _check_memory(spec, state, "out[1]", v.device)
    N = q.shape[0] if packed is None else packed.shape[0] - 1
    shape = (N, v.shape[2], q.shape[3], v.shape[3])
    if tuple(state.shape) != shape:
        fail(
            spec,
            f"out[1] has shape {tuple(state.shape)}, should be (N, HV, K, V) = {shape}",
        )
    computed = compute_dtype(q.dtype)
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if computed not in allowed:
        allowed.insert(0, computed)
    if state.dtype not in allowed:
        names = ", ".join(map(dtype_name, allowed))
        fail(spec, f"out[1] has dtype {dtype_name(state.dtype)}, should be one of {names}")
    if not _is_hidden(state) and lies_in(state, (out.o,)):
        fail(spec, "out[0] and out[1] share memory, should have memory of their own")


def _is_hidden(x: Tensor) -> bool:
    """Return whether nobody can ask where a tensor lies: while it is traced, or without memory."""
    return torch.compiler.is_compiling() or x.is_meta or type(x) is not Tensor


def targets_of(out: Out, arguments: Arguments) -> Targets | None:
    """Return where a backend may write o while it still reads, or None."""
    o, inputs = out.o, (*arguments.tokens, arguments.state, arguments.cu_seqlens)
    if _is_hidden(o) or any(x is not None and _is_hidden(x) for x in inputs):
        return None
    if o.stride(-1) != 1 or o.is_neg() or lies_in(o, inputs):
        return None
    return Targets(o=o)


def starting_state(spec: OpSpec, state: Any, has_initial_state: Any) -> Any:
    """Return the initial state, with zeros for sequences that are said to have none.

    Args:
        spec: the op.
        state: (N, HV, K, V), its argument `initial_state`.
        has_initial_state: (N,) bool. What a row holds where it is False does not matter, and has
            a gradient of 0.

    Raises:
        SpecError: they do not fit.
    """
    name = "has_initial_state"
    if not isinstance(has_initial_state, Tensor):
        fail(spec, f"{name} {shown(as_python(has_initial_state))}, should be a torch.Tensor of "
             f"bool", SpecTypeError)  # fmt: skip
    if state is None:
        fail(spec, f"initial_state is None, should be a torch.Tensor: {name} says whose counts")
    if not isinstance(state, Tensor) or state.dim() != 4:
        return state  # binding the call says so
    if has_initial_state.dtype != torch.bool:
        fail(spec, f"{name} has dtype {dtype_name(has_initial_state.dtype)}, should be bool")
    if tuple(has_initial_state.shape) != (state.shape[0],):
        fail(
            spec,
            f"{name} has shape {tuple(has_initial_state.shape)}, should be (N,) = "
            f"({state.shape[0]},); N is fixed by initial_state",
        )
    if has_initial_state.device != state.device:
        fail(
            spec,
            f"{name} is on {has_initial_state.device}, should be on {state.device}, the device "
            f"of initial_state",
        )
    if is_distributed(state) and not is_distributed(has_initial_state):
        fail(spec, f"{name} is a plain tensor, should be a DTensor: initial_state is one")
    return torch.where(has_initial_state[:, None, None, None], state, state.new_zeros(()))
