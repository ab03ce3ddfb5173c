"""Run the registered operators on DTensors: on every device its part, by the plan of `sharding`.

An operator of DTensors is the operator of what each device holds, with results that are DTensors
again. What a backend saves for its backward stays as it is, a tensor of each device: the plan
follows from the arguments alone, so that the backward, which sees the same ones, splits alike.

This module is imported when a function is given the first DTensor, or with `gdn_ops` where
torch.distributed.tensor is loaded already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gdn_ops.call.bind import Arguments, Tokens
from gdn_ops.call.structure import Structure, axes_of, check_structure, fail
from gdn_ops.call.subclasses import fault_of_subclasses, is_distributed
from gdn_ops.call.values import are_readable, check_values
from gdn_ops.dispatch.results import Grads
from gdn_ops.spec.language import OpSpec, TensorArg
from gdn_ops.torch_ops.eager import is_symbolic
from gdn_ops.torch_ops.operators import OPERATORS, Operator, schema_names
from gdn_ops.torch_ops.sharding import Axes, Plan, held, output_shapes, plan_of


class _Sharded:
    """Hold a call of DTensors with its plan.

    Attributes:
        spec: the op.
        arguments: those of the call, DTensors.
        checked: what follows from their structure.
        plan: how the call is split.
        axes: the axes of every tensor that is there, by field.
        local: this device's part of every argument, by name.
    """

    def __init__(self, spec: OpSpec, arguments: Arguments) -> None:
        # Asked here too: while a graph is traced, `check_structure` does not ask.
        fault = fault_of_subclasses({arg.name: arguments.value(arg.field) for arg in spec.tensors})
        if fault is not None:
            fail(spec, fault)
        self.spec, self.arguments = spec, arguments
        self.checked: Structure = check_structure(spec, arguments)
        self.plan: Plan = plan_of(spec, arguments, self.checked.sizes)
        self.axes: dict[str, Axes] = {
            arg.field: axes_of(spec, arg, arguments)
            for arg in spec.tensors
            if arguments.value(arg.field) is not None
        }
        self.local: dict[str, Any] = {arg.name: arguments.value(arg.field) for arg in spec.bound}
        for arg in spec.tensors:
            if arg.field in self.axes:
                self.local[arg.name] = held(self.plan, self.local[arg.name], self.axes[arg.field])

    @property
    def has_part(self) -> bool:
        """Return whether this device holds heads and columns: it may hold none of few."""
        q, v = self.local["q"], self.local["v"]
        return bool(q.shape[-2] and v.shape[-2] and v.shape[-1])

    def local_tensors(self) -> list[Tensor]:
        """Return this device's parts of the tensors that have gradients."""
        return [self.local[arg.name] for arg in self.differentiable()]

    def differentiable(self) -> list[TensorArg]:
        """Return the arguments that have gradients and are there, in the order of Grads."""
        by_field = {arg.field: arg for arg in self.spec.tensors if arg.field in self.axes}
        return [by_field[field] for field in Grads._fields if field in by_field]

    def distributed(self, local: Tensor, placements: Any, shape: tuple[int, ...]) -> DTensor:
        """Return a result as a DTensor, given this device's part."""
        stride: list[int] = []
        size = 1
        for length in reversed(shape):
            stride.insert(0, size)
            size *= max(length, 1)
        return DTensor.from_local(
            local.contiguous(), self.plan.mesh, placements, run_check=False,
            shape=torch.Size(shape), stride=tuple(stride),
        )  # fmt: skip


def zeros_of(result: Tensor) -> Callable[[], Tensor]:
    """Return what makes zeros like a DTensor, of which neither keeps any element in memory."""
    assert isinstance(result, DTensor)
    mesh, placements, local = result.device_mesh, result.placements, result.to_local()
    shape, stride, part = result.shape, result.stride(), local.shape
    dtype, device = local.dtype, local.device

    def zeros() -> Tensor:
        with torch.no_grad():
            nothing = torch.zeros((), dtype=dtype, device=device).expand(part)
            return DTensor.from_local(
                nothing, mesh, placements, run_check=False, shape=shape, stride=stride
            )

    return zeros


