"""Pages made from the code are there for every public name, and every link leads somewhere."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import runpy
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops import Backend, Limits, register_backend
from gdn_ops.backends.cpp import library
from gdn_ops.spec import docs
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import OPS
from gdn_ops.testing.laws import LAWS
from gdn_ops.testing.mutants import MUTATIONS
from paths import ROOT

GENERATE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "generate.py")))
NAMES = GENERATE.public_names()
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/**/*.md"))
}
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")
SHAPE = re.compile(r"\((\.\.\.|\w[\w+ ]*)?(, ?[^()]*)?\)")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_page_of_an_op_names_everything_in_its_spec(op: OpSpec) -> None:
    page = GENERATE.generated_pages()[f"ops/{op.name}.md"]
    assert page.startswith(docs.page(op))
    names = [x.name for group in (op.args, op.outputs, op.rules, op.cases) for x in group]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [line for line in (*map(docs.tex, op.equations), *op.sources) if line not in page] == []


def test_equations_of_a_spec_are_typeset() -> None:
    lines = [docs.tex(equation) for equation in gdn_ops.GATED_DELTA.equations]
    assert lines[1] == r"u_t &= \beta_t (v_t - S'^\top k_t)"
    assert lines[3] == r"o_t &= s \, S_t^\top q_t"


def test_every_law_is_listed_with_its_docstring() -> None:
    table = GENERATE.laws_table()
    for law in LAWS:
        assert f"| {law.number} | `{law.name}` |" in table
        assert law.text and law.text in html.unescape(table).replace("\\|", "|")


def test_every_mutant_is_listed() -> None:
    table = GENERATE.mutants_table()
    assert [name for name in MUTATIONS if f"`{name}`" not in table] == []


def test_pages_made_from_the_code_are_current() -> None:
    made = GENERATE.generated_pages() | GENERATE.filled_pages()
    assert {"testing.md", "onnx.md", "family.md", "ops/gated_delta.md"} <= set(made)
    written = {path: (ROOT / "docs" / path) for path in made}
    stale = [
        path
        for path, file in written.items()
        if not file.exists() or file.read_text(encoding="utf-8") != made[path]
    ]
    assert stale == [], "make pages writes them"


def test_every_public_name_has_a_page_and_a_line_in_its_module() -> None:
    assert {name.module for name in NAMES} == set(GENERATE.MODULES)
    assert len({name.path.lower() for name in NAMES}) == len(NAMES), "files differ in case only"
    for name in NAMES:
        path = ROOT / "docs" / name.path
        assert path.exists(), f"{name.module}.{name.name} has no page: make pages"
        page = path.read_text(encoding="utf-8")
        assert page.startswith(f"# `{name.name}`\n")
        index = ROOT / "docs" / "reference" / name.module / "index.md"
        assert f"[`{name.name}`](" in index.read_text(encoding="utf-8")


def test_every_module_that_says_what_is_public_has_pages() -> None:
    said = set()
    for folder in ("nn", "compat", "testing"):
        for path in (ROOT / "gdn_ops" / folder).rglob("*.py"):
            if "\n__all__ = [" in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                said.add(".".join(parts).removesuffix(".__init__"))
    assert said
    assert said <= set(GENERATE.MODULES)


def documented_functions() -> list[tuple[str, Any]]:
    functions = []
    for name in NAMES:
        members = GENERATE.members_of(name.value)
        if inspect.isfunction(name.value):
            functions.append((f"{name.module}.{name.name}", name.value))
        for member, value in members.items():
            if inspect.isfunction(value):
                functions.append((f"{name.module}.{name.name}.{member}", value))
    return functions


FUNCTIONS = documented_functions()


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])
def test_a_docstring_gives_the_shape_of_every_tensor(name: str, function: Any) -> None:
    """An argument that is a tensor has an entry with its shape, or one that refers to another."""
    text = inspect.getdoc(function) or ""
    entries = {
        part.strip(): match[2]
        for match in re.finditer(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
        for part in match[1].split(",")
    }
    for parameter in inspect.signature(function).parameters.values():
        if re.search(r"\bTensor\b", str(parameter.annotation)) and "as in" not in text.lower():
            said = re.search(rf"\b{parameter.name} (\(.*)", text)
            entry = entries.get(parameter.name, said[1] if said else "")
            refers = re.search(r"\bas (in|said)\b|\blikewise\b|not (needed|supported)", entry)
            assert refers or SHAPE.search(entry), f"{name}: {parameter.name}: {entry!r}"


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])
def test_a_docstring_of_what_takes_tensors_says_which_errors_it_raises(
    name: str, function: Any
) -> None:
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters.values()
    if any(re.search(r"\bTensor\b", str(parameter.annotation)) for parameter in parameters):
        assert re.search(r"^Raises:|\braises\b|\bas in\b", text, re.MULTILINE), name


def slugs(page: str) -> set[str]:
    """Return the anchors of the headings of a page that the site and a forge agree on."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCED.sub("", page), re.MULTILINE)
    both = set()
    for heading in headings:
        text = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        forge = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip())
        if site == forge:
            both.add(site)
    return both


