"""Find onnxruntime and the function bodies that it runs, and open sessions of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, helper

from gdn_ops.export.bodies.body import DEFAULT_OPSET, MIN_OPSET, Body
from gdn_ops.export.bodies.standard import STANDARD
from gdn_ops.export.bodies.table import BODIES
from gdn_ops.export.model.functions import bodies_of, without_overloads
from gdn_ops.export.model.nodes import Node, ir_version, opset_of
from gdn_ops.export.model.single import make_decode_model
from gdn_ops.export.node.arguments import check_name
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError

logger = logging.getLogger("gdn_ops")


class ModelRefusedError(SpecError, BackendUnsupportedError):
    """Report a model that onnxruntime does not take, or that it cannot run."""


CUSTOM = "custom"
"""The body of a session whose kernel a custom-op library brings."""

_SILENT = 4
_RELEASED_ONLY = "ALLOW_RELEASED_ONNX_OPSET_ONLY"
_OPSETS = {
    22: "1.21",
    23: "1.23",
    24: "1.24",
    25: "1.24",
    26: "1.25",
    27: f"1.32 (1.28 where {_RELEASED_ONLY}=0 is set in the environment)",
    28: "1.32",
}
"""The oldest onnxruntime that takes models of an opset, measured; 1.20 takes 21 and older."""


def onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import onnxruntime as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DecodeSession needs onnxruntime: pip install 'gdn_ops[onnx]'", name=error.name
        ) from error
    return module  # type: ignore[no-any-return]


def available_bodies() -> tuple[str, ...]:
    """Return the bodies that the installed onnx writes and the installed onnxruntime runs.

    Each is loaded once to see. Whether "onnx" is among them is no recommendation: it is the
    slowest, and body "auto" of a `DecodeSession` never takes it.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    released_only = os.environ.get(_RELEASED_ONLY)
    return tuple(body.name for body in BODIES.values() if _loads(body, released_only))


@functools.cache
def _loads(body: Body, released_only: str | None) -> bool:
    """Return whether a model with a body loads, given a setting that onnxruntime reads then."""
    if onnx.defs.onnx_opset_version() < body.min_opset:
        logger.debug("onnx %s does not write body %r", onnx.__version__, body.name)
        return False
    model = make_decode_model(
        num_qk_heads=1,
        num_v_heads=1,
        head_k_dim=1,
        head_v_dim=1,
        opset=body.opset,
        body=body.name,
    )
    return _is_taken(model)


# Let a test forget what was found.
available_bodies.cache_clear = _loads.cache_clear  # type: ignore[attr-defined]


def _is_taken(model: ModelProto) -> bool:
    """Return whether onnxruntime loads a model."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = _SILENT
    try:
        _session(model.SerializeToString(), options)
    # Its errors have no common base but Exception, and they differ between releases.
    except Exception as error:
        logger.debug("onnxruntime does not take a model: %s", error)
        return False
    return True


def takes_opset(opset: int) -> bool:
    """Return whether onnxruntime loads models of an opset."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    imports = [helper.make_opsetid("", opset)]
    return _is_taken(
        helper.make_model(graph, opset_imports=imports, ir_version=ir_version(imports))
    )


def _newest_taken(opset: int) -> int | None:
    """Return the newest opset up to one that onnxruntime loads models of, None without one."""
    taken = list(itertools.takewhile(takes_opset, range(MIN_OPSET, opset + 1)))
    return taken[-1] if taken else None


def _session(model: bytes, options: Any) -> Any:
    return onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])


