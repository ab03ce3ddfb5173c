"""Build hooks: what the site has beside the files of this folder as they lie.

The contributing guide and the changelog stand at the repository's root; the reference's part of
the navigation follows from the public names. What is made of the code is written by generate.py,
and committed.
"""

from __future__ import annotations

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


ROOT_LINK = re.compile(r"\]\(\.\./((?:\.\./)*)(CONTRIBUTING|CHANGELOG)\.md")


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
    """Let links to files at the root lead to their pages."""
    return ROOT_LINK.sub(lambda link: f"]({link[1]}{link[2].lower()}.md", markdown)
