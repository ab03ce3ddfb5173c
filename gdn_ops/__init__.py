"""Provide the gated delta rule as ops: one specification, and many backends checked against it."""

from __future__ import annotations

from gdn_ops import _interrupt as _interrupt  # isort: skip, first: what follows takes seconds
from gdn_ops._version import __version__ as __version__
from gdn_ops.dispatch.backend import Backend, Forward, Grads
from gdn_ops.dispatch.explain import BackendInfo, Explanation, list_backends
from gdn_ops.dispatch.registry import register_backend, use_backend
from gdn_ops.ops import explain, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.product import gated_delta_product
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError, SpecTypeError
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.spec.rules import Limits

__all__ = [
    "GATED_DELTA",
    "GATED_DELTA_STEP",
    "GATED_DELTA_STEPS",
    "Backend",
    "BackendInfo",
    "BackendUnsupportedError",
    "Explanation",
    "Forward",
    "Grads",
    "Limits",
    "SpecError",
    "SpecTypeError",
    "explain",
    "gated_delta",
    "gated_delta_product",
    "gated_delta_step",
    "gated_delta_steps",
    "list_backends",
    "register_backend",
    "use_backend",
]
