"""Check the structure of a call, that is all but its values, against the op's spec.

A call that breaks the spec ends in a `SpecError` whose text names the argument, what it is and
what it should be.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gdn_ops.call.layouts import Given, layout_hint
from gdn_ops.call.numerics import compute_dtype
from gdn_ops.call.subclasses import fault_of_subclasses
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import Attr, OpSpec, Sizes, TensorArg, printed_shape
from gdn_ops.spec.rules import FLOAT_DTYPES, Rule, Width, Widths

if TYPE_CHECKING:
    from gdn_ops.call.bind import Arguments

DTYPE_NAMES = {getattr(torch, name): name for name in (*FLOAT_DTYPES, "int64", "int32")}
"""The names of the dtypes that specs know."""


class Structure(NamedTuple):
    """Hold what follows from all of a call but its values; documented by `Call`."""

    sizes: Sizes
    rule: Rule
    widths: Widths
    device: torch.device
    compute_dtype: torch.dtype
    scale: float


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def is_narrow(alpha: Any) -> bool:
    """Return whether alpha is bfloat16 or float16, which every call warns of."""
    return alpha is not None and alpha.dtype in (torch.bfloat16, torch.float16)


def check_structure(spec: OpSpec, arguments: Arguments) -> Structure:
    """Check everything about a call but its values."""
    for attr in spec.attrs:
        _check_attr(spec, attr, arguments.value(attr.field))
    rule = spec.rule[arguments.rule]
    for arg in spec.tensors:
        _check_type(spec, arg, arguments.value(arg.field))
    check_subclasses(spec, arguments)
    _check_gates(spec, rule, arguments)
    sizes = _check_tensors(spec, arguments)
    if arguments.state is None:
        _check_state_is_free(spec, arguments)
    scale = arguments.scale
    scale = float(sizes.K) ** -0.5 if scale is None else float(scale)
    q = arguments.tokens.q
    computed = compute_dtype(q.dtype)
    if abs(scale) > torch.finfo(computed).max:
        fail(spec, f"scale is {scale:g}, should be a finite number in {dtype_name(computed)}")
    widths = _widths(spec, rule, arguments)
    return Structure(sizes, rule, widths, q.device, computed, scale)


def _check_state_is_free(spec: OpSpec, arguments: Arguments) -> None:
    """Check that a call without a state asks neither for `inplace` nor for `state_indices`."""
    should = "state is None, should be a torch.Tensor"
    if arguments.inplace:
        fail(spec, f"{should}: inplace updates it")
    if arguments.state_indices is not None:
        fail(spec, f"{should}: state_indices are slots of it")


def fail(spec: OpSpec, message: str, error: type[SpecError] = SpecError) -> NoReturn:
    """Raise an error whose text is the op's name, then the message."""
    raise error(f"{spec.name}: {message}")


def _check_attr(spec: OpSpec, attr: Attr, value: Any) -> None:
    """Check the type, the choices and the range of one argument that is not a tensor."""
    name = attr.name
    if attr.type == "str":
        should = f"one of {', '.join(map(str, attr.choices))}" if attr.choices else "a string"
        if not isinstance(value, str):
            fail(spec, f"{name} {shown(value)}, should be {should}", SpecTypeError)
        if attr.choices and value not in attr.choices:
            fail(spec, f"{name} is {value!r}, should be {should}")
    elif attr.type == "bool":
        if not isinstance(value, bool):
            fail(spec, f"{name} {shown(value)}, should be True or False", SpecTypeError)
    elif value is None:
        return
    elif attr.type == "int | None":
        if isinstance(value, bool) or not isinstance(value, int):
            fail(spec, f"{name} {shown(value)}, should be a positive integer", SpecTypeError)
        if value < 1:
            fail(spec, f"{name} is {value}, should be a positive integer")
    else:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            fail(spec, f"{name} {shown(value)}, should be a finite number", SpecTypeError)
        if not abs(value) <= sys.float_info.max:
            fail(spec, f"{name} is {value}, should be a finite number")


