"""A session takes the body that it can run, and refuses what does not fit."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import gdn_ops
from errors import message_of, refusal
from gdn_ops import export
from gdn_ops.export.runtime import sessions
from onnx_native import needs_library
from onnx_needs import needs_ort_body
from onnx_steps import STATE, Step, assert_right, feed, in_session
from paths import ORT_LIBRARY

STEP_SESSION = Step(B=3, tokens=1)


@pytest.fixture(scope="module")
def session() -> export.DecodeSession:
    return STEP_SESSION.session(body="standard")


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("text", "wrong"),
    {
        "q has shape (3, 8), should be (batch, 2, 8) = (3, 2, 8): 3 dimensions, not 2": {
            "q": zeros(3, 8)
        },
        "q has shape (3, 4, 8), should be (batch, 2, 8) = (3, 2, 8)": {"q": zeros(3, 4, 8)},
        "k has shape (3, 2, 16), should be (batch, 2, 8) = (3, 2, 8)": {"k": zeros(3, 2, 16)},
        "v has shape (3, 4, 8), should be (batch, 4, 6) = (3, 4, 6)": {"v": zeros(3, 4, 8)},
        "beta has shape (1, 4), should be (batch, 4) = (3, 4); the batch is fixed when a "
        "DecodeSession is made": {"beta": zeros(1, 4)},
        "v has dtype float64, should be float32": {"v": zeros(3, 4, 6, dtype=np.float64)},
        "log_alpha has type list, should be a numpy.ndarray": {"log_alpha": [[0.0] * 4] * 3},
        "v has type MaskedArray, should be a numpy.ndarray": {
            "v": np.ma.masked_array(zeros(3, 4, 6), True)
        },
    }.items(),
)
def test_a_wrong_input_is_refused_before_onnxruntime_runs(
    text: str, wrong: dict[str, Any], session: export.DecodeSession
) -> None:
    (token,), state = STEP_SESSION.draw()
    session.state = state.numpy()
    assert refusal(session.step, **feed(token) | wrong) == f"DecodeSession.step: {text}"
    assert np.array_equal(session.state[STATE], state.numpy())


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"q": 0}, "k is missing, should be given: the inputs are q, k, v, log_alpha, beta"),
        ((0,), {"q": 0}, "q is given twice, should be given once"),
        ((), {"alpha": 0}, "alpha is given, should be one of q, k, v, log_alpha, beta"),
        ((0,) * 6, {}, "6 inputs are given, should be 5: q, k, v, log_alpha, beta"),
    ],
)
def test_inputs_that_are_missing_or_too_many_are_named(
    args: tuple[int, ...], kwargs: dict[str, int], text: str, session: export.DecodeSession
) -> None:
    message = message_of(gdn_ops.SpecTypeError, session.step, *args, **kwargs)
    assert message == f"DecodeSession.step: {text}"


@pytest.mark.parametrize(
    ("text", "state"),
    {
        f"{STATE} has shape (3, 4, 6, 8), should be (batch, 4, 8, 6) = (3, 4, 8, 6); K comes "
        f"before V in a state": zeros(3, 4, 6, 8),
        f"{STATE} has shape (1, 4, 8, 6), should be (batch, 4, 8, 6) = (3, 4, 8, 6); the batch "
        f"is fixed when a DecodeSession is made": zeros(1, 4, 8, 6),
        f"{STATE} has dtype float16, should be float32": {
            STATE: zeros(3, 4, 8, 6, dtype=np.float16)
        },
        f"state is given, should be one of {STATE}": {"state": zeros(3, 4, 8, 6)},
    }.items(),
)
def test_a_wrong_state_is_refused(state: Any, text: str, session: export.DecodeSession) -> None:
    assert refusal(setattr, session, "state", state) == f"DecodeSession.state: {text}"


@pytest.mark.parametrize(
    ("text", "options"),
    {
        "batch is -1, should be at least 0": {"batch": -1},
        "batch has type float, should be an integer": {"batch": 2.0},
        "batch is of 101 bits, should be at most 9223372036854775807": {"batch": 2**100},
        "threads is 0, should be at least 1": {"threads": 0},
        "threads is 1000000, should be at most 1024": {"threads": 10**6},
        "in_place has type str, should be True or False": {"in_place": "no"},
        "custom_op_library has type int, should be a path": {"custom_op_library": 3},
        "custom_op_library has type bytes, should be a path": {"custom_op_library": b"lib.so"},
        "custom_op_library is 'a\\x00b', should be a path": {"custom_op_library": "a\0b"},
        "body is [], should be one of auto, standard, ort, onnx, custom": {"body": []},
        "body is 'fast', should be one of auto, standard, ort, onnx, custom": {"body": "fast"},
        "custom_op_library is None, should be the path of a library for body 'custom'": {
            "body": "custom"
        },
        "body is 'standard', should be 'auto' or 'custom' with a custom_op_library, whose "
        "kernel runs whatever the function body is": {
            "body": "standard",
            "custom_op_library": "lib.so",
        },
        "custom_op_library is 'no-such.so', should be an existing shared library": {
            "custom_op_library": "no-such.so"
        },
    }.items(),
)
def test_a_wrong_argument_of_a_session_is_refused(text: str, options: dict[str, Any]) -> None:
    assert refusal(STEP_SESSION.session, **options) == f"DecodeSession: {text}"


def without_states() -> Any:
    """Return a model whose states have names of their own."""
    model = STEP_SESSION.model("standard")
    del model.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.node):
        value.name = value.name.replace("past_key_values.0.", "before_").replace("present.0", "now")
    node = model.graph.node[0]
    node.input[:] = [x.name for x in model.graph.input]
    node.output[:] = [x.name for x in model.graph.output]
    return model


@pytest.mark.parametrize(
    ("text", "make"),
    {
        "model_or_path is 'no-such.onnx', should be an existing file": lambda: "no-such.onnx",
        "model_or_path has type int, should be a path or an onnx.ModelProto": lambda: 3,
        "the model has the sizes batch, sequence, should have one, the batch (sequence: q has it "
        "in axis 1); a prompt runs in an onnxruntime.InferenceSession": lambda: (
            STEP_SESSION.prefill_model("standard")
        ),
        "the model has no state input and output, should have some: name them "
        "past_key_values.{i}.recurrent_state and present.{i}.recurrent_state": without_states,
    }.items(),
)
def test_what_is_no_model_that_decodes_is_refused(text: str, make: Callable[[], Any]) -> None:
    assert refusal(export.DecodeSession, make(), batch=3) == f"DecodeSession: {text}"


@needs_library
@pytest.mark.parametrize("body", ["standard", None])
def test_the_kernel_of_a_library_runs_whatever_body_the_file_has(body: str | None) -> None:
    step = Step(qk_l2norm=True)
    run = in_session(step.model(body), "custom", custom_op_library=ORT_LIBRARY)
    assert_right(step, *step.draw(), run)
    session = export.DecodeSession(step.model(body), batch=2, custom_op_library=ORT_LIBRARY)
    assert session.body == "custom"


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"no library")
    with pytest.raises(gdn_ops.SpecError, match=r"library.so' cannot be loaded by onnxruntime"):
        export.DecodeSession(STEP_SESSION.model(None), batch=3, custom_op_library=path)


@needs_ort_body
def test_auto_takes_the_ort_body_where_it_can() -> None:
    for step, body in (
        (Step(), "ort"),
        (Step(dtype="float64", state_dtype="float64"), "standard"),
        (Step(scale=0.0), "standard"),
    ):
        assert step.session().body == body
        assert export.DecodeSession(step.model(None), batch=2).body == body


@pytest.fixture
def old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make onnxruntime 1.24 of the installed one: without LinearAttention."""
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard",))
    sessions._warn_once.cache_clear()
    monkeypatch.setattr(ort, "__version__", "1.24.4")


