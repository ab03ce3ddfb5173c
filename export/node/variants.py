"""Describe one use of an operator, and check whether a function body can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from gdn_ops.export.node.schema import Operator
from gdn_ops.spec.errors import SpecError

BODIES = ("standard", "ort", "onnx")
STANDARD_OPSET = 18
ONNX_OPSET = 27
ONNX_RELEASE = "1.22"
"""The oldest onnx that knows that opset."""

DEFAULT_OPSET = 21
"""The opset of a model where none is given: every onnxruntime we run on takes it."""


@dataclass(frozen=True)
class Variant:
    """Describe the use of an operator that a function body is written for.

    Attributes:
        operator: the operator.
        rule: the member of the family.
        qk_l2norm: whether q and k are normalised.
        has_beta: whether beta is there; it is 1 otherwise.
        compute: "float" or "double", the type that is computed in.
        stores_wide: whether the state is stored in that type.
    """

    operator: Operator
    rule: str
    qk_l2norm: bool
    has_beta: bool
    compute: str
    stores_wide: bool = True

    @property
    def has_decay(self) -> bool:
        """Return whether log_alpha is an input."""
        return self.operator.spec.rule[self.rule].has_decay

    @property
    def has_erase(self) -> bool:
        """Return whether the rule first takes off what is stored under the key."""
        return self.operator.spec.rule[self.rule].has_erase

    @property
    def overload(self) -> str:
        """Return the overload of the variant's function, where a model needs more than one."""
        parts = (
            self.rule,
            "l2norm" * self.qk_l2norm,
            "beta" * self.has_beta,
            self.compute,
            "narrow" * (not self.stores_wide),
        )
        return "_".join(part for part in parts if part)


def check_opset(label: str, opset: int, body: str | None) -> None:
    """Check that the installed onnx knows an opset.

    Raises:
        SpecError: it is too old; the text says which one there is.
    """
    newest = onnx.defs.onnx_opset_version()
    if opset <= newest:
        return
    is_too_old = body == "onnx" and newest < ONNX_OPSET
    cure = f"; body 'onnx' needs onnx {ONNX_RELEASE} or newer: take body='standard'" * is_too_old
    raise SpecError(
        f"{label}: opset is {opset}, should be at most {newest}, the newest that the installed "
        f"onnx {onnx.__version__} knows{cure}"
    )


def check_body(body: str | None, variant: Variant, opset: int, scale: float) -> None:
    """Check that a body can do what a node asks for.

    Raises:
        SpecError: the body is unknown or cannot.
    """
    node = str(variant.operator)
    if body is not None and body not in BODIES:
        known = ", ".join(BODIES)
        raise SpecError(f"{node}: body is {body!r}, should be one of {known}, or None for none")
    if opset < STANDARD_OPSET:
        raise SpecError(
            f"{node}: the model has opset {opset}, should have {STANDARD_OPSET} or newer; "
            f"export it with opset={STANDARD_OPSET} or convert it with onnx.version_converter"
        )
    if body == "onnx" and opset < ONNX_OPSET:
        raise SpecError(
            f"{node}: the model has opset {opset}, body 'onnx' should have {ONNX_OPSET} or newer; "
            f"export with opset={ONNX_OPSET}, or take body='standard'"
        )
    if body in ("ort", "onnx") and variant.compute == "double":
        raise SpecError(
            f"{node}: the state is float64, body {body!r} should have float32 or shorter; "
            f"take body='standard'"
        )
    if body in ("ort", "onnx") and scale == 0:
        raise SpecError(
            f"{node}: scale is 0, which LinearAttention of body {body!r} reads as K ** -0.5; "
            f"take body='standard'"
        )