def links_that_lead_nowhere(texts: dict[Path, str]) -> list[str]:
    wrong = []
    for path, text in texts.items():
        for link in LINK.findall(FENCED.sub("", text)):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if file and not target.exists():
                wrong.append(f"{path.name} links to {link}: there is no such file")
            elif anchor and anchor not in slugs(target.read_text("utf-8") if file else text):
                wrong.append(f"{path.name} links to {link}: there is no such heading")
    return wrong


def test_every_link_leads_somewhere_when_the_files_are_read_as_they_lie() -> None:
    assert len(TEXTS) > 100
    assert links_that_lead_nowhere(TEXTS) == []


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("nowhere.md", ["page.md links to nowhere.md: there is no such file"]),
        ("#nothing", ["page.md links to #nothing: there is no such heading"]),
        ("math.md#9-none", ["page.md links to math.md#9-none: there is no such heading"]),
        ("math.md#8-laws", []),
        ("#a-heading", []),
    ],
)
def test_a_link_that_leads_nowhere_is_noticed(link: str, wrong: list[str]) -> None:
    page = f"# A `heading`\n\n[text]({link})\n"
    assert links_that_lead_nowhere({ROOT / "docs" / "page.md": page}) == wrong


def test_pages_link_to_no_file_that_the_site_does_not_have() -> None:
    for path, text in TEXTS.items():
        if "docs" not in path.parts[len(ROOT.parts) :]:
            continue
        for link in LINK.findall(FENCED.sub("", text)):
            target = (path.parent / link.partition("#")[0]).resolve()
            is_inside = target.is_relative_to(ROOT / "docs")
            assert is_inside or target.name in ("CONTRIBUTING.md", "CHANGELOG.md"), (
                f"{path}: {link}"
            )


def test_modules_of_the_reference_can_be_imported() -> None:
    for module in GENERATE.MODULES:
        assert sorted(set(importlib.import_module(module).__all__))


def test_every_reason_that_troubleshooting_lists_is_one_that_explain_gives(
    registry_as_found: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Narrow(Backend):
        name = "narrow"
        limits = Limits(devices=("cuda",), dtypes=("float32",), head_dims=(128,), grad=False)

    class Lonely(Backend):
        name = "lonely"
        requires = ("no_such_package",)
        limits = Limits(devices=("*",))

    register_backend(Narrow)
    register_backend(Lonely)
    q = torch.zeros(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    double = gdn_ops.explain(q, q, q, rule="linear")
    x = q.detach().float()
    reasons = (*double.reasons, *gdn_ops.explain(x, x, x, rule="linear", chunk_size=64).reasons)
    # Without the library of the backend cpp.
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    monkeypatch.setenv("GDN_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_opened", None)
    reasons += gdn_ops.explain(x, x, x, rule="linear").reasons
    given = "\n".join(text for _, texts in reasons for text in texts)
    certificate = (ROOT / "gdn_ops" / "environment" / "certificate.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("| reason | what it means |")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    quoted = re.findall("`([^`]+)`", "\n".join(first))
    assert len(quoted) >= 8
    for text in quoted:
        pattern = ".*".join(re.escape(part) for part in text.split("..."))
        where = certificate if text.startswith("not certified") else given
        assert re.search(pattern, where), f"{text!r} is no reason that explain gives"


def test_the_site_has_all_that_its_pages_load() -> None:
    """Scripts, styles and fonts lie in docs/; none is asked of another host."""
    yaml = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", yaml, re.MULTILINE)
    extra = yaml.partition("extra_css:")[2].partition("\nplugins:")[0]
    loaded = re.findall(r"^  - (.+)$", extra, re.MULTILINE)
    assert len(loaded) >= 4
    for path in loaded:
        text = (ROOT / "docs" / path).read_text(encoding="utf-8")
        for url in re.findall(r"url\(([^)]+)\)|@import ([^;]+)", text):
            assert (ROOT / "docs" / path).parent.joinpath("".join(url)).exists(), f"{path}: {url}"
    pages = "\n".join(FENCED.sub("", text) for text in TEXTS.values())
    assert re.findall(r"<(?:script|img|link|iframe)[^>]*https?:", pages) == []
    assert re.findall(r"!\[[^]]*\]\(https?:", pages) == []
