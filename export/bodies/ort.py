"""Write body "ort": one com.microsoft::LinearAttention."""

from __future__ import annotations

import functools

from gdn_ops.export.bodies.body import MIN_OPSET, Body
from gdn_ops.export.bodies.linear_attention import refuse, write_linear_attention
from gdn_ops.export.bodies.text import BodyText


def _write(text: BodyText) -> None:
    text.query_and_key()
    write_linear_attention(
        text, "com.microsoft.LinearAttention", ("H", "num_qk_heads"), ("q_n", "k_n")
    )


ORT = Body(
    name="ort",
    min_opset=MIN_OPSET,
    write=_write,
    what="one `com.microsoft::LinearAttention`",
    where="onnxruntime 1.25 or newer, from any language",
    needs="com.microsoft::LinearAttention, which onnxruntime has from 1.25 on",
    refuses=functools.partial(refuse, "ort"),
    imports=(("com.microsoft", 1),),
    is_preferred=True,
)
