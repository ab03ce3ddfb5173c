"""Write the bodies that are one LinearAttention: "ort", of com.microsoft, "onnx", of ai.onnx."""

from __future__ import annotations

import functools

from gdn_ops.export.bodies.body import MIN_OPSET, Body
from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.attributes import Variant

_SETTING = "ALLOW_RELEASED_ONNX_OPSET_ONLY=0"


def _refuse(body: str, variant: Variant, scale: float) -> str:
    """Return why a LinearAttention cannot do what a node asks for, or an empty string."""
    if variant.is_double:
        return f"the state is float64, body {body!r} should have float32 or shorter"
    if scale == 0:
        return f"scale is 0, which LinearAttention of body {body!r} reads as K ** -0.5"
    return ""


def _write(text: BodyText, operator: str, repeats_heads: bool) -> None:
    """Write a LinearAttention, whose operands are (B, T, heads * width).

    Its rules without an erase do not read beta: v is multiplied by it there. That of ai.onnx has
    no value heads that share a key head: q and k are repeated.
    """
    text.query_and_key()
    if repeats_heads:
        text.repeat_heads()
    q, k = ("q_r", "k_r") if repeats_heads else ("q_n", "k_n")
    heads, attribute = ("HV", "num_v_heads") if repeats_heads else ("H", "num_qk_heads")
    variant = text.variant
    tokens = "T" if text.sequence else "one"
    for x, count, width in ((q, heads, "K"), (k, heads, "K"), ("v_w", "HV", "V")):
        text(f"{x}_width = Mul({count}, {width})")
        text(f"{x}_flat = Concat <axis = 0> (B, {tokens}, {x}_width)")
    text(f"gate_flat = Concat <axis = 0> (B, {tokens}, HV)")
    value = text.operand("v", "HV", "one", "V")
    if variant.has_beta:
        text.operand("beta", "HV", "one", "one")
    if variant.has_beta and not variant.has_erase:
        text(f"v_w = Mul({value}, beta_x)")
    else:
        text(f"v_w = Identity({value})")
    for x in (q, k, "v_w"):
        text(f"{x}_p = Reshape <allowzero = 1> ({x}, {x}_flat)")
    gates = _packed_gates(text)
    old, new = text.states()
    attributes = (
        f"q_num_heads: int = @{attribute}, kv_num_heads: int = @num_v_heads, "
        f'scale: float = @scale, update_rule = "{variant.rule}"'
    )
    operands = ", ".join((f"{q}_p", f"{k}_p", "v_w_p", old, *gates))
    text(f"o_p, {new} = {operator} <{attributes}> ({operands})")
    text.results("o_p", new)


def _packed_gates(text: BodyText) -> tuple[str, ...]:
    """Write the gates as (B, T, HV); return the operands decay and beta of LinearAttention.

    A decay of each key channel is (B, T, HV * K).
    """
    variant = text.variant
    if variant.decay == "channel":
        text.operand("log_alpha", "HV", "one", "K")
        text("decay_width = Mul(HV, K)")
        text(f"decay_flat = Concat <axis = 0> (B, {'T' if text.sequence else 'one'}, decay_width)")
        text("decay_p = Reshape <allowzero = 1> (log_alpha_x, decay_flat)")
    elif variant.has_decay:
        text.operand("log_alpha", "HV", "one", "one")
        text("decay_p = Reshape <allowzero = 1> (log_alpha_x, gate_flat)")
    if variant.has_erase and variant.has_beta:
        text("beta_p = Reshape <allowzero = 1> (beta_x, gate_flat)")
    elif variant.has_erase:
        text.number("beta_one", 1.0)
        text("beta_p = Expand(beta_one, gate_flat)")
    decay = "decay_p" if variant.has_decay else '""'
    if variant.has_erase:
        return decay, "beta_p"
    return (decay,) if variant.has_decay else ()


ORT = Body(
    name="ort",
    min_opset=MIN_OPSET,
    write=functools.partial(_write, operator="com.microsoft.LinearAttention", repeats_heads=False),
    what="one `com.microsoft::LinearAttention`",
    where="onnxruntime 1.25 or newer, from any language",
    needs="com.microsoft::LinearAttention, which onnxruntime has from 1.25 on",
    refuses=functools.partial(_refuse, "ort"),
    imports=(("com.microsoft", 1),),
    is_preferred=True,
)

ONNX = Body(
    name="onnx",
    min_opset=27,
    write=functools.partial(_write, operator="LinearAttention", repeats_heads=True),
    what="one `LinearAttention` of ai.onnx, opset 27",
    where="for comparison: the slowest, because onnxruntime has no CPU kernel for it and runs a "
    f"Scan. onnxruntime 1.32 or newer; 1.31 only where `{_SETTING}` is set",
    needs="models of opset 27, for which onnx should be 1.22 or newer and onnxruntime 1.32 (1.28 "
    f"where {_SETTING} is set in the environment) or newer",
    refuses=functools.partial(_refuse, "onnx"),
    oldest_onnx="1.22",
    min_rows=1,
)
