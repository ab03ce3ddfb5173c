"""Write body "standard": the recurrence as in docs/math.md §2, of operators of ai.onnx alone."""

from __future__ import annotations

from gdn_ops.export.bodies.body import MIN_OPSET, Body
from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.attributes import Variant


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
        # §2, §9 S' = diag(α_t) S_{t-1}           [K, V]
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


def _write(text: BodyText) -> None:
    text.query_and_key()
    text.repeat_heads()
    text("scale_f = Constant <value_float: float = @scale> ()")
    text.cast("scale_c", "scale_f")
    text("q_s = Mul(q_r, scale_c)")
    text(f"k_c = Reshape <allowzero = 1> (k_r, {text.shape('k_c_to', 'HV', 'K', 'one')})")
    text.operand("v", "HV", "one", "V")
    if text.variant.has_decay:
        # One number of a head, or a column of K.
        rows = "K" if text.variant.decay == "channel" else "one"
        text(f"decay = Exp({text.operand('log_alpha', 'HV', rows, 'one')})")
    if text.variant.has_beta:
        text.operand("beta", "HV", "one", "one")
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


STANDARD = Body(
    name="standard",
    min_opset=MIN_OPSET,
    write=_write,
    what=f"operators of ai.onnx alone, opset {MIN_OPSET} or newer",
    where="everywhere; what an export writes. The only one with float64",
    needs="onnxruntime 1.20 or newer",
)