def shown(value: Any) -> str:
    """Return a wrong value as text: "is 1.5" for a plain one, "has type list" for any other."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"is {value!r}"
    return f"has type {type(value).__name__}"


def _check_gates(spec: OpSpec, rule: Rule, arguments: Arguments) -> None:
    """Check that there is one decay gate where the rule has a decay, and none elsewhere."""
    given = [name for name in ("alpha", "log_alpha") if arguments.value(name) is not None]
    if rule.has_decay and not given:
        fail(
            spec,
            f"alpha and log_alpha are both missing, should be exactly one of them: "
            f"rule {rule.name!r} has a decay",
        )
    if rule.has_decay and len(given) == 2:
        fail(spec, "alpha and log_alpha are both given, should be exactly one of them")
    if not rule.has_decay and given:
        fail(spec, f"{given[0]} is given, should be None: rule {rule.name!r} has no decay")
    strengths = [name for name in ("erase", "write") if arguments.value(name) is not None]
    if strengths and not rule.has_erase:
        fail(
            spec,
            f"{strengths[0]} is given, should be None: rule {rule.name!r} has no error term, and "
            f"beta is its write strength",
        )
    if strengths and arguments.value("beta") is not None:
        fail(
            spec,
            f"{strengths[0]} and beta are both given, should be one of them: beta is erase and "
            f"write in one",
        )


def _widths(spec: OpSpec, rule: Rule, arguments: Arguments) -> Widths:
    """Return the widths of a call's gates, and check that the rule takes them."""
    found: dict[str, Width] = {}
    for name, (kind, allowed) in {
        "alpha": ("decay", rule.decays),
        "log_alpha": ("decay", rule.decays),
        "erase": ("erase", rule.erases),
        "write": ("write", rule.writes),
    }.items():
        gate = arguments.value(name)
        if gate is None:
            continue
        is_wide = axes_of(spec, spec.tensor[name], arguments)[-1] in ("K", "V")
        found[kind] = width = "channel" if is_wide else "scalar"
        if width not in allowed:
            takes = " or ".join(allowed)
            fail(
                spec,
                f"{name} has shape {tuple(gate.shape)}, a {width} {kind}; rule {rule.name!r} takes "
                f"{takes} {kind}s",
            )
    decay, apart = found.get("decay", "none"), "erase" in found or "write" in found
    erase, write = found.get("erase", rule.erases[0]), found.get("write", rule.writes[0])
    return Widths(decay, erase, write, apart, apart or decay == "channel")


def _check_type(spec: OpSpec, arg: TensorArg, value: Any) -> None:
    """Check that an argument is a tensor with one shape and memory for every element."""
    if value is None and arg.optional:
        return
    if not isinstance(value, Tensor):
        fail(spec, f"{arg.name} {shown(value)}, should be a torch.Tensor", SpecTypeError)
    if value.is_nested:
        fail(
            spec,
            f"{arg.name} is a nested tensor, should have one shape; sequences of different "
            f"lengths are packed along T, with cu_seqlens of gated_delta",
        )
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        fail(spec, f"{arg.name} has layout {layout}, should be strided")


def check_subclasses(spec: OpSpec, arguments: Arguments) -> None:
    """Check that no tensor is of a subclass that backends do not compute with.

    Raises:
        SpecError: one is masked, or fake beside one that is not.
    """
    given = [(arg.name, arguments.value(arg.field)) for arg in spec.tensors]
    unusual = [type(x) not in _USUAL for _, x in given]
    # A compiler traces with tensors of its own.
    if not any(unusual) or torch.compiler.is_compiling():
        return
    fault = fault_of_subclasses(dict(given))
    if fault is not None:
        fail(spec, fault)


_USUAL = (Tensor, torch.nn.Parameter, type(None))


def _check_tensors(spec: OpSpec, arguments: Arguments) -> Sizes:
    """Check rank, dtype, device and shape of every tensor and return the axes."""
    bound: dict[str, tuple[int, str]] = {}
    reference: Tensor | None = None
    for arg in spec.binding_order:
        value = arguments.value(arg.field)
        if value is None:
            continue
        _check_dtype(spec, arg, value, arguments)
        if reference is None:
            reference = value
        elif value.device != reference.device:
            fail(
                spec,
                f"{arg.name} is on {value.device}, should be on {reference.device}, "
                f"the device of q",
            )
        axes = axes_of(spec, arg, arguments)
        _check_shape(spec, arg.name, axes, arguments, bound)
        if arg.name == "cu_seqlens":
            _bind_sequences(spec, arguments, bound)
    for axis in spec.axes:
        size, holder = bound.get(axis.name, (axis.minimum, ""))
        if axis.minimum and size < axis.minimum:
            fail(spec, f"{holder} has {axis}={size}, should be at least {axis.minimum}")
    for constraint in spec.constraints:
        count, of = bound[constraint.axis][0], bound[constraint.of][0]
        if count % of:
            fail(
                spec,
                f"{constraint.holder} has {constraint.axis}={count} {constraint.meaning}, "
                f"should be a multiple of {constraint.of}={of}{_layout_hint(spec, arguments)}",
            )
    sizes = {name: bound[name][0] for name in bound if name not in ("N+1", "P")}
    sizes.setdefault("T", 1)
    sizes.setdefault("N", sizes["B"])
    return Sizes(**sizes)


