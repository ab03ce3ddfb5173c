"""Bind arguments to a `Call`: the only place where a call is checked and made canonical.

The checks are derived from the op's spec. Those of shapes, dtypes and attributes stand in
`structure`, and are made once for every combination of them; those of every call stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from gdn_ops.call import transforms
from gdn_ops.call.memory import check_updatable
from gdn_ops.call.scalars import as_python
from gdn_ops.call.structure import Structure, check_structure, fail, is_narrow
from gdn_ops.call.structure import dtype_name as dtype_name
from gdn_ops.call.transforms import NONE, Transforms
from gdn_ops.call.values import are_readable
from gdn_ops.call.values import check_values as check_values_of
from gdn_ops.spec.language import OpSpec, Sizes
from gdn_ops.spec.rules import Rule, Widths


class Tokens(NamedTuple):
    """Hold the tensors of a call that have a row per token.

    Attributes:
        q, k: (B, T, H, K), or (B, H, K) for a step.
        v: (B, T, HV, V), or (B, HV, V).
        alpha, log_alpha: (B, T, HV), or (B, HV), or with a last axis K for a decay of every
            channel; one of them where the rule decays, else None.
        beta: (B, T, HV), or (B, HV), or None for 1.
        erase: like alpha, write: (B, T, HV), or (B, HV), or with a last axis V: in place of beta.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None = None
    log_alpha: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Return the results of a function of every tensor that is there."""
        return Tokens(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


class Targets(NamedTuple):
    """Hold tensors that a backend may write results to and return, in place of new ones.

    They are views of larger ones, shaped like the results, their last axis contiguous. A backend
    that knows nothing of them returns tensors of its own.

    Attributes:
        o: (B, T, HV, V), of a forward.
        q, k, v, alpha, log_alpha, beta, erase, write: for the gradients of those, of a backward.
        saved: like what `Backend.saved_like` returns, contiguous, of a forward.
    """

    o: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    alpha: Tensor | None = None
    log_alpha: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None
    saved: tuple[Tensor, ...] | None = None

    @property
    def of_tokens(self) -> tuple[Tensor | None, ...]:
        """Return those for gradients, in the order of the tokens."""
        return self[1:9]


class Arguments(NamedTuple):
    """Hold the arguments of one call of any op as its caller gave them: nothing is checked yet.

    The attributes are those of the public functions; what an op does not have keeps its default.
    `state` is the argument `state` or `initial_state`.
    """

    tokens: Tokens
    state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    state_indices: Tensor | None = None
    rule: str = "gated_delta"
    scale: float | None = None
    qk_l2norm: bool = False
    chunk_size: int | None = None
    return_state: bool = True
    return_states: bool = False
    inplace: bool = False
    backend: str = "auto"

    def value(self, field: str) -> Any:
        """Return an argument by its name, which for either name of the state is "state"."""
        return getattr(self.tokens if field in Tokens._fields else self, field)


def with_python_numbers(arguments: Arguments) -> Arguments:
    """Return arguments with numbers of other libraries, as numpy's scalars, as Python's.

    Under a compiler they are left to it: it knows them as tensors.
    """
    if torch.compiler.is_compiling():
        return arguments
    tokens, state, cu_seqlens, state_indices, *attributes = arguments
    return Arguments(tokens, state, cu_seqlens, state_indices, *map(as_python, attributes))


def arguments_of(spec: OpSpec, named: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call, given by their names in the public signature.

    Args:
        spec: the op.
        named: its arguments; those left out have their default, tensors None.

    Raises:
        TypeError: the op has no argument of some name.
    """
    fields = {arg.name: arg.field for arg in spec.bound}
    unknown = set(named) - set(fields)
    if unknown:
        raise TypeError(f"{spec.name} has no argument {', '.join(sorted(unknown))}")
    given: dict[str, Any] = {attr.name: attr.default for attr in spec.attrs}
    given.update((fields[name], x) for name, x in named.items())
    tokens = Tokens(*(given.pop(field, None) for field in Tokens._fields))
    return Arguments(tokens, **given)


