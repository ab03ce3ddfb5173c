"""Time the files that a model is exported to, beside the model itself."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXPORTS = {
    "onnx": ("portable", "float32"),
    "onnxruntime": ("onnxruntime", "float32"),
    "onnxruntime int8": ("onnxruntime", "int8"),
    "onnxruntime int4": ("onnxruntime", "int4"),
}
"""Flavour and weights of each file, by the name of its rows."""


def why_not() -> str:
    """Return why files are not timed here, or an empty string."""
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} missing" if missing else ""


@contextmanager
def exported(model: Any) -> Iterator[dict[str, Any]]:
    """Export a model in every way, and yield a session of each by the name of its rows."""
    from gdn_ops.export import ModelSession, export_model

    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, (flavour, weights) in EXPORTS.items():
            target = export_model(model, Path(folder) / name, flavour=flavour, weights=weights)
            sessions[name] = ModelSession(
                target, threads=torch.get_num_threads(), checks_files=False
            )
        yield sessions


def prefill(session: Any, ids: Tensor) -> Callable[[], Any]:
    """Return what reads a prompt, (1, T), and returns the logits of the next token."""
    return functools.partial(session.read, ids[0].tolist())


def decoder(session: Any, ids: Tensor, count: int, calls: int) -> Callable[[], Any]:
    """Return what decodes `count` tokens on and on behind a prompt, at most `calls` times."""
    # A random model has no token that ends a text.
    steps = session.stream(ids[0].tolist(), count * calls)

    def run() -> list[Any]:
        return [next(steps) for _ in range(count)]

    return run
