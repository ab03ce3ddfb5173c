"""Describe one use of an operator, which a function body is written for."""

from __future__ import annotations

from dataclasses import dataclass

from gdn_ops.export.node.schema import Operator


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
