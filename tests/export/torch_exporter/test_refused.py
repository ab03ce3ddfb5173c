"""What cannot be exported is refused, with the cure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paths import ROOT

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import gdn_ops  # noqa: E402
from gdn_ops import export  # noqa: E402
from gdn_ops.export.model import naming  # noqa: E402
from gdn_ops.export.torch_exporter import translation  # noqa: E402
from gdn_ops.torch_ops import onnx_export  # noqa: E402
from onnx_layers import (  # noqa: E402
    Step,
    assert_same,
    feeds_of,
    step_args,
)


def test_a_prompt_needs_tokens_to_tell_their_axis() -> None:
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.export_prefill(Step(gdn_ops.gated_delta), (torch.ones(2, 1), *step_args()[1:]))
    assert str(caught.value) == (
        "export_prefill: the first tensor of args has shape (2, 1), should be (B, T, ...) with at "
        "least two tokens"
    )


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            (("x",), (None, None)),
            "label: names has 1 inputs, should have 6: the graph has q, k, v, log_alpha, beta, "
            "past_key_values.0.recurrent_state",
        ),
        (
            (("x", "x", None, None, None, None), (None, None)),
            "label: the name 'x' is given twice, should be given once",
        ),
    ],
)
def test_wrong_names_are_refused(names: Any, text: str) -> None:
    sizes = {"num_qk_heads": 1, "num_v_heads": 1, "head_k_dim": 2, "head_v_dim": 2}
    with pytest.raises(gdn_ops.SpecError) as caught:
        naming.name_values("label", export.make_decode_model(**sizes), names)
    assert str(caught.value) == text


def torch_export(table: Any) -> Any:
    with torch.no_grad():
        return torch.onnx.export(
            Step(gdn_ops.gated_delta_step),
            step_args(),
            dynamo=True,
            verbose=False,
            custom_translation_table=table,
        )


@pytest.mark.filterwarnings("ignore")
def test_torch_onnx_export_takes_the_translation_table() -> None:
    program = torch_export(export.translation_table())
    model = export.set_body(program.model_proto, "standard")
    args = step_args()
    engine = ort.InferenceSession(model.SerializeToString())
    expected = gdn_ops.gated_delta_step(*args)
    assert_same(engine.run(None, feeds_of(engine, list(args))), expected)


@pytest.mark.filterwarnings("ignore")
def test_torch_onnx_export_without_the_table_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_has_table", False)
    with pytest.raises(Exception, match="step 1/3") as caught:
        torch_export(None)
    cause = caught.value.__cause__
    assert isinstance(cause, gdn_ops.SpecError)
    assert str(cause) == (
        "gated_delta_step: torch.onnx.export was given no translation of it, should be given "
        "custom_translation_table=gdn_ops.export.translation_table()"
    )


def slots(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Any:
    where = torch.arange(q.shape[0])
    return gdn_ops.gated_delta_step(q, k, v, a, b, s, state_indices=where)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "no call": (
        lambda q, k, v, a, b, s: (q * 2, s),
        "export_decode: the module calls no gated_delta_step, should call it; pass the module "
        "itself: a program that torch.export made before holds the step in pieces",
    ),
    "sequence": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta(*(x.unsqueeze(1) for x in (q, k, v, a, b))),
        "export_decode: the module calls no gated_delta_step, should call it: there are only "
        "nodes gdn_ops::GatedDelta; the other exporter is for them",
    ),
    "no state": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta_step(q, k, v, a, b),
        "gated_delta_step: state is None, should be a tensor in an export to ONNX: what a decode "
        "step remembers is an input and an output of the graph",
    ),
    "in place": (
        lambda *x: gdn_ops.gated_delta_step(*x, inplace=True),
        "gated_delta_step: inplace is True, should be False in an export to ONNX: the module "
        "returns the new state, and a DecodeSession binds both to one buffer",
    ),
    "pool": (
        slots,
        "gated_delta_step: state_indices is given, should be None in an export to ONNX: a node "
        "has one state per row; gather the rows of the pool before it",
    ),
    "states": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta_steps(
            *(x.unsqueeze(1) for x in (q, k, v, a, b)), s, return_states=True
        ),
        "gated_delta_steps: return_states is True, should be False in an export to ONNX",
    ),
    "packed": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta(
            *(x.transpose(0, 1).flatten(0, 1).unsqueeze(0) for x in (q, k, v, a, b)),
            cu_seqlens=torch.tensor([0, q.shape[0]]),
        ),
        "gated_delta: cu_seqlens is given, should be None in an export to ONNX: pass a batch of "
        "sequences of one length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_with_the_cure(name: str) -> None:
    call, text = REFUSED[name]
    args = step_args()
    if name == "packed":
        args = tuple(x.unsqueeze(1) if i < 5 else x for i, x in enumerate(args))
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.export_decode(Step(call), args)
    assert str(caught.value) == text


def test_heads_that_do_not_divide_are_refused_by_the_spec() -> None:
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.export_decode(Step(gdn_ops.gated_delta_step), step_args(heads=3))
    assert str(caught.value) == (
        "gated_delta_step: v has HV=3 value heads, should be a multiple of H=2"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"body": "fast"},
            "export_decode: body is 'fast', should be one of standard, ort, onnx, or None for none",
        ),
        (
            {"opset": 17},
            "export_decode: opset is 17, should be 18 to 25, or 27 for body 'onnx'",
        ),
        (
            {"opset": 26},
            "export_decode: opset is 26, should be 18 to 25, or 27 for body 'onnx'",
        ),
        (
            {"body": "onnx"},
            "export_decode: opset is 21, should be 27 for body 'onnx'; or take body='standard'",
        ),
        ({"args": []}, "export_decode: args has type list, should be a tuple"),
        (
            {"args": ()},
            "export_decode: args hold no tensor with a batch, should hold at least one",
        ),
    ],
)
def test_a_wrong_option_is_refused_before_torch_runs(options: dict[str, Any], text: str) -> None:
    arguments = {"args": step_args(), **options}
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.export_decode(Step(gdn_ops.gated_delta_step), **arguments)
    assert str(caught.value) == text


def test_bodies_that_cannot_are_refused_after_the_export() -> None:
    zero = Step(lambda *x: gdn_ops.gated_delta_step(*x, scale=0.0))
    with pytest.raises(gdn_ops.SpecError, match=r"scale is 0, .*take body='standard'$"):
        export.export_decode(zero, step_args(), body="ort")
    wide = Step(gdn_ops.gated_delta_step)
    with pytest.raises(gdn_ops.SpecError, match=r"state is float64, .*take body='standard'$"):
        export.export_decode(wide, step_args(torch.float64), body="ort")


def test_a_model_without_our_nodes_is_refused() -> None:
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([], "empty", [value], [value])
    model = onnx.helper.make_model(graph)
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.set_body(model, "standard")
    assert str(caught.value) == (
        "the model holds no gdn_ops::GatedDeltaStep or gdn_ops::GatedDelta node; export a module "
        "that calls gated_delta_step or gated_delta with gdn_ops.export.export_decode or "
        "export_prefill"
    )


def test_without_onnxscript_an_export_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    translation._node.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        export.export_decode(Step(gdn_ops.gated_delta_step), step_args())
    text = "an export to ONNX needs the onnx extra: pip install 'gdn_ops[onnx]'"
    assert str(caught.value) == text


def fresh(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_onnx_the_import_says_what_to_install() -> None:
    done = fresh("import sys; sys.modules['onnx'] = None; import gdn_ops.export")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: gdn_ops.export needs the onnx extra: pip install 'gdn_ops[onnx]'"
    )