@dataclass(slots=True, eq=False)
class Call:
    """Hold one checked call of any op, as every backend receives it. Never modified.

    Attributes:
        op: its spec.
        sizes: the value of every axis (T = 1 for a step).
        rule: the member of the family.
        widths: how its gates act: by a number per head, per channel, or not at all.
        device: the device that every tensor is on.
        compute_dtype: the dtype of gates, solve and state.
        scale: the factor on q, resolved.
        qk_l2norm: whether q and k are still to be normalised.
        chunk_size: as given; None leaves it to the backend.
        return_state: whether the caller wants the final state.
        return_states: whether the caller of `gated_delta_steps` wants the state after each token.
        inplace: whether a decode op updates `state` itself.
        needs_grad: whether any input needs a gradient.
        tokens: q, k, v and the gates.
        state: (N, HV, K, V), the initial state, or None for zeros; a pool (P, HV, K, V) where
            there are state_indices.
        cu_seqlens: (N+1,), or None.
        state_indices: (B,), the slot of the pool that a row reads and updates, every slot at
            most once; -1 where the row is skipped; or None.
        transforms: what of torch.func and of forward mode concerns its tensors.
        is_part: whether it is one of many parts of a call, which are computed at the same time:
            then it need not be cut for cores that compute others.
        targets: where its results may be written.
    """

    op: OpSpec
    sizes: Sizes
    rule: Rule
    widths: Widths
    device: torch.device
    compute_dtype: torch.dtype
    scale: float
    qk_l2norm: bool
    chunk_size: int | None
    return_state: bool
    return_states: bool
    inplace: bool
    needs_grad: bool
    tokens: Tokens
    state: Tensor | None
    cu_seqlens: Tensor | None
    state_indices: Tensor | None
    transforms: Transforms = NONE
    is_part: bool = False
    targets: Targets | None = None

    @property
    def has_tokens(self) -> bool:
        """Return whether there are tokens, without which no kernel is launched."""
        return min(self.sizes.B * self.sizes.T, self.sizes.N) > 0

    def with_tensors(self, tokens: Tokens, state: Tensor | None) -> Call:
        """Return the same call on other tensors."""
        return replace(self, tokens=tokens, state=state)

    def without_memory(self) -> Call:
        """Return the same call on tensors that have shapes, strides and dtypes, but no values."""
        state, boundaries, slots = self.state, self.cu_seqlens, self.state_indices
        return replace(
            self,
            tokens=self.tokens.map(_without_memory),
            state=None if state is None else _without_memory(state),
            cu_seqlens=None if boundaries is None else _without_memory(boundaries),
            state_indices=None if slots is None else _without_memory(slots),
        )

    def on_own_pool(self) -> Call:
        """Return the call made in place, on a copy of the pool if the caller's must not change."""
        if self.inplace:
            return self
        assert self.state is not None
        return replace(self, state=self.state.clone(), inplace=True)

    def describe(self) -> str:
        """Return the call as a line for messages: `q bfloat16 (2, 4096, 16, 80) cuda:0, ...`."""
        q, v = self.tokens.q, self.tokens.v
        parts = [f"q {dtype_name(q.dtype)} {tuple(q.shape)} {self.device}"]
        if self.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(self.device)
            parts[0] += f" sm{major}{minor}"
        parts.append(f"v {tuple(v.shape)}")
        parts.append(f"rule {self.rule}")
        if self.cu_seqlens is not None:
            parts.append(f"cu_seqlens of {self.sizes.N} sequences")
        if self.state_indices is not None and self.state is not None:
            parts.append(f"state_indices into a pool of {self.state.shape[0]}")
        if self.needs_grad:
            parts.append("gradients needed")
        if self.transforms.has_tangent:
            parts.append("forward-mode tangents")
        if self.transforms.maps:
            parts.append("mapped by vmap")
        return ", ".join(parts)

    def __getattr__(self, name: str) -> Any:
        """Say where a tensor is that a backend looks for where it was before."""
        where = f": it is call.tokens.{name}" if name in Tokens._fields else ""
        raise AttributeError(f"Call has no attribute {name!r}{where}")


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def bind(
    spec: OpSpec,
    arguments: Arguments,
    key: Signature | None = None,
    *,
    check_values: bool = True,
    sees_transforms: bool | None = None,
) -> Call:
    """Check the arguments of one call against its spec.

    Args:
        spec: the op.
        arguments: those of the call.
        key: their signature, if it is known.
        check_values: whether to look at values too. It happens for CPU tensors only, or on
            every device under GDN_OPS_CHECK=values; elsewhere a look costs a device sync.
        sees_transforms: whether to ask what transforms concern the tensors; None asks if values
            are checked. While Dynamo traces nobody can ask.

    Returns:
        The canonical call.

    Raises:
        SpecError: an argument breaks the spec (SpecTypeError if its Python type does).
    """
    # A step costs tens of microseconds: what was checked once is not checked again, values aside.
    if key is None and check_values:
        key = signature(spec, arguments)
    if key is None:
        arguments, key = _in_python(spec, arguments, check_values)
    checked = _checked_structure(spec, arguments, key)
    under, asks = NONE, check_values if sees_transforms is None else sees_transforms
    if asks and (transforms.any_active() or forward_ad._current_level >= 0):
        arguments, under = _seen_through(spec, arguments)
    if arguments.inplace and arguments.state is not None:
        check_updatable(spec, arguments.state, check_values)
    if check_values and key is None:
        arguments = _without_negation(arguments)
    is_readable = check_values and are_readable(checked.device)
    if is_readable and not (transforms.modes() and transforms.is_recording()):
        check_values_of(spec, arguments, checked.sizes, under)
    needs_grad = torch.is_grad_enabled() and (requires_grad(arguments) or under.differentiates)
    if needs_grad:
        check_gradients(spec, arguments)
    return Call(
        spec,
        *checked,
        qk_l2norm=arguments.qk_l2norm,
        chunk_size=arguments.chunk_size,
        return_state=arguments.return_state,
        return_states=arguments.return_states,
        inplace=arguments.inplace,
        needs_grad=needs_grad,
        tokens=arguments.tokens,
        state=arguments.state,
        cu_seqlens=arguments.cu_seqlens,
        state_indices=arguments.state_indices,
        transforms=under,
    )


