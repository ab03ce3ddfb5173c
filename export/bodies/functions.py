"""Write the function bodies of the operators, for runtimes without a kernel of their own.

    standard   ai.onnx alone, opset 18 or newer: the recurrence as in docs/math.md §2
    ort        one com.microsoft::LinearAttention: onnxruntime 1.25 or newer
    onnx       one ai.onnx LinearAttention: opset 27 or newer, experimental

A body is text, written for the opset of the model that it goes into, because a function may not
import another one. It is *guarded*: every operand is reshaped to a shape that is read from the
state, so a batch that does not match is an error and never a silent broadcast. All reads of the
state happen before the one write of the new state, which makes it safe to bind both to one buffer.

A function has no way to ask for its rule or for what is missing, so each combination that a
model uses is a function of its own, told apart by its overload.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser

from gdn_ops.export.bodies.linear_attention import MICROSOFT, write_onnx, write_ort
from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.schema import ATTRIBUTES, DOMAIN, INPUTS, OUTPUTS
from gdn_ops.export.node.variants import BODIES, Variant, check_body


def decode_function(body: str, variant: Variant, opset: int) -> onnx.FunctionProto:
    """Return the ONNX function of one variant.

    Args:
        body: "standard", "ort" or "onnx".
        variant: what it is written for.
        opset: of ai.onnx in the model that it goes into.

    Raises:
        SpecError: the body is unknown or cannot do what the variant asks for.
    """
    check_body(body, variant, opset, 1.0)
    text = BodyText(variant)
    _WRITERS[body](text)
    imports = f'"": {opset}' + (f', "{MICROSOFT}": 1' if body == "ort" else "")
    lines = "\n".join(f"  {line}" for line in text.lines)
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n'
        f"{variant.operator.name} <{', '.join(ATTRIBUTES)}> ({', '.join(INPUTS)}) "
        f"=> ({', '.join(OUTPUTS)})\n{{\n{lines}\n}}"
    )
    function.doc_string = f"{variant.operator}, {variant.rule}: body {body}"
    return function


def body_of(function: onnx.FunctionProto) -> str:
    """Return the name of a function's body, "other" if it is none of ours."""
    name = function.doc_string.rpartition("body ")[2]
    return name if name in BODIES else "other"


def _token(
    variant: Variant, operands: tuple[str, str, str, str, str, str], states: tuple[str, str]
) -> list[str]:
    """Return the lines of one token of the recurrence, which compute the next state and o_t.

    Args:
        variant: what is computed.
        operands: names of q, k, k as a column, v, decay and beta.
        states: names of the state before and after.
    """
    q, k, k_t, v, decay, beta = operands
    lines = []
    state, write = states[0], v
    if variant.has_decay:
        # §2 S' = α_t S_{t-1}                     [K, V]
        lines.append(f"S_decayed = Mul({state}, {decay})")
        state = "S_decayed"
    if variant.has_erase:
        # §2 u_t = β_t (v_t − S'ᵀ k_t)            [1, V]
        lines.append(f"kS = MatMul({k}, {state})")
        lines.append(f"v_new = Sub({v}, kS)")
        write = "v_new"
    if variant.has_beta:
        lines.append(f"u = Mul({write}, {beta})")
        write = "u"
    # §2 S_t = S' + k_t u_tᵀ                      [K, V]
    lines.append(f"ku = MatMul({k_t}, {write})")
    lines.append(f"{states[1]} = Add({state}, ku)")
    # §2 o_t = s S_tᵀ q_t, q holds s              [1, V]
    lines.append(f"o_t = MatMul({q}, {states[1]})")
    return lines


def _operands(text: BodyText) -> None:
    """Write q_s, k_r, k_c, v_x, decay and beta_x, in the shapes of the products."""
    text.query_and_key()
    text.repeat_heads()
    text("scale_f = Constant <value_float: float = @scale> ()")
    text.cast("scale_c", "scale_f")
    text("q_s = Mul(q_r, scale_c)")
    text(f"k_c = Reshape <allowzero = 1> (k_r, {text.shape('k_c_to', 'HV', 'K', 'one')})")
    text.operand("v", "HV", "one", "V")
    if text.variant.has_decay:
        text(f"decay = Exp({text.operand('log_alpha', 'HV', 'one', 'one')})")
    if text.variant.has_beta:
        text.operand("beta", "HV", "one", "one")


def _standard(text: BodyText) -> None:
    _operands(text)
    states = text.states()
    if text.sequence:
        _scan(text, states)
        text.results("o_tokens", states[1])
        return
    operands = ("q_s", "k_r", "k_c", "v_x", "decay", "beta_x")
    for line in _token(text.variant, operands, states):
        text(line)
    text.results("o_t", states[1])


def _scan(text: BodyText, states: tuple[str, str]) -> None:
    """Write the recurrence over tokens as a Scan, tokens first.

    A Scan over no token is an error in onnxruntime. So a token that changes nothing comes first:
    zeros, of which the decay is exp(0).
    """
    variant = text.variant
    gates = ["decay"] * variant.has_decay + ["beta_x"] * variant.has_beta
    for name in ("q_s", "k_r", "k_c", "v_x", *gates):
        text(f"{name}_first = Transpose <perm = [1, 0, 2, 3, 4]> ({name})")
        text(f"{name}_rest = Shape <start = 1> ({name}_first)")
        text(f"{name}_none = Concat <axis = 0> (one, {name}_rest)")
        text.number(f"{name}_still", 1.0 if name == "decay" else 0.0)
        text(f"{name}_idle = Expand({name}_still, {name}_none)")
        text(f"{name}_tokens = Concat <axis = 0> ({name}_idle, {name}_first)")
    tokens = [f"{name}_tokens" for name in ("q_s", "k_r", "k_c", "v_x", *gates)]
    kind = f"{variant.compute}[]"
    formal = ["S", "q_t", "k_t", "kc_t", "v_t"]
    formal += ["a_t"] * variant.has_decay + ["b_t"] * variant.has_beta
    operands = ("q_t", "k_t", "kc_t", "v_t", "a_t", "b_t")
    body = "\n    ".join(_token(variant, operands, ("S", "S_next")))
    text(
        f"{states[1]}, o_scanned = Scan <num_scan_inputs = {len(tokens)}, body = token "
        f"({', '.join(f'{kind} {name}' for name in formal)}) "
        f"=> ({kind} S_next, {kind} o_t) {{\n    {body}\n  }}> ({states[0]}, {', '.join(tokens)})"
    )
    text("last = Constant <value_ints = [9223372036854775807]> ()")
    text("o_own = Slice(o_scanned, one, last, axis_0)")
    text("o_tokens = Transpose <perm = [1, 0, 2, 3, 4]> (o_own)")


_WRITERS: dict[str, Callable[[BodyText], None]] = {
    "standard": _standard,
    "ort": write_ort,
    "onnx": write_onnx,
}
