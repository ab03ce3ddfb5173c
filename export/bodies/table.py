"""List the function bodies, find one by its name, and write its function.

A body is text, written for the opset of the model that it goes into, because a function may not
import another one. It is *guarded*: every operand is reshaped to a shape that is read from the
state, so a batch that does not match is an error and never a silent broadcast. All reads of the
state happen before the one write of the new state, which makes it safe to bind both to one buffer.

A function has no way to ask for its rule or for what is missing, so each combination that a
model uses is a function of its own, told apart by its overload.
"""

from __future__ import annotations

import onnx
import onnx.parser

from gdn_ops.export.bodies.body import MIN_OPSET, Body
from gdn_ops.export.bodies.linear_attention import ONNX, ORT
from gdn_ops.export.bodies.standard import STANDARD
from gdn_ops.export.bodies.text import BodyText
from gdn_ops.export.node.arguments import check_name, check_type
from gdn_ops.export.node.attributes import Variant
from gdn_ops.export.node.schema import ATTRIBUTES, DECAY, DOMAIN, INPUTS, OUTPUTS
from gdn_ops.spec.errors import SpecError

BODIES = {body.name: body for body in (STANDARD, ORT, ONNX)}
"""Every body by its name."""


def find_body(label: str, name: str | None) -> Body | None:
    """Return a body by its name, None for no function.

    Raises:
        SpecError: the name is unknown.
    """
    if name is None:
        return None
    check_name(label, "body", name, BODIES, ", or None for none")
    return BODIES[name]


def check_body(name: str | None, variant: Variant, opset: int, scale: float) -> Body | None:
    """Return a body by its name, if it can do what a node asks for.

    Raises:
        SpecError: the body is unknown or cannot.
    """
    node = str(variant.operator)
    body = find_body(node, name)
    if opset < MIN_OPSET:
        raise SpecError(
            f"{node}: the model has opset {opset}, should have {MIN_OPSET} or newer; "
            f"export it with opset={MIN_OPSET} or convert it with onnx.version_converter"
        )
    if body is None:
        return None
    if opset < body.min_opset:
        raise SpecError(
            f"{node}: the model has opset {opset}, body {name!r} should have {body.min_opset} or "
            f"newer; export with opset={body.min_opset}, or take body='standard'"
        )
    reason = body.refuses(variant, scale)
    if reason:
        raise SpecError(f"{node}: {reason}; take body='standard'")
    return body


def check_opset(label: str, opset: int, name: str | None) -> None:
    """Check that the installed onnx knows an opset, for a model that is to have the named body.

    Raises:
        SpecError: it is too old; the text says which one there is.
    """
    check_type(label, "opset", opset, int, "an integer")
    newest = onnx.defs.onnx_opset_version()
    if opset <= newest:
        return
    body, cure = BODIES.get(name or ""), ""
    if body is not None and newest < body.min_opset:
        cure = f"; body {name!r} needs onnx {body.oldest_onnx} or newer: take body='standard'"
    raise SpecError(
        f"{label}: opset is {opset}, should be at most {newest}, the newest that the installed "
        f"onnx {onnx.__version__} knows{cure}"
    )


def decode_function(body: str, variant: Variant, opset: int) -> onnx.FunctionProto:
    """Return the ONNX function of one variant.

    Args:
        body: its name, a key of `BODIES`.
        variant: what it is written for.
        opset: of ai.onnx in the model that it goes into.

    Raises:
        SpecError: the body is unknown or cannot do what the variant asks for.
    """
    label = "decode_function"
    check_name(label, "body", body, BODIES)
    check_type(label, "variant", variant, Variant, "a gdn_ops.export.node.attributes.Variant")
    check_type(label, "opset", opset, int, "an integer")
    chosen = check_body(body, variant, opset, 1.0)
    assert chosen is not None
    text = BodyText(variant)
    chosen.write(text)
    imports = "".join(f', "{domain}": {version}' for domain, version in chosen.imports)
    lines = "\n".join(f"  {line}" for line in text.lines)
    attributes = ", ".join((*ATTRIBUTES, DECAY) if variant.decay == "channel" else ATTRIBUTES)
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": {opset}{imports}]>\n'
        f"{variant.operator.name} <{attributes}> ({', '.join(INPUTS)}) "
        f"=> ({', '.join(OUTPUTS)})\n{{\n{lines}\n}}"
    )
    function.doc_string = f"{variant.operator}, {variant.rule}: body {body}"
    return function


def body_of(function: onnx.FunctionProto) -> str:
    """Return the name of a function's body, "other" if it is none of ours."""
    name = function.doc_string.rpartition("body ")[2]
    return name if name in BODIES else "other"


def bodies_table() -> str:
    """Return the bodies as a Markdown table."""
    rows = ["| body | what it is | where to use it |", "|---|---|---|"]
    rows += [f"| `{body.name}` | {body.what} | {body.where} |" for body in BODIES.values()]
    kernel = "where a custom-op library registers our operators, as that of `make native` does"
    return "\n".join([*rows, f"| `None` | no function | {kernel} |"])
