"""A session keeps its states, updates them in place, and refuses what does not fit."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paths import ORT_LIBRARY

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import gdn_ops  # noqa: E402
from gdn_ops import export  # noqa: E402
from gdn_ops.export.runtime import sessions  # noqa: E402
from onnx_needs import BODIES, needs_ort_body  # noqa: E402
from onnx_steps import STATE, Step, assert_right, feed, in_session, relative_error  # noqa: E402

LONG = Step(H=2, HV=4, K=16, V=12, tokens=256)


@pytest.mark.parametrize("body", BODIES)
def test_one_buffer_two_buffers_and_float64_agree_over_256_steps(body: str) -> None:
    tokens, state = LONG.draw()
    model = LONG.model(body)
    one, two = in_session(model, body), in_session(model, body, in_place=False)
    assert_right(LONG, tokens, state, one)
    assert_right(LONG, tokens, state, two)
    (outputs, final), (others, other_final) = one(tokens, state), two(tokens, state)
    assert all(np.array_equal(x, y) for x, y in zip(outputs, others, strict=True))
    assert np.array_equal(final, other_final)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("body", BODIES)
def test_a_session_outlives_everything_that_it_was_made_of(body: str, in_place: bool) -> None:
    tokens, state = LONG.draw()
    exact_o, exact_state = LONG.run(tokens, state, wide=True)
    session = export.DecodeSession(
        LONG.model(body), batch=2, body=body, threads=1, in_place=in_place
    )
    session.state = state.numpy().copy()
    rubbish = []
    for token, exact in zip(tokens, exact_o, strict=True):
        # What was freed by mistake is overwritten.
        gc.collect() if len(rubbish) % 16 == 0 else None
        rubbish.append(np.full_like(state.numpy(), np.nan))
        o = session.step(**{name: x.copy() for name, x in feed(token).items()})
        assert relative_error(o, exact) < 2e-5
    del rubbish
    gc.collect()
    assert relative_error(session.state[STATE], exact_state) <= 1e-6


def test_what_a_session_returns_belongs_to_the_caller() -> None:
    tokens, state = Step(tokens=2).draw()
    session = export.DecodeSession(Step().model("standard"), batch=2)
    given = state.numpy().copy()
    session.state = given
    given.fill(7)
    kept = session.state[STATE]
    assert np.array_equal(kept, state.numpy())
    kept.fill(7)
    assert np.array_equal(session.state[STATE], state.numpy())
    o = session.step(**feed(tokens[0]))
    before = o.copy()
    session.step(**feed(tokens[1]))
    assert np.array_equal(o, before)
    assert session.state[STATE].flags.owndata


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda o: o,
    "a part": lambda o: o[1, 1:],
    "a part of a part": lambda o: o[0][:1].T,
    "another dtype": lambda o: o.view(np.int32),
    "a tensor": lambda o: torch.from_numpy(o).numpy(),
    "a buffer": memoryview,
    "an iterator": lambda o: o.flat,
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_result_is_not_written_again_while_anybody_has_a_part_of_it(
    holder: str, in_place: bool
) -> None:
    tokens, _ = Step(tokens=6).draw()
    session = export.DecodeSession(Step().model("standard"), batch=2, in_place=in_place)
    held, values = [], []
    for token in tokens:
        o = session.step(**feed(token))
        held.append(HOLDERS[holder](o))
        values.append(np.array(held[-1]))
        del o
    for kept, value in zip(held, values, strict=True):
        assert np.array_equal(np.array(kept), value)


def test_the_memory_of_a_result_that_nobody_has_is_used_again() -> None:
    tokens, _ = Step(tokens=8).draw()
    session = export.DecodeSession(Step().model("standard"), batch=2)
    session.step(**feed(tokens[0]))
    made = session._results[0]
    for token in tokens[1:4]:
        session.step(**feed(token))
    assert session._results == [made]
    # As a loop does that still has the last result while it makes the next.
    o = session.step(**feed(tokens[4]))
    for token in tokens[5:]:
        o = session.step(**feed(token))
    assert len(session._results) == 2 and made in session._results
    assert o.flags.writeable


@pytest.mark.parametrize("body", export.available_bodies())
def test_a_token_written_into_the_buffers_is_one_that_was_given(body: str) -> None:
    tokens, _ = Step(tokens=6).draw()
    given, written = (
        export.DecodeSession(Step().model(body), batch=2, body=body) for _ in range(2)
    )
    for i, token in enumerate(tokens):
        arrays = feed(token)
        expected = given.step(**arrays)
        buffers = written.buffers
        for name in list(arrays)[: i % (len(arrays) + 1)]:
            buffers[name][...] = arrays[name]
            arrays[name] = buffers[name]
        assert np.array_equal(written.step(**arrays), expected)
    for x, y in zip(given.state.values(), written.state.values(), strict=True):
        assert np.array_equal(x, y)


def test_a_buffer_that_is_given_for_another_input_is_read_before_it_is_written() -> None:
    tokens, _ = Step(tokens=1).draw()
    arrays = feed(tokens[0])
    swapped = arrays | {"q": arrays["k"], "k": arrays["q"]}
    session, other = (export.DecodeSession(Step().model("standard"), batch=2) for _ in range(2))
    expected = other.step(**swapped)
    buffers = session.buffers
    for name, x in arrays.items():
        buffers[name][...] = x
    given = buffers | {"q": buffers["k"][:], "k": buffers["q"]}
    assert np.array_equal(session.step(**given), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_reset_session_is_a_new_one(in_place: bool) -> None:
    tokens, _ = Step(tokens=3).draw()
    model = Step().model("standard")
    session = export.DecodeSession(model, batch=2, in_place=in_place)
    first = [session.step(**feed(token)) for token in tokens]
    assert session.state[STATE].any()
    session.reset()
    assert not session.state[STATE].any()
    again = [session.step(**feed(token)) for token in tokens]
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))


def test_inputs_go_by_position_or_by_name_and_need_not_be_contiguous() -> None:
    ((token,), _) = Step(tokens=1).draw()
    model = Step().model("standard")

    def o(*args: Any, **kwargs: Any) -> Any:
        return export.DecodeSession(model, batch=2).step(*args, **kwargs)

    values = feed(token)
    expected = o(*values.values())
    assert expected.any()
    assert np.array_equal(o(**dict(reversed(values.items()))), expected)
    strided = [np.repeat(x, 2, -1)[..., ::2] for x in values.values()]
    assert not strided[0].flags.c_contiguous
    assert np.array_equal(o(*strided), expected)
    first, *rest = values.values()
    assert np.array_equal(o(first, **dict(zip(list(values)[1:], rest, strict=True))), expected)


STEP_SESSION = Step(B=3, tokens=1)


@pytest.fixture(scope="module")
def session() -> export.DecodeSession:
    return export.DecodeSession(STEP_SESSION.model("standard"), batch=3, body="standard")


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


WRONG_INPUTS = [
    (
        {"q": zeros(3, 8)},
        "q has shape (3, 8), should be (batch, 2, 8) = (3, 2, 8): 3 dimensions, not 2",
    ),
    (
        {"q": zeros(3, 4, 8)},
        "q has shape (3, 4, 8), should be (batch, 2, 8) = (3, 2, 8)",
    ),
    (
        {"k": zeros(3, 2, 16)},
        "k has shape (3, 2, 16), should be (batch, 2, 8) = (3, 2, 8)",
    ),
    (
        {"v": zeros(3, 4, 8)},
        "v has shape (3, 4, 8), should be (batch, 4, 6) = (3, 4, 6)",
    ),
    (
        {"beta": zeros(1, 4)},
        "beta has shape (1, 4), should be (batch, 4) = (3, 4); the batch is fixed when a "
        "DecodeSession is made",
    ),
    (
        {"v": zeros(3, 4, 6, dtype=np.float64)},
        "v has dtype float64, should be float32",
    ),
    (
        {"log_alpha": [[0.0] * 4] * 3},
        "log_alpha has type list, should be a numpy.ndarray",
    ),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG_INPUTS)
def test_a_wrong_input_is_refused_before_onnxruntime_runs(
    wrong: dict[str, Any], text: str, session: export.DecodeSession
) -> None:
    (token,), state = STEP_SESSION.draw()
    session.state = state.numpy()
    with pytest.raises(gdn_ops.SpecError) as caught:
        session.step(**{**feed(token), **wrong})
    assert str(caught.value) == f"DecodeSession.step: {text}"
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
    with pytest.raises(gdn_ops.SpecTypeError) as caught:
        session.step(*args, **kwargs)
    assert str(caught.value) == f"DecodeSession.step: {text}"


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            zeros(3, 4, 6, 8),
            f"{STATE} has shape (3, 4, 6, 8), should be (batch, 4, 8, 6) = (3, 4, 8, 6); K comes "
            f"before V in a state",
        ),
        (
            zeros(1, 4, 8, 6),
            f"{STATE} has shape (1, 4, 8, 6), should be (batch, 4, 8, 6) = (3, 4, 8, 6); the batch "
            f"is fixed when a DecodeSession is made",
        ),
        (
            {STATE: zeros(3, 4, 8, 6, dtype=np.float16)},
            f"{STATE} has dtype float16, should be float32",
        ),
        ({"state": zeros(3, 4, 8, 6)}, f"state is given, should be one of {STATE}"),
    ],
)
def test_a_wrong_state_is_refused(state: Any, text: str, session: export.DecodeSession) -> None:
    with pytest.raises(gdn_ops.SpecError) as caught:
        session.state = state
    assert str(caught.value) == f"DecodeSession.state: {text}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": -1}, "batch is -1, should be at least 0"),
        ({"batch": 2.0}, "batch has type float, should be an integer"),
        ({"threads": 0}, "threads is 0, should be at least 1"),
        (
            {"body": "fast"},
            "body is 'fast', should be one of auto, standard, ort, onnx, custom",
        ),
        (
            {"body": "custom"},
            "custom_op_library is None, should be the path of a library for body 'custom'",
        ),
        (
            {"body": "standard", "custom_op_library": "lib.so"},
            "body is 'standard', should be 'auto' or 'custom' with a custom_op_library, whose "
            "kernel runs whatever the function body is",
        ),
        (
            {"custom_op_library": "no-such.so"},
            "custom_op_library is 'no-such.so', should be an existing shared library",
        ),
        (
            {"model_or_path": "no-such.onnx"},
            "model_or_path is 'no-such.onnx', should be an existing file",
        ),
        (
            {"model_or_path": 3},
            "model_or_path has type int, should be a path or an onnx.ModelProto",
        ),
    ],
)
def test_a_wrong_argument_of_a_session_is_refused(options: dict[str, Any], text: str) -> None:
    arguments = {"model_or_path": STEP_SESSION.model("standard"), "batch": 3, **options}
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.DecodeSession(arguments.pop("model_or_path"), **arguments)
    assert str(caught.value) == f"DecodeSession: {text}"


needs_library = pytest.mark.skipif(
    not ORT_LIBRARY.exists(), reason="native/build/libgdn_ops_ort.so is not built: make native"
)


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


def test_a_prompt_is_no_model_for_a_session() -> None:
    model = export.make_prefill_model(**STEP_SESSION.options())
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.DecodeSession(model, batch=3)
    assert str(caught.value) == (
        "DecodeSession: the model has the sizes batch, sequence, should have one, the batch "
        "(sequence: q has it in axis 1); a prompt runs in an onnxruntime.InferenceSession"
    )


def test_a_model_without_states_is_none_for_a_session() -> None:
    model = STEP_SESSION.model("standard")
    del model.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.node):
        value.name = value.name.replace("past_key_values.0.", "before_").replace("present.0", "now")
    node = model.graph.node[0]
    node.input[:] = [x.name for x in model.graph.input]
    node.output[:] = [x.name for x in model.graph.output]
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.DecodeSession(model, batch=3)
    assert str(caught.value) == (
        "DecodeSession: the model has no state input and output, should have some: name them "
        "past_key_values.{i}.recurrent_state and present.{i}.recurrent_state"
    )


@needs_ort_body
def test_auto_takes_the_ort_body_where_it_can() -> None:
    for step, body in (
        (Step(), "ort"),
        (Step(dtype="float64", state_dtype="float64"), "standard"),
        (Step(scale=0.0), "standard"),
    ):
        session = export.DecodeSession(step.model("standard"), batch=2)
        assert session.body == body
        assert export.DecodeSession(step.model(None), batch=2).body == body


@pytest.fixture
def old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make onnxruntime 1.24 of the installed one: without LinearAttention."""
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard",))
    monkeypatch.setattr(sessions, "_warned", set())
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


