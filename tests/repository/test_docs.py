"""The documentation is executed: every python block runs and prints what the page shows.

The python blocks of a page share one namespace, in order. What a block prints stands in the
block that follows it, fenced as ```text title="prints"; how it fails, as ```text title="raises",
with the error's type and text. `...` stands for anything, as in doctest.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.metadata
import io
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.version import Version

import gdn_ops
from gdn_ops.cli import bench_command, exit_codes
from gdn_ops.cli.commands import make_parser
from gdn_ops.cli.parser import UsageError, parse
from gdn_ops.dispatch import registry
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block: where its first line is, its language and title, and what it holds."""

    line: int
    language: str
    title: str
    text: str


def blocks_of(page: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(page):
        _, language, info, text = match.groups()
        title = re.search(r'title="(\w+)"', info)
        line = page.count("\n", 0, match.start(4)) + 1
        blocks.append(Block(line, language, title[1] if title else "", textwrap.dedent(text)))
    return blocks


def run_block(block: Block, name: str, namespace: dict[str, Any]) -> tuple[str, str]:
    """Run one block; return how it ended, "prints" or "raises", and the text."""
    # Empty lines before the code make a traceback point into the page.
    code = compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        return "raises", f"{out.getvalue()}{type(error).__name__}: {error}\n"
    return "prints", out.getvalue()


def run_page(page: str, name: str) -> int:
    """Run the python blocks of a page against what it shows; return how many there were."""
    blocks, namespace, count = blocks_of(page), {"__name__": "docs"}, 0
    for block, following in zip(blocks, [*blocks, Block(0, "", "", "")][1:], strict=True):
        if block.language != "python":
            continue
        count += 1
        shown = following.title in ("prints", "raises")
        ending, shows = (following.title, following.text) if shown else ("prints", "")
        ended, got = run_block(block, name, namespace)
        equal = doctest.OutputChecker().check_output(shows, got, doctest.ELLIPSIS)
        if ended != ending or not equal:
            skip_for_older(got, f"{Path(name).name}:{block.line}")
            raise AssertionError(
                f"{name}:{block.line} {ended}\n{got}but should be: {ending}\n{shows}"
            )
    return count


NEWER = re.compile(r"^SpecError: .* with (\w+) (\d+\.\d+) and newer\b", re.MULTILINE)
"""The text of an error that says what a package is too old for."""


def skip_for_older(got: str, place: str) -> None:
    """Skip the rest of a page where the library itself says that a package is too old for it."""
    found = NEWER.search(got)
    if found is not None and Version(importlib.metadata.version(found[1])) < Version(found[2]):
        pytest.skip(f"{place} needs {found[1]} {found[2]}")


@pytest.fixture
def restored(registry_as_found: None) -> Iterator[None]:
    """Undo what a page may change: backends, the default backend, the logger."""
    logger = registry.logger
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_prints_what_it_shows(path: Path, restored: None, one_thread: None) -> None:
    page = path.read_text(encoding="utf-8")
    count = run_page(page, str(path))
    assert count == len(re.findall(r"^ *```python", page, re.MULTILINE))


@pytest.mark.parametrize("needed", ["0.1", "999.0"])
def test_only_a_package_that_is_too_old_ends_a_page(needed: str) -> None:
    code = f"import gdn_ops\nraise gdn_ops.SpecError('as with torch {needed} and newer')"
    noticed = AssertionError if needed == "0.1" else pytest.skip.Exception
    with pytest.raises(noticed):
        run_page(f"```python\n{code}\n```\n", "page")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ('```python\nprint(1)\n```\n\n```text title="prints"\n2\n```\n', "prints\n1\n"),
        ("```python\nprint(1)\n```\n", "but should be: prints\n"),
        ('```python\nx = 1\n```\n\n```text title="raises"\nKeyError\n```\n', "should be: raises"),
        ("\n```python\nraise ValueError('no')\n```\n", "page:3 raises\nValueError: no\n"),
        ('```python\nprint(1)\n```\n```text title="prints"\n...2\n```\n', "prints\n1\n"),
    ],
)
def test_a_page_that_shows_something_else_is_noticed(page: str, message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_page(page, "page")


def test_blocks_of_a_page_share_a_namespace() -> None:
    page = "```python\nx = 1\n```\ntext\n\n    ```python\n    print(x)\n    ```\n"
    shown = '    ```text title="prints"\n    1\n    ```\n'
    assert run_page(page + shown, "page") == 2


def test_every_public_name_and_every_backend_is_documented() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [name for name in gdn_ops.__all__ if not re.search(rf"`{name}\b", text)] == []
    shipped = [name for name in registry.known_backends() if (ROOT / "backends" / name).exists()]
    shipped += [p.stem for p in (ROOT / "backends").glob("*.py") if not p.stem.startswith("_")]
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    readme = PAGES[0].read_text(encoding="utf-8")
    assert shipped
    for name in shipped:
        assert f"\n## `{name}`" in page, f"docs/backends.md has no section on {name}"
        assert f"| `{name}` |" in readme, f"README.md has no row for {name}"


def test_every_section_of_the_mathematics_that_code_cites_exists() -> None:
    cited = set()
    for folder in ("gdn_ops", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            cited |= set(re.findall(r"§(\d)", path.read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    assert cited
    assert cited <= set(re.findall(r"^## §(\d) ", page, re.MULTILINE))


def test_katex_knows_every_command_of_every_equation() -> None:
    katex = (ROOT / "docs" / "assets" / "katex" / "katex.min.js").read_text(encoding="utf-8")
    known = set(re.findall(r"\\\\([A-Za-z]+)", katex))
    equations = "".join(
        "".join(re.findall(r"^\$\$\n(.*?)^\$\$$", path.read_text(encoding="utf-8"), re.M | re.S))
        for path in PAGES
    )
    used = set(re.findall(r"\\([A-Za-z]+)", equations)) - {"begin", "end"}
    assert {"alpha", "top", "text"} <= used
    assert used - known == set()


def test_the_picture_of_the_folders_is_the_folders_in_the_order_of_their_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("```text\n")[2].partition("\n```")[0].splitlines()
    drawn: dict[str, list[str]] = {}
    for line in picture:
        if not line.startswith(" "):
            inside = drawn[line.split()[0].removesuffix("/")] = []
        else:
            inside += re.findall(r"(?<=  )(\w+)(?:/|\.py)(?= )", line)
    folders = {
        folder: {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        for folder in ("gdn_ops", "backends", "export")
    }
    folders["gdn_ops"] -= {"backends", "export"}
    assert set(drawn["gdn_ops"]) == folders["gdn_ops"] | {"gates", "ops", "product"}
    assert set(drawn["backends"]) == folders["backends"] | {"naive"}
    assert set(drawn["export"]) == folders["export"]

    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"gdn_ops\.(\w+)", layer) for layer in contracts[0]["layers"]]
    order = {name: i for i, names in enumerate(layers) for name in names}
    positions = [order[name] for name in drawn["gdn_ops"]]
    assert positions == sorted(positions)
    elsewhere = {"__main__", "_version", "_interrupt", "backends", "export"}
    assert set(order) - elsewhere == set(drawn["gdn_ops"])


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in make_parser().commands().items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, f"docs/cli.md has no section on {name}"
        for inner in (command, *command.commands().values()):
            missing = [o for o in inner.option_names() if o != "--help" and o not in section]
            assert not missing, f"docs/cli.md, {name}: {missing}"
        assert [n for n in command.commands() if f"bench {n}" not in section] == []


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"| {code} | {meaning} |" in page


def commands_of(pages: list[Path]) -> list[tuple[str, list[str]]]:
    """Return every call of gdn-ops in the shell blocks of pages, and where it is."""
    found = []
    for path in pages:
        for block in blocks_of(path.read_text(encoding="utf-8")):
            for line in block.text.splitlines() if block.language == "sh" else []:
                if line.startswith("gdn-ops "):
                    words = shlex.split(line.partition(" > ")[0], comments=True)
                    words = [__file__ if word == "FILE" else word for word in words]
                    found.append((f"{path.name}: {line}", words[1:]))
    return found


def test_every_command_in_a_shell_block_can_be_parsed() -> None:
    found = commands_of(PAGES)
    assert len(found) > 25
    for where, words in found:
        try:
            parse(make_parser(), bench_command.with_default(words))
        except UsageError as error:
            raise AssertionError(f"{where}: {error}") from error