def _in_python(
    spec: OpSpec, arguments: Arguments, check_values: bool
) -> tuple[Arguments, Signature | None]:
    """Return arguments with Python's numbers, and their signature if there is one."""
    arguments = with_python_numbers(arguments)
    return arguments, signature(spec, arguments) if check_values else None


Signature = tuple[Any, ...]
"""A key for all of a call but the values and the addresses of its tensors."""

_PLAIN_TYPES = frozenset((bool, int, float, str, type(None)))


def signature(spec: OpSpec, arguments: Arguments) -> Signature | None:
    """Return the signature of a call, whose checks and choices can be remembered by it.

    Returns:
        The key, or None for a call with an argument of an unusual type, or a tensor whose memory
        does not hold its values one by one: nested, sparse, or a negated view.
    """
    if torch.compiler.is_compiling():
        return None
    tokens, state, cu_seqlens, state_indices, *attributes = arguments
    kinds = tuple(map(type, attributes))
    if not _PLAIN_TYPES.issuperset(kinds):
        return None
    # 1, 1.0 and True are equal, but only one of them is a fine bool.
    parts: list[Any] = [spec.name, kinds, *attributes]
    strided = torch.strided
    # Every call comes here, and a question costs 0.1 us: only what tells calls apart is asked.
    for x in (*tokens, state, cu_seqlens, state_indices):
        if x is None:
            parts.append(None)
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return None
        if x.layout is not strided or x.is_neg() or x.is_nested:
            return None
        parts += (x.shape, x.is_contiguous() or x.stride(), x.dtype, x.is_cpu or x.device)
    return tuple(parts)


