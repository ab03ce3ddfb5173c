"""Define the errors that end a call before any arithmetic is done."""

from __future__ import annotations


class SpecError(ValueError):
    """Report an argument that breaks the op's specification.

    The text names the op, the argument, what it is and what it should be. Raised by
    `gdn_ops.call.bind` before any backend runs.
    """


class SpecTypeError(SpecError, TypeError):
    """Report an argument of the wrong Python type or an argument too few or too many."""


class BackendUnsupportedError(RuntimeError):
    """Report that the backend that was asked for, or every backend, cannot run a call.

    The text holds the inputs, each backend's reasons and a cure.
    """
