"""onnxruntime: whether it is there, which bodies it runs, and sessions of it."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from onnx import ModelProto

from gdn_ops.errors import BackendUnsupportedError, SpecError
from gdn_ops.export.build import make_decode_model
from gdn_ops.export.model import Node
from gdn_ops.export.variants import BODIES, ONNX_OPSET

logger = logging.getLogger("gdn_ops")

CUSTOM = "custom"
"""What runs where a custom-op library brings the kernel."""

_SILENT = 4
_NEEDS = {
    "ort": "com.microsoft::LinearAttention, which onnxruntime has from 1.25 on",
    "onnx": f"models of opset {ONNX_OPSET}, which onnxruntime 1.29 and newer take where "
    f"ALLOW_RELEASED_ONNX_OPSET_ONLY=0 is set in the environment",
}
_told: set[str] = set()


def onnxruntime() -> ModuleType:
    """Return onnxruntime.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import onnxruntime as found
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DecodeSession needs onnxruntime: pip install 'gdn_ops[onnx]'", name=error.name
        ) from error
    return found  # type: ignore[no-any-return]


@functools.cache
def available_bodies() -> tuple[str, ...]:
    """Return the bodies that the installed onnxruntime runs, found by loading each once.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    return tuple(body for body in BODIES if _loads(body))


def _loads(body: str) -> bool:
    runtime = onnxruntime()
    model = make_decode_model(
        num_qk_heads=1,
        num_v_heads=1,
        head_k_dim=1,
        head_v_dim=1,
        opset=ONNX_OPSET if body == "onnx" else 21,
        body=body,
    )
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        _session(model.SerializeToString(), options)
    # Its errors have no common base but Exception, and they differ between releases.
    except Exception as error:
        logger.debug("onnxruntime does not run body %r: %s", body, error)
        return False
    return True


def _session(model: bytes, options: Any) -> Any:
    return onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])


def choose_body(nodes: list[Node], body: str, has_library: bool) -> str:
    """Return the body that a session runs.

    Args:
        nodes: of the model.
        body: as the user asked for it: "auto", "standard", "ort", "onnx" or "custom".
        has_library: whether a custom-op library brings the kernel.

    Raises:
        SpecError: the body is unknown, or the installed onnxruntime does not run it.
    """
    known = ("auto", *BODIES, CUSTOM)
    if body not in known:
        raise SpecError(f"DecodeSession: body is {body!r}, should be one of {', '.join(known)}")
    if has_library:
        if body not in ("auto", CUSTOM):
            raise SpecError(
                f"DecodeSession: body is {body!r}, should be 'auto' or 'custom' with a "
                f"custom_op_library, whose kernel runs whatever the function body is"
            )
        return CUSTOM
    if body == CUSTOM:
        raise SpecError(
            "DecodeSession: custom_op_library is None, should be the path of a library for body "
            "'custom'"
        )
    if body != "auto":
        if body not in available_bodies():
            raise SpecError(
                f"DecodeSession: body {body!r} needs {_NEEDS[body]}; this is onnxruntime "
                f"{onnxruntime().__version__}; take body='standard'"
            )
        return body
    if any(node.variant.compute == "double" or node.scale == 0 for node in nodes):
        return "standard"
    if "ort" in available_bodies():
        return "ort"
    _tell_once(
        f"onnxruntime {onnxruntime().__version__} does not have {_NEEDS['ort']}: the slower body "
        f"'standard' runs"
    )
    return "standard"


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning(message)


def open_session(
    model: ModelProto,
    folder: Path | None,
    threads: int | None,
    custom_op_library: str | os.PathLike[str] | None,
) -> Any:
    """Return an onnxruntime session of a model.

    Args:
        model: the model.
        folder: where files with weights lie, or None.
        threads: that one operator computes with, or None for onnxruntime's choice.
        custom_op_library: brings kernels, or None.

    Raises:
        SpecError: the library cannot be loaded.
        BackendUnsupportedError: onnxruntime does not take the model.
    """
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    if custom_op_library is not None:
        library = Path(custom_op_library)
        if not library.is_file():
            raise SpecError(
                f"DecodeSession: custom_op_library is {str(library)!r}, should be an existing "
                f"shared library"
            )
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise SpecError(
                f"DecodeSession: custom_op_library {str(library)!r} cannot be loaded by "
                f"onnxruntime {runtime.__version__}: {error}"
            ) from error
    try:
        return _session(model.SerializeToString(), options)
    except Exception as error:
        cure = ""
        if custom_op_library is not None:
            cure = "; the library has no kernel for these types: leave custom_op_library out"
        raise BackendUnsupportedError(
            f"onnxruntime {runtime.__version__} does not take the model: {error}{cure}"
        ) from error