def _check_dtype(spec: OpSpec, arg: TensorArg, value: Tensor, arguments: Arguments) -> None:
    name = DTYPE_NAMES.get(value.dtype)
    if name not in arg.dtypes:
        allowed = ", ".join(arg.dtypes)
        fail(spec, f"{arg.name} has dtype {dtype_name(value.dtype)}, should be one of {allowed}")
    if arg.same_dtype_as is not None:
        other = arguments.value(arg.same_dtype_as).dtype
        if value.dtype != other:
            fail(
                spec,
                f"{arg.name} has dtype {name}, should be {dtype_name(other)}, "
                f"the dtype of {arg.same_dtype_as}",
            )
    elif value.dtype == torch.float64 and arguments.tokens.q.dtype != torch.float64:
        fail(
            spec,
            f"{arg.name} has dtype float64, should be float32: "
            f"q is {dtype_name(arguments.tokens.q.dtype)}",
        )
    elif arg.name == "alpha" and is_narrow(value):
        step = 8 if value.dtype == torch.bfloat16 else 11
        warnings.warn(
            f"{spec.name}: alpha is {name}, which has no value between 1 - 2**-{step} and 1; "
            f"pass it as float32, or pass log_alpha=",
            stacklevel=8,
        )


def _check_shape(
    spec: OpSpec,
    name: str,
    axes: tuple[str, ...],
    arguments: Arguments,
    bound: dict[str, tuple[int, str]],
) -> None:
    """Check rank and sizes of one tensor; axes not seen before are bound to its sizes."""
    shape = arguments.value(spec.tensor[name].field).shape
    if len(shape) != len(axes):
        is_wide = name == "beta" and len(shape) == len(axes) + 1
        hint = "; strengths of channels are given as erase and write" if is_wide else ""
        fail(
            spec,
            f"{name} has shape {tuple(shape)}, should be {printed_shape(axes)}: "
            f"{len(axes)} dimension{'s' if len(axes) != 1 else ''}, not {len(shape)}{hint}",
        )
    wrong: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        known = bound.get(axis)
        if known is None:
            bound[axis] = known = bound["B"] if axis == "N" else (size, name)
        if known[0] != size:
            wrong.append(axis)
    if wrong:
        should = tuple(bound[axis][0] for axis in axes)
        reasons = ", ".join(f"{axis} is fixed by {bound[axis][1]}" for axis in wrong)
        fail(
            spec,
            f"{name} has shape {tuple(shape)}, should be {printed_shape(axes)} = {should}; "
            f"{reasons}{_layout_hint(spec, arguments)}",
        )


def _layout_hint(spec: OpSpec, arguments: Arguments) -> str:
    """Return which tensors of a call look as if they had axes in another order, as a text."""
    given: dict[str, Given] = {}
    for arg in spec.binding_order:
        value = arguments.value(arg.field)
        if isinstance(value, Tensor):
            # Without `next`, whose default Dynamo of torch 2.8 does not trace.
            fitting = [s.axes for s in arg.shapes if len(s.axes) == value.dim()]
            given[arg.name] = Given((*fitting, arg.axes)[0], tuple(value.shape))
    return layout_hint(spec, given)


def axes_of(spec: OpSpec, arg: TensorArg, arguments: Arguments) -> tuple[str, ...]:
    """Return the axes of an argument in one call: of the shape with its number of dimensions."""
    allowed = [s for s in arg.shapes if s.given and arguments.value(s.given) is not None]
    allowed = allowed or [s for s in arg.shapes if s.given is None]
    shape = arguments.value(arg.field).shape
    for one in allowed:
        if len(one.axes) == len(shape) or len(allowed) == 1:
            return one.axes
    should = " or ".join(printed_shape(one.axes) for one in allowed)
    fail(spec, f"{arg.name} has shape {tuple(shape)}, should be {should}")


def _bind_sequences(spec: OpSpec, arguments: Arguments, bound: dict[str, tuple[int, str]]) -> None:
    """Bind N = len(cu_seqlens) - 1 and check that the packed batch has one row."""
    cu_seqlens = arguments.value("cu_seqlens")
    if cu_seqlens.shape[0] < 1:
        fail(spec, "cu_seqlens is empty, should be 0, ..., T")
    if bound["B"][0] != 1:
        hint = _layout_hint(spec, arguments)
        fail(spec, f"q has B={bound['B'][0]} rows, should be 1 when cu_seqlens is given{hint}")
    bound["N"] = (cu_seqlens.shape[0] - 1, "cu_seqlens")
