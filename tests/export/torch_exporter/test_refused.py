"""What cannot be exported is refused, with the cure."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch

import gdn_ops
from errors import message_of, refusal
from gdn_ops import export
from gdn_ops.export.model import naming
from gdn_ops.export.torch_exporter import exporter, translation
from gdn_ops.torch_ops import onnx_export
from onnx_layers import Step, assert_same, run_engine, step_args
from onnx_steps import Step as Node
from processes import python


def test_a_prompt_needs_tokens_to_tell_their_axis() -> None:
    args = torch.ones(2, 1), *step_args()[1:]
    assert refusal(export.export_prefill, Step(gdn_ops.gated_delta), args) == (
        "export_prefill: the first tensor of args has shape (2, 1), should be (B, T, ...) with at "
        "least two tokens"
    )


@pytest.mark.parametrize(
    ("text", "inputs"),
    {
        "label: names has 1 inputs, should have 6: the graph has q, k, v, log_alpha, beta, "
        "past_key_values.0.recurrent_state": ("x",),
        "label: the name 'x' is given twice, should be given once": ("x", "x", *[None] * 4),
        "label: the name 'output' is given twice, should be given once": ("output", *[None] * 5),
    }.items(),
)
def test_wrong_names_are_refused(text: str, inputs: Any) -> None:
    names = inputs, (None, None)
    assert refusal(naming.name_values, "label", Node().model("standard"), names) == text


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
    assert_same(run_engine(model, step_args()), gdn_ops.gated_delta_step(*step_args()))


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
        lambda *x: gdn_ops.gated_delta_step(*x, state_indices=torch.arange(x[0].shape[0])),
        "gated_delta_step: state_indices is given, should be None in an export to ONNX: a node "
        "has one state per row; gather the rows of the pool before it",
    ),
    "states": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta_steps(
            *(x.unsqueeze(1) for x in (q, k, v, a, b)), s, return_states=True
        ),
        "gated_delta_steps: return_states is True, should be False in an export to ONNX",
    ),
    "erase and write": (
        lambda q, k, v, a, b, s: gdn_ops.gated_delta_step(q, k, v, a, erase=b, write=b, state=s),
        "gated_delta_step: erase is given, should be None in an export to ONNX: "
        "gdn_ops::GatedDeltaStep has one strength, beta, and no erase or write",
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
    assert refusal(export.export_decode, Step(call), args) == text


@pytest.mark.parametrize(
    ("text", "options"),
    {
        "gated_delta_step: v has HV=3 value heads, should be a multiple of H=2": {
            "args": step_args(heads=3)
        },
        "export_decode: body is 'fast', should be one of standard, ort, onnx, or None for none": {
            "body": "fast"
        },
        "export_decode: opset is 17, should be 18 to 25, or 27 for body 'onnx'": {"opset": 17},
        "export_decode: opset is 26, should be 18 to 25, or 27 for body 'onnx'": {"opset": 26},
        "export_decode: opset is 21, should be 27 for body 'onnx'; or take body='standard'": {
            "body": "onnx"
        },
        "export_decode: args has type list, should be a tuple": {"args": []},
        "export_decode: module has type function, should be a torch.nn.Module": {
            "module": gdn_ops.gated_delta_step
        },
        "export_decode: opset has type str, should be an integer": {"opset": "21"},
        "export_decode: dynamic_batch has type int, should be True or False": {"dynamic_batch": 1},
        "export_decode: names is ['q'], should be names of inputs and names of outputs: "
        "([...], [...])": {"names": ["q"]},
        "export_decode: names has '', should have printable texts or None": {
            "names": ([""] * 6, [None] * 2)
        },
        "export_decode: path has type bytes, should be a path": {"path": b"x.onnx"},
        "export_decode: path is 'a\\x00b', should be a path": {"path": "a\0b"},
        "export_decode: path is '/', a folder, should be a file": {"path": "/"},
        "export_decode: path is 'no/such/x.onnx', whose folder should exist": {
            "path": "no/such/x.onnx"
        },
        "export_decode: torch.onnx.export does not take the module: missing a required argument: "
        "'a'": {"args": step_args()[:3]},
        "export_decode: args hold no tensor with a batch, should hold at least one": {"args": ()},
    }.items(),
)
def test_a_wrong_argument_is_refused(text: str, options: dict[str, Any]) -> None:
    arguments = {"module": Step(gdn_ops.gated_delta_step), "args": step_args(), **options}
    assert refusal(export.export_decode, **arguments) == text


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_file_is_written_whole_and_only_when_it_passes(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_INLINE_BYTES", limit)
    path = tmp_path / "x.onnx"

    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.LazyLinear(512)

        def forward(self, q: Any, k: Any, v: Any, a: Any, b: Any, s: Any) -> Any:
            o, state = gdn_ops.gated_delta_step(q, k, v, a, b, s)
            return self.project(o), state

    module = Weighted()
    module(*step_args())
    export.export_decode(module, step_args(), path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == ({"x.onnx"} if limit else {"x.onnx", "x.onnx.data"})
    # Written again, weights beside the model are not added to those that are there.
    export.export_decode(module, step_args(), path)
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == sizes
    monkeypatch.setattr(exporter, "check_model", mock.Mock(side_effect=OSError(28, "full")))
    monkeypatch.setattr(onnx.checker, "check_model", mock.Mock(side_effect=OSError(28, "full")))
    with pytest.raises(OSError, match=re.escape(f"No space left on device: {str(path)!r}")):
        export.export_decode(module, step_args(), path)
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == sizes


def test_bodies_that_cannot_are_refused_after_the_export() -> None:
    zero = Step(lambda *x: gdn_ops.gated_delta_step(*x, scale=0.0))
    with pytest.raises(gdn_ops.SpecError, match=r"scale is 0, .*take body='standard'$"):
        export.export_decode(zero, step_args(), body="ort")
    wide = Step(gdn_ops.gated_delta_step)
    with pytest.raises(gdn_ops.SpecError, match=r"state is float64, .*take body='standard'$"):
        export.export_decode(wide, step_args(torch.float64), body="ort")


def test_a_model_without_our_nodes_is_refused() -> None:
    assert refusal(export.set_body, onnx.ModelProto(), "standard") == (
        "the model holds no gdn_ops::GatedDeltaStep or gdn_ops::GatedDelta node; export a module "
        "that calls gated_delta_step or gated_delta with gdn_ops.export.export_decode or "
        "export_prefill"
    )


def test_without_onnxscript_an_export_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    translation._node.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    module = Step(gdn_ops.gated_delta_step)
    assert message_of(ModuleNotFoundError, export.export_decode, module, step_args()) == (
        "an export to ONNX needs the onnx extra: pip install 'gdn_ops[onnx]'"
    )


def test_without_onnx_the_import_says_what_to_install() -> None:
    done = python("-c", "import sys; sys.modules['onnx'] = None; import gdn_ops.export")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: gdn_ops.export needs the onnx extra: pip install 'gdn_ops[onnx]'"
    )
