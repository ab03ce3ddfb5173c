"""Compare a function, its torch schema and its documentation with the spec.

All three are derived from the spec or written beside it. `lint` reads them back as text, by
means of its own, so that a wrong derivation and a forgotten edit are both noticed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gdn_ops.spec.docs import tex
from gdn_ops.spec.language import Attr, OpSpec, TensorArg

_SCHEMA = re.compile(r"^[\w:.]*\((?P<arguments>.*)\) -> (?P<outputs>.*)$")
_CHOICES = re.compile(r"One of ([^.]*)\.")


def lint(
    spec: OpSpec, function: Callable[..., Any], *, schema: str, documentation: str
) -> list[str]:
    """Return every disagreement with a spec as a sentence; an empty list when there is none.

    Args:
        spec: the op.
        function: its public function.
        schema: the text of its torch.library schema. After the arguments and outputs of the
            spec it may have more that are not of type Tensor.
        documentation: a docstring or a Markdown page, in which every argument and output has
            a line that begins with its name.
    """
    findings = _check_rules(spec)
    findings += [f"signature: {text}" for text in _check_signature(spec, function)]
    findings += [f"schema: {text}" for text in _check_schema(spec, schema)]
    findings += [f"documentation: {text}" for text in _check_documentation(spec, documentation)]
    return findings


def _check_rules(spec: OpSpec) -> list[str]:
    """Compare the rules with the choices of the argument `rule`, which offers them."""
    offered = {choice for attr in spec.attrs if attr.name == "rule" for choice in attr.choices}
    missing, unknown = set(spec.rule) - offered, offered - set(spec.rule)
    texts = [f"spec: rule {name!r} is no choice of the argument 'rule'" for name in sorted(missing)]
    return texts + [
        f"spec: the argument 'rule' offers {name!r}, which is no rule" for name in map(str, unknown)
    ]


def _compare_names(kind: str, expected: Sequence[str], written: Sequence[str]) -> list[str]:
    """Report names that are missing, and those that are there in another order."""
    missing = [f"{kind} {name!r} is missing" for name in expected if name not in written]
    in_spec = [name for name in expected if name in written]
    in_text = [name for name in written if name in expected]
    return missing + [
        f"{kind} {got!r} stands where {wanted!r} should be"
        for got, wanted in zip(in_text, in_spec, strict=True)
        if got != wanted
    ]


def _check_signature(spec: OpSpec, function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters
    by_name = {arg.name: arg for arg in spec.args}
    findings = _compare_names("argument", list(by_name), list(parameters))
    findings += [f"argument {n!r} is not in the spec" for n in parameters if n not in by_name]
    for name, default, is_keyword_only in spec.parameters():
        if name not in parameters:
            continue
        parameter = parameters[name]
        if (parameter.kind is parameter.KEYWORD_ONLY) != is_keyword_only:
            should = "keyword-only" if is_keyword_only else "positional"
            findings.append(f"argument {name!r} should be {should}")
        wanted = parameter.empty if default is ... else default
        if type(parameter.default) is not type(wanted) or parameter.default != wanted:
            got, should = _default_text(parameter.default), _default_text(wanted)
            findings.append(f"argument {name!r} has {got}, should have {should}")
        annotation = _annotation_text(parameter.annotation)
        if annotation and annotation != _type_text(by_name[name]):
            should = _type_text(by_name[name])
            findings.append(f"argument {name!r} has type {annotation}, should have {should}")
    return findings


def _default_text(default: object) -> str:
    return "no default" if default is inspect.Parameter.empty else f"default {default!r}"


def _annotation_text(annotation: Any) -> str:
    """Return an annotation as it is written, or the empty text where there is none."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("torch.", "")


def _type_text(arg: TensorArg | Attr) -> str:
    if isinstance(arg, Attr):
        return arg.type
    return "Tensor | None" if arg.optional else "Tensor"


