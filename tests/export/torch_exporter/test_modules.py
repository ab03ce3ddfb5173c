"""A torch module becomes a model with our nodes, which onnxruntime runs as torch does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import gdn_ops
from gdn_ops import export
from gdn_ops.export.model.conversion import with_body
from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.torch_exporter import exporter
from onnx_layers import (
    CHANNELS,
    HV,
    TAPS,
    D,
    K,
    Layer,
    Step,
    Two,
    V,
    assert_same,
    layer_args,
    make_layer,
    run_engine,
    shapes_of,
    step_args,
    zero_states,
)
from onnx_needs import at_opset, takes_opset, tells_overloads_apart
from onnx_steps import NEW_STATE, STATE
from onnx_steps import Step as Node


@pytest.fixture(scope="module")
def layer() -> Layer:
    torch.manual_seed(0)
    return make_layer()


@pytest.fixture(scope="module")
def layer_file(layer: Layer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "layer.onnx"
    export.export_decode(layer, layer_args(1), path)
    return path


def run_reference(model: Any, tensors: Iterable[Tensor]) -> Any:
    """Run a model in onnx.reference on its inputs in order."""
    feeds = {i.name: x.numpy() for i, x in zip(model.graph.input, tensors, strict=True)}
    return ReferenceEvaluator(model).run(None, feeds)


def assert_states(session: Any, convs: list[Tensor], states: list[Tensor]) -> None:
    for i, (conv, state) in enumerate(zip(convs, states, strict=True)):
        names = (f"past_key_values.{i}.{kind}_state" for kind in ("conv", "recurrent"))
        assert_same([session.state[name] for name in names], [conv, state])


def test_a_whole_layer_is_one_file_with_one_node(layer: Layer, layer_file: Path) -> None:
    model = onnx.load(layer_file)
    assert [n.op_type for n in model.graph.node if n.domain == "gdn_ops"] == ["GatedDeltaStep"]
    assert export.bodies_of(model) == ("standard",)
    conv, recurrent = ["batch", CHANNELS, TAPS - 1], ["batch", HV, K, V]
    assert shapes_of(model.graph.input) == {
        "x": ["batch", 1, D],
        "past_key_values.0.conv_state": conv,
        STATE: recurrent,
    }
    assert shapes_of(model.graph.output) == {
        "output": ["batch", 1, D],
        "present.0.conv_state": conv,
        NEW_STATE: recurrent,
    }
    for batch in (0, 1, 3, 7):
        args = layer_args(batch, seed=batch)
        assert_same(run_engine(layer_file, args), layer(*args))
        # onnx.reference cannot concatenate nothing.
        if batch:
            assert_same(run_reference(model, args), layer(*args))


@pytest.mark.parametrize("body", export.available_bodies())
def test_a_session_decodes_as_the_layer_does(body: str, layer: Layer, layer_file: Path) -> None:
    session = export.DecodeSession(layer_file, batch=3, body=body, threads=1)
    assert session.inputs == ("x",)
    assert session.outputs == ("output",)
    conv, state = zero_states(3)
    for t in range(20):
        x = layer_args(3, seed=t)[0]
        expected, conv, state = layer(x, conv, state)
        assert_same([session.step(x.numpy())], [expected])
    assert_states(session, [conv], [state])


def test_a_prompt_and_its_continuation_share_their_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = make_layer()
    first, rest = tmp_path / "prompt.onnx", tmp_path / "decode.onnx"
    x = torch.randn(2, 9, D)
    model = export.export_prefill(layer, (x[:, :5], *layer_args(2)[1:]), first)
    export.export_decode(layer, layer_args(2), rest)
    assert shapes_of(model.graph.input)["x"] == ["batch", "sequence", D]
    assert shapes_of(model.graph.output)["output"] == ["batch", "sequence", D]
    zeros = zero_states(2)
    expected, *after = layer(x, *zeros)
    for body in export.available_bodies():
        swapped = with_body(model, body, "test")
        read, *states = run_engine(swapped, [x[:, :6], *zeros])
        assert_same([read], [expected[:, :6]])
        names = [value.name for value in swapped.graph.output[1:]]
        session = export.DecodeSession(rest, batch=2, body=body)
        pairs = zip(names, states, strict=True)
        session.state = {name.replace("present", "past_key_values"): state for name, state in pairs}
        for t in range(6, 9):
            assert_same([session.step(x[:, t : t + 1].numpy())], [expected[:, t : t + 1]])
        assert_same(session.state.values(), after)


def test_layers_are_numbered_and_their_states_kept_apart(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Two()
    x, conv, state = layer_args(2)
    model = export.export_decode(module, (x, [conv, conv], [state, state]))
    kinds = ("conv_state", "recurrent_state")
    assert export.states_of(model) == {
        f"past_key_values.{i}.{kind}": f"present.{i}.{kind}" for kind in kinds for i in (0, 1)
    }
    session = export.DecodeSession(model, batch=2)
    convs, states = ([zero, zero] for zero in zero_states(2))
    for t in range(5):
        x = layer_args(2, seed=t)[0]
        expected, convs, states = module(x, convs, states)
        assert_same([session.step(x.numpy())], [expected])
    assert_states(session, convs, states)


def test_layers_of_two_rules_have_a_function_each() -> None:
    torch.manual_seed(2)
    module = Two(("gated_delta", "delta"))
    x, conv, state = layer_args(2)
    model = export.export_decode(module, (x, [conv, conv], [state, state]))
    assert [f.overload for f in model.functions] == ["", "delta_l2norm_beta_float"]
    for body in export.available_bodies():
        swapped = with_body(model, body, "test")
        assert export.bodies_of(swapped) == (body,)
        assert [f.overload for f in swapped.functions] == ["", "delta_l2norm_beta_float"]
        check_model(swapped)
        expected, convs, states = module(x, [conv, conv], [state, state])
        session = export.DecodeSession(model, batch=2, body=body)
        kept = {name: state if "recurrent" in name else conv for name in session.state}
        session.state = {name: value.numpy() for name, value in kept.items()}
        assert_same([session.step(x.numpy())], [expected])
        assert_states(session, convs, states)
        if tells_overloads_apart():
            results = run_engine(swapped, [x, conv, conv, state, state])
            assert_same(results, [expected, *convs, *states])
        if body == "onnx":
            # Nothing but the opset and the IR version is another.
            assert export.states_of(swapped) == export.states_of(model)
            swapped.opset_import[0].version = 21
            swapped.ir_version = model.ir_version
        back = export.set_body(export.set_body(swapped, None), "standard")
        assert back.SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (18, "standard"),
        at_opset(25, "standard", opset=25, is_run=False),
        *(at_opset(27, body, opset=27, is_run=False) for body in ("standard", "onnx")),
        at_opset(28, "onnx", opset=28, is_run=False),
    ],
)
def test_a_layer_exports_at_every_opset(opset: int, body: str, layer: Layer) -> None:
    model = export.export_decode(layer, layer_args(2), opset=opset, body=body)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, "gdn_ops": 1}
    args = layer_args(3)
    if takes_opset(opset):
        assert_same(run_engine(model, args), layer(*args))
    assert_same(run_reference(model, args), layer(*args))


def test_bodies_change_places_and_leave_no_trace(layer_file: Path) -> None:
    model = onnx.load(layer_file)
    original = model.SerializeToString()
    previous: Any = "standard"
    for body in ("standard", "ort", None, "standard", None, "ort", "ort", "standard"):
        before = model.SerializeToString()
        model = export.set_body(model, body)
        check_model(model)
        assert export.bodies_of(model) == (() if body is None else (body,))
        assert (model.SerializeToString() == before) == (body == previous)
        previous = body
    assert model.SerializeToString() == original


def test_a_body_takes_only_the_import_away_that_it_brought() -> None:
    model = Node().model("standard")
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    original = model.SerializeToString()
    swapped = export.set_body(export.set_body(model, "ort"), "standard")
    assert swapped.SerializeToString() == original


def test_other_functions_of_a_model_stay(layer_file: Path) -> None:
    model = onnx.load(layer_file)
    other = onnx.parser.parse_function(
        '<domain: "mine", opset_import: ["": 21]> Twice (x) => (y) { y = Add(x, x) }'
    )
    model.functions.append(other)
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    swapped = export.set_body(model, "ort")
    assert [(f.domain, f.name) for f in swapped.functions] == [
        ("mine", "Twice"),
        ("gdn_ops", "GatedDeltaStep"),
    ]


def assert_first_step(path: Path, layer: Layer) -> None:
    x = layer_args(2)[0]
    expected = layer(x, *zero_states(2))[0]
    assert_same([export.DecodeSession(path, batch=2).step(x.numpy())], [expected])


def test_weights_in_another_file_stay_there(layer: Layer, layer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    beside = tmp_path / "external.onnx.data"
    model = onnx.load(layer_file)
    onnx.save_model(model, path, save_as_external_data=True, location=beside.name)
    before = beside.read_bytes()
    light = onnx.load(path, load_external_data=False)
    onnx.save_model(export.set_body(light, "standard"), path)
    assert beside.read_bytes() == before
    kept = onnx.load(path, load_external_data=False).graph.initializer
    largest = max(kept, key=lambda tensor: math.prod(tensor.dims))
    assert largest.data_location == onnx.TensorProto.EXTERNAL
    assert_first_step(path, layer)


def test_large_weights_are_written_beside_the_model(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_INLINE_BYTES", 1000)
    path = tmp_path / "large.onnx"
    export.export_decode(layer, layer_args(2), path)
    assert (tmp_path / "large.onnx.data").stat().st_size > 9_000
    assert_first_step(path, layer)


step = gdn_ops.gated_delta_step
STEPS: dict[str, Callable[..., Any]] = {
    "alpha": step,
    "no beta": lambda q, k, v, a, b, s: step(q, k, v, a, None, s),
    "narrow gates": lambda q, k, v, a, b, s: step(
        q, k, v, None, b.bfloat16(), s, log_alpha=a.log().half()
    ),
    "float16": step,
    "float64": step,
    "pinned": lambda *x: step(*x, backend="naive"),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_way_to_call_the_step_has_a_translation(name: str) -> None:
    call, dtype = STEPS[name], getattr(torch, name, torch.float32)
    args = step_args(dtype)
    model = export.export_decode(Step(call), args)
    args[3][0, 0] = 0.0
    named = dict(zip(("q", "k", "v", "a", "b", STATE), args, strict=True))
    # torch drops an argument that is not used.
    used = [named[i.name] for i in model.graph.input]
    allowed = {torch.float16: 2e-3, torch.float64: 1e-7}.get(dtype, 2e-6)
    assert_same(run_engine(model, used), call(*args), allowed)


def test_a_prompt_of_few_tokens_is_a_sequence() -> None:
    *one, state = step_args()
    five, three = ((*(torch.stack([x] * n, 1) for x in one), state) for n in (5, 3))
    model = export.export_prefill(Step(gdn_ops.gated_delta_steps), five)
    assert_same(run_engine(model, three), gdn_ops.gated_delta_steps(*three))


def test_a_prompt_without_a_state_starts_from_zeros() -> None:
    class Start(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Any:
            return gdn_ops.gated_delta(q, k, v, a, return_state=True)

    args = tuple(torch.stack([x] * 5, 1) for x in step_args()[:4])
    model = export.export_prefill(Start(), args)
    assert shapes_of(model.graph.output) == {
        "output": ["batch", "sequence", HV, V],
        NEW_STATE: ["batch", HV, K, V],
    }
    assert_same(run_engine(model, args), Start()(*args))


def test_names_may_be_given(layer: Layer) -> None:
    names = (("hidden", None, None), ("y", None, None))
    model = export.export_decode(layer, layer_args(2), names=names)
    assert model.graph.input[0].name == "hidden"
    assert [v.name for v in model.graph.output] == ["y", "present.0.conv_state", NEW_STATE]
    own = (("x", "conv.in", "memory.in"), ("y", "conv.out", "memory.out"))
    model = export.export_decode(layer, layer_args(2), names=own)
    assert export.states_of(model) == {"memory.in": "memory.out", "conv.in": "conv.out"}


def test_a_batch_may_be_fixed(layer: Layer) -> None:
    model = export.export_decode(layer, layer_args(3), dynamic_batch=False)
    assert shapes_of(model.graph.input)["x"] == [3, 1, D]
    assert_same(run_engine(model, layer_args(3)), layer(*layer_args(3)))
