"""Hold the attributes of a node, and the variant of an operator that a body is written for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnx import AttributeProto, NodeProto, helper

from gdn_ops.export.node.arguments import (
    check_flag,
    check_integer,
    check_name,
    check_scale,
    check_type,
)
from gdn_ops.export.node.schema import ATTRIBUTES, DECAY, Operator
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.rules import Rule, Width

SIZES = {"num_qk_heads": "H", "num_v_heads": "HV", "head_k_dim": "K", "head_v_dim": "V"}
"""The axes whose sizes make a node, by the argument that is such a size."""


@dataclass(frozen=True)
class Attributes:
    """Hold the attributes of a node, as in its schema; all but a decay of heads are written."""

    num_qk_heads: int
    num_v_heads: int
    scale: float
    rule: str
    qk_l2norm: bool
    decay: Width

    @classmethod
    def read(cls, label: str, proto: NodeProto) -> Attributes:
        """Return the attributes of a node in a model.

        Raises:
            SpecError: one is missing, has another type, or the scale is not finite.
        """
        given = {a.name: a for a in proto.attribute}
        values: dict[str, Any] = {}
        written = {DECAY: AttributeProto.STRING} if DECAY in given else {}
        for name, kind in (ATTRIBUTES | written).items():
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
        for name in ("rule", *written):
            values[name] = values[name].decode(errors="replace")
        usual = {"qk_l2norm": bool(values["qk_l2norm"]), DECAY: values.get(DECAY, "scalar")}
        return cls(**values | usual)

    def as_onnx(self) -> dict[str, Any]:
        """Return the attributes as ONNX writes them: it has no booleans."""
        values = asdict(self) | {"qk_l2norm": int(self.qk_l2norm)}
        return values if values[DECAY] == "channel" else {name: values[name] for name in ATTRIBUTES}

    def check(self, label: str, operator: Operator) -> None:
        """Check that value heads can share key heads, and that the rule is known and has the decay.

        Raises:
            SpecError: there is no head, num_v_heads is no multiple of num_qk_heads, the rule is
                none of the operator's, or it has no such decay.
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
        check_decay(label, operator.spec.rule[self.rule], self.decay)


def check_strengths(label: str, operator: Operator, **given: Any) -> None:
    """Check that no strength is given that an operator has no input of.

    Args:
        label: what messages start with.
        operator: the operator.
        given: erase and write, by name.

    Raises:
        SpecError: one of them is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise SpecError(
                f"{label}: {name} is given, should be None in an export to ONNX: "
                f"{why_beta(operator)}"
            )


def why_beta(operator: Operator) -> str:
    """Return why an operator takes neither erase nor write."""
    return f"{operator} has one strength, beta, and no erase or write"


def check_decay(label: str, rule: Rule, decay: str) -> None:
    """Check that a rule has a decay of a width.

    Raises:
        SpecError: it has another one; or it has none, and a width was asked for.
    """
    if not rule.has_decay and decay == "scalar":
        return
    if not rule.has_decay:
        raise SpecError(
            f"{label}: {DECAY} is {decay!r}, should be left out: rule {rule.name!r} has no decay"
        )
    if decay not in rule.decays:
        known = ", ".join(rule.decays)
        raise SpecError(f"{label}: {DECAY} is {decay!r}, should be one of {known}")


def checked_attributes(
    label: str,
    operator: Operator,
    sizes: Mapping[str, int],
    rule: str,
    scale: float | None,
    qk_l2norm: bool,
    decay: Any = "scalar",
) -> Attributes:
    """Return the attributes of a node with sizes H, HV, K and V; scale None is K ** -0.5.

    Raises:
        SpecError: a size, the rule, its decay or the scale is not allowed.
    """
    for name, axis in SIZES.items():
        check_integer(label, name, sizes[axis], 1)
    check_name(label, "rule", rule, operator.spec.rule)
    check_scale(label, scale)
    check_flag(label, "qk_l2norm", qk_l2norm)
    check_type(label, DECAY, decay, str, "a text")
    factor = float(sizes["K"] ** -0.5 if scale is None else scale)
    heads = int(sizes["H"]), int(sizes["HV"])
    attributes = Attributes(*heads, factor, rule, bool(qk_l2norm), decay)
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
        decay: the width of log_alpha; "none" where it is no input.
    """

    operator: Operator
    rule: str
    qk_l2norm: bool
    has_beta: bool
    compute: str
    stores_wide: bool = True
    decay: Width = "scalar"

    @property
    def is_double(self) -> bool:
        """Return whether arithmetic is in float64."""
        return self.compute == "double"

    @property
    def has_decay(self) -> bool:
        """Return whether log_alpha is an input."""
        return self.decay != "none"

    @property
    def has_erase(self) -> bool:
        """Return whether the rule first takes off what is stored under the key."""
        return self.operator.spec.rule[self.rule].has_erase

    @property
    def overload(self) -> str:
        """Return the overload of the variant's function, where a model needs more than one."""
        parts = (
            self.rule,
            "channel_decay" * (self.decay == "channel"),
            "l2norm" * self.qk_l2norm,
            "beta" * self.has_beta,
            self.compute,
            "narrow" * (not self.stores_wide),
        )
        return "_".join(part for part in parts if part)