def test_the_ort_body_on_an_old_onnxruntime_names_the_cure(old_onnxruntime: None) -> None:
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.DecodeSession(Step().model("standard"), batch=2, body="ort")
    assert str(caught.value) == (
        "DecodeSession: body 'ort' needs com.microsoft::LinearAttention, which onnxruntime has "
        "from 1.25 on; this is onnxruntime 1.24.4; take body='standard'"
    )


def test_the_onnx_body_on_an_old_onnxruntime_names_what_it_needs(old_onnxruntime: None) -> None:
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.DecodeSession(Step().model("standard"), batch=2, body="onnx")
    assert str(caught.value) == (
        "DecodeSession: body 'onnx' needs models of opset 27, for which onnx should be 1.22 or "
        "newer and onnxruntime 1.32 (1.28 where ALLOW_RELEASED_ONNX_OPSET_ONLY=0 is set in the "
        f"environment) or newer; this is onnx {onnx.__version__} and onnxruntime 1.24.4; take "
        "body='standard'"
    )


def test_an_old_onnx_writes_no_onnx_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 23)
    monkeypatch.setattr(onnx, "__version__", "1.18.0")
    export.available_bodies.cache_clear()
    try:
        assert "onnx" not in export.available_bodies()
        assert export.DecodeSession(Step().model("standard"), batch=2).body != "onnx"
        with pytest.raises(gdn_ops.SpecError, match=r"needs models .* this is onnx 1\.18\.0 and"):
            export.DecodeSession(Step().model("standard"), batch=2, body="onnx")
    finally:
        export.available_bodies.cache_clear()
    with pytest.raises(gdn_ops.SpecError) as caught:
        Step().model("onnx")
    assert str(caught.value) == (
        "gdn_ops::GatedDeltaStep: opset is 27, should be at most 23, the newest that the installed "
        "onnx 1.18.0 knows; body 'onnx' needs onnx 1.22 or newer: take body='standard'"
    )


def test_auto_never_takes_the_onnx_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard", "onnx"))
    assert export.DecodeSession(Step().model("standard"), batch=2).body == "standard"


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
    with pytest.raises(ModuleNotFoundError) as caught:
        export.DecodeSession(Step().model("standard"), batch=2, body="standard")
    assert str(caught.value) == ("DecodeSession needs onnxruntime: pip install 'gdn_ops[onnx]'")


def test_the_buffers_of_a_session_are_aligned_to_cache_lines() -> None:
    session = export.DecodeSession(Step(K=5, V=7).model("standard"), batch=2)
    for buffers in (session._inputs, session._new_results().buffers):
        assert all(buffer.array.ctypes.data % 64 == 0 for buffer in buffers.values())


def test_a_session_prints_what_it_is() -> None:
    session = export.DecodeSession(Step().model("standard"), batch=2, body="standard")
    assert repr(session) == (
        "DecodeSession(q, k, v, log_alpha, beta -> o; 1 states, batch=2, body='standard')"
    )