def choose_body(
    nodes: list[Node],
    body: str,
    has_library: bool,
    opset: int = DEFAULT_OPSET,
    label: str = "DecodeSession",
) -> Body | None:
    """Return the body that a session of a model with these nodes and this opset runs.

    The user asks for "auto", "custom" or the name of a body. The kernel of a custom-op library is
    None.

    Raises:
        SpecError: the body is unknown, or the installed onnxruntime does not run it.
    """
    known = ("auto", *BODIES, CUSTOM)
    check_name(label, "body", body, known)
    if has_library:
        if body not in ("auto", CUSTOM):
            raise SpecError(
                f"{label}: body is {body!r}, should be 'auto' or 'custom' with a "
                f"custom_op_library, whose kernel runs whatever the function body is"
            )
        return None
    if body == CUSTOM:
        raise SpecError(
            f"{label}: custom_op_library is None, should be the path of a library for body 'custom'"
        )
    if body == "auto":
        return _fastest_body(nodes)
    if body not in available_bodies():
        is_taken = _newest_taken(opset) == opset
        export = "" if is_taken else f"export with opset={DEFAULT_OPSET} and "
        raise SpecError(f"{label}: {why_not(body)}; {export}take body='standard'")
    return BODIES[body]


def _fastest_body(nodes: list[Node]) -> Body:
    """Return the first preferred body that runs and can do what the nodes ask for."""
    for body in BODIES.values():
        if not body.is_preferred or any(body.refuses(n.variant, n.scale) for n in nodes):
            continue
        if body.name in available_bodies():
            return body
        _warn_once(
            f"onnxruntime {onnxruntime().__version__} does not have {body.needs}: the slower body "
            f"'standard' runs"
        )
    return STANDARD


def why_not(name: str) -> str:
    """Return a text: what a body needs, and which installed packages are too old for it."""
    body = BODIES[name]
    beside = f"onnx {onnx.__version__} and " if body.oldest_onnx else ""
    return (
        f"body {name!r} needs {body.needs}; this is {beside}onnxruntime {onnxruntime().__version__}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def open_session(
    model: ModelProto,
    folder: Path | None,
    threads: int | None,
    custom_op_library: str | os.PathLike[str] | None,
) -> Any:
    """Return an onnxruntime session of a model, whose weights may lie in files of a folder.

    One operator computes with `threads`, None being onnxruntime's choice.

    Raises:
        SpecError: the library cannot be loaded.
        ModelRefusedError: onnxruntime does not take the model.
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
    model = without_overloads(model)
    try:
        return _session(model.SerializeToString(), options)
    except Exception as error:
        if folder is not None and (moved := _with_absolute_weights(model, folder)) is not None:
            # onnxruntime 1.20 does not know the entry above; newer ones refuse absolute paths.
            with contextlib.suppress(Exception):
                return _session(moved.SerializeToString(), options)
        cure = _cure_of_opset(model)
        if custom_op_library is not None and not cure:
            cure = "; the library has no kernel for these types: leave custom_op_library out"
        raise ModelRefusedError(
            f"onnxruntime {runtime.__version__} does not take the model: {str(error).strip()}{cure}"
        ) from error


def refusal_to_run(error: Exception) -> ModelRefusedError:
    """Return the error of a run that failed in onnxruntime."""
    version = onnxruntime().__version__
    return ModelRefusedError(f"onnxruntime {version} cannot run the model: {str(error).strip()}")


def _with_absolute_weights(model: ModelProto, folder: Path) -> ModelProto | None:
    """Return a model with absolute paths to its weights in other files, None if it has none."""
    moved, is_moved = copy.deepcopy(model), False
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value, is_moved = str(folder / entry.value), True
    return moved if is_moved else None


def _cure_of_opset(model: ModelProto) -> str:
    """Return advice about an opset that onnxruntime does not take, else an empty string."""
    opset = opset_of(model)
    newest = _newest_taken(opset)
    if newest is None or newest >= opset:
        return ""
    body = "".join(f"body {name!r} in " for name in bodies_of(model)[:1])
    needed = f"{_OPSETS[opset]} or newer" if opset in _OPSETS else "of a later year"
    return (
        f"; {body}a model of opset {opset} needs onnxruntime {needed}, this one takes opset "
        f"{newest} and older: export with opset={min(newest, DEFAULT_OPSET)}"
    )
