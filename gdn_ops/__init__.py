"""gdn_ops: the gated delta rule, one specification and many proven backends."""

from __future__ import annotations

# Imported before the function of the same name, which then stays what `gdn_ops.backends` is.
import gdn_ops.backends  # noqa: F401
from gdn_ops.backend import Backend, BackendInfo, Explanation, Forward, Grads
from gdn_ops.errors import BackendUnsupportedError, SpecError, SpecTypeError
from gdn_ops.gated_delta import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.ops import explain, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.registry import backends, register_backend, use_backend
from gdn_ops.spec import Limits

__version__ = "0.1.0"

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
    "backends",
    "explain",
    "gated_delta",
    "gated_delta_step",
    "gated_delta_steps",
    "register_backend",
    "use_backend",
]
