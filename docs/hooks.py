"""Build hooks: pages and tables that are made from the code, so that they cannot go stale.

Generated pages: one per op, from its spec and `examples/`; the contributing guide and the
changelog, from the files at the repository's root. `<!-- laws -->`, `<!-- mutants -->` and
`<!-- bodies -->` in a page become tables.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def _prefer_this_checkout() -> None:
    """Import gdn_ops from here, whatever is installed; mkdocs resets the path after loading."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def generated_pages() -> dict[str, str]:
    """Return the generated pages, Markdown by path."""
    _prefer_this_checkout()
    from gdn_ops.spec import docs
    from gdn_ops.spec.ops import OPS

    pages = {}
    for op in OPS:
        examples = ROOT / "docs" / "examples" / f"{op.name}.md"
        pages[f"ops/{op.name}.md"] = f"{docs.page(op)}\n{examples.read_text(encoding='utf-8')}"
    for name in ("CONTRIBUTING", "CHANGELOG"):
        pages[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    return pages


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


TABLES = {
    "<!-- laws -->": laws_table,
    "<!-- mutants -->": mutants_table,
    "<!-- bodies -->": bodies_table,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables."""
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown
