"""Write the bodies that are one LinearAttention, of com.microsoft or of ai.onnx."""

from __future__ import annotations

from gdn_ops.export.bodies.text import BodyText

MICROSOFT = "com.microsoft"


def _linear_attention(text: BodyText, name: str, heads: tuple[str, str], q: str, k: str) -> None:
    """Write a LinearAttention, whose operands are (B, T, heads * width).

    Its rules without an erase do not read beta: v is multiplied by it there.
    """
    variant = text.variant
    tokens = "T" if text.sequence else "one"
    for x, count, width in ((q, heads[0], "K"), (k, heads[0], "K"), ("v_w", "HV", "V")):
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
        f"q_num_heads: int = @{heads[1]}, kv_num_heads: int = @num_v_heads, "
        f'scale: float = @scale, update_rule = "{variant.rule}"'
    )
    text(f"o_p, {new} = {name} <{attributes}> ({q}_p, {k}_p, v_w_p, {old}, {', '.join(gates)})")
    text.results("o_p", new)


def _packed_gates(text: BodyText) -> list[str]:
    """Write the gates as (B, T, HV); return the operands decay and beta of LinearAttention."""
    variant, found = text.variant, ['""', '""']
    if variant.has_decay:
        text.operand("log_alpha", "HV", "one", "one")
        text("decay_p = Reshape <allowzero = 1> (log_alpha_x, gate_flat)")
        found[0] = "decay_p"
    if variant.has_erase:
        if variant.has_beta:
            text("beta_p = Reshape <allowzero = 1> (beta_x, gate_flat)")
        else:
            text.number("beta_one", 1.0)
            text("beta_p = Expand(beta_one, gate_flat)")
        found[1] = "beta_p"
    while found and found[-1] == '""':
        found.pop()
    return found


def write_ort(text: BodyText) -> None:
    """Write the body that is one com.microsoft::LinearAttention."""
    text.query_and_key()
    _linear_attention(text, f"{MICROSOFT}.LinearAttention", ("H", "num_qk_heads"), "q_n", "k_n")


def write_onnx(text: BodyText) -> None:
    """Write the body that is one LinearAttention of ai.onnx."""
    # ai.onnx has no value heads that share a key head: q and k are repeated.
    text.query_and_key()
    text.repeat_heads()
    _linear_attention(text, "LinearAttention", ("HV", "num_v_heads"), "q_r", "k_r")
