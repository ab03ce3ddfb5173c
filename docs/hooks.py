"""Build hooks: what the site has beside the files of this folder as they lie.

The contributing guide and the changelog stand at the repository's root; the reference's part of
the navigation follows from the public names; `<!-- laws -->`, `<!-- mutants -->` and
`<!-- bodies -->` in a page become tables. Pages that are made of the code are written by
generate.py, and committed.
"""

from __future__ import annotations

import html
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def _prefer_this_checkout() -> None:
    """Import gdn_ops from here, whatever is installed; mkdocs resets the path after loading."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def root_pages() -> dict[str, str]:
    """Return the pages whose files stand at the repository's root, Markdown by path in the site."""
    pages = {}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        pages[f"{name.lower()}.md"] = text.replace("](docs/", "](")
    return pages


def reference_pages() -> list[dict[str, list[Any]]]:
    """Return the navigation of the API reference: a section per module, a page per public name."""
    _prefer_this_checkout()
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    sections = []
    for module in generate["MODULES"]:
        pages = [{x.name: x.path} for x in generate["public_names"]() if x.module == module]
        sections.append({module: [f"reference/{module}/index.md", *pages]})
    return sections


def laws_table() -> str:
    """Return the laws as a table: number, name of the function, what it says."""
    _prefer_this_checkout()
    from gdn_ops.testing.laws import LAWS

    rows = ["| §8 | function | law |", "|---|---|---|"]
    for law in LAWS:
        shown = html.escape(law.text, quote=False).replace("|", "\\|")
        rows.append(f"| {law.number} | `{law.name}` | {shown} |")
    return "\n".join(rows)


def mutants_table() -> str:
    """Return the mistakes that the kit is shown to catch, as a table."""
    _prefer_this_checkout()
    from gdn_ops.testing.mutants import MUTATIONS

    rows = ["| mutant | mistake |", "|---|---|"]
    for name, mutation in MUTATIONS.items():
        text = (mutation.__doc__ or "").strip().splitlines()[0]
        rows.append(f"| `{name}` | {html.escape(text, quote=False)} |")
    return "\n".join(rows)


def bodies_table() -> str:
    """Return the function bodies of ONNX nodes as a table: name, what it is, where to use it."""
    _prefer_this_checkout()
    from gdn_ops.export.bodies.table import bodies_table

    return bodies_table()


ROOT_LINK = re.compile(r"\]\(\.\./((?:\.\./)*)(CONTRIBUTING|CHANGELOG)\.md")

TABLES = {
    "<!-- laws -->": laws_table,
    "<!-- mutants -->": mutants_table,
    "<!-- bodies -->": bodies_table,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of public names to the group of the reference."""
    for group in config.nav or ():
        group.get("Reference", []).extend(reference_pages())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files stand at the repository's root."""
    for path, text in root_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables, and let links to files at the root lead to their pages."""
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return ROOT_LINK.sub(lambda link: f"]({link[1]}{link[2].lower()}.md", markdown)
