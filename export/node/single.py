"""Make models of one node without a torch module: for tests, benchmarks, hand-built graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import ModelProto, ValueInfoProto, helper

from gdn_ops.export.node.model import check_heads, ir_version, set_body, write_states
from gdn_ops.export.node.schema import (
    DOMAIN,
    ELEMENT_TYPES,
    INPUTS,
    OUTPUTS,
    SEQUENCE,
    STEP,
    VERSION,
    Operator,
)
from gdn_ops.export.node.variants import DEFAULT_OPSET, check_opset
from gdn_ops.spec.errors import SpecError

BATCH = "batch"
TOKENS = "sequence"
"""Names of the symbolic sizes B and T."""


def recurrent_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's state as input and output, as in onnxruntime-genai."""
    return f"past_key_values.{layer}.recurrent_state", f"present.{layer}.recurrent_state"


_CALLED = dict(zip(("state", "new_state"), recurrent_names(0), strict=True))


def make_decode_model(
    *,
    num_qk_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    dtype: str = "float32",
    state_dtype: str | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    has_beta: bool = True,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
) -> ModelProto:
    """Return a model of one gdn_ops::GatedDeltaStep, its batch symbolic.

    Args:
        num_qk_heads, num_v_heads: H and HV, a multiple of H.
        head_k_dim, head_v_dim: K and V.
        dtype: of q, k, v and o.
        state_dtype: of the state; float32, or float64 with a float64 dtype, when not given.
        rule, scale, qk_l2norm: as in `gated_delta_step`; scale is K ** -0.5 when not given.
        has_beta: whether beta is an input; it is 1 otherwise.
        opset: of ai.onnx.
        body: of the function, as in `set_body`.

    Returns:
        Inputs q, k, v, log_alpha where the rule has a decay, beta, and
        past_key_values.0.recurrent_state; outputs o and present.0.recurrent_state.

    Raises:
        SpecError: a value is not allowed, or the body cannot do what is asked for.
    """
    return _Plan(**locals(), operator=STEP).model()


def make_prefill_model(
    *,
    num_qk_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    dtype: str = "float32",
    state_dtype: str | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    has_beta: bool = True,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
) -> ModelProto:
    """Return a model of one gdn_ops::GatedDelta, its batch and number of tokens symbolic.

    Arguments, inputs and outputs are those of `make_decode_model`, with tokens; the state is
    the same.
    """
    return _Plan(**locals(), operator=SEQUENCE).model()


@dataclass(frozen=True)
class _Plan:
    """Hold the checked arguments of a model of one node."""

    operator: Operator
    num_qk_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    dtype: str
    state_dtype: str | None
    rule: str
    scale: float | None
    qk_l2norm: bool
    has_beta: bool
    opset: int
    body: str | None

    def __post_init__(self) -> None:
        label = str(self.operator)
        check_heads(label, self.num_qk_heads, self.num_v_heads)
        for name in ("head_k_dim", "head_v_dim"):
            if getattr(self, name) < 1:
                raise SpecError(f"{label}: {name} is {getattr(self, name)}, should be at least 1")
        if self.rule not in self.operator.spec.rule:
            known = ", ".join(self.operator.spec.rule)
            raise SpecError(f"{label}: rule is {self.rule!r}, should be one of {known}")
        if not math.isfinite(self.resolved_scale):
            raise SpecError(f"{label}: scale is {self.scale}, should be a finite number")
        check_dtypes(label, self.dtype, self.stored)
        check_opset(label, self.opset, self.body)

    @property
    def resolved_scale(self) -> float:
        """Return the factor on q."""
        return float(self.head_k_dim**-0.5 if self.scale is None else self.scale)

    @property
    def stored(self) -> str:
        """Return the dtype of the state."""
        return self.state_dtype or ("float64" if self.dtype == "float64" else "float32")

    def value(self, name: str) -> ValueInfoProto:
        """Return an input or output of the graph."""
        sizes: dict[str, int | str] = {
            "B": BATCH,
            "T": TOKENS,
            "H": self.num_qk_heads,
            "HV": self.num_v_heads,
            "K": self.head_k_dim,
            "V": self.head_v_dim,
        }
        gates = "float64" if self.stored == "float64" else "float32"
        dtypes = {"state": self.stored, "new_state": self.stored, "log_alpha": gates, "beta": gates}
        shape = [sizes[axis] for axis in self.operator.axes(name)]
        kind = ELEMENT_TYPES[dtypes.get(name, self.dtype)]
        return helper.make_tensor_value_info(_CALLED.get(name, name), kind, shape)

    def model(self) -> ModelProto:
        """Return the model."""
        has_decay = self.operator.spec.rule[self.rule].has_decay
        is_there = {"log_alpha": has_decay, "beta": self.has_beta}
        left_out = {name for name, there in is_there.items() if not there}
        node = helper.make_node(
            self.operator.name,
            ["" if name in left_out else _CALLED.get(name, name) for name in INPUTS],
            [_CALLED.get(name, name) for name in OUTPUTS],
            name=self.operator.name,
            domain=DOMAIN,
            num_qk_heads=self.num_qk_heads,
            num_v_heads=self.num_v_heads,
            scale=self.resolved_scale,
            rule=self.rule,
            qk_l2norm=int(self.qk_l2norm),
        )
        graph = helper.make_graph(
            [node],
            self.operator.spec.name,
            [self.value(name) for name in INPUTS if name not in left_out],
            [self.value(name) for name in OUTPUTS],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version(opsets))
        write_states(model, {_CALLED["state"]: _CALLED["new_state"]})
        return set_body(model, self.body)


def check_dtypes(label: str, dtype: str, state_dtype: str) -> None:
    """Check the dtypes of a node.

    Raises:
        SpecError: one is unknown, or only one of them is float64.
    """
    for name, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        if value not in ELEMENT_TYPES:
            raise SpecError(
                f"{label}: {name} is {value!r}, should be one of {', '.join(ELEMENT_TYPES)}"
            )
    if (dtype == "float64") != (state_dtype == "float64"):
        raise SpecError(
            f"{label}: q is {dtype} and the state {state_dtype}, should both be float64 or neither"
        )