MOST_CHECKED = 4096
"""Forget all checked structures when there are so many."""

_checked: dict[Signature, Structure] = {}


def _checked_structure(spec: OpSpec, arguments: Arguments, key: Signature | None) -> Structure:
    """Return what follows from the structure of a call, checked unless its signature is known."""
    checked = _checked.get(key) if key is not None else None
    if checked is None:
        checked = check_structure(spec, arguments)
        if key is not None and not is_narrow(arguments.tokens.alpha):
            if len(_checked) >= MOST_CHECKED:
                _checked.clear()
            _checked[key] = checked
    return checked


def _without_negation(arguments: Arguments) -> Arguments:
    """Return arguments whose memory holds their values: kernels do not see that a view negates."""
    tokens, state = arguments.tokens, arguments.state
    if not any([x is not None and x.is_neg() for x in (*tokens, state)]):
        return arguments
    state = None if state is None else state.resolve_neg()
    return arguments._replace(tokens=tokens.map(Tensor.resolve_neg), state=state)


def requires_grad(arguments: Arguments) -> bool:
    """Return whether any tensor of a call requires a gradient."""
    tokens, state, cu_seqlens, state_indices, *_ = arguments
    for x in (*tokens, state, cu_seqlens, state_indices):
        if x is not None and x.requires_grad:
            return True
    return False


def check_gradients(spec: OpSpec, arguments: Arguments) -> None:
    """Check that a call that needs gradients can have them."""
    if arguments.inplace:
        fail(spec, "inplace is True, should be False: gradients are needed")
    if arguments.state_indices is not None:
        fail(
            spec,
            "state_indices is for decoding: it is given, should be None where gradients are "
            "needed; decode under torch.no_grad()",
        )
    for arg in spec.tensors:
        x = arguments.value(arg.field)
        if x is not None and x.requires_grad and not arg.differentiable:
            fail(
                spec,
                f"{arg.name} requires a gradient, should not: {spec.name} is for decoding, under "
                f"torch.no_grad(); gated_delta has gradients",
            )


def _seen_through(spec: OpSpec, arguments: Arguments) -> tuple[Arguments, Transforms]:
    """Return arguments whose integers have values, and what transforms concern the rest.

    Raises:
        SpecError: a transform concerns an argument that it cannot.
    """
    given = {arg.name: arguments.value(arg.field) for arg in spec.tensors}
    under = transforms.transforms_of(x for x in given.values() if x is not None)
    if not (under.maps or under.differentiates or under.has_tangent):
        return arguments, NONE
    if arguments.inplace:
        fail(spec, "inplace is True, should be False under vmap, grad, vjp and jvp")
    if arguments.state_indices is not None and (under.maps or under.has_tangent):
        fail(
            spec,
            "state_indices is for decoding: it is given, should be None under vmap and jvp; give "
            "the rows of the pool as state",
        )
    for arg in spec.tensors:
        x = given[arg.name]
        if x is None or arg.differentiable:
            continue
        if x.is_floating_point():
            own = transforms.transforms_of((x,))
            if own.has_tangent or (own.differentiates and torch.is_grad_enabled()):
                what = "has a tangent" if own.has_tangent else "requires a gradient"
                fail(
                    spec,
                    f"{arg.name} {what}, should not: {spec.name} is for decoding, under "
                    f"torch.no_grad(); gated_delta has derivatives",
                )
        elif transforms.is_mapped(x):
            fail(
                spec,
                f"{arg.name} is mapped by vmap, should be the same for all: give it in_dims None",
            )
    if arguments.cu_seqlens is not None:
        arguments = arguments._replace(cu_seqlens=transforms.innermost(arguments.cu_seqlens))
    return arguments, under
