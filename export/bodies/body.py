"""Define what a function body is: the value that ends a file of bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.attributes import Variant

MIN_OPSET = 18
"""The oldest opset of a model with our nodes."""

DEFAULT_OPSET = 21
"""The opset of a model where none is given: every onnxruntime we run on takes it."""


def _refuses_nothing(variant: Variant, scale: float) -> str:
    return ""


@dataclass(frozen=True)
class Body:
    """Describe a function body. A body is this value and a row of `BODIES`; no code knows its name.

    Attributes:
        name: what users call it.
        min_opset: the oldest opset of ai.onnx that it can be written for.
        write: writes its lines.
        what, where: what it is and where to use it, in Markdown, for the documentation.
        needs: what onnxruntime, or onnx, must have for it, for errors.
        refuses: returns why it cannot do what a node asks for, given the scale, or "".
        imports: domains that it needs besides ai.onnx, with their versions.
        oldest_onnx: the oldest onnx that writes it; None for every one that is supported.
        min_rows: the fewest rows that onnxruntime runs it on.
        is_preferred: whether body "auto" of a session takes it where it runs.
    """

    name: str
    min_opset: int
    write: Callable[[BodyText], None]
    what: str
    where: str
    needs: str
    refuses: Callable[[Variant, float], str] = _refuses_nothing
    imports: tuple[tuple[str, int], ...] = ()
    oldest_onnx: str | None = None
    min_rows: int = 0
    is_preferred: bool = False

    @property
    def opset(self) -> int:
        """Return the opset of a model where none is given."""
        return max(self.min_opset, DEFAULT_OPSET)
