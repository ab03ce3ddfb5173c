"""A new function body is one value and one row of the table; everything else follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import gdn_ops
from command_line import run
from errors import refusal
from gdn_ops import export
from gdn_ops.export.bodies.body import Body
from gdn_ops.export.bodies.standard import STANDARD
from gdn_ops.export.bodies.table import BODIES, bodies_table
from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.attributes import Variant
from gdn_ops.export.runtime.sessions import why_not
from onnx_layers import Step as Module
from onnx_layers import step_args
from onnx_needs import needs_taken, needs_written
from onnx_steps import Step, assert_right, in_session

pytestmark = [needs_written(22), needs_taken(22)]


def write(text: BodyText) -> None:
    """Write the recurrence for a decay and beta, its products as sums over broadcast products."""
    text.query_and_key()
    text.repeat_heads()
    for name in ("log_alpha", "beta"):
        text.operand(name, "HV", "one", "one")
    text.operand("v", "HV", "one", "V")
    text("scale_f = Constant <value_float: float = @scale> ()")
    text("rows = Constant <value_ints = [-2]> ()")
    column = text.shape("column", "HV", "K", "one")
    for name in ("q", "k"):
        text(f"{name}_c = Reshape <allowzero = 1> ({name}_r, {column})")
    old, new = text.states()
    text("decay = Exp(log_alpha_x)")
    text(f"S_decayed = Mul({old}, decay)")
    text("kS = Mul(k_c, S_decayed)")
    text("read = ReduceSum(kS, rows)")
    text("error = Sub(v_x, read)")
    text("u = Mul(beta_x, error)")
    text("ku = Mul(k_c, u)")
    text(f"{new} = Add(S_decayed, ku)")
    text(f"qS = Mul(q_c, {new})")
    text("o_sum = ReduceSum(qS, rows)")
    text("o_t = Mul(o_sum, scale_f)")
    text.results("o_t", new)


def refuse(variant: Variant, scale: float) -> str:
    if not (variant.has_decay and variant.has_erase and variant.has_beta):
        return f"rule is {variant.rule!r}, body 'sums' should have 'gated_delta'"
    return "q and k are normalised, which body 'sums' is not for" if variant.qk_l2norm else ""


SUMS = Body(
    name="sums",
    min_opset=22,
    write=write,
    what="products summed one by one",
    where="nowhere but here",
    needs="patience",
    refuses=refuse,
)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BODIES, "sums", SUMS)
    yield
    export.available_bodies.cache_clear()


def test_a_new_body_is_exported_set_and_run(sums: None) -> None:
    assert "sums" in export.available_bodies()
    module = Module(gdn_ops.gated_delta_step)
    exported = export.export_decode(module, step_args(), body="sums", opset=22)
    assert export.bodies_of(exported) == ("sums",)
    assert "MatMul" not in {node.op_type for node in exported.functions[0].node}
    step = Step(tokens=16)
    assert_right(step, *step.draw(), in_session(step.model("sums", 22), "sums"))
    # A file of an older opset is converted when it is loaded.
    assert_right(step, *step.draw(), in_session(step.model("standard", 21), "sums"))
    swapped = export.set_body(export.set_body(exported, "standard"), "sums")
    assert swapped.SerializeToString() == exported.SerializeToString()


def test_a_new_body_is_found_at_its_opset_by_the_command(sums: None, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    result = run("export", "--heads", 2, "--key-dim", 8, "--out", path, "--body", "sums")
    assert result.exit_code == 0, result.output
    assert re.search(r"(?m)^sums .* pass$", result.output)
    model = onnx.load(path)
    assert (export.bodies_of(model), model.opset_import[0].version) == (("sums",), 22)


@pytest.mark.parametrize(
    ("text", "options"),
    {
        "the model has opset 21, body 'sums' should have 22 or newer; export with opset=22, or "
        "take body='standard'": {"opset": 21},
        "rule is 'linear', body 'sums' should have 'gated_delta'; take body='standard'": {
            "rule": "linear"
        },
        "body is 'fast', should be one of standard, ort, onnx, sums, or None for none": {
            "body": "fast"
        },
    }.items(),
)
def test_what_a_new_body_cannot_do_is_refused_in_its_words(
    text: str, options: dict[str, Any], sums: None
) -> None:
    arguments = Step().options() | {"body": "sums", "opset": 22} | options
    assert refusal(export.make_decode_model, **arguments) == (f"gdn_ops::GatedDeltaStep: {text}")


def test_a_new_body_stands_in_the_documentation(sums: None) -> None:
    assert "| `sums` | products summed one by one | nowhere but here |" in bodies_table()
    assert why_not("sums").startswith("body 'sums' needs patience; this is onnxruntime ")


def test_the_table_and_the_help_name_every_body() -> None:
    assert list(BODIES) == ["standard", "ort", "onnx"]
    assert BODIES["standard"] is STANDARD
    rows = bodies_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*BODIES, "None"]
    assert f'{", ".join(BODIES)}, or "none"' in run("export", "--help").output
