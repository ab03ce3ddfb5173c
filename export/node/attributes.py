"""Hold the attributes of a node, and the variant of an operator that a body is written for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnx import AttributeProto, NodeProto, helper

from gdn_ops.export.node.arguments import check_flag, check_integer, check_name, check_scale
from gdn_ops.export.node.schema import ATTRIBUTES, Operator
from gdn_ops.spec.errors import SpecError

SIZES = {"num_qk_heads": "H", "num_v_heads": "HV", "head_k_dim": "K", "head_v_dim": "V"}
"""The axes whose sizes make a node, by the argument that is such a size."""


@dataclass(frozen=True)
class Attributes:
    """Hold the attributes of a node, as in its schema; all are always written."""

    num_qk_heads: int
    num_v_heads: int
    scale: float
    rule: str
    qk_l2norm: bool

    @classmethod
    def read(cls, label: str, proto: NodeProto) -> Attributes:
        """Return the attributes of a node in a model.

        Raises:
            SpecError: one is missing, has another type, or the scale is not finite.
        """
        given = {a.name: a for a in proto.attribute}
        values: dict[str, Any] = {}
        for name, kind in ATTRIBUTES.items():
            if name not in given:
                raise SpecError(f"{label}: attribute {name} is missing, should be written")
            attribute = given[name]
            if attribute.ref_attr_name:
                raise SpecError(
                    f"{label}: attribute {name} refers to {attribute.ref_attr_name!r} of a "
                    f"function, should be a value: the node stands in the graph"
                )
            if attribute.type != kind:
                types = AttributeProto.AttributeType
                got = types.Name(attribute.type) if attribute.type in types.values() else "unknown"
                raise SpecError(
                    f"{label}: attribute {name} has type {got}, should be {types.Name(kind)}"
                )
            values[name] = helper.get_attribute_value(attribute)
        if not math.isfinite(values["scale"]):
            raise SpecError(f"{label}: scale is {values['scale']}, should be a finite number")
        values["rule"] = values["rule"].decode(errors="replace")
        return cls(**values | {"qk_l2norm": bool(values["qk_l2norm"])})

    def as_onnx(self) -> dict[str, Any]:
        """Return the attributes as ONNX writes them: it has no booleans."""
        return asdict(self) | {"qk_l2norm": int(self.qk_l2norm)}

    def check(self, label: str, operator: Operator) -> None:
        """Check that value heads can share key heads, and that the rule is known.

        Raises:
            SpecError: there is no head, num_v_heads is no multiple of num_qk_heads, or the rule
                is none of the operator's.
        """
        keys, values = self.num_qk_heads, self.num_v_heads
        if keys < 1:
            raise SpecError(f"{label}: num_qk_heads is {keys}, should be at least 1")
        if values < 1 or values % keys:
            raise SpecError(
                f"{label}: num_v_heads is {values}, should be a multiple of num_qk_heads={keys}"
            )
        if self.rule not in operator.spec.rule:
            known = ", ".join(operator.spec.rule)
            raise SpecError(f"{label}: rule is {self.rule!r}, should be one of {known}")


def checked_attributes(
    label: str,
    operator: Operator,
    sizes: Mapping[str, int],
    rule: str,
    scale: float | None,
    qk_l2norm: bool,
) -> Attributes:
    """Return the attributes of a node with sizes H, HV, K and V; scale None is K ** -0.5.

    Raises:
        SpecError: a size, the rule or the scale is not allowed.
    """
    for name, axis in SIZES.items():
        check_integer(label, name, sizes[axis], 1)
    check_name(label, "rule", rule, operator.spec.rule)
    check_scale(label, scale)
    check_flag(label, "qk_l2norm", qk_l2norm)
    factor = float(sizes["K"] ** -0.5 if scale is None else scale)
    attributes = Attributes(int(sizes["H"]), int(sizes["HV"]), factor, rule, bool(qk_l2norm))
    attributes.check(label, operator)
    return attributes


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
    def is_double(self) -> bool:
        """Return whether arithmetic is in float64."""
        return self.compute == "double"

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
