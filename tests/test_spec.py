"""The language of the spec, the two specs written in it, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops import GATED_DELTA, GATED_DELTA_STEP, Limits, describe
from gdn_ops.gated_delta import OPS
from gdn_ops.spec import Attr, Axis, Interval, Multiple, OpSpec, Output, Rule, Sizes, TensorArg
from gdn_ops.testing.lint import lint

STATE = "(N, HV, K, V)"


def lint_of(spec: OpSpec, text: Callable[[OpSpec], str] = describe.docstring) -> list[str]:
    """Lint a spec, wrong or not, against the function, schema and text of the true one."""
    true = next(op for op in OPS if op.name == spec.name)
    schema = str(getattr(torch.ops.gdn_ops, spec.name).default._schema)
    return lint(spec, getattr(gdn_ops, spec.name), schema=schema, documentation=text(true))


# Spec, signature, schema and documentation agree.


@pytest.mark.parametrize("spec", OPS, ids=lambda op: op.name)
def test_signature_schema_docstring_and_page_say_what_the_spec_says(spec: OpSpec) -> None:
    assert getattr(gdn_ops, spec.name).__doc__ == describe.docstring(spec)
    assert lint_of(spec) == []
    assert lint_of(spec, describe.page) == []


def with_arg(name: str, **changes: Any) -> OpSpec:
    """Return GATED_DELTA with one argument changed."""
    args = (replace(arg, **changes) if arg.name == name else arg for arg in GATED_DELTA.args)
    return replace(GATED_DELTA, args=tuple(args))


def without_arg(name: str) -> OpSpec:
    return replace(GATED_DELTA, args=tuple(a for a in GATED_DELTA.args if a.name != name))


def swapped(i: int, j: int) -> OpSpec:
    args = list(GATED_DELTA.args)
    args[i], args[j] = args[j], args[i]
    return replace(GATED_DELTA, args=tuple(args))


def with_output(**changes: Any) -> OpSpec:
    o, state = GATED_DELTA.outputs
    return replace(GATED_DELTA, outputs=(o, replace(state, **changes)))


O, FINAL_STATE = GATED_DELTA.outputs
WRONG: dict[str, tuple[OpSpec, list[str]]] = {
    "renamed argument": (
        with_arg("alpha", name="alfa"),
        [
            "signature: argument 'alfa' is missing",
            "signature: argument 'alpha' is not in the spec",
            "schema: argument 'alfa' is missing",
            "schema: argument 'alpha' is not in the spec",
            "documentation: argument 'alfa' is missing",
        ],
    ),
    "changed default": (
        with_arg("scale", default=1.0),
        ["signature: argument 'scale' has default None, should have default 1.0"],
    ),
    "default of another type": (
        with_arg("qk_l2norm", default=0),
        ["signature: argument 'qk_l2norm' has default False, should have default 0"],
    ),
    "dropped tensor": (
        without_arg("cu_seqlens"),
        [
            "signature: argument 'cu_seqlens' is not in the spec",
            "schema: argument 'cu_seqlens' is not in the spec",
        ],
    ),
    "dropped attribute": (
        without_arg("return_state"),
        ["signature: argument 'return_state' is not in the spec"],
    ),
    "optional made required": (
        with_arg("beta", optional=False),
        [
            "signature: argument 'beta' has default None, should have no default",
            "signature: argument 'beta' has type Tensor | None, should have Tensor",
            "schema: argument 'beta' has type Tensor?, should have Tensor",
        ],
    ),
    "required made optional": (
        with_arg("v", optional=True),
        [
            "signature: argument 'v' has no default, should have default None",
            "signature: argument 'v' has type Tensor, should have Tensor | None",
            "schema: argument 'v' has type Tensor, should have Tensor?",
        ],
    ),
    "extra axis": (
        with_arg("log_alpha", axes=("B", "T", "HV", "K")),
        ["documentation: argument 'log_alpha' should have shape (B, T, HV, K)"],
    ),
    "missing rule": (
        replace(GATED_DELTA, rules=GATED_DELTA.rules[:-1]),
        ["spec: the argument 'rule' offers 'linear', which is no rule"],
    ),
    "missing rule and choice": (
        replace(with_arg("rule", choices=("gated_delta",)), rules=GATED_DELTA.rules[:1]),
        [f"documentation: rule={name!r} is not in the spec" for name in ("delta", "gated", "linear")],
    ),
    "unknown rule": (
        replace(GATED_DELTA, rules=(*GATED_DELTA.rules, Rule("kda", True, True, "KDA"))),
        [
            "spec: rule 'kda' is no choice of the argument 'rule'",
            "documentation: rule 'kda' is missing",
        ],
    ),
    "renamed output": (
        with_output(name="memory"),
        [
            "schema: output 'memory' is missing",
            "schema: output 'final_state' is not in the spec",
            f"documentation: output 'memory' with shape {STATE} is missing",
        ],
    ),
    "output of another shape": (
        with_output(axes=("N", "HV", "V", "K")),
        ["documentation: output 'final_state' with shape (N, HV, V, K) is missing"],
    ),
    "dropped output": (
        replace(GATED_DELTA, outputs=(O,)),
        ["schema: output 'final_state' is not in the spec"],
    ),
    "swapped outputs": (
        replace(GATED_DELTA, outputs=(FINAL_STATE, O)),
        [
            "schema: output 'o' stands where 'final_state' should be",
            "schema: output 'final_state' stands where 'o' should be",
        ],
    ),
    "swapped arguments": (
        swapped(0, 1),
        [
            "signature: argument 'q' stands where 'k' should be",
            "signature: argument 'k' stands where 'q' should be",
            "schema: argument 'q' stands where 'k' should be",
            "schema: argument 'k' stands where 'q' should be",
        ],
    ),
    "keyword-only too early": (
        replace(GATED_DELTA, keyword_only_from="beta"),
        ["signature: argument 'beta' should be keyword-only"],
    ),
    "keyword-only too late": (
        replace(GATED_DELTA, keyword_only_from="rule"),
        ["signature: argument 'log_alpha' should be positional"],
    ),
    "attribute of another type": (
        with_arg("chunk_size", type="int", schema="int"),
        [
            "signature: argument 'chunk_size' has type int | None, should have int",
            "schema: argument 'chunk_size' has type int?, should have int",
        ],
    ),
    "attribute that the schema lacks": (
        with_arg("return_state", schema="bool"),
        ["schema: argument 'return_state' is missing"],
    ),
    "attribute that the schema has": (
        with_arg("qk_l2norm", schema=None),
        ["schema: argument 'qk_l2norm' is not in the spec"],
    ),
    "changed equation": (
        replace(GATED_DELTA, equations=("o_t = S_t q_t",)),
        ["documentation: equation 'o_t = S_t q_t' is missing"],
    ),
}


@pytest.mark.parametrize("text", [describe.docstring, describe.page], ids=["docstring", "page"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_is_noticed_and_the_culprit_named(
    name: str, text: Callable[[OpSpec], str]
) -> None:
    spec, findings = WRONG[name]
    assert lint_of(spec, text) == findings


def test_text_that_is_no_schema_is_a_finding() -> None:
    found = lint(
        GATED_DELTA, gdn_ops.gated_delta, schema="q", documentation=describe.page(GATED_DELTA)
    )
    assert found == ["schema: 'q' is not of the form name(arguments) -> (outputs)"]


# A value that makes no sense cannot be built.

X = TensorArg("x", ("B",), "a tensor")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Axis("1B", "rows"), "axis name '1B' is not an identifier"),
        (lambda: Axis("B", ""), "axis B has no meaning"),
        (lambda: Interval(1.0, 1.0), "interval [1.0, 1.0] is empty"),
        (lambda: replace(X, name="x y"), "argument name 'x y' is not an identifier"),
        (lambda: replace(X, axes=("B", "B")), "x repeats an axis"),
        (lambda: replace(X, dtypes=()), "x allows no dtype"),
        (lambda: replace(X, meaning=""), "x has no meaning"),
        (lambda: Attr("a-b", "str", "", "text"), "attribute name 'a-b' is not an identifier"),
        (lambda: Attr("a", "str", "", ""), "a has no meaning"),
        (
            lambda: Attr("a", "str", "c", "text", choices=("d", "e")),
            "default of a is 'c', not one of ('d', 'e')",
        ),
        (lambda: Limits(devices=()), "limits name no device"),
        (
            lambda: Limits(devices=("cpu",), dtypes=("float8",)),
            "limits name unknown dtypes ('float8',)",
        ),
        (lambda: Limits(devices=("cpu",), head_dim_multiple=0), "head_dim_multiple is below 1"),
        (
            lambda: replace(GATED_DELTA, args=(X, X), keyword_only_from="x"),
            "gated_delta names an argument twice: ['x', 'x']",
        ),
        (lambda: with_arg("k", axes=("B", "Z", "Y")), "gated_delta: k uses unknown axes ['Y', 'Z']"),
        (lambda: with_output(axes=("Z",)), "gated_delta: final_state uses unknown axes ['Z']"),
        (
            lambda: with_arg("v", same_dtype_as="w"),
            "gated_delta: v takes its dtype from unknown w",
        ),
        (
            lambda: replace(GATED_DELTA, constraints=(Multiple("HV", "Z", "v", "value heads"),)),
            "gated_delta: HV is a multiple of Z uses unknown axes ['Z']",
        ),
        (
            lambda: with_output(dtype="float32"),
            "gated_delta: output final_state has unknown dtype 'float32'",
        ),
        (
            lambda: with_output(dtype="like:w"),
            "gated_delta: output final_state has unknown dtype 'like:w'",
        ),
        (
            lambda: replace(GATED_DELTA, keyword_only_from="w"),
            "gated_delta: keyword_only_from='w' is no argument",
        ),
        (lambda: replace(GATED_DELTA, rules=()), "gated_delta has no rule"),
    ],
)
def test_a_senseless_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value) == message


# Values print themselves.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Axis("T", "tokens"), "T"),
        (Interval(0.0, 1.0), "[0, 1]"),
        (Interval(float("-inf"), 0.5), "[-inf, 0.5]"),
        (X, "x (B,)"),
        (GATED_DELTA.tensor["q"], "q (B, T, H, K)"),
        (GATED_DELTA.tensor["beta"], "beta (B, T, HV) in [0, 2] optional"),
        (GATED_DELTA.tensor["log_alpha"], "log_alpha (B, T, HV) in [-inf, 0] optional"),
        (GATED_DELTA.tensor["cu_seqlens"], "cu_seqlens (N+1,) optional"),
        (GATED_DELTA.attrs[0], "rule='gated_delta'"),
        (FINAL_STATE, f"final_state {STATE}"),
        (GATED_DELTA.rule["gated"], "gated"),
        (GATED_DELTA.constraints[0], "HV is a multiple of H"),
        (GATED_DELTA.case["tiny"], "tiny: B=2 T=100 H/HV=2/4 K=32 V=48"),
        (
            GATED_DELTA,
            "gated_delta(q, k, v, alpha=None, beta=None, *, log_alpha=None, rule='gated_delta', "
            "scale=None, qk_l2norm=False, initial_state=None, return_state=False, "
            "cu_seqlens=None, chunk_size=None, backend='auto') "
            "-> o (B, T, HV, V), final_state (N, HV, K, V)",
        ),
        (
            GATED_DELTA_STEP,
            "gated_delta_step(q, k, v, alpha=None, beta=None, state=None, *, log_alpha=None, "
            "rule='gated_delta', scale=None, qk_l2norm=False, inplace=False, backend='auto') "
            "-> o (B, HV, V), new_state (B, HV, K, V)",
        ),
    ],
)
def test_a_value_prints_itself(value: object, text: str) -> None:
    assert str(value) == text


def test_a_page_prints_the_signature_an_argument_a_line() -> None:
    signature = describe.page(GATED_DELTA_STEP).partition("```text\n")[2].partition("\n```")[0]
    assert signature.splitlines() == [
        "gated_delta_step(",
        *("    q,", "    k,", "    v,", "    alpha=None,", "    beta=None,", "    state=None,"),
        *("    *,", "    log_alpha=None,", "    rule='gated_delta',", "    scale=None,"),
        *("    qk_l2norm=False,", "    inplace=False,", "    backend='auto',"),
        ") -> o (B, HV, V), new_state (B, HV, K, V)",
    ]


def test_value_heads_per_key_head() -> None:
    assert Sizes(1, 1, 16, 48, 1, 1, 1).R == 3
    assert Sizes(1, 1, 0, 0, 1, 1, 1).R == 1
