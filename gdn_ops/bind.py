"""Arguments to `Call`: the only place where a call is checked and made canonical.

Every check is derived from the op's spec. A call that breaks it ends in a `SpecError`
whose text names the argument, what it is and what it should be.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gdn_ops.errors import SpecError, SpecTypeError
from gdn_ops.numerics import compute_dtype
from gdn_ops.spec import Attr, Interval, OpSpec, Rule, Sizes, TensorArg

CHECK_VALUES_EVERYWHERE = os.environ.get("GDN_OPS_CHECK", "") == "values"
"""Whether value ranges are checked on every device, not only on the CPU. Read at import."""

GRAD_NAMES = ("q", "k", "v", "alpha", "log_alpha", "beta", "state")
"""The differentiable tensors of a `Call`, in the order in which `Grads` lists them."""

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32")
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(slots=True, eq=False)
class Call:
    """One checked call, the same for both ops; what every backend receives. Never modified.

    Attributes:
        op: its spec.
        sizes: the value of every axis (T = 1 for a step).
        rule: the member of the family.
        scale: the factor on q, resolved.
        qk_l2norm: whether q and k are still to be normalised.
        chunk_size: as given; None leaves it to the backend.
        return_state: whether the caller wants the final state.
        inplace: whether a step updates `state` itself.
        needs_grad: whether any input needs a gradient.
        q, k: (B, T, H, K), or (B, H, K) for a step.
        v: (B, T, HV, V), or (B, HV, V).
        alpha, log_alpha: (B, T, HV), or (B, HV); one of them where the rule decays, else None.
        beta: like alpha, or None for 1.
        state: (N, HV, K, V), the initial state, or None for zeros.
        cu_seqlens: (N+1,), or None.
    """

    op: OpSpec
    sizes: Sizes
    rule: Rule
    scale: float
    qk_l2norm: bool
    chunk_size: int | None
    return_state: bool
    inplace: bool
    needs_grad: bool
    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    log_alpha: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of gates, solve and state."""
        return compute_dtype(self.q.dtype)

    @property
    def device(self) -> torch.device:
        """The device that every tensor is on."""
        return self.q.device

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the differentiable tensors, in the order of GRAD_NAMES."""
        return self.q, self.k, self.v, self.alpha, self.log_alpha, self.beta, self.state

    def with_tensors(self, *tensors: Tensor | None) -> Call:
        """Return the same call on other tensors, given in the order of GRAD_NAMES."""
        return replace(self, **dict(zip(GRAD_NAMES, tensors, strict=True)))  # type: ignore[arg-type]

    def describe(self) -> str:
        """Return one line for messages: `q bfloat16 (2, 4096, 16, 80) cuda:0 sm80, ...`."""
        parts = [f"q {dtype_name(self.q.dtype)} {tuple(self.q.shape)} {self.device}"]
        if self.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(self.device)
            parts[0] += f" sm{major}{minor}"
        parts.append(f"v {tuple(self.v.shape)}")
        parts.append(f"rule {self.rule}")
        if self.cu_seqlens is not None:
            parts.append(f"cu_seqlens of {self.sizes.N} sequences")
        if self.needs_grad:
            parts.append("gradients needed")
        return ", ".join(parts)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def bind(spec: OpSpec, arguments: Mapping[str, Any], *, check_values: bool = True) -> Call:
    """Check the arguments of one call against its spec.

    Args:
        spec: GATED_DELTA or GATED_DELTA_STEP.
        arguments: every argument of the public signature, by name.
        check_values: whether to look at values too. It happens for CPU tensors only, or on
            every device under GDN_OPS_CHECK=values; elsewhere a look costs a device sync.

    Returns:
        The canonical call.

    Raises:
        SpecError: an argument breaks the spec (SpecTypeError if its Python type does).
    """
    # A step costs tens of microseconds: what was checked once is not checked again, values aside.
    key = _structure(spec, arguments) if check_values else None
    found = _checked.get(key) if key is not None else None
    if found is None:
        found = _check_structure(spec, arguments)
        if key is not None and not _is_narrow(arguments["alpha"]):
            if len(_checked) >= MOST_CHECKED:
                _checked.clear()
            _checked[key] = found
    q, state = arguments["q"], arguments.get("initial_state", arguments.get("state"))
    if check_values and (q.device.type == "cpu" or CHECK_VALUES_EVERYWHERE):
        _check_values(spec, arguments, found.sizes)
    needs_grad = torch.is_grad_enabled() and any(
        arguments[name] is not None and arguments[name].requires_grad for name in spec.tensor
    )
    inplace = arguments.get("inplace", False)
    if inplace and needs_grad:
        _fail(spec, "inplace is True, should be False: gradients are needed")
    return Call(
        op=spec,
        sizes=found.sizes,
        rule=found.rule,
        scale=found.scale,
        qk_l2norm=arguments["qk_l2norm"],
        chunk_size=arguments.get("chunk_size"),
        return_state=arguments.get("return_state", True),
        inplace=inplace,
        needs_grad=needs_grad,
        q=q,
        k=arguments["k"],
        v=arguments["v"],
        alpha=arguments["alpha"],
        log_alpha=arguments["log_alpha"],
        beta=arguments["beta"],
        state=state,
        cu_seqlens=arguments.get("cu_seqlens"),
    )


class _Checked(NamedTuple):
    """What the structure of a call, shapes and dtypes and attributes, says."""

    sizes: Sizes
    rule: Rule
    scale: float


MOST_CHECKED = 4096
"""Structures remembered before all are forgotten."""

_checked: dict[tuple[Any, ...], _Checked] = {}


def _structure(spec: OpSpec, arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return everything about a call but its values, or None if it is not plain."""
    parts: list[Any] = [spec.name]
    add = parts.append
    for x in arguments.values():
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            add(x.shape)
            add(x.dtype)
            add(x.device)
            add(x.layout)
        elif x is None or kind in _PLAIN_TYPES:
            # 1, 1.0 and True are equal keys, but only one of them is a fine bool.
            add(kind)
            add(x)
        else:
            return None
    return tuple(parts)


