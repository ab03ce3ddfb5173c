"""The two ops of this library as values: the sequence op and the single step.

Everything that can be said about them as data is said here and nowhere else.
"""

from __future__ import annotations

import math

from gdn_ops.spec import (
    FLOAT_DTYPES,
    Attr,
    Axis,
    Case,
    CostModel,
    Interval,
    Multiple,
    OpSpec,
    Output,
    Rule,
    Sizes,
    TensorArg,
)

RULES = (
    Rule("gated_delta", True, True, "Gated DeltaNet"),
    Rule("delta", False, True, "DeltaNet"),
    Rule("gated", True, False, "Mamba2's scalar-decay recurrence, simple GLA, RetNet"),
    Rule("linear", False, False, "linear attention"),
)

_AXES = (
    Axis("B", "batch rows"),
    Axis("T", "tokens"),
    Axis("H", "query/key heads", 1),
    Axis("HV", "value heads; value head h reads key head h // (HV / H)", 1),
    Axis("K", "key and query width", 1),
    Axis("V", "value width", 1),
    Axis("N", "sequences: B, or len(cu_seqlens) - 1"),
    Axis("N1", "N + 1", 1),
)

_CONSTRAINTS = (Multiple("HV", "H", "v", "value heads"),)

_EQUATIONS = (
    "S' = alpha_t S_{t-1}",
    "u_t = beta_t (v_t - S'^T k_t)",
    "S_t = S' + k_t u_t^T",
    "o_t = scale S_t^T q_t",
)

_SOURCES = (
    "Yang, Kautz, Hatamizadeh: Gated Delta Networks, ICLR 2025, arXiv 2412.06464, eq. 10",
    "Yang et al.: Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484",
)

_ALPHA = "decay; exact 0 clears the memory, 1 keeps it"
_LOG_ALPHA = "the same gate as a natural logarithm; -inf is an exact 0"
_BETA = "write strength; 1 when not given"
_RULE = Attr(
    "rule",
    "str",
    "gated_delta",
    "member of the family",
    choices=tuple(rule.name for rule in RULES),
    schema="str",
)
_SCALE = Attr(
    "scale", "float | None", None, "factor on q; K ** -0.5 when not given", schema="float?"
)
_QK_L2NORM = Attr(
    "qk_l2norm",
    "bool",
    False,
    "divide q and k by sqrt(sum of squares + 1e-6) per head first",
    schema="bool",
)
_BACKEND = Attr(
    "backend", "str", "auto", 'backend name, or "auto" for the first that can', schema="str"
)


def _gates(axes: tuple[str, ...]) -> tuple[TensorArg, TensorArg, TensorArg]:
    """Return alpha, beta and log_alpha over the given axes."""
    unit, strength = Interval(0.0, 1.0), Interval(0.0, 2.0)
    return (
        TensorArg("alpha", axes, _ALPHA, domain=unit, optional=True, gate=True),
        TensorArg("beta", axes, _BETA, domain=strength, optional=True, gate=True),
        TensorArg(
            "log_alpha",
            axes,
            _LOG_ALPHA,
            domain=Interval(-math.inf, 0.0),
            optional=True,
            gate=True,
        ),
    )


def _forward_flops(s: Sizes, chunk: int) -> float:
    """Return flops of the chunkwise form (MATH §3), a multiply-add counted as two.

    Per token and value head: K S, Q S and K^T U cost 6 K V; T (.) and P U cost 2 C V each,
    half of them above the diagonal and not needed, so 2 C V together. Per token and key
    head: K K^T and Q K^T, likewise halved, 2 C K together. The solve costs C² / 3 a row.
    """
    per_value_head = 6 * s.K * s.V + 2 * chunk * s.V + chunk * chunk / 3
    per_key_head = 2 * chunk * s.K
    return float(s.B * s.T * (s.HV * per_value_head + s.H * per_key_head))


def _forward_bytes(s: Sizes, element: int) -> float:
    """Return bytes that must cross memory: q, k, v, o once, gates in float32, the states."""
    activations = element * s.B * s.T * (2 * s.H * s.K + 2 * s.HV * s.V)
    gates = 4 * 2 * s.B * s.T * s.HV
    return float(activations + gates + _state_bytes(s))


def _state_bytes(s: Sizes) -> float:
    return float(4 * s.N * s.HV * s.K * s.V)


def _step_flops(s: Sizes, chunk: int) -> float:
    """Return flops of one token: decay K V, then S^T k, k u^T and S^T q at 2 K V each."""
    return float(s.B * s.HV * 7 * s.K * s.V)


def _step_bytes(s: Sizes, element: int) -> float:
    """Return bytes of one token: the float32 state read and written, and the token."""
    token = element * s.B * (2 * s.H * s.K + 2 * s.HV * s.V) + 8 * s.B * s.HV
    return float(2 * _state_bytes(s) + token)