def test_auto_on_an_old_onnxruntime_takes_the_standard_body_and_says_so_once(
    old_onnxruntime: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="gdn_ops"):
        sessions = [export.DecodeSession(Step().model("ort"), batch=2) for _ in range(2)]
    assert [session.body for session in sessions] == ["standard", "standard"]
    assert [record.getMessage() for record in caplog.records] == [
        "onnxruntime 1.24.4 does not have com.microsoft::LinearAttention, which onnxruntime has "
        "from 1.25 on: the slower body 'standard' runs"
    ]


@pytest.mark.parametrize(
    ("body", "needs"),
    {
        "ort": "com.microsoft::LinearAttention, which onnxruntime has from 1.25 on; this is ",
        "onnx": "models of opset 27, for which onnx should be 1.22 or newer and onnxruntime 1.32 "
        "(1.28 where ALLOW_RELEASED_ONNX_OPSET_ONLY=0 is set in the environment) or newer; this is "
        f"onnx {onnx.__version__} and ",
    }.items(),
)
def test_a_body_on_an_old_onnxruntime_names_what_it_needs_and_the_cure(
    old_onnxruntime: None, body: str, needs: str
) -> None:
    assert refusal(Step().session, body=body) == (
        f"DecodeSession: body {body!r} needs {needs}onnxruntime 1.24.4; take body='standard'"
    )


