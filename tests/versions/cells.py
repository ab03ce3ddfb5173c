"""Name the cells: which versions the tests run with, and which tests each version concerns."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\d+(\.\d+)*")


@dataclass(frozen=True)
class Group:
    """Describe the cells of one package.

    Attributes:
        package: the package, or "python".
        versions: the cells: numbers ("5.12" is any 5.12.x), "lowest" (of pyproject.toml),
            "locked" or "newest".
        tests: files below tests/, with shell patterns, or parameters of one file.
        keyword: pytest's -k.
        beside: packages that are resolved with it, because they follow its version.
        deps: whether what the package requires is installed too.
    """

    package: str
    versions: tuple[str, ...]
    tests: tuple[str, ...]
    keyword: str = ""
    beside: tuple[str, ...] = ()
    deps: bool = True


@dataclass(frozen=True)
class Cell:
    """Name one version of a package: a number, "lowest", "locked" or "newest"."""

    group: Group
    version: str

    @property
    def name(self) -> str:
        """Return the name, as `make versions CELL=` takes it."""
        return f"{self.group.package}-{self.version}"

    @property
    def requirements(self) -> tuple[str, ...]:
        """Return what pip is asked for; nothing where the locked version is meant."""
        package, version = self.group.package, self.version
        if version == "locked" or package == "python":
            return ()
        if version == "newest":
            return (package, *self.group.beside)
        number = lowest(package) if version == "lowest" else f"{version}.*"
        return (f"{package}=={number}", *self.group.beside)


def page(name: str) -> str:
    """Return the test that runs the examples of a page of docs/."""
    return f"repository/test_docs.py::test_a_page_prints_what_it_shows[docs/{name}.md]"


TRANSFORMERS = Group(
    "transformers",
    (
        *("4.57", "5.0", "5.4", "5.8", "5.12", "5.13", "5.14", "5.15", "5.16", "5.20", "5.23"),
        *("5.24", "newest"),
    ),
    ("compat/transformers/test_*.py", "bench/test_models.py", page("transformers")),
)
ONNX_TESTS = ("export/**/test_*.py", "cli/test_export.py", "nn/test_export.py", page("onnx"))
ONNXRUNTIME = Group(
    "onnxruntime", ("lowest", "1.25", "1.26", "1.27", "1.28", "1.31", "1.32"), ONNX_TESTS
)
ONNX = Group("onnx", ("lowest", "1.21", "1.22", "newest"), ONNX_TESTS, beside=("onnxscript",))
TORCH = Group(
    "torch",
    ("lowest", "2.11", "locked", "newest"),
    (
        *("torch_ops/test_*.py", "call/test_*.py", "dispatch/test_*.py", "nn/test_*.py"),
        *("export/torch_exporter/test_modules.py", "testing/test_conformance.py"),
    ),
    # Of the kit only what is made of torch.
    keyword="not test_conformance or torch or compile or naive",
)
# A torch may pin another Triton, so nothing else is asked to fit.
TRITON = Group("triton", ("3.6", "3.9"), ("backends/triton/test_*.py",), deps=False)
# Not what is compiled for GPUs and what only takes longer to be as sure: `make test` runs all.
PYTHON = Group(
    "python",
    ("3.11", "newest"),
    (
        *("bench/test_models.py", "call/test_*.py", "cli/test_*.py", "compat/**/test_*.py"),
        *("demo/test_*.py", "dispatch/test_*.py", "environment/test_*.py", "export/**/test_*.py"),
        *("nn/test_*.py", "repository/test_docs.py", "repository/test_imports.py"),
        *("repository/test_package.py", "spec/test_*.py", "testing/test_lint.py"),
        *("torch_ops/test_*.py", "versions/test_*.py", "backends/tilelang/test_language*.py"),
        *("backends/triton/test_backend.py", "backends/triton/test_interpret*.py"),
    ),
)

GROUPS = (TRANSFORMERS, ONNXRUNTIME, ONNX, TORCH, TRITON, PYTHON)
CELLS = tuple(Cell(group, version) for group in GROUPS for version in group.versions)


class UnknownCellError(ValueError):
    """A name that is no cell."""


def lowest(package: str, pyproject: Path = ROOT / "pyproject.toml") -> str:
    """Return the lower bound of a package in pyproject.toml."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in (text for texts in lists for text in texts):
        if found := re.match(rf"{package}>=([\d.]+)", text):
            return found[1]
    raise ValueError(f"pyproject.toml has no lower bound of {package}")


def _of_another_version(name: str) -> Cell | None:
    package, _, version = name.rpartition("-")
    for group in GROUPS:
        if group.package == package and (NUMBER.fullmatch(version) or version == "newest"):
            return Cell(group, version)
    return None


def select(names: Sequence[str]) -> list[Cell]:
    """Return the cells that names and shell patterns mean, in the order of the table.

    Any number is a cell: transformers-5.7 is not in the table and runs all the same.

    Raises:
        UnknownCellError: a name or pattern means no cell.
    """
    found: list[Cell] = []
    for name in names or ["*"]:
        matching = [cell for cell in CELLS if fnmatch.fnmatchcase(cell.name, name)]
        if not matching and (other := _of_another_version(name)):
            matching = [other]
        if not matching:
            known = ", ".join(cell.name for cell in CELLS)
            raise UnknownCellError(f"no cell is called {name!r}, known: {known}")
        found += matching
    order = [*CELLS, *found]
    return sorted(dict.fromkeys(found), key=order.index)
