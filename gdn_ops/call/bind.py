"""Bind arguments to a `Call`: the only place where a call is checked and made canonical.

The checks, all derived from the op's spec, stand in `structure` and `values`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.numerics import compute_dtype
from gdn_ops.call.structure import Structure, check_gradients, check_structure, is_narrow
from gdn_ops.call.structure import dtype_name as dtype_name
from gdn_ops.call.values import check_tensor_values
from gdn_ops.spec.language import OpSpec, Rule, Sizes

CHECK_VALUES_EVERYWHERE = os.environ.get("GDN_OPS_CHECK", "") == "values"
"""Whether value ranges are checked on every device, not only on the CPU. Read at import."""

GRAD_NAMES = ("q", "k", "v", "alpha", "log_alpha", "beta", "state")
"""The differentiable tensors of a `Call`, in the order in which `Grads` lists them."""


@dataclass(slots=True, eq=False)
class Call:
    """Hold one checked call of any op, as every backend receives it. Never modified.

    Attributes:
        op: its spec.
        sizes: the value of every axis (T = 1 for a step).
        rule: the member of the family.
        scale: the factor on q, resolved.
        qk_l2norm: whether q and k are still to be normalised.
        chunk_size: as given; None leaves it to the backend.
        return_state: whether the caller wants the final state.
        return_states: whether the caller of `gated_delta_steps` wants the state after each token.
        inplace: whether a decode op updates `state` itself.
        needs_grad: whether any input needs a gradient.
        q, k: (B, T, H, K), or (B, H, K) for a step.
        v: (B, T, HV, V), or (B, HV, V).
        alpha, log_alpha: (B, T, HV), or (B, HV); one of them where the rule decays, else None.
        beta: like alpha, or None for 1.
        state: (N, HV, K, V), the initial state, or None for zeros; a pool (P, HV, K, V) where
            there are state_indices.
        cu_seqlens: (N+1,), or None.
        state_indices: (B,), the slot of the pool that a row reads and updates, every slot at
            most once; -1 where the row is skipped; or None.
    """

    op: OpSpec
    sizes: Sizes
    rule: Rule
    scale: float
    qk_l2norm: bool
    chunk_size: int | None
    return_state: bool
    return_states: bool
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
    state_indices: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of gates, solve and state."""
        return compute_dtype(self.q.dtype)

    @property
    def device(self) -> torch.device:
        """Return the device that every tensor is on."""
        return self.q.device

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the differentiable tensors, in the order of GRAD_NAMES."""
        return self.q, self.k, self.v, self.alpha, self.log_alpha, self.beta, self.state

    def with_tensors(self, *tensors: Tensor | None) -> Call:
        """Return the same call on other tensors, given in the order of GRAD_NAMES."""
        return replace(self, **dict(zip(GRAD_NAMES, tensors, strict=True)))  # type: ignore[arg-type]

    def on_own_pool(self) -> Call:
        """Return the call made in place, on a copy of the pool if the caller's must not change."""
        if self.inplace:
            return self
        assert self.state is not None
        return replace(self, state=self.state.clone(), inplace=True)

    def describe(self) -> str:
        """Return the call as a line for messages: `q bfloat16 (2, 4096, 16, 80) cuda:0, ...`."""
        parts = [f"q {dtype_name(self.q.dtype)} {tuple(self.q.shape)} {self.device}"]
        if self.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(self.device)
            parts[0] += f" sm{major}{minor}"
        parts.append(f"v {tuple(self.v.shape)}")
        parts.append(f"rule {self.rule}")
        if self.cu_seqlens is not None:
            parts.append(f"cu_seqlens of {self.sizes.N} sequences")
        if self.state_indices is not None and self.state is not None:
            parts.append(f"state_indices into a pool of {self.state.shape[0]}")
        if self.needs_grad:
            parts.append("gradients needed")
        return ", ".join(parts)


def bind(spec: OpSpec, arguments: Mapping[str, Any], *, check_values: bool = True) -> Call:
    """Check the arguments of one call against its spec.

    Args:
        spec: the op.
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
        found = check_structure(spec, arguments)
        if key is not None and not is_narrow(arguments["alpha"]):
            if len(_checked) >= MOST_CHECKED:
                _checked.clear()
            _checked[key] = found
    q, state = arguments["q"], arguments.get("initial_state", arguments.get("state"))
    if check_values and (q.device.type == "cpu" or CHECK_VALUES_EVERYWHERE):
        check_tensor_values(spec, arguments, found.sizes)
    needs_grad = torch.is_grad_enabled() and any(
        arguments[name] is not None and arguments[name].requires_grad for name in spec.tensor
    )
    if needs_grad:
        check_gradients(spec, arguments)
    return Call(
        op=spec,
        sizes=found.sizes,
        rule=found.rule,
        scale=found.scale,
        qk_l2norm=arguments["qk_l2norm"],
        chunk_size=arguments.get("chunk_size"),
        return_state=arguments.get("return_state", True),
        return_states=arguments.get("return_states", False),
        inplace=arguments.get("inplace", False),
        needs_grad=needs_grad,
        q=q,
        k=arguments["k"],
        v=arguments["v"],
        alpha=arguments["alpha"],
        log_alpha=arguments["log_alpha"],
        beta=arguments["beta"],
        state=state,
        cu_seqlens=arguments.get("cu_seqlens"),
        state_indices=arguments.get("state_indices"),
    )


MOST_CHECKED = 4096
"""Forget all checked structures when there are so many."""

_checked: dict[tuple[Any, ...], Structure] = {}


def _structure(spec: OpSpec, arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return a key for all of a call but tensor values, or None for an unusual argument type."""
    parts: list[Any] = [spec.name]
    add = parts.append
    for x in arguments.values():
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            add(x.shape)
            add(x.dtype)
            add(x.device)
            add(x.layout)
        elif x is None:
            add(x)
        elif kind in _PLAIN_TYPES:
            # 1, 1.0 and True are equal keys, but only one of them is a fine bool.
            add(kind)
            add(x)
        else:
            return None
    return tuple(parts)


_PLAIN_TYPES = frozenset((bool, int, float, str))
