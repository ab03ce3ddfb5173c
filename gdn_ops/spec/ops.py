"""Specify the ops of this library: the sequence op, the single step and a few steps at once.

All data about the ops stands here and nowhere else, except their costs and named workloads,
which stand in `cases`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gdn_ops.spec.cases import (
    CASES,
    STEP_CASES,
    STEPS_CASES,
    forward_bytes,
    forward_flops,
    state_bytes,
    step_bytes,
    step_flops,
)
from gdn_ops.spec.language import (
    OPS_BY_NAME,
    Attr,
    Axis,
    CostModel,
    FrontAttr,
    Interval,
    Multiple,
    OpSpec,
    Output,
    TensorArg,
    shapes,
)
from gdn_ops.spec.rules import Rule, Width

_ANY: tuple[Width, ...] = ("scalar", "channel")

RULES = (
    Rule(
        "gated_delta",
        "Gated DeltaNet; Kimi Delta Attention with a decay per channel; GDN-2 with erase and write",
        decays=_ANY,
        erases=_ANY,
        writes=_ANY,
    ),
    Rule("delta", "DeltaNet", decays=("none",), erases=_ANY, writes=_ANY),
    Rule(
        "gated",
        "Mamba2's scalar-decay recurrence, simple GLA, RetNet; GLA with a decay per channel",
        decays=_ANY,
        erases=("none",),
    ),
    Rule("linear", "linear attention", decays=("none",), erases=("none",)),
)

_AXES = (
    Axis("B", "batch rows"),
    Axis("T", "tokens"),
    Axis("H", "query/key heads", 1),
    Axis("HV", "value heads; value head h reads key head h // (HV / H)", 1),
    Axis("K", "key and query width", 1),
    Axis("V", "value width", 1),
    Axis("N", "sequences: B, or len(cu_seqlens) - 1"),
    Axis("P", "slots of a pool of states"),
)


def _axes(*names: str) -> tuple[Axis, ...]:
    return tuple(axis for axis in _AXES if axis.name in names)


_ALPHA = "decay of a head, or of each key channel; exact 0 clears the memory, 1 keeps it"
_LOG_ALPHA = "the same gate as a natural logarithm; -inf is an exact 0"
_BETA = "erase and write strength in one; 1 when not given"
_ERASE = (
    "erase strength of a head, or of each key channel, in place of beta; "
    "1 when write is given alone"
)
_WRITE = (
    "write strength of a head, or of each value channel, in place of beta; "
    "1 when erase is given alone"
)
_OPTIONS = (
    Attr(
        "rule",
        "str",
        "gated_delta",
        "member of the family",
        choices=tuple(rule.name for rule in RULES),
        schema="str",
    ),
    Attr("scale", "float | None", None, "factor on q; K ** -0.5 when not given", schema="float?"),
    Attr(
        "qk_l2norm",
        "bool",
        False,
        "divide q and k by sqrt(sum of squares + 1e-6) per head first",
        schema="bool",
    ),
)
_BACKEND = Attr(
    "backend", "str", "auto", 'backend name, or "auto" for the first that can', schema="str"
)


_STATE_INDICES = TensorArg(
    "state_indices",
    shapes("B"),
    "slot of the pool `state` that a row reads and updates, a slot for at most one row; "
    "-1 skips the row: its o is 0 and no slot changes",
    dtypes=("int64", "int32"),
    optional=True,
    differentiable=False,
)
_INPLACE = Attr("inplace", "bool", False, "whether to update the state tensor instead of a copy")


def _out(axes: str) -> FrontAttr:
    """Return the argument of a decode op for the memory of o."""
    meaning = f"({axes}) memory like v for o, which is returned; not where gradients are needed"
    return FrontAttr("out", "Tensor | None", None, meaning)


def _state(meaning: str) -> TensorArg:
    """Return the state argument of a decode op, which may be a pool."""
    allowed = shapes("B HV K V", "P HV K V with state_indices")
    return TensorArg("state", allowed, meaning, optional=True)


def _new_state(meaning: str) -> Output:
    pool = "the whole pool (P, HV, K, V) with state_indices"
    return Output("new_state", ("B", "HV", "K", "V"), "like:state", f"{meaning}; {pool}")


def _gates(axes: str) -> tuple[TensorArg, ...]:
    """Return the arguments alpha, beta, log_alpha, erase and write over the given axes."""
    of_keys, of_values = shapes(axes, f"{axes} K"), shapes(axes, f"{axes} V")
    unit, strength = Interval(0.0, 1.0), Interval(0.0, 2.0)
    logarithms = Interval(-math.inf, 0.0)
    return (
        TensorArg("alpha", of_keys, _ALPHA, domain=unit, optional=True, gate=True),
        TensorArg("beta", shapes(axes), _BETA, domain=strength, optional=True, gate=True),
        TensorArg("log_alpha", of_keys, _LOG_ALPHA, domain=logarithms, optional=True, gate=True),
        TensorArg("erase", of_keys, _ERASE, domain=strength, optional=True, gate=True),
        TensorArg("write", of_values, _WRITE, domain=strength, optional=True, gate=True),
    )


_ALPHA_T, _BETA_T, *_KEYWORD_GATES_T = _gates("B T HV")
_QKV_T = (
    TensorArg("q", shapes("B T H K"), "queries"),
    TensorArg("k", shapes("B T H K"), "keys", same_dtype_as="q"),
    TensorArg("v", shapes("B T HV V"), "values", same_dtype_as="q"),
)

GATED_DELTA = OpSpec(
    name="gated_delta",
    summary="Run the gated delta rule over whole sequences.",
    axes=_axes("B", "T", "H", "HV", "K", "V", "N"),
    args=(
        *_QKV_T,
        _ALPHA_T,
        _BETA_T,
        *_KEYWORD_GATES_T,
        *_OPTIONS,
        TensorArg(
            "initial_state",
            shapes("N HV K V"),
            "memory before the first token; zeros when not given",
            optional=True,
            stands_for="state",
        ),
        FrontAttr(
            "has_initial_state",
            "Tensor | None",
            None,
            "(N,) bool: sequences whose row of initial_state counts; the others start from zeros",
        ),
        Attr("return_state", "bool", False, "whether to return the final state too"),
        TensorArg(
            "cu_seqlens",
            shapes("N+1"),
            "boundaries of N sequences packed along T (then B = 1): 0, ..., T",
            dtypes=("int64", "int32"),
            optional=True,
            differentiable=False,
        ),
        Attr(
            "chunk_size",
            "int | None",
            None,
            "tokens per chunk of the chunkwise form; the backend's choice when not given",
            schema="int?",
        ),
        FrontAttr(
            "out",
            "Tensor | tuple[Tensor, Tensor] | None",
            None,
            "(B, T, HV, V) memory like v for o, which is returned; with return_state a pair of it "
            "and memory (N, HV, K, V) for the final state, rounded to its dtype: float32, "
            "bfloat16, float16; not where gradients are needed",
        ),
        _BACKEND,
    ),
    outputs=(
        Output("o", ("B", "T", "HV", "V"), "like:v", "what the memory answers to each query"),
        Output("final_state", ("N", "HV", "K", "V"), "compute", "memory after the last token"),
    ),
    keyword_only_from="log_alpha",
    rules=RULES,
    constraints=(Multiple("HV", "H", "v", "value heads"),),
    equations=(
        "S' = alpha_t S_{t-1}",
        "u_t = beta_t (v_t - S'^T k_t)",
        "S_t = S' + k_t u_t^T",
        "o_t = scale S_t^T q_t",
    ),
    sources=(
        "Yang, Kautz, Hatamizadeh: Gated Delta Networks, ICLR 2025, arXiv 2412.06464, eq. 10",
        "Yang et al.: Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484",
    ),
    cost=CostModel(forward_flops, forward_bytes, state_bytes),
    cases=CASES,
)
"""The specification of `gated_delta` as a value: arguments, rules, equations, cost, workloads."""

_ALPHA_1, _BETA_1, *_KEYWORD_GATES_1 = _gates("B HV")

GATED_DELTA_STEP = replace(
    GATED_DELTA,
    name="gated_delta_step",
    summary="Run the gated delta rule for one token per row.",
    axes=_axes("B", "H", "HV", "K", "V", "P"),
    args=(
        TensorArg("q", shapes("B H K"), "query"),
        TensorArg("k", shapes("B H K"), "key", same_dtype_as="q"),
        TensorArg("v", shapes("B HV V"), "value", same_dtype_as="q"),
        _ALPHA_1,
        _BETA_1,
        _state("memory before the token; zeros when not given"),
        *_KEYWORD_GATES_1,
        *_OPTIONS,
        _STATE_INDICES,
        _INPLACE,
        _out("B, HV, V"),
        _BACKEND,
    ),
    outputs=(
        Output("o", ("B", "HV", "V"), "like:v", "what the memory answers to the query"),
        _new_state("memory after the token"),
    ),
    cost=CostModel(step_flops, step_bytes, state_bytes),
    cases=STEP_CASES,
)
"""The specification of `gated_delta_step` as a value."""

_ARGUMENTS_OF_STEPS: tuple[TensorArg | Attr, ...] = (
    *_QKV_T,
    _ALPHA_T,
    _BETA_T,
    _state("memory before the first token; zeros when not given"),
    *_KEYWORD_GATES_T,
    *_OPTIONS,
    _STATE_INDICES,
    _INPLACE,
    Attr(
        "return_states",
        "bool",
        False,
        "whether to return the state after every token too",
        schema="bool",
    ),
    _out("B, T, HV, V"),
    _BACKEND,
)

GATED_DELTA_STEPS = replace(
    GATED_DELTA_STEP,
    name="gated_delta_steps",
    summary="Run the gated delta rule for a few tokens per row, and keep the state after each.",
    axes=_axes("B", "T", "H", "HV", "K", "V", "P"),
    # For decoding: no argument has a gradient.
    args=tuple(
        replace(arg, differentiable=False) if isinstance(arg, TensorArg) else arg
        for arg in _ARGUMENTS_OF_STEPS
    ),
    outputs=(
        Output("o", ("B", "T", "HV", "V"), "like:v", "what the memory answers to each query"),
        _new_state("memory after the last token"),
        Output(
            "states",
            ("B", "T", "HV", "K", "V"),
            "like:state",
            "memory after every token, 0 in rows that are skipped",
        ),
    ),
    cases=STEPS_CASES,
)
"""The specification of `gated_delta_steps` as a value."""

OPS = (GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS)
OPS_BY_NAME.update({op.name: op for op in OPS})
