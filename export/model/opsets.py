"""Ask a model for its opset and IR version, and check it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import ModelProto, helper

_OLDEST_IR = 10
"""The oldest IR version that has overloads and metadata of functions."""


def opset_of(model: ModelProto, domain: str = "") -> int:
    """Return the version of a domain that a model imports, 0 if it does not."""
    return next((int(o.version) for o in model.opset_import if o.domain == domain), 0)


def ir_version(opsets: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Return the oldest IR version that a model with these imports can have."""
    return max(_OLDEST_IR, int(helper.find_min_ir_version_for(list(opsets), ignore_unknown=True)))


def check_model(model: ModelProto) -> None:
    """Run the full checker and strict shape inference of onnx.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the model is invalid.
    """
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
