"""A foreign or damaged file is refused by name, without another error or more memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("hypothesis")

import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import gdn_ops
from errors import message_of
from gdn_ops import export
from onnx_steps import STATE, Step

STEP = Step(H=1, HV=2, K=4, V=3)


def changed(change: Callable[[Any], object]) -> bytes:
    """Return the file of a good model after a change of it."""
    model = STEP.model("standard")
    change(model)
    return bytes(model.SerializeToString())


def with_metadata(text: str) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        model.metadata_props[0].value = text

    return change


def with_attribute(name: str, value: object) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        (given,) = (a for a in model.graph.node[0].attribute if a.name == name)
        given.CopyFrom(helper.make_attribute(name, value))

    return change


def with_reference(model: Any) -> None:
    model.graph.node[0].attribute[0].ref_attr_name = "x"


def with_state_type(kind: int) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        model.graph.input[-1].type.tensor_type.elem_type = kind

    return change


def with_width(size: int) -> Callable[[Any], object]:
    """Change V, on every value that has it."""

    def change(model: Any) -> None:
        for value in (*model.graph.input, *model.graph.output):
            for axis in value.type.tensor_type.shape.dim:
                if axis.dim_value == STEP.V:
                    axis.dim_value = size

    return change


GOOD = STEP.model("standard").SerializeToString()
FOREIGN = "a foreign, cut off or damaged file"

BROKEN: dict[str, bytes] = {
    "an empty file, should be an ONNX file": b"",
    "an empty file, should be an ONNX file ": b"\0" * 64,
    f"{FOREIGN}, should be an ONNX file": GOOD[: len(GOOD) // 2],
    f"{FOREIGN}, should be an ONNX file ": b"\xff" * 100,
    "a text, should be an ONNX file": b"# Gated delta\n\nkein Modell: \xc3\xa4\n" * 20,
    "a Git LFS pointer: git lfs pull fetches the file, should be an ONNX file": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    ),
    "a safetensors file, should be an ONNX file": ((2).to_bytes(8, "little") + b"{}" + b"\0" * 64),
    "a GGUF file, should be an ONNX file": b"GGUF\3\0\0\0" + b"\0" * 40,
    "a model of onnxruntime's own format: keep the .onnx file it was made of, should be an "
    "ONNX file": b"\x10\0\0\0ORTM" + b"\0" * 40,
    "a damaged file: a name in it is no UTF-8 text": GOOD.replace(
        b"GatedDeltaStep", b"GatedDel\xff\xfeStep"
    ),
    f"{FOREIGN}: as an ONNX model it has no IR version": changed(
        lambda model: model.ClearField("ir_version")
    ),
    f"{FOREIGN}: as an ONNX model it has no opset": changed(
        lambda model: model.ClearField("opset_import")
    ),
    f"{FOREIGN}: as an ONNX model it has no nodes in its graph": changed(
        lambda model: model.graph.ClearField("node")
    ),
}


def readers(path: Path) -> list[Callable[[], object]]:
    """Return everything that takes the path of a model."""
    return [
        lambda: export.load_model(path),
        lambda: export.DecodeSession(path, batch=1),
        lambda: export.DecodeSession(str(path), batch=1, body="standard"),
    ]


def refusals(path: Path) -> list[str]:
    return [message_of(gdn_ops.SpecError, read) for read in readers(path)]


@pytest.mark.parametrize(("text", "data"), BROKEN.items())
def test_a_broken_file_is_named_with_what_is_wrong(text: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    for message in refusals(path):
        assert message.endswith(f"is {str(path)!r}, {text.strip()}")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path, "a folder, should be an ONNX file"),
        (tmp_path / "no.onnx", "should be an existing file"),
        (Path(os.devnull), "should be an existing file"),
    ):
        for message in refusals(path):
            assert message.endswith(f"is {str(path)!r}, {text}")
    assert "a\\x00b', " in message_of(gdn_ops.SpecError, export.load_model, "a\0b")
    assert message_of(gdn_ops.SpecTypeError, export.load_model, 3) == (
        "load_model: path has type int, should be a path"
    )


def test_a_large_foreign_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.write(b"\xf7" * 64)
        file.truncate(2**33)
    monkeypatch.setattr(onnx, "load_model_from_string", None)
    for message in refusals(path):
        assert message.endswith(f"is {str(path)!r}, a foreign file, should be an ONNX file")
    with path.open("r+b") as file:
        file.write(b"\x08")
    for message in refusals(path):
        assert "which has 8589934592 bytes, should have at most 2147483647" in message


def test_a_torch_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(3)}, path)
    for message in refusals(path):
        assert message.endswith("a zip archive, as torch.save writes it, should be an ONNX file")


@pytest.mark.parametrize(
    ("text", "change"),
    {
        "the model's metadata 'gdn_ops.states' hold '[1, 2]', should hold an object of names: "
        "which output is the next value of which input": with_metadata("[1, 2]"),
        "the model's metadata 'gdn_ops.states' hold '{', should hold an object of names: which "
        "output is the next value of which input": with_metadata("{"),
        "gdn_ops::GatedDeltaStep 'GatedDeltaStep': attribute num_qk_heads has type STRING, should "
        "be INT": with_attribute("num_qk_heads", "two"),
        "gdn_ops::GatedDeltaStep 'GatedDeltaStep': attribute num_qk_heads refers to 'x' of a "
        "function, should be a value: the node stands in the graph": with_reference,
        "DecodeSession: present.0.recurrent_state is the next value of more than one state, should "
        "be of one": with_metadata(
            f'{{"{STATE}": "present.0.recurrent_state", "q": "present.0.recurrent_state"}}'
        ),
        "gdn_ops::GatedDeltaStep 'GatedDeltaStep': num_qk_heads is 0, should be at least 1": (
            with_attribute("num_qk_heads", 0)
        ),
        "gdn_ops::GatedDeltaStep 'GatedDeltaStep': scale is nan, should be a finite number": (
            with_attribute("scale", float("nan"))
        ),
        f"gdn_ops::GatedDeltaStep 'GatedDeltaStep': the state {STATE!r} has ONNX element type 7, "
        f"should be one of float64, float32, bfloat16, float16": with_state_type(TensorProto.INT64),
        "the model imports gdn_ops 2, should import 1, which this release of gdn_ops knows: a "
        "newer release wrote it": lambda model: setattr(model.opset_import[1], "version", 2),
        "gdn_ops::GatedDeltaStep 'GatedDeltaStep': has 5 inputs, should have 6: q, k, v, "
        "log_alpha, beta, state, an empty name for one that is not given": (
            lambda model: model.graph.node[0].input.pop()
        ),
    }.items(),
)
def test_a_model_that_reads_wrong_names_its_file(
    text: str, change: Callable[[Any], object], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(changed(change))
    message = message_of(gdn_ops.SpecError, export.DecodeSession, path, batch=1)
    assert message == f"{str(path)!r}: {text}"


def test_a_huge_dimension_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(changed(with_width(2**40)))
    message = message_of(gdn_ops.SpecError, export.DecodeSession, path, batch=1)
    assert message.startswith(
        f"{str(path)!r}: DecodeSession: {STATE} has shape (1, 2, 4, 1099511627776), and all "
        f"buffers take "
    )
    assert "take a smaller batch, or look at the sizes with gdn-ops export --inspect" in message
    with pytest.raises(gdn_ops.SpecError, match="of this machine: take a smaller batch"):
        STEP.session(batch=2**40)


def test_an_opset_that_nobody_has_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(changed(lambda model: setattr(model.opset_import[0], "version", 99)))
    # It is both: an error of the file, and of what the installed runtime supports.
    for kind in (gdn_ops.SpecError, gdn_ops.BackendUnsupportedError):
        message = message_of(kind, export.DecodeSession, path, batch=1)
        assert message.startswith(f"{str(path)!r}: onnxruntime {onnxruntime.__version__} does not")


def weighted(path: Path) -> Path:
    """Write a model with a weight in another file; return the path of that file."""
    model = STEP.model("standard")
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path.with_name("weights.bin")


def test_weights_in_other_files_are_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = weighted(path)
    light = export.load_model(path).graph.initializer[0]
    whole = export.load_model(path, with_weights=True).graph.initializer[0]
    assert (len(light.raw_data), len(whole.raw_data)) == (0, 4 * 64 * 64)
    weights.write_bytes(b"\0" * 100)
    text = f"is {str(path)!r}, whose weight 'w' lies in 'weights.bin', "
    for message in refusals(path):
        assert message.endswith(f"{text}which has 100 bytes, should have 16384")
    weights.unlink()
    for message in refusals(path):
        assert message.endswith(f"{text}a missing file: keep the files of a model together")


@pytest.mark.parametrize("name", ["nodes_of", "states_of", "bodies_of", "set_body"])
def test_a_path_where_a_model_is_meant_says_how_to_load_it(name: str) -> None:
    more = {"body": None} if name == "set_body" else {}
    assert message_of(gdn_ops.SpecTypeError, getattr(export, name), "x.onnx", **more) == (
        f"{name}: model has type str, should be an onnx.ModelProto; gdn_ops.export.load_model "
        f"reads one from a file"
    )


MODELS = (
    GOOD,
    STEP.model(None).SerializeToString(),
    STEP.model("ort").SerializeToString(),
    STEP.prefill_model("standard").SerializeToString(),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a model, cut off or with some of them changed."""
    data = bytearray(draw(st.sampled_from(MODELS)))
    at = st.integers(0, len(data) - 1)
    if draw(st.integers(0, 3)) == 0:
        return bytes(data[: draw(at)])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(at)] = draw(st.integers(0, 255))
    return bytes(data)


@given(data=damaged())
@settings(max_examples=150, deadline=None)
def test_a_damaged_model_runs_or_is_refused(data: bytes) -> None:
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        try:
            model = export.load_model(path)
        except gdn_ops.SpecError as error:
            assert str(path) in str(error)
            with pytest.raises(gdn_ops.SpecError):
                export.DecodeSession(path, batch=2)
            return
        for body in (None, "standard", "ort"):
            try:
                export.set_body(model, body)
            except gdn_ops.SpecError:
                continue
        try:
            session = export.DecodeSession(path, batch=2, threads=1)
            outputs = session.step(**session.buffers)
        except gdn_ops.SpecError:
            return
        # Zeros written into a memory of zeros.
        for x in outputs if isinstance(outputs, tuple) else (outputs,):
            assert x.shape[0] == 2 and not x.astype(np.float32).any()
