"""Check arguments that bear FLA's names, and bring their dtypes to what the ops take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.nn.values import check_floats, has_values
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.rules import FLOAT_DTYPES

OLDER_NAMES = {
    "offsets": "cu_seqlens",
    "BT": "chunk_size of chunk_gated_delta_rule",
    "alpha": "g, which is log α",
    "log_alpha": "g",
    "gate": "g",
    "gk": "g of chunk_kda, or gk of fused_recurrent_gated_delta_rule",
    "beta": "b and w of chunk_gdn2",
    "erase": "b of chunk_gdn2",
    "write": "w of chunk_gdn2",
    "gv": "left out: a decay of every value channel is not supported",
    "return_state": "output_final_state",
    "qk_l2norm": "use_qk_l2norm_in_kernel",
    "backend": "left out: gdn_ops.use_backend sets one, and gated_delta takes one",
    "ssm_state_indices": "left out: gdn_ops.gated_delta_step takes a pool of states",
    "inplace_final_state": "left out: gdn_ops.gated_delta_step updates a state in place",
}
"""Says what is meant by names of other versions and of other functions."""

FLOATS = tuple(getattr(torch, name) for name in FLOAT_DTYPES)
"""The dtypes of tokens and gates."""

POSITIONS = {"use_beta_sigmoid_in_kernel": "cu_seqlens"}
"""Names what older versions of FLA have in the place of an argument."""


NOT_PER_HEAD = ("chunk_gdn2", "fused_recurrent_gdn2", "chunk_gla", "fused_recurrent_gla")
"""Functions that have no sibling here which takes one decay per head."""

TOKENS = ("q", "k", "v")
"""Arguments that every function needs."""

GATES = ("g", "gk", "beta", "b", "w")
"""Arguments over the tokens that a function may have none of, or may be given as None."""

TENSORS = (*TOKENS, *GATES, "initial_state", "A_log", "dt_bias")
"""Arguments that are tensors; some functions lack some of them."""

SWITCHES = (
    *("output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel"),
    *("use_beta_sigmoid_in_kernel", "allow_neg_eigval"),
)
"""Arguments that are True or False."""


def check_kinds(function: str, arguments: dict[str, Any]) -> None:
    """Check that tensors are tensors and switches are switches.

    Args:
        function: what messages start with.
        arguments: at least the TOKENS, by name; what is not there is not checked.

    Raises:
        SpecError: one of them is something else, or tokens or gates have a dtype that the ops do
            not take.
    """
    for name in TENSORS:
        value = arguments.get(name)
        if not isinstance(value, Tensor) and (value is not None or name in TOKENS):
            text = f"{name} has type {type(value).__name__}, should be a torch.Tensor"
            raise SpecTypeError(f"{function}: {text}")
        if name in TOKENS + GATES and value is not None and value.dtype not in FLOATS:
            raise SpecError(
                f"{function}: {name} has dtype {dtype_name(value.dtype)}, should be one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )
    check_switches(function, **{name: arguments.get(name) for name in SWITCHES})


def required(function: str, name: str, value: Tensor | None, why: str | None = None) -> Tensor:
    """Return an argument that may not be None here.

    Raises:
        SpecError: it is None.
    """
    if value is None:
        reason = "" if why is None else f": {why}"
        raise SpecError(f"{function}: {name} is None, should be a torch.Tensor{reason}")
    return value


def check_heads(function: str, g: Tensor | None) -> None:
    """Check that a gate is one decay per head.

    Raises:
        SpecError: it has a channel axis.
    """
    if g is not None and g.dim() == 4:
        raise SpecError(
            f"{function}: g has shape {tuple(g.shape)}, should be (B, T, HV): chunk_kda and "
            f"fused_recurrent_kda take a decay of every key channel"
        )


def check_channels(
    function: str, name: str, gate: Tensor, q: Tensor, v: Tensor, has_domain: bool = True
) -> None:
    """Check a decay of every key channel, and on a CPU its values, which are log α.

    Args:
        function: what messages start with.
        name: of the gate.
        gate: should be (B, T, HV, K).
        q, v: the tokens; their own ranks are checked elsewhere.
        has_domain: whether values are log α, and not raw.

    Raises:
        SpecError: the gate has another shape, or other values.
    """
    shape = tuple(gate.shape)
    expected = (*v.shape[:3], q.shape[-1]) if q.dim() == v.dim() == 4 else shape
    if shape != expected or gate.dim() != 4:
        other = "gdn_ops.gated_delta" if function in NOT_PER_HEAD else "chunk_gated_delta_rule"
        hint = f": {other} takes one decay per head" if gate.dim() == 3 else ""
        raise SpecError(
            f"{function}: {name} has shape {shape}, should be (B, T, HV, K) = {expected}{hint}"
        )
    if has_domain:
        check_logarithm(function, name, gate)


def check_gate(
    function: str, name: str, gate: Tensor, axes: str, expected: tuple[int, ...]
) -> None:
    """Check the shape of a gate, or of another tensor over the tokens.

    Args:
        function: what messages start with.
        name: of the tensor.
        gate: the tensor.
        axes: the letters of that shape.
        expected: that shape.

    Raises:
        SpecError: it has another shape.
    """
    shape = tuple(gate.shape)
    if shape != tuple(expected):
        text = f"{name} has shape {shape}, should be {axes} = {tuple(expected)}"
        raise SpecError(f"{function}: {text}")


def check_logarithm(function: str, name: str, gate: Tensor) -> None:
    """Check on a CPU that a gate is log α.

    Raises:
        SpecError: it has positive values.
    """
    if not gate.numel() or not has_values(gate):
        return
    low, high = (float(x) for x in gate.detach().aminmax())
    if high > 0:
        raise SpecError(
            f"{function}: {name} has values in [{low:.4g}, {high:.4g}], should be in [-inf, 0]: "
            f"it is log α; from α, {name} = alpha.log()"
        )


def check_packing(function: str, cu_seqlens: Any, **derived: Any) -> None:
    """Check what is derived from the boundaries of packed sequences.

    Args:
        function: what messages start with.
        cu_seqlens: the boundaries.
        derived: copies of them, and indices, by name.

    Raises:
        SpecError: something is given without the boundaries, or `cu_seqlens_cpu` has other ones.
    """
    for name, value in derived.items():
        if value is not None and cu_seqlens is None:
            raise SpecError(
                f"{function}: {name} is given without cu_seqlens, should be given with it: packed "
                f"sequences would run into each other"
            )
    copied = derived["cu_seqlens_cpu"]
    if all(isinstance(x, Tensor) and has_values(x) for x in (cu_seqlens, copied)):
        here, there = copied.tolist(), cu_seqlens.tolist()
        if here != there:
            raise SpecError(
                f"{function}: cu_seqlens_cpu has boundaries {here}, should be those of cu_seqlens, "
                f"{there}"
            )


def check_switches(function: str, **values: Any) -> None:
    """Check arguments that are True, False or None, which acts as False, as in FLA.

    Raises:
        SpecTypeError: one of them is something else.
    """
    for name, value in values.items():
        if value is None or isinstance(value, int):
            continue
        place = ""
        if isinstance(value, Tensor) and name in POSITIONS:
            place = f"; older versions of FLA have {POSITIONS[name]} in this place: pass it by name"
        raise SpecTypeError(
            f"{function}: {name} has type {type(value).__name__}, should be True or False{place}"
        )


def check_gate_parameter(function: str, name: str, value: Tensor, g: Tensor) -> None:
    """Check a parameter of the gate of g (B, T, HV) or (B, T, HV, K).

    Raises:
        SpecError: it has another shape, is no float, or is on another device.
    """
    check_floats(function, **{name: value})
    text = ""
    heads = g.shape[2:3]
    shapes, should = [tuple(heads)], f"(HV,) = {tuple(heads)}"
    if g.dim() == 4 and name == "dt_bias":
        shapes = [(heads.numel() * g.shape[3],), tuple(g.shape[2:])]
        should = f"(HV K,) = {shapes[0]} or (HV, K) = {shapes[1]}"
    elif g.dim() == 4:
        shapes.append((1, 1, *heads, 1))
    if tuple(value.shape) not in shapes:
        text = f"has shape {tuple(value.shape)}, should be {should}"
    elif value.device != g.device:
        text = f"is on {value.device}, should be on {g.device}, the device of g"
    if text:
        raise SpecError(f"{function}: {name} {text}")


def promoted(tokens: dict[str, Any]) -> tuple[dict[str, Any], torch.dtype]:
    """Bring tokens to the dtypes of the ops, as FLA's kernels promote.

    Args:
        tokens: q, k, v and gates, as the ops name them.

    Returns:
        Tokens whose q, k and v have one dtype and whose gates are no wider than the op computes
        in, and the dtype that v had.
    """
    wide = functools.reduce(torch.promote_types, (tokens[name].dtype for name in TOKENS))
    changed = {name: tokens[name].to(wide) for name in TOKENS}
    for name, gate in tokens.items():
        if name in TOKENS:
            continue
        if gate is not None and gate.dtype == torch.float64 != wide:
            changed[name] = gate.to(torch.float32)
    return tokens | changed, tokens["v"].dtype