_PLAIN_TYPES = frozenset((bool, int, float, str))


def _is_narrow(alpha: Any) -> bool:
    """Whether alpha is of a dtype that every call is warned of."""
    return alpha is not None and alpha.dtype in (torch.bfloat16, torch.float16)


def _check_structure(spec: OpSpec, arguments: Mapping[str, Any]) -> _Checked:
    """Check everything about a call but its values."""
    for attr in spec.attrs:
        _check_attr(spec, attr, arguments[attr.name])
    rule = spec.rule[arguments["rule"]]
    _check_gates(spec, rule, arguments)
    sizes = _check_tensors(spec, arguments)
    if arguments.get("inplace", False) and arguments["state"] is None:
        _fail(spec, "state is None, should be a torch.Tensor: inplace updates it")
    scale = arguments["scale"]
    return _Checked(sizes, rule, _default_scale(sizes.K) if scale is None else float(scale))


def _default_scale(key_width: int) -> float:
    return float(key_width) ** -0.5 if key_width else 1.0


def _fail(spec: OpSpec, message: str, error: type[SpecError] = SpecError) -> NoReturn:
    raise error(f"{spec.name}: {message}")


def _check_attr(spec: OpSpec, attr: Attr, value: Any) -> None:
    """Check the type, the choices and the range of one argument that is not a tensor."""
    name = attr.name
    if attr.type == "str":
        should = f"one of {', '.join(map(str, attr.choices))}" if attr.choices else "a string"
        if not isinstance(value, str):
            _fail(spec, f"{name} {_shown(value)}, should be {should}", SpecTypeError)
        if attr.choices and value not in attr.choices:
            _fail(spec, f"{name} is {value!r}, should be {should}")
    elif attr.type == "bool":
        if not isinstance(value, bool):
            _fail(spec, f"{name} {_shown(value)}, should be True or False", SpecTypeError)
    elif value is None:
        return
    elif attr.type == "int | None":
        if isinstance(value, bool) or not isinstance(value, int):
            _fail(spec, f"{name} {_shown(value)}, should be a positive integer", SpecTypeError)
        if value < 1:
            _fail(spec, f"{name} is {value}, should be a positive integer")
    else:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _fail(spec, f"{name} {_shown(value)}, should be a finite number", SpecTypeError)
        if not abs(value) <= sys.float_info.max:
            _fail(spec, f"{name} is {value}, should be a finite number")


