"""Write the pages that are made from the code: `python docs/generate.py`, or `make pages`.

They are committed, so that every link leads somewhere when the files are read as they lie: a page
per op, from its spec and `examples/`, a page per public name, from its docstring, and the tables of
laws, mutants, bodies, the family and ablations. A test says when they are out of date.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MODULES = (
    "gdn_ops",
    "gdn_ops.gates",
    "gdn_ops.nn",
    "gdn_ops.parallel",
    "gdn_ops.export",
    "gdn_ops.compat.transformers",
    "gdn_ops.compat.fla",
    "gdn_ops.compat.states",
    "gdn_ops.testing",
    "gdn_ops.testing.conformance",
    "gdn_ops.testing.oracle",
    "gdn_ops.testing.mutants",
    "gdn_ops.testing.compiled",
)
"""Whose public names have pages: those of `__all__`, in this order."""

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Source):$")
_ENTRY = re.compile(r"^([\w*, .]+): +(.*)$")
_TITLES = {"Args": "Arguments", "Source": "Sources"}


class Name(NamedTuple):
    """Hold one public name: where it is said to be, what it is, and its page in docs/."""

    module: str
    name: str
    value: Any
    path: str


def public_names() -> list[Name]:
    """Return every public name. The ops have pages of their own in docs/ops."""
    from gdn_ops.spec.ops import OPS

    ops = {op.name for op in OPS}
    names = []
    for module in MODULES:
        exported = importlib.import_module(module)
        for name in exported.__all__:
            value = getattr(exported, name)
            path = f"reference/{module}/{_slug(name)}.md"
            if module == "gdn_ops" and name in ops:
                path = f"ops/{name}.md"
            names.append(Name(module, name, value, path))
    return names


def _slug(name: str) -> str:
    """Return the name of a page's file; constants differ from functions in more than case."""
    return f"{name.lower()}-constant" if name.isupper() else name


def generated_pages() -> dict[str, str]:
    """Return the generated pages, Markdown by path in docs/."""
    from gdn_ops.spec import docs
    from gdn_ops.spec.ops import OPS

    pages = {}
    for op in OPS:
        examples = (DOCS / "examples" / f"{op.name}.md").read_text(encoding="utf-8")
        pages[f"ops/{op.name}.md"] = f"{docs.page(op)}\n{examples}"
    names = public_names()
    for name in names:
        if not name.path.startswith("ops/"):
            pages[name.path] = page_of(name, names)
    for module in MODULES:
        own = [name for name in names if name.module == module]
        pages[f"reference/{module}/index.md"] = index_of(module, own)
    pages["reference/index.md"] = index_of_modules(names)
    return pages


def index_of_modules(names: list[Name]) -> str:
    """Return the first page of the reference."""
    lines = ["# API reference", ""]
    lines += ["A page per public name, made from its docstring. What is not here may change.", ""]
    lines += ["| module | what it is for |", "|---|---|"]
    for module in MODULES:
        summary = _first_line(importlib.import_module(module))
        lines.append(f"| [`{module}`]({module}/index.md) | {_escaped(summary)} |")
    lines += ["", "| name | module | what it is |", "|---|---|---|"]
    for name in sorted(names, key=lambda name: name.name.lower()):
        link = f"[`{name.name}`]({_relative(name.path, 'reference/index.md')})"
        lines.append(f"| {link} | `{name.module}` | {_escaped(_summary(name))} |")
    return "\n".join(lines) + "\n"


