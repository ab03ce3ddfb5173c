"""Define the ONNX operators, derived from the ops' own specs.

    gdn_ops::GatedDeltaStep   one token per row     from GATED_DELTA_STEP
    gdn_ops::GatedDelta       T tokens per row      from GATED_DELTA

Both read a state and return the next one, so that a prompt and its continuation share it.
Gates are in log space: -inf is an exact alpha = 0. What a call leaves open is settled when the
node is written: `scale` is always there, resolved, and so are the numbers of heads.

A body cannot ask for the rank of log_alpha. So the attribute `decay` says whether it is a number of
each head, as where it is not written, or one of each key channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx.defs import OpSchema

from gdn_ops.export.node.arguments import check_name, check_type
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import OpSpec, TensorArg, printed_shape
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.spec.rules import FLOAT_DTYPES, Width

DOMAIN = "gdn_ops"
VERSION = 1

INPUTS = ("q", "k", "v", "log_alpha", "beta", "state")
OUTPUTS = ("o", "new_state")
ATTRIBUTES = {
    "num_qk_heads": onnx.AttributeProto.INT,
    "num_v_heads": onnx.AttributeProto.INT,
    "scale": onnx.AttributeProto.FLOAT,
    "rule": onnx.AttributeProto.STRING,
    "qk_l2norm": onnx.AttributeProto.INT,
}
"""Names and types of the attributes that are always written."""

DECAY = "decay"
"""The attribute that is written where log_alpha has a number of each key channel: "channel"."""

ELEMENT_TYPES = {
    "float64": onnx.TensorProto.DOUBLE,
    "float32": onnx.TensorProto.FLOAT,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float16": onnx.TensorProto.FLOAT16,
}
"""ONNX element types by the name of the dtype."""

_PARAMETERS = {"q": "T", "k": "T", "v": "T", "log_alpha": "G", "beta": "G", "state": "S"}
_PARAMETER_MEANINGS = {
    "T": "q, k, v and o",
    "G": "the gates; an exporter writes float, or double with a double state",
    "S": "the state; arithmetic is in float, in double where the state is double",
}


@dataclass(frozen=True, repr=False)
class Operator:
    """Describe one operator of the domain: its op type, and the spec of its op."""

    name: str
    spec: OpSpec

    def argument(self, name: str) -> TensorArg:
        """Return the argument of the spec that is an input of the operator."""
        return next(arg for arg in self.spec.tensors if arg.field == name)

    def axes(self, name: str, decay: Width = "scalar") -> tuple[str, ...]:
        """Return the axes of an input or output, log_alpha with those of a decay."""
        if name in ("state", "new_state"):
            return ("B", "HV", "K", "V")
        axes = self.argument("v" if name == "o" else name).axes
        return (*axes, "K") if name == "log_alpha" and decay == "channel" else axes

    def __repr__(self) -> str:
        return f"{DOMAIN}::{self.name}"


STEP = Operator("GatedDeltaStep", GATED_DELTA_STEP)
SEQUENCE = Operator("GatedDelta", GATED_DELTA)
OPERATORS = {operator.name: operator for operator in (STEP, SEQUENCE)}


def op_schema(operator: Operator = STEP) -> OpSchema:
    """Return the schema of an operator.

    log_alpha is there exactly where the rule has a decay; beta that is not there is 1.
    """
    check_type("op_schema", "operator", operator, Operator, "an operator, STEP or SEQUENCE")
    spec, kinds = operator.spec, (ELEMENT_TYPES[dtype] for dtype in FLOAT_DTYPES)
    types = [f"tensor({onnx.TensorProto.DataType.Name(kind).lower()})" for kind in kinds]
    return OpSchema(
        operator.name,
        DOMAIN,
        VERSION,
        "\n".join((spec.summary, *spec.equations, *spec.sources)),
        inputs=[_input(operator, name) for name in INPUTS],
        outputs=[_output(operator, name) for name in OUTPUTS],
        type_constraints=[(p, types, meaning) for p, meaning in _PARAMETER_MEANINGS.items()],
        attributes=_attributes(spec),
    )


def _input(operator: Operator, name: str) -> OpSchema.FormalParameter:
    arg = operator.argument(name)
    domain = f", in {arg.domain}" if arg.domain else ""
    meaning, shape = arg.meaning, printed_shape(operator.axes(name))
    if name == "log_alpha":
        shape += f", or {printed_shape(operator.axes(name, 'channel'))} where {DECAY} is channel"
        meaning = f"natural logarithm of alpha: {operator.argument('alpha').meaning}"
    if name == "state":
        # It is always there: what the spec says of one that is not given is dropped.
        meaning = meaning.partition(";")[0]
    option = OpSchema.FormalParameterOption
    return OpSchema.FormalParameter(
        name,
        _PARAMETERS[name],
        f"{shape}{domain}: {meaning}",
        param_option=option.Optional if name in ("log_alpha", "beta") else option.Single,
    )


def _output(operator: Operator, name: str) -> OpSchema.FormalParameter:
    meanings = dict(zip(OUTPUTS, operator.spec.outputs, strict=False))
    shape = printed_shape(operator.axes(name))
    parameter = "T" if name == "o" else "S"
    meaning = meanings[name].meaning.partition(";")[0]
    return OpSchema.FormalParameter(name, parameter, f"{shape}: {meaning}")


def _attributes(spec: OpSpec) -> list[OpSchema.Attribute]:
    said = {attr.name: attr.meaning for attr in spec.attrs}
    types = OpSchema.AttrType
    meanings = {
        "num_qk_heads": (types.INT, "H, query/key heads"),
        "num_v_heads": (types.INT, "HV, a multiple of H"),
        "scale": (types.FLOAT, "factor on q, always written"),
        "rule": (types.STRING, f"{said['rule']}: {', '.join(rule.name for rule in spec.rules)}"),
        "qk_l2norm": (types.INT, f"1 to {said['qk_l2norm']}, else 0"),
    }
    written = [OpSchema.Attribute(name, *meanings[name], required=True) for name in ATTRIBUTES]
    # A default would be written by torch.onnx.export too.
    meaning = "channel: a log_alpha of each key channel; scalar, or not there: one of each head"
    return [*written, OpSchema.Attribute(DECAY, types.STRING, meaning, required=False)]


def check_dtypes(label: str, dtype: str, state_dtype: str) -> None:
    """Check the dtypes of a node.

    Raises:
        SpecError: one is unknown, or only one of them is float64.
    """
    for name, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        check_name(label, name, value, ELEMENT_TYPES)
    if (dtype == "float64") != (state_dtype == "float64"):
        raise SpecError(
            f"{label}: q is {dtype} and the state {state_dtype}, should both be float64 or neither"
        )
