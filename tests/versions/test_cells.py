"""The table of versions has the cells that were promised, and each is found by its name."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from gdn_ops.backends import triton
from versions import __main__ as command
from versions import run
from versions.cells import CELLS, GROUPS, ROOT, Cell, Group, UnknownCellError, lowest, select
from versions.process import CellFailedError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def named(name: str) -> Cell:
    (cell,) = select([name])
    return cell


def test_the_table_has_the_cells_that_users_were_promised() -> None:
    promised = {
        *("transformers-4.57", "transformers-5.0", "transformers-5.4", "transformers-5.8"),
        *("transformers-5.12", "transformers-5.13", "transformers-5.15", "transformers-5.16"),
        *("transformers-5.20", "transformers-5.23", "transformers-5.24", "transformers-newest"),
        *("onnxruntime-lowest", "onnxruntime-1.25", "onnxruntime-1.31", "onnxruntime-1.32"),
        *("onnx-lowest", "onnx-newest"),
        *("torch-lowest", "torch-2.11", "torch-locked", "torch-newest"),
        *("triton-3.6", "triton-3.9", "python-3.11", "python-newest"),
    }
    # Those beside them are the first of a kind that a page names.
    more = {
        *("transformers-5.14", "onnxruntime-1.26", "onnxruntime-1.27", "onnxruntime-1.28"),
        *("onnx-1.21", "onnx-1.22"),
    }
    assert {cell.name for cell in CELLS} == promised | more


@pytest.mark.parametrize("package", ["torch", "triton", "onnx", "onnxruntime", "transformers"])
def test_the_lowest_cell_is_the_lower_bound_that_users_get(package: str) -> None:
    (group,) = (group for group in GROUPS if group.package == package)
    first = Cell(group, group.versions[0]).requirements[0]
    assert first.removesuffix(".*") == f"{package}=={lowest(package)}"
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for texts in extras for text in texts)]
    bounds = [re.match(rf"{package}(\[\w+\])?>=([\d.]+)", text) for text in texts]
    assert {found[2] for found in bounds if found} == {lowest(package)}


def test_the_range_of_triton_is_the_one_that_its_backend_accepts() -> None:
    (text,) = PROJECT["optional-dependencies"]["triton"]
    low, (major, minor) = triton.OLDEST, triton.NEWEST
    assert text.startswith(f"triton>={low[0]}.{low[1]},<{major}.{minor + 1};")
    assert [cell.version for cell in CELLS if cell.group.package == "triton"] == ["3.6", "3.9"]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.package)
def test_every_test_that_a_cell_runs_is_there(group: Group) -> None:
    arguments = run.test_arguments(Cell(group, "newest"))
    files = [text.partition("::")[0] for text in arguments if text.startswith(str(ROOT))]
    assert files and all(Path(file).is_file() for file in files)
    assert arguments.count("-k") == bool(group.keyword)


def test_a_test_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    group = replace(GROUPS[0], tests=("test_nothing*.py",))
    with pytest.raises(CellFailedError, match=r"no test file is called test_nothing\*\.py"):
        run.test_arguments(Cell(group, "1.0"), tmp_path)


def test_cells_are_chosen_by_name_pattern_and_any_version() -> None:
    assert select([]) == list(CELLS)
    found = select(["triton-*", "transformers-5.7", "onnx-newest", "triton-3.6"])
    assert [cell.name for cell in found] == [
        *("onnx-newest", "triton-3.6", "triton-3.9", "transformers-5.7")
    ]
    assert found[-1].requirements == ("transformers==5.7.*",)


@pytest.mark.parametrize("name", ["nope", "jax-1.0", "triton-", "transformers-best", "jax-*"])
def test_an_unknown_cell_ends_with_two_and_the_known_ones(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownCellError):
        select([name])
    assert command.main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"no cell is called {name!r}, known: transformers-4.57, ")
    assert said.endswith("python-newest\n")


def test_a_cell_asks_pip_for_its_version_and_what_follows_it() -> None:
    assert named("transformers-5.12").requirements == ("transformers==5.12.*",)
    assert named("onnx-lowest").requirements == (f"onnx=={lowest('onnx')}", "onnxscript")
    assert named("torch-newest").requirements == ("torch",)
    assert named("torch-locked").requirements == ()
    assert named("python-3.11").requirements == ()
