"""Leave the tests of the exporter out where a package of the onnx extra is not installed."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("onnx", "onnxruntime", "onnxscript")
collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["*"]