def _case(
    name: str, b: int, t: int, h: int, hv: int, k: int, v: int, source: str, dtype: str = "bfloat16"
) -> Case:
    return Case(name, Sizes(b, t, h, hv, k, v, b), source, dtype)


_QWEN = "Qwen3.5 / Qwen3-Next linear-attention layer"
CASES = (
    _case("tiny", 2, 100, 2, 4, 32, 48, "smoke tests", "float32"),
    *(_case(f"qwen-16-32-{t}", 1, t, 16, 32, 128, 128, _QWEN) for t in (2048, 4096, 8192, 16384)),
    *(_case(f"qwen-16-48-{t}", 1, t, 16, 48, 128, 128, _QWEN) for t in (2048, 8192)),
    *(_case(f"qwen-16-64-{t}", 1, t, 16, 64, 128, 128, _QWEN) for t in (2048, 8192, 32768)),
    _case("olmo-hybrid-2048", 1, 2048, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
    _case("olmo-hybrid-8192", 1, 8192, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
    _case("paper-400m-2048", 1, 2048, 9, 9, 128, 256, "Gated DeltaNet 0.4B of the paper"),
)

STEP_CASES = (
    _case("tiny-step", 2, 1, 2, 4, 32, 48, "smoke tests", "float32"),
    *(_case(f"qwen-16-32-step-b{b}", b, 1, 16, 32, 128, 128, _QWEN) for b in (1, 8)),
    _case("olmo-hybrid-step", 1, 1, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
)

_ALPHA_T, _BETA_T, _LOG_ALPHA_T = _gates(("B", "T", "HV"))

GATED_DELTA = OpSpec(
    name="gated_delta",
    summary="Run the gated delta rule over whole sequences.",
    axes=_AXES,
    args=(
        TensorArg("q", ("B", "T", "H", "K"), "queries"),
        TensorArg("k", ("B", "T", "H", "K"), "keys", same_dtype_as="q"),
        TensorArg("v", ("B", "T", "HV", "V"), "values", same_dtype_as="q"),
        _ALPHA_T,
        _BETA_T,
        _LOG_ALPHA_T,
        _RULE,
        _SCALE,
        _QK_L2NORM,
        TensorArg(
            "initial_state",
            ("N", "HV", "K", "V"),
            "memory before the first token; zeros when not given",
            optional=True,
        ),
        Attr("return_state", "bool", False, "whether to return the final state too"),
        TensorArg(
            "cu_seqlens",
            ("N1",),
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
        _BACKEND,
    ),
    outputs=(
        Output("o", ("B", "T", "HV", "V"), "like:v", "what the memory answers to each query"),
        Output("final_state", ("N", "HV", "K", "V"), "compute", "memory after the last token"),
    ),
    keyword_only_from="log_alpha",
    rules=RULES,
    constraints=_CONSTRAINTS,
    equations=_EQUATIONS,
    sources=_SOURCES,
    cost=CostModel(_forward_flops, _forward_bytes, _state_bytes),
    cases=CASES,
)

_ALPHA_1, _BETA_1, _LOG_ALPHA_1 = _gates(("B", "HV"))

GATED_DELTA_STEP = OpSpec(
    name="gated_delta_step",
    summary="Run the gated delta rule for one token per row.",
    axes=tuple(axis for axis in _AXES if axis.name not in ("T", "N", "N1")),
    args=(
        TensorArg("q", ("B", "H", "K"), "query"),
        TensorArg("k", ("B", "H", "K"), "key", same_dtype_as="q"),
        TensorArg("v", ("B", "HV", "V"), "value", same_dtype_as="q"),
        _ALPHA_1,
        _BETA_1,
        TensorArg(
            "state",
            ("B", "HV", "K", "V"),
            "memory before the token; zeros when not given",
            dtypes=FLOAT_DTYPES,
            optional=True,
        ),
        _LOG_ALPHA_1,
        _RULE,
        _SCALE,
        _QK_L2NORM,
        Attr("inplace", "bool", False, "whether to update the state tensor instead of a copy"),
        _BACKEND,
    ),
    outputs=(
        Output("o", ("B", "HV", "V"), "like:v", "what the memory answers to the query"),
        Output("new_state", ("B", "HV", "K", "V"), "like:state", "memory after the token"),
    ),
    keyword_only_from="log_alpha",
    rules=RULES,
    constraints=_CONSTRAINTS,
    equations=_EQUATIONS,
    sources=_SOURCES,
    cost=CostModel(_step_flops, _step_bytes, _state_bytes),
    cases=STEP_CASES,
)

OPS = (GATED_DELTA, GATED_DELTA_STEP)
