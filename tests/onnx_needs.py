"""Marks that skip a test and say what the installed onnx and onnxruntime cannot do."""

from __future__ import annotations

import functools
import importlib.metadata

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from packaging.requirements import Requirement

from gdn_ops import export
from gdn_ops.export.runtime import sessions
from gdn_ops.export.runtime.sessions import why_not

takes_opset = functools.cache(sessions.takes_opset)


def needs_written(opset: int) -> pytest.MarkDecorator:
    """Skip a test where onnx does not know an opset."""
    return pytest.mark.skipif(
        opset > onnx.defs.onnx_opset_version(),
        reason=f"onnx {onnx.__version__} knows no opset {opset}",
    )


def needs_taken(opset: int) -> pytest.MarkDecorator:
    """Skip a test where onnxruntime loads no model of an opset."""
    return pytest.mark.skipif(
        not takes_opset(opset),
        reason=f"onnxruntime {onnxruntime.__version__} takes no model of opset {opset}",
    )


@functools.cache
def reference_scans() -> bool:
    """Return whether a Scan of onnx.reference stacks its tokens and does not join them."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 1, 1] x) => (float[2, 1, 1] y) {
          y = Scan <num_scan_inputs = 1, body = b (float[1, 1] a) => (float[1, 1] c) {
            c = Identity (a) }> (x)
        }"""
    )
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 1, 1), np.float32)})
    return bool(y.shape == (2, 1, 1))


@functools.cache
def reference_has_bfloat16() -> bool:
    """Return whether onnx.reference computes in bfloat16."""
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    return bool(dtype == np.dtype(ml_dtypes.bfloat16))


@functools.cache
def tells_overloads_apart() -> bool:
    """Return whether onnxruntime runs the function that the overload of a node names."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21, "mine": 1]>
        g (float[1] x) => (float[1] y, float[1] z) { y = mine.F (x) z = mine.F : other (x) }
        <domain: "mine", opset_import: ["": 21]> F (x) => (y) { y = Identity (x) }
        <domain: "mine", overload: "other", opset_import: ["": 21]> F (x) => (y) { y = Neg (x) }"""
    )
    engine = onnxruntime.InferenceSession(model.SerializeToString())
    y, z = engine.run(None, {"x": np.ones(1, np.float32)})
    return bool(y[0] == 1 and z[0] == -1)


@functools.cache
def why_no_genai() -> str:
    """Return why onnxruntime-genai does not run here, or an empty text."""
    try:
        wanted = map(Requirement, importlib.metadata.requires("onnxruntime-genai") or [])
    except importlib.metadata.PackageNotFoundError:
        return "onnxruntime-genai is not installed"
    for requirement in wanted:
        installed = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(installed):
            return f"onnxruntime-genai needs {requirement}; this is {installed}"
    return ""


needs_genai = pytest.mark.skipif(bool(why_no_genai()), reason=why_no_genai())
needs_reference_scan = pytest.mark.skipif(
    not reference_scans(), reason=f"a Scan of onnx.reference {onnx.__version__} joins its tokens"
)


def needs_body(body: str) -> pytest.MarkDecorator:
    """Skip a test where a body does not run."""
    is_missing = body not in export.available_bodies()
    return pytest.mark.skipif(is_missing, reason=why_not(body) if is_missing else "")


needs_ort_body, needs_onnx_body = needs_body("ort"), needs_body("onnx")
BODIES = ("standard", pytest.param("ort", marks=needs_ort_body))
ALL_BODIES = (*BODIES, pytest.param("onnx", marks=needs_onnx_body))
WRITTEN_ONNX_BODY = pytest.param("onnx", marks=needs_written(27))
"""Of a test that writes the body and leaves onnxruntime out."""


def skip_without(body: str, state_dtype: str) -> None:
    """Skip a test of a body on a dtype of the state that it refuses."""
    if body != "standard" and state_dtype == "float64":
        pytest.skip(f"body {body!r} has no float64")


def at_opset(*values: object, opset: int, body: str = "standard", is_run: bool = True) -> object:
    """Return the parameters of a test that writes a model of an opset, and maybe runs a body."""
    marks = [needs_written(opset)]
    if is_run:
        marks.append(needs_taken(opset))
        if body != "standard":
            marks.append(needs_body(body))
    return pytest.param(*values, marks=marks)