def index_of(module: str, names: list[Name]) -> str:
    """Return the page of a module: its docstring and its names."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    lines = [f"# `{module}`", "", *_markdown(text.splitlines(), lambda line: line), ""]
    lines += ["| name | what it is |", "|---|---|"]
    at = f"reference/{module}/index.md"
    for name in names:
        link = f"[`{name.name}`]({_relative(name.path, at)})"
        lines.append(f"| {link} | {_escaped(_summary(name))} |")
    return "\n".join(lines) + "\n"


def page_of(name: Name, names: list[Name]) -> str:
    """Return the page of one public name."""
    own = _parameters(name.value)
    known = {
        other.name: _relative(other.path, name.path)
        for other in names
        if other.module in (name.module, "gdn_ops") and other.name not in (name.name, *own)
    }

    def linked(line: str) -> str:
        def link(match: re.Match[str]) -> str:
            at = known.get(match[1])
            return f"[`{match[1]}`]({at})" if at else match[0]

        return re.sub(r"(?<!\[)`(\w+)`", link, line)

    lines = [f"# `{name.name}`", ""]
    lines += ["```python", f"from {name.module} import {name.name}", "```", ""]
    if not callable(name.value):
        lines += _markdown(_constant(name).splitlines(), linked)
        if type(name.value).__module__.startswith("gdn_ops"):
            lines += ["", f"It is a value of `{type(name.value).__name__}`.", ""]
            lines += _markdown((inspect.getdoc(type(name.value)) or "").splitlines(), linked)
        return "\n".join(lines) + "\n"
    lines += ["```text", *signature_of(name.name, name.value), "```", ""]
    lines += _markdown((inspect.getdoc(name.value) or "").splitlines(), linked)
    for member, value in members_of(name.value).items():
        function = value.fget if isinstance(value, property) else getattr(name.value, member)
        lines += ["", f"## `{member}`", ""]
        if isinstance(value, property):
            lines += ["```text", f"{member}: {_annotation(function)}", "```", ""]
        else:
            lines += ["```text", *signature_of(member, function), "```", ""]
        lines += _markdown((inspect.getdoc(function) or "").splitlines(), linked)
    return "\n".join(lines) + "\n"


def members_of(value: Any) -> dict[str, Any]:
    """Return the public methods and properties that a class of this library defines."""
    if not inspect.isclass(value):
        return {}
    members: dict[str, Any] = {}
    for base in reversed(value.__mro__):
        if base.__module__.split(".")[0] == "gdn_ops":
            members |= {
                name: member
                for name, member in vars(base).items()
                if not name.startswith("_")
                and getattr(getattr(member, "__func__", member), "__doc__", None)
                and (
                    inspect.isfunction(member)
                    or isinstance(member, property | classmethod | staticmethod)
                )
            }
    return members


def signature_of(name: str, value: Any) -> list[str]:
    """Return the lines of a signature, one where it fits, else an argument a line."""
    kind = "class " if inspect.isclass(value) else ""
    if inspect.isclass(value) and issubclass(value, BaseException):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        return [f"class {name}({bases})"]
    signature = inspect.signature(value)
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(p.startswith("*") for p in parts):
            parts.append("*")
        # Leave out arguments typed `Never`: they are only refused by name.
        if parameter.name != "self" and parameter.annotation != "Never":
            parts.append(_parameter(parameter))
    ending = "" if kind or not _annotation(value) else f" -> {_annotation(value)}"
    line = f"{kind}{name}({', '.join(parts)}){ending}"
    if len(line) <= 90:
        return [line]
    return [f"{kind}{name}(", *(f"    {part}," for part in parts), f"){ending}"]


def _parameter(parameter: inspect.Parameter) -> str:
    """Return one parameter as it is written in a signature."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = parameter.default
        text += f' = "{default}"' if isinstance(default, str) else f" = {_value(default)}"
    return text


def _value(default: Any) -> str:
    """Return a default as text; one that is no plain value says nothing that a reader could use."""
    plain = default is None or isinstance(default, bool | int | float | tuple)
    return repr(default) if plain else "..."


def _annotation(function: Any) -> str:
    returns = inspect.signature(function).return_annotation
    return "" if returns is inspect.Signature.empty else _type(returns)


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _parameters(value: Any) -> Iterable[str]:
    if not callable(value) or (inspect.isclass(value) and issubclass(value, BaseException)):
        return ()
    return inspect.signature(value).parameters


def _markdown(lines: list[str], linked: Any) -> list[str]:
    """Return a docstring in Google style as Markdown."""
    out: list[str] = []
    section = ""
    for line in lines:
        title = _SECTION.match(line)
        if title:
            section = title[1]
            out += [f"**{_TITLES.get(section, section)}**", ""]
            continue
        if line and not line.startswith(" "):
            section = ""
        out.append(_line(line, section, linked))
    return out


def _line(line: str, section: str, linked: Any) -> str:
    """Return one line of a docstring as Markdown: an entry of a list, code, or text."""
    if section in ("Args", "Attributes", "Raises") and line:
        entry = _ENTRY.match(line[4:])
        if entry and not line[4:].startswith(" "):
            names = ", ".join(f"`{part.strip()}`" for part in entry[1].split(","))
            return f"- {names}: {linked(_escaped(entry[2]))}"
        return f"  {linked(_escaped(line.strip()))}"
    if section in ("Returns", "Yields", "Source"):
        return linked(_escaped(line.strip()))
    return line if line.startswith("    ") else linked(_escaped(line))