def _run(operator: Operator, values: tuple[Any, ...]) -> Any:
    """Run an operator of DTensors, given the values of its schema."""
    arguments, extra = operator.arguments(values)
    with torch.no_grad():
        call = _Sharded(operator.spec, arguments)
        if operator.name == "gated_delta_backward":
            return _run_backward(operator, call, *extra)
        _check_local_values(call)
        shapes = output_shapes(operator.spec, arguments, call.checked.sizes)
        if operator.is_inplace:
            shapes = {name: given for name, given in shapes.items() if name != "new_state"}
        local = _results(operator, call, extra, shapes)
        results: list[Any] = [
            call.distributed(part, call.plan.placements(axes), shape)
            for part, (axes, shape) in zip(local, shapes.values(), strict=False)
        ]
    # Append what a backend saves to the results, as it is.
    results += local[len(results) :]
    return results[0] if len(results) == 1 else tuple(results)


def _results(operator: Operator, call: _Sharded, extra: tuple[Any, ...], shapes: Any) -> list[Any]:
    """Return what an operator returns on this device."""
    if call.has_part:
        results = _overload(operator)(*_local_values(call), *extra)
        return [results] if isinstance(results, Tensor) else list(results)
    q, stored = call.local["q"], call.checked.compute_dtype
    if call.arguments.state is not None and "initial_state" not in call.local:
        stored = call.arguments.state.dtype
    empty: list[Any] = [
        torch.zeros(
            call.plan.local_shape(axes, shape, call.plan.mesh.get_coordinate() or ()),
            dtype=q.dtype if name == "o" else stored,
            device=q.device,
        )
        for name, (axes, shape) in shapes.items()
    ]
    return [*empty, []] if operator.name == "gated_delta" else empty


def _run_backward(
    operator: Operator, call: _Sharded, saved: list[Tensor], d_o: Tensor, d_state: Tensor
) -> list[Tensor]:
    """Return the gradients of a sequence call: shares of sums where an argument is not split."""
    shapes = output_shapes(call.spec, call.arguments, call.checked.sizes)
    for name, d in (("d_o", d_o), ("d_state", d_state)):
        if not is_distributed(d):
            fail(call.spec, f"{name} is no DTensor, should be one, as q is")
    d_o, d_state = (
        held(call.plan, d, axes)
        for d, (axes, _) in zip((d_o, d_state), shapes.values(), strict=True)
    )
    tensors = call.local_tensors()
    grads = [torch.zeros_like(x) for x in tensors]
    if call.has_part:
        grads = _overload(operator)(*_local_values(call), saved, d_o, d_state)
    return [
        call.distributed(
            grad,
            call.plan.gradient_placements(call.axes[arg.field]),
            tuple(call.arguments.value(arg.field).shape),
        )
        for grad, arg in zip(grads, call.differentiable(), strict=True)
    ]


def _overload(operator: Operator) -> Any:
    return getattr(torch.ops.gdn_ops, operator.name)


def _local_values(call: _Sharded) -> list[Any]:
    """Return the values of the schema on this device."""
    return [call.local[name] for name in schema_names(call.spec)]


def _check_local_values(call: _Sharded) -> None:
    """Check the values that this device holds, where they are looked at."""
    q = call.local["q"]
    if is_symbolic(q) or torch.compiler.is_compiling() or not are_readable(q.device):
        return
    parts = {arg.field: call.local[arg.name] for arg in call.spec.tensors}
    check_values(call.spec, with_fields(call.arguments, parts), call.checked.sizes)


def with_fields(arguments: Arguments, fields: Mapping[str, Tensor]) -> Arguments:
    """Return arguments with other tensors, by field."""
    tokens = {name: fields.get(name) for name in Tokens._fields}
    others = {name: x for name, x in fields.items() if name not in tokens}
    return arguments._replace(tokens=Tokens(**tokens), **others)  # type: ignore[arg-type]


def part_of(spec: OpSpec, arguments: Arguments) -> Arguments:
    """Return arguments like those of the largest part of a call of DTensors, without values.

    Raises:
        SpecError: the call breaks the spec, or cannot be split as its arguments lie.
    """
    checked = check_structure(spec, arguments)
    plan = plan_of(spec, arguments, checked.sizes)
    parts, first = {}, [0] * plan.mesh.ndim
    for arg in spec.tensors:
        x = arguments.value(arg.field)
        if x is not None:
            shape = plan.local_shape(axes_of(spec, arg, arguments), x.shape, first)
            part = torch.empty(shape, dtype=x.dtype, device=x.device)
            parts[arg.field] = part.requires_grad_(x.requires_grad)
    return with_fields(arguments, parts)


def _rule(operator: Operator) -> Callable[..., Any]:
    """Return what torch calls for an operator of DTensors."""

    def run(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, tuple(args))

    return run


for _operator in OPERATORS:
    torch.library.register_torch_dispatch(f"gdn_ops::{_operator.name}", DTensor, _rule(_operator))