def _check_schema(spec: OpSpec, schema: str) -> list[str]:
    match = _SCHEMA.match(schema)
    if match is None:
        return [f"{schema!r} is not of the form name(arguments) -> (outputs)"]
    arguments = [
        (arg.name, "Tensor?" if arg.optional else "Tensor")
        if isinstance(arg, TensorArg)
        else (arg.name, arg.schema)
        for arg in spec.args
        if isinstance(arg, TensorArg) or arg.schema is not None
    ]
    outputs = [(output.name, "Tensor") for output in spec.outputs]
    return [
        *_compare_declarations("argument", arguments, _declarations(match["arguments"])),
        *_compare_declarations("output", outputs, _declarations(match["outputs"].strip("()"))),
    ]


def _declarations(text: str) -> list[tuple[str, str]]:
    """Return (name, type) of each declaration in a schema; aliases like (a!) are left out."""
    parts = [part.partition("=")[0] for part in text.split(", ") if part not in ("", "*")]
    pairs = [re.sub(r"\([a-z]!?\)", "", part).rpartition(" ") for part in parts]
    return [(name, kind) for kind, _, name in pairs]


def _compare_declarations(
    kind: str, expected: Sequence[tuple[str, str | None]], written: Sequence[tuple[str, str]]
) -> list[str]:
    wanted, types = dict(expected), dict(written)
    findings = _compare_names(kind, list(wanted), list(types))
    findings += [
        f"{kind} {name!r} has type {types[name]}, should have {should}"
        for name, should in expected
        if types.get(name, should) != should
    ]
    last = max((i for i, (name, _) in enumerate(written) if name in wanted), default=-1)
    return findings + [
        f"{kind} {name!r} is not in the spec"
        for i, (name, type_) in enumerate(written)
        if name not in wanted and (i < last or type_ == "Tensor")
    ]


def _check_documentation(spec: OpSpec, documentation: str) -> Iterable[str]:
    for arg in spec.args:
        entries = _entries(documentation, arg.name)
        shape = arg.shape if isinstance(arg, TensorArg) else ""
        if not entries:
            yield f"argument {arg.name!r} is missing"
        elif not any(shape in entry for entry in entries):
            yield f"argument {arg.name!r} should have shape {shape}"
        if isinstance(arg, Attr) and arg.choices:
            offered, wanted = _choices(entries), set(map(str, arg.choices))
            yield from (f"{arg.name}={n!r} is missing" for n in sorted(wanted - offered))
            yield from (f"{arg.name}={n!r} is not in the spec" for n in sorted(offered - wanted))
    for output in spec.outputs:
        shape = f"({', '.join(output.axes)})"
        if not any(entry.startswith(shape) for entry in _entries(documentation, output.name)):
            yield f"output {output.name!r} with shape {shape} is missing"
    for rule in spec.rules:
        if not _entries(documentation, rule.name) and rule.name not in _choices(
            _entries(documentation, "rule")
        ):
            yield f"rule {rule.name!r} is missing"
    lines = {line.strip().removesuffix(r" \\") for line in documentation.splitlines()}
    for text in spec.equations:
        if not {text, tex(text)} & lines:
            yield f"equation {text!r} is missing"


def _entries(documentation: str, name: str) -> list[str]:
    """Return the text after a name in every line `name: ...`, `name (...` or "| `name` ..."."""
    entry = re.compile(rf"^(?:[ |-]*`{name}`| +{name}(?::| (?=\()))(.*)$", re.MULTILINE)
    return [text.strip() for text in entry.findall(documentation)]


def _choices(entries: Iterable[str]) -> set[str]:
    """Return the values offered as "One of a, b." or as a table cell of quoted words."""
    offered: set[str] = set()
    for entry in entries:
        listed = _CHOICES.search(entry)
        offered |= set(listed[1].split(", ") if listed else re.findall(r"`(\w+)`", entry))
    return offered
