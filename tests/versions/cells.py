"""Name the cells: which versions the tests run with, and which tests each version concerns."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class UnknownCellError(ValueError):
    """A name that is no cell."""


class CellFailedError(Exception):
    """Say why a cell failed before its tests could say it."""


class NotRunError(Exception):
    """Say why a cell cannot be installed, or has no interpreter here.

    `excused` where it is no failure: a newer Python that this machine does not have.
    """

    def __init__(self, reason: str, *, excused: bool = False) -> None:
        super().__init__(reason)
        self.excused = excused


@dataclass(frozen=True)
class Cell:
    """Describe one version of a package, and the tests that it concerns.

    Attributes:
        package: the package, or "python".
        tests: files below tests/, with shell patterns, or parameters of one file.
        keyword: pytest's -k.
        beside: packages that are resolved with it, because they follow its version; of a Python,
            the torch that its environment gets in place of the locked one.
        deps: whether what the package requires is installed too.
        version: a number ("5.12" is any 5.12.x), "lowest" (of pyproject.toml), "locked" or
            "newest".
    """

    package: str
    tests: tuple[str, ...]
    keyword: str = ""
    beside: tuple[str, ...] = ()
    deps: bool = True
    version: str = "newest"

    @property
    def name(self) -> str:
        """Return the name, as `make versions CELL=` takes it."""
        return f"{self.package}-{self.version}"

    @property
    def requirements(self) -> tuple[str, ...]:
        """Return what pip is asked for; nothing where the locked version is meant."""
        if self.version == "locked" or self.package == "python":
            return ()
        if self.version == "newest":
            return (self.package, *self.beside)
        number = lowest(self.package) if self.version == "lowest" else f"{self.version}.*"
        return (f"{self.package}=={number}", *self.beside)


PAGE = "repository/test_docs.py::test_a_page_prints_what_it_shows[docs/{}.md]"
ONNX_TESTS = ("export/**/test_*.py", "cli/test_export.py", "nn/test_export.py")
ONNX_TESTS += (PAGE.format("onnx"),)
TRANSFORMERS_TESTS = ("compat/transformers/test_*.py", "export/language_models/test_*.py")
TRANSFORMERS_TESTS += ("bench/test_models.py", PAGE.format("transformers"))
TORCH_TESTS = (
    *("torch_ops/test_*.py", "call/test_*.py", "dispatch/test_*.py", "nn/test_*.py"),
    *("export/torch_exporter/test_modules.py", "testing/test_conformance.py"),
    *("backends/test_compile.py", "backends/test_compile_threads.py"),
    "compat/transformers/test_releases.py",
)
OF_TORCH = "(not test_conformance or torch or compile or naive) and not triton"
TRITON_TESTS = ("backends/triton/test_*.py", "backends/test_kernels.py")
# Not what is compiled for GPUs and what only takes longer to be as sure: `make test` runs all.
PYTHON_TESTS = (
    *("bench/test_models.py", "call/test_*.py", "cli/test_*.py", "compat/**/test_*.py"),
    *("demo/test_*.py", "dispatch/test_*.py", "environment/test_*.py", "export/**/test_*.py"),
    *("nn/test_*.py", "repository/test_docs.py", "repository/test_imports.py"),
    *("repository/test_package.py", "spec/test_*.py", "testing/test_lint.py"),
    *("torch_ops/test_*.py", "versions/test_*.py", "backends/tilelang/test_language*.py"),
    *("backends/triton/test_backend.py", "backends/triton/test_interpret*.py"),
    "backends/test_kernels.py",
)
PACKAGES = (
    Cell("transformers", TRANSFORMERS_TESTS),
    Cell("onnxruntime", ONNX_TESTS),
    Cell("onnx", ONNX_TESTS, beside=("onnxscript",)),
    # Of the kit only what is made of torch, which may pin another Triton than is supported.
    Cell("torch", TORCH_TESTS, keyword=OF_TORCH),
    # A torch may pin another Triton, so nothing else is asked to fit.
    Cell("triton", TRITON_TESTS, keyword="not tilelang", deps=False),
    Cell("python", PYTHON_TESTS),
)
VERSIONS = {
    "transformers": "4.57 5.0 5.4 5.8 5.12 5.13 5.14 5.15 5.16 5.20 5.23 5.24 newest",
    "onnxruntime": "lowest 1.25 1.26 1.27 1.28 1.31 1.32",
    "onnx": "lowest 1.21 1.22 newest",
    "torch": "lowest 2.11 locked newest",
    "triton": "3.6 3.9",
    "python": "3.11 3.12 newest",
}
CELLS = {
    f"{cell.package}-{version}": replace(cell, version=version)
    for cell in PACKAGES
    for version in VERSIONS[cell.package].split()
}
# The first release with models whose key channels decay; the tests of older ones skip them.
for name in ("transformers-5.24", "transformers-newest"):
    CELLS[name] = replace(CELLS[name], tests=(*TRANSFORMERS_TESTS, PAGE.format("transformers-kda")))
# The machine that `make gpu-kit` packs for: every test that needs no GPU runs with its versions.
CELLS["python-3.12"] = replace(
    CELLS["python-3.12"], tests=("**/test_*.py",), beside=("torch==2.11.*",)
)


def declared() -> list[str]:
    """Return every requirement of pyproject.toml, those of its extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    return [text for texts in lists for text in texts]


def lowest(package: str) -> str:
    """Return the lower bound of a package in pyproject.toml."""
    bounds = (re.match(rf"{package}>=([\d.]+)", text) for text in declared())
    return next(match[1] for match in bounds if match)


def select(names: Sequence[str]) -> list[Cell]:
    """Return the cells that names and shell patterns mean, in the order of the table.

    Any number is a cell: transformers-5.7 is not in the table and runs all the same.

    Raises:
        UnknownCellError: a name or pattern means no cell.
    """
    chosen: dict[str, Cell] = {}
    for name in names or ["*"]:
        matching = [CELLS[known] for known in fnmatch.filter(CELLS, name)]
        package, _, version = name.rpartition("-")
        if not matching and re.fullmatch(r"\d+(\.\d+)*|newest", version):
            matching = [replace(c, version=version) for c in PACKAGES if c.package == package]
        if not matching:
            raise UnknownCellError(f"no cell is called {name!r}, known: {', '.join(CELLS)}")
        chosen |= {cell.name: cell for cell in matching}
    return [chosen[name] for name in in_order(chosen)]


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of cells as the table has them, those of no table after them."""
    wanted = set(names)
    return [*(name for name in CELLS if name in wanted), *sorted(wanted - CELLS.keys())]
