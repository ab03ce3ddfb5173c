"""Spec, signature, torch schema and documentation agree, and lint notices when they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import gdn_ops
from changed_specs import with_arg, with_output
from gdn_ops import GATED_DELTA
from gdn_ops.spec import docs
from gdn_ops.spec.language import OpSpec, shapes
from gdn_ops.spec.ops import OPS
from gdn_ops.spec.rules import Rule
from gdn_ops.testing.lint import lint

STATE = "(N, HV, K, V)"


def lint_of(spec: OpSpec, text: Callable[[OpSpec], str] = docs.docstring) -> list[str]:
    """Lint a spec, wrong or not, against the function, schema and text of the true one."""
    true = next(op for op in OPS if op.name == spec.name)
    schema = str(getattr(torch.ops.gdn_ops, spec.name).default._schema)
    return lint(spec, getattr(gdn_ops, spec.name), schema=schema, documentation=text(true))


@pytest.mark.parametrize("spec", OPS, ids=lambda op: op.name)
def test_signature_schema_docstring_and_page_say_what_the_spec_says(spec: OpSpec) -> None:
    assert getattr(gdn_ops, spec.name).__doc__ == docs.docstring(spec)
    assert lint_of(spec) == []
    assert lint_of(spec, docs.page) == []


def without_arg(name: str) -> OpSpec:
    return replace(GATED_DELTA, args=tuple(a for a in GATED_DELTA.args if a.name != name))


def swapped(i: int, j: int) -> OpSpec:
    args = list(GATED_DELTA.args)
    args[i], args[j] = args[j], args[i]
    return replace(GATED_DELTA, args=tuple(args))


def in_both(*findings: str) -> list[str]:
    return [f"{where}: {text}" for where in ("signature", "schema") for text in findings]


FIRST, FINAL_STATE = GATED_DELTA.outputs
WRONG: dict[str, tuple[OpSpec, list[str]]] = {
    "renamed argument": (
        with_arg("alpha", name="alfa"),
        [
            *in_both("argument 'alfa' is missing", "argument 'alpha' is not in the spec"),
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
        in_both("argument 'cu_seqlens' is not in the spec"),
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
        with_arg("beta", shapes=shapes("B T HV K")),
        ["documentation: argument 'beta' should have shape (B, T, HV, K)"],
    ),
    "missing rule": (
        replace(GATED_DELTA, rules=GATED_DELTA.rules[:-1]),
        ["spec: the argument 'rule' offers 'linear', which is no rule"],
    ),
    "missing rule and choice": (
        replace(with_arg("rule", choices=("gated_delta",)), rules=GATED_DELTA.rules[:1]),
        [
            f"documentation: rule={name!r} is not in the spec"
            for name in ("delta", "gated", "linear")
        ],
    ),
    "unknown rule": (
        replace(GATED_DELTA, rules=(*GATED_DELTA.rules, Rule("kda", "KDA"))),
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
        replace(GATED_DELTA, outputs=(FIRST,)),
        ["schema: output 'final_state' is not in the spec"],
    ),
    "swapped outputs": (
        replace(GATED_DELTA, outputs=(FINAL_STATE, FIRST)),
        [
            "schema: output 'o' stands where 'final_state' should be",
            "schema: output 'final_state' stands where 'o' should be",
        ],
    ),
    "swapped arguments": (
        swapped(0, 1),
        in_both(
            "argument 'q' stands where 'k' should be", "argument 'k' stands where 'q' should be"
        ),
    ),
    "keyword-only too early": (
        replace(GATED_DELTA, keyword_only_from="beta"),
        ["signature: argument 'beta' should be keyword-only"],
    ),
    "keyword-only too late": (
        replace(GATED_DELTA, keyword_only_from="rule"),
        [
            f"signature: argument {name!r} should be positional"
            for name in ("log_alpha", "erase", "write")
        ],
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


@pytest.mark.parametrize("text", [docs.docstring, docs.page], ids=["docstring", "page"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_is_noticed_and_the_culprit_named(
    name: str, text: Callable[[OpSpec], str]
) -> None:
    spec, findings = WRONG[name]
    assert lint_of(spec, text) == findings


def test_text_that_is_no_schema_is_a_finding() -> None:
    texts = lint(GATED_DELTA, gdn_ops.gated_delta, schema="q", documentation=docs.page(GATED_DELTA))
    assert texts == ["schema: 'q' is not of the form name(arguments) -> (outputs)"]