def _escaped(text: str) -> str:
    """Return text whose characters Markdown would take for markup outside of code, escaped."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*<|])", r"\\\1", parts[i])
    return "`".join(parts)


def _summary(name: Name) -> str:
    text = _constant(name) if not callable(name.value) else inspect.getdoc(name.value) or ""
    return text.splitlines()[0]


def _first_line(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").splitlines()[0]


def _constant(name: Name) -> str:
    """Return what the string below the assignment of a constant says."""
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("gdn_ops") or not module.__file__:
            continue
        body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        for node, following in itertools.pairwise(body):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if any(isinstance(t, ast.Name) and t.id == name.name for t in targets) and (
                isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            ):
                return inspect.cleandoc(str(following.value.value))
    raise ValueError(f"{name.module}.{name.name} is not described below its assignment")


def _relative(path: str, at: str) -> str:
    """Return a link to one page of docs/ from another."""
    here, there = at.split("/")[:-1], path.split("/")
    while here and there[:-1] and here[0] == there[0]:
        here, there = here[1:], there[1:]
    return "/".join([".."] * len(here) + there)


def laws_table() -> str:
    """Return the laws as a table: number, name of the function, what it says."""
    from gdn_ops.testing.laws import LAWS

    rows = ["| §8 | function | law |", "|---|---|---|"]
    for law in LAWS:
        shown = html.escape(law.text, quote=False).replace("|", "\\|")
        rows.append(f"| {law.number} | `{law.name}` | {shown} |")
    return "\n".join(rows)


def mutants_table() -> str:
    """Return the mistakes that the kit is shown to catch, as a table."""
    from gdn_ops.testing.mutants import MUTATIONS

    rows = ["| mutant | mistake |", "|---|---|"]
    for name, mutation in MUTATIONS.items():
        text = (mutation.__doc__ or "").strip().splitlines()[0]
        rows.append(f"| `{name}` | {html.escape(text, quote=False)} |")
    return "\n".join(rows)


def bodies_table() -> str:
    """Return the function bodies of ONNX nodes as a table: name, what it is, where to use it."""
    from gdn_ops.export.bodies.table import bodies_table

    return bodies_table()


def family_table() -> str:
    """Return which backend and which ONNX body runs each member of the family, or why not."""
    from gdn_ops.testing.members import support_table

    return support_table()


def paper_tables() -> dict[str, Callable[[], str]]:
    """Return what makes the tables of docs/paper.md, from the recorded results, by their marks."""
    from gdn_ops.bench.paper.pages import tables

    made = tables(ROOT / "benchmarks" / "results")
    return {name: functools.partial(str, text) for name, text in made.items()}


def ablation_table() -> str:
    """Return the recorded ablation table, with the figures of the paper beside it."""
    from gdn_ops.bench.ablation.report import markdown

    recorded = ROOT / "benchmarks" / "results" / "ablation.json"
    return markdown(json.loads(recorded.read_text(encoding="utf-8")))


TABLES = {
    "laws": laws_table,
    "mutants": mutants_table,
    "bodies": bodies_table,
    "family": family_table,
    "ablation": ablation_table,
}
"""Makes the text between `<!-- laws -->` and `<!-- /laws -->` of a page, and so on."""


def filled_pages() -> dict[str, str]:
    """Return the pages that hold tables made from the code, Markdown by path in docs/."""
    pages = {}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for name, table in (TABLES | paper_tables()).items():
            begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
            if begin in text:
                before, _, rest = text.partition(begin)
                pages[path.name] = text = (
                    f"{before}{begin}\n{table()}\n\n{end}{rest.partition(end)[2]}"
                )
    return pages


def main() -> None:
    """Write every generated page, and remove those that are no longer made."""
    pages = generated_pages()
    for folder in ("ops", "reference"):
        for path in (DOCS / folder).rglob("*.md"):
            if path.relative_to(DOCS).as_posix() not in pages:
                path.unlink()
    for path, text in (pages | filled_pages()).items():
        (DOCS / path).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
    print(f"{len(pages)} pages")


if __name__ == "__main__":
    main()
