"""Register the ops with torch.library: a table of operators, each derived from an op's spec.

    gdn_ops::gated_delta            the sequence op, with what its backward wants saved
    gdn_ops::gated_delta_backward   its gradients
    gdn_ops::gated_delta_step       one token
    gdn_ops::gated_delta_step_      one token, state updated in place
    gdn_ops::gated_delta_steps      a few tokens
    gdn_ops::gated_delta_steps_     a few tokens, state updated in place

An operator looks its arguments up by the names in its schema, binds them like any call, and hands
them to a backend. Those of a few tokens always return `states`, with T = 0 where it is not asked
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn_ops.call.bind import Arguments, Call, Tokens, arguments_of, bind
from gdn_ops.call.subclasses import is_distributed
from gdn_ops.call.transforms import transforms_of
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import select
from gdn_ops.dispatch.results import checked_forward, checked_grads
from gdn_ops.spec.language import OpSpec, TensorArg
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops.eager import SECOND_ORDER, decode_many, decode_one, full_precision

NO_GRADIENTS = "{} is for decoding and has no gradients; gated_delta has"

LOST_TANGENT = (
    "torch.ops.gdn_ops.{}: an input has a tangent of torch.autograd.forward_ad, which does not "
    "reach operators: call gdn_ops.{}, or take torch.func.jvp"
)


@dataclass(frozen=True)
class Operator:
    """Describe one operator of torch.library.

    Attributes:
        name: its name in the namespace gdn_ops; with a trailing underscore it updates `state`.
        spec: the op whose arguments it has, in public order.
        outputs: what it returns, as schema text.
        run: computes the outputs, given a backend, the call, and the values of `extra`.
        fake: makes empty outputs from the same arguments, for tracing.
        extra: the schema text of arguments after those of the spec.
        needs_grad: tells from the values of `extra` whether the call needs gradients.
        backward: the gradients of its inputs by autograd, given the context that `keep_inputs`
            filled and the gradients of the outputs; None where it is never differentiated.
    """

    name: str
    spec: OpSpec
    outputs: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    extra: tuple[str, ...] = ()
    needs_grad: Callable[..., bool] = lambda *extra: False
    backward: Callable[..., Any] | None = None

    @property
    def is_inplace(self) -> bool:
        """Return whether it updates its argument `state`."""
        return self.name.endswith("_")

    @property
    def schema(self) -> str:
        """Return its schema as text."""
        arguments = [*_schema_arguments(self.spec, self.is_inplace), *self.extra]
        return f"({', '.join(arguments)}) -> {self.outputs}"

    def register(self) -> None:
        """Register it with torch.library."""
        operator = torch.library.custom_op(
            f"gdn_ops::{self.name}",
            self._run,
            mutates_args={"state"} if self.is_inplace else (),
            schema=self.schema,
        )
        operator.register_fake(self._fake)
        if self.backward is not None:
            keep = keep_inputs if self.spec is not GATED_DELTA_STEPS else None
            operator.register_autograd(self.backward, setup_context=keep)

    def arguments(self, values: tuple[Any, ...]) -> tuple[Arguments, tuple[Any, ...]]:
        """Return the arguments of the op, and the values of `extra`, from those of the schema."""
        names = schema_names(self.spec)
        own, extra = values[: len(names)], values[len(names) :]
        arguments = arguments_of(self.spec, dict(zip(names, own, strict=True)))
        return arguments._replace(inplace=self.is_inplace), extra

    def _run(self, *values: Any) -> Any:
        if forward_ad._current_level >= 0:
            self._check_tangents(values)
        call, backend, extra = self._bound(values)
        with full_precision(call.device.type):
            return self.run(backend, call, *extra)

    def _check_tangents(self, values: tuple[Any, ...]) -> None:
        """Check that no input has a tangent, which torch would leave behind."""
        # An operator runs below autograd, which alone knows tangents.
        included = torch._C._dispatch_tls_local_include_set()
        none = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
        with torch._C._ForceDispatchKeyGuard(included, none):
            under = transforms_of(x for x in values if isinstance(x, Tensor))
        if under.has_tangent:
            raise RuntimeError(LOST_TANGENT.format(self.name, self.spec.name))

    def _fake(self, *values: Any) -> Any:
        call, backend, extra = self._bound(values)
        return self.fake(backend, call, *extra)

    def _bound(self, values: tuple[Any, ...]) -> tuple[Call, Backend, tuple[Any, ...]]:
        """Bind the values of the schema and select a backend. No value of a tensor is looked at."""
        arguments, extra = self.arguments(values)
        call = bind(self.spec, arguments, check_values=False)
        call = replace(call, needs_grad=self.needs_grad(*extra))
        return call, select(call, arguments.backend), extra


def schema_names(spec: OpSpec) -> list[str]:
    """Return the names of the arguments that are part of an operator's schema."""
    return [a.name for a in spec.args if isinstance(a, TensorArg) or a.schema is not None]