def test_an_old_onnx_writes_no_onnx_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 23)
    monkeypatch.setattr(onnx, "__version__", "1.18.0")
    export.available_bodies.cache_clear()
    try:
        assert "onnx" not in export.available_bodies()
        assert Step().session().body != "onnx"
        with pytest.raises(gdn_ops.SpecError, match=r"needs models .* this is onnx 1\.18\.0 and"):
            Step().session(body="onnx")
    finally:
        export.available_bodies.cache_clear()
    assert refusal(Step().model, "onnx") == (
        "gdn_ops::GatedDeltaStep: opset is 27, should be at most 23, the newest that the installed "
        "onnx 1.18.0 knows; body 'onnx' needs onnx 1.22 or newer: take body='standard'"
    )


def test_auto_never_takes_the_onnx_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard", "onnx"))
    assert Step().session().body == "standard"


@pytest.mark.parametrize("body", ["auto", "standard", "onnx"])
def test_a_model_too_new_for_onnxruntime_names_its_opset_and_the_cure(body: str) -> None:
    model = Step().model("standard")
    model.opset_import[0].version = 99
    with pytest.raises((gdn_ops.SpecError, gdn_ops.BackendUnsupportedError)) as caught:
        export.DecodeSession(model, batch=2, body=body)
    if "onnx" in export.available_bodies() or body != "onnx":
        assert re.search(
            rf"onnxruntime {re.escape(ort.__version__)} does not take the model: .*; body '\w+' in "
            r"a model of opset 99 needs onnxruntime of a later year, this one takes opset \d+ and "
            r"older: export with opset=21$",
            str(caught.value),
            re.DOTALL,
        )
    else:
        assert str(caught.value).endswith("; export with opset=21 and take body='standard'")


def test_without_onnxruntime_a_session_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert message_of(ModuleNotFoundError, Step().session, body="standard") == (
        "DecodeSession needs onnxruntime: pip install 'gdn_ops[onnx]'"
    )


@pytest.mark.parametrize("name", ["batch", "body", "inputs", "outputs", "buffers"])
def test_what_a_session_was_made_with_cannot_be_set(
    session: export.DecodeSession, name: str
) -> None:
    before = getattr(session, name)
    message = message_of(AttributeError, setattr, session, name, before)
    assert message == f"property {name!r} of 'DecodeSession' object has no setter"