def _shown(value: Any) -> str:
    """Return "is 1.5" for a plain value and "has type list" for anything larger."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"is {value!r}"
    return f"has type {type(value).__name__}"


def _check_gates(spec: OpSpec, rule: Rule, arguments: Mapping[str, Any]) -> None:
    """Check that there is one decay gate where the rule has a decay, and none elsewhere."""
    given = [name for name in ("alpha", "log_alpha") if arguments[name] is not None]
    if rule.has_decay and not given:
        _fail(
            spec,
            f"alpha and log_alpha are both missing, should be exactly one of them: "
            f"rule {rule.name!r} has a decay",
        )
    if rule.has_decay and len(given) == 2:
        _fail(spec, "alpha and log_alpha are both given, should be exactly one of them")
    if not rule.has_decay and given:
        _fail(spec, f"{given[0]} is given, should be None: rule {rule.name!r} has no decay")


def _check_tensors(spec: OpSpec, arguments: Mapping[str, Any]) -> Sizes:
    """Check type, rank, dtype, device and shape of every tensor and return the axes."""
    bound: dict[str, tuple[int, str]] = {}
    reference: Tensor | None = None
    for arg in spec.binding_order:
        value = arguments[arg.name]
        if value is None:
            if not arg.optional:
                _fail(spec, f"{arg.name} is None, should be a torch.Tensor", SpecTypeError)
            continue
        if not isinstance(value, Tensor):
            _fail(spec, f"{arg.name} {_shown(value)}, should be a torch.Tensor", SpecTypeError)
        if value.layout is not torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            _fail(spec, f"{arg.name} has layout {layout}, should be strided")
        _check_dtype(spec, arg, value, arguments)
        if reference is None:
            reference = value
        elif value.device != reference.device:
            _fail(
                spec,
                f"{arg.name} is on {value.device}, should be on {reference.device}, "
                f"the device of q",
            )
        _check_shape(spec, arg, value, bound)
        if arg.name == "cu_seqlens":
            _bind_sequences(spec, value, bound)
    for axis in spec.axes:
        size, holder = bound.get(axis.name, (axis.minimum, ""))
        if axis.minimum and size < axis.minimum:
            _fail(spec, f"{holder} has {axis}={size}, should be at least {axis.minimum}")
    for constraint in spec.constraints:
        count, of = bound[constraint.axis][0], bound[constraint.of][0]
        if count % of:
            _fail(
                spec,
                f"{constraint.holder} has {constraint.axis}={count} {constraint.meaning}, "
                f"should be a multiple of {constraint.of}={of}",
            )
    sizes = {name: bound[name][0] for name in bound if name != "N1"}
    sizes.setdefault("T", 1)
    sizes.setdefault("N", sizes["B"])
    return Sizes(**sizes)


def _check_dtype(spec: OpSpec, arg: TensorArg, value: Tensor, arguments: Mapping[str, Any]) -> None:
    name = _DTYPE_NAMES.get(value.dtype)
    if name not in arg.dtypes:
        allowed = ", ".join(arg.dtypes)
        _fail(spec, f"{arg.name} has dtype {dtype_name(value.dtype)}, should be one of {allowed}")
    if arg.same_dtype_as is not None:
        other = arguments[arg.same_dtype_as].dtype
        if value.dtype != other:
            _fail(
                spec,
                f"{arg.name} has dtype {name}, should be {dtype_name(other)}, "
                f"the dtype of {arg.same_dtype_as}",
            )
    elif value.dtype == torch.float64 and arguments["q"].dtype != torch.float64:
        _fail(
            spec,
            f"{arg.name} has dtype float64, should be float32: "
            f"q is {dtype_name(arguments['q'].dtype)}",
        )
    elif arg.name == "alpha" and _is_narrow(value):
        step = 8 if value.dtype == torch.bfloat16 else 11
        warnings.warn(
            f"{spec.name}: alpha is {name}, which has no value between 1 - 2**-{step} and 1; "
            f"pass it as float32, or pass log_alpha=",
            stacklevel=6,
        )


def _check_shape(
    spec: OpSpec, arg: TensorArg, value: Tensor, bound: dict[str, tuple[int, str]]
) -> None:
    """Check rank and sizes of one tensor; axes not seen before are bound to its sizes."""
    shape = value.shape
    if len(shape) != len(arg.axes):
        _fail(
            spec,
            f"{arg.name} has shape {tuple(shape)}, should be {arg.shape}: "
            f"{len(arg.axes)} dimension{'s' if len(arg.axes) != 1 else ''}, not {len(shape)}",
        )
    wrong: list[str] = []
    for axis, size in zip(arg.axes, shape, strict=True):
        known = bound.get(axis)
        if known is None:
            bound[axis] = known = bound["B"] if axis == "N" else (size, arg.name)
        if known[0] != size:
            wrong.append(axis)
    if wrong:
        should = tuple(bound[axis][0] for axis in arg.axes)
        reasons = ", ".join(f"{axis} is fixed by {bound[axis][1]}" for axis in wrong)
        _fail(
            spec,
            f"{arg.name} has shape {tuple(shape)}, should be {arg.shape} = {should}; {reasons}",
        )


def _bind_sequences(spec: OpSpec, cu_seqlens: Tensor, bound: dict[str, tuple[int, str]]) -> None:
    """Bind N = len(cu_seqlens) - 1 and check that the packed batch has one row."""
    if cu_seqlens.shape[0] < 1:
        _fail(spec, "cu_seqlens is empty, should be 0, ..., T")
    if bound["B"][0] != 1:
        _fail(spec, f"q has B={bound['B'][0]} rows, should be 1 when cu_seqlens is given")
    bound["N"] = (cu_seqlens.shape[0] - 1, "cu_seqlens")


def _check_values(spec: OpSpec, arguments: Mapping[str, Any], sizes: Sizes) -> None:
    """Check domains and sequence boundaries. NaN passes: NaN in, NaN out."""
    for arg in spec.tensors:
        value = arguments[arg.name]
        if arg.domain is None or value is None or value.numel() == 0:
            continue
        smallest, largest = torch.aminmax(value.detach() if value.requires_grad else value)
        low, high = smallest.item(), largest.item()
        if low < arg.domain.low or high > arg.domain.high:
            hint = ""
            if arg.name == "alpha" and low < 0:
                hint = "; log-space gates go in log_alpha="
            elif arg.name == "log_alpha" and low >= 0:
                hint = "; gates in [0, 1] go in alpha="
            values = f"[{_digits(low, arg.domain)}, {_digits(high, arg.domain)}]"
            _fail(spec, f"{arg.name} has values in {values}, should be in {arg.domain}{hint}")
    boundaries = arguments.get("cu_seqlens")
    if boundaries is not None:
        _check_boundaries(spec, boundaries.tolist(), sizes.T)


def _digits(value: float, domain: Interval) -> str:
    """Return a value in four digits, or in as many as show that it is outside its domain."""
    inside = domain.low <= value <= domain.high
    texts = (f"{value:.{digits}g}" for digits in (4, 9, 17))
    return next(t for t in texts if (domain.low <= float(t) <= domain.high) == inside)


def _check_boundaries(spec: OpSpec, boundaries: list[int], tokens: int) -> None:
    if boundaries[0] != 0:
        _fail(spec, f"cu_seqlens starts with {boundaries[0]}, should start with 0")
    for i in range(1, len(boundaries)):
        if boundaries[i] < boundaries[i - 1]:
            _fail(
                spec,
                f"cu_seqlens decreases at index {i} ({boundaries[i - 1]} to {boundaries[i]}), "
                f"should be non-decreasing",
            )
    if boundaries[-1] != tokens:
        _fail(spec, f"cu_seqlens ends with {boundaries[-1]}, should end with T = {tokens}")
