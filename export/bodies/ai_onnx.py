"""Write body "onnx": one LinearAttention of ai.onnx."""

from __future__ import annotations

import functools

from gdn_ops.export.bodies.body import Body
from gdn_ops.export.bodies.linear_attention import refuse, write_linear_attention
from gdn_ops.export.bodies.text import BodyText

_SETTING = "ALLOW_RELEASED_ONNX_OPSET_ONLY=0"


def _write(text: BodyText) -> None:
    # ai.onnx has no value heads that share a key head: q and k are repeated.
    text.query_and_key()
    text.repeat_heads()
    write_linear_attention(text, "LinearAttention", ("HV", "num_v_heads"), ("q_r", "k_r"))


ONNX = Body(
    name="onnx",
    min_opset=27,
    write=_write,
    what="one `LinearAttention` of ai.onnx, opset 27",
    where="for comparison: the slowest, because onnxruntime has no CPU kernel for it and runs a "
    f"Scan. onnxruntime 1.32 or newer; 1.31 only where `{_SETTING}` is set",
    needs="models of opset 27, for which onnx should be 1.22 or newer and onnxruntime 1.32 (1.28 "
    f"where {_SETTING} is set in the environment) or newer",
    refuses=functools.partial(refuse, "onnx"),
    oldest_onnx="1.22",
    min_rows=1,
)