def schema_fields(spec: OpSpec) -> list[str]:
    """Return the names of those arguments in a call of any op."""
    return [a.field for a in spec.args if isinstance(a, TensorArg) or a.schema is not None]


def _schema_arguments(spec: OpSpec, is_inplace: bool) -> list[str]:
    """Return the arguments of a spec as torch schema text, in public order."""
    texts = []
    for arg in spec.args:
        if not isinstance(arg, TensorArg):
            texts += [f"{arg.schema} {arg.name}"] if arg.schema is not None else []
        elif is_inplace and arg.name == "state":
            texts.append("Tensor(a!) state")
        else:
            texts.append(f"Tensor{'?' if arg.optional else ''} {arg.name}")
    return texts


# Define what the operators compute, and empty results like theirs.


def _forward(backend: Backend, call: Call, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = checked_forward(backend, call, backend.forward(call))
    return out.o, out.final_state, [*out.saved] if save else []


def _empty_forward(backend: Backend, call: Call, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    s = call.sizes
    state = torch.empty((s.N, s.HV, s.K, s.V), dtype=call.compute_dtype, device=call.device)
    return _empty_output(call), state, [*backend.saved_like(call)] if save else []


def _gradients(
    backend: Backend, call: Call, saved: list[Tensor], d_o: Tensor, d_state: Tensor
) -> list[Tensor]:
    """Return the gradients of the tensors that are there, in the order of Tokens, then state.

    What is not saved, as by a step or a transformed call, is computed again.
    """
    with torch.no_grad():
        kept = tuple(saved) or checked_forward(backend, call, backend.forward(call)).saved
        grads = backend.backward(call, kept, d_o, d_state)
    tensors = (*call.tokens, call.state)
    return [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(tensors, checked_grads(backend, tensors, grads), strict=True)
        if x is not None
    ]


def _empty_gradients(backend: Backend, call: Call, *extra: Any) -> list[Tensor]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (*call.tokens, call.state)
        if x is not None
    ]


def _steps(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    o, state, states = decode_many(backend, call)
    return o, state, empty_states(call) if states is None else states


def _empty_output(call: Call) -> Tensor:
    v = call.tokens.v
    return torch.empty(v.shape, dtype=v.dtype, device=call.device)


def _empty_state(call: Call) -> Tensor:
    if call.state is not None:
        return torch.empty(call.state.shape, dtype=call.state.dtype, device=call.device)
    s = call.sizes
    return torch.empty((s.B, s.HV, s.K, s.V), dtype=call.compute_dtype, device=call.device)


def empty_states(call: Call) -> Tensor:
    """Return an empty tensor like the states after each token, of no token if none is asked for."""
    s = call.sizes
    stored = call.compute_dtype if call.state is None else call.state.dtype
    shape = (s.B, s.T if call.return_states else 0, s.HV, s.K, s.V)
    return torch.empty(shape, dtype=stored, device=call.device)


# Their gradients, as autograd asks for them.


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep the inputs of an operator, and of the sequence op what its backward wants saved."""
    saved = output[2] if len(output) == 3 else []
    is_tensor = [x is None or isinstance(x, Tensor) for x in inputs]
    ctx.attributes = [None if is_one else x for x, is_one in zip(inputs, is_tensor, strict=True)]
    ctx.save_for_backward(
        *(x if t else None for x, t in zip(inputs, is_tensor, strict=True)), *saved
    )
    if is_distributed(output[0]):
        from gdn_ops.torch_ops.sharded import zeros_of  # stands on this module

        # Autograd's own zeros would be plain tensors of the whole size.
        ctx.set_materialize_grads(False)
        ctx.zeros = [zeros_of(x) for x in output[:2]]


def _kept(ctx: Any, spec: OpSpec) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the inputs that `keep_inputs` kept, by field, and the tensors that were saved."""
    # Read once: under activation checkpointing a second read is an error.
    kept, count = ctx.saved_tensors, len(ctx.attributes)
    inputs = (a if x is None else x for a, x in zip(ctx.attributes, kept[:count], strict=True))
    return dict(zip(schema_fields(spec), inputs, strict=False)), list(kept[count:])


def _given(ctx: Any, *grads: Tensor | None) -> list[Tensor]:
    """Return the gradients of the results, zeros where autograd has none."""
    return [ctx.zeros[i]() if grad is None else grad for i, grad in enumerate(grads)]


def _gradients_by_field(
    values: dict[str, Any], saved: list[Tensor], d_o: Tensor, d_state: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of a sequence call, given its schema's values by field."""
    own = [values[field] for field in schema_fields(GATED_DELTA)]
    grads = torch.ops.gdn_ops.gated_delta_backward(*own, saved, d_o, d_state)
    present = [name for name in (*Tokens._fields, "state") if values[name] is not None]
    return dict(zip(present, grads, strict=True))


def _sequence_backward(ctx: Any, d_o: Tensor, d_state: Tensor, d_saved: Any) -> tuple[Any, ...]:
    values, saved = _kept(ctx, GATED_DELTA)
    d_o, d_state = _given(ctx, d_o, d_state)
    grads = _gradients_by_field(values, saved, d_o, d_state)
    return *(grads.get(field) for field in values), None


def _step_backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    """Compute the gradients of a step as those of a sequence of one token."""
    values, _ = _kept(ctx, GATED_DELTA_STEP)
    if values["state_indices"] is not None:
        raise RuntimeError(NO_GRADIENTS.format("gated_delta_step with state_indices"))
    d_o, d_state = _given(ctx, d_o, d_state)
    sequence = values | {"cu_seqlens": None, "chunk_size": None}
    for name in Tokens._fields:
        sequence[name] = None if values[name] is None else values[name].unsqueeze(1)
    grads = _gradients_by_field(sequence, [], d_o.unsqueeze(1), d_state)
    grads = {name: x if name == "state" else x.squeeze(1) for name, x in grads.items()}
    return tuple(grads.get(field) for field in values)


def _raising(message: str) -> Callable[..., Any]:
    """Return a backward that raises."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    return backward


OPERATORS = (
    Operator(
        "gated_delta",
        GATED_DELTA,
        "(Tensor o, Tensor final_state, Tensor[] saved)",
        _forward,
        _empty_forward,
        extra=("bool save",),
        needs_grad=lambda save: save,
        backward=_sequence_backward,
    ),
    Operator(
        "gated_delta_backward",
        GATED_DELTA,
        "Tensor[]",
        _gradients,
        _empty_gradients,
        extra=("Tensor[] saved", "Tensor d_o", "Tensor d_state"),
        needs_grad=lambda *extra: True,
        backward=_raising(SECOND_ORDER),
    ),
    Operator(
        "gated_delta_step",
        GATED_DELTA_STEP,
        "(Tensor o, Tensor new_state)",
        decode_one,
        lambda backend, call: (_empty_output(call), _empty_state(call)),
        backward=_step_backward,
    ),
    Operator(
        "gated_delta_step_",
        GATED_DELTA_STEP,
        "Tensor o",
        lambda backend, call: decode_one(backend, call)[0],
        lambda backend, call: _empty_output(call),
    ),
    Operator(
        "gated_delta_steps",
        GATED_DELTA_STEPS,
        "(Tensor o, Tensor new_state, Tensor states)",
        _steps,
        lambda backend, call: (_empty_output(call), _empty_state(call), empty_states(call)),
        backward=_raising(NO_GRADIENTS.format("gated_delta_steps")),
    ),
    Operator(
        "gated_delta_steps_",
        GATED_DELTA_STEPS,
        "(Tensor o, Tensor states)",
        lambda backend, call: _steps(backend, call)[::2],
        lambda backend, call: (_empty_output(call), empty_states(call)),
    ),
)
"""The operators, in the order in which they are registered."""

for _operator in OPERATORS:
    _operator.register()
