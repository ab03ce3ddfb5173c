"""The table of versions has the cells that were promised, and each is found by its name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gdn_ops.backends import triton
from versions import __main__ as command
from versions import run
from versions.cells import CELLS, PACKAGES, ROOT, Cell, CellFailedError, declared, lowest, select


def test_the_table_has_the_cells_that_users_were_promised() -> None:
    promised = {
        "transformers": "4.57 5.0 5.4 5.8 5.12 5.13 5.15 5.16 5.20 5.23 5.24 newest",
        "onnxruntime": "lowest 1.25 1.31 1.32",
        "onnx": "lowest newest",
        "torch": "lowest 2.11 locked newest",
        "triton": "3.6 3.9",
        "python": "3.11 3.12 newest",
    }
    # The first of a kind that a page names.
    more = {"transformers": "5.14", "onnxruntime": "1.26 1.27 1.28", "onnx": "1.21 1.22"}
    names = [f"{p}-{v}" for table in (promised, more) for p in table for v in table[p].split()]
    assert sorted(CELLS) == sorted(names)


@pytest.mark.parametrize("package", ["torch", "triton", "onnx", "onnxruntime", "transformers"])
def test_the_lowest_cell_is_the_lower_bound_that_users_get(package: str) -> None:
    first = next(cell for cell in CELLS.values() if cell.package == package).requirements[0]
    assert first.removesuffix(".*") == f"{package}=={lowest(package)}"
    bounds = [re.match(rf"{package}(\[\w+\])?>=([\d.]+)", text) for text in declared()]
    assert {bound[2] for bound in bounds if bound} == {lowest(package)}


def test_the_range_of_triton_is_the_one_that_its_backend_accepts() -> None:
    (text,) = (text for text in declared() if text.startswith("triton"))
    low, (major, minor) = triton.OLDEST, triton.NEWEST
    assert text.startswith(f"triton>={low[0]}.{low[1]},<{major}.{minor + 1};")


@pytest.mark.parametrize("cell", PACKAGES, ids=lambda cell: cell.package)
def test_every_test_that_a_cell_runs_is_there(cell: Cell) -> None:
    arguments = run.test_arguments(cell)
    files = [text.partition("::")[0] for text in arguments if text.startswith(str(ROOT))]
    assert files and all(Path(file).is_file() for file in files)
    assert arguments.count("-k") == bool(cell.keyword)


def test_the_page_of_models_with_channels_runs_where_there_are_such_models() -> None:
    page = "test_a_page_prints_what_it_shows[docs/transformers-kda.md]"
    names = [name for name, cell in CELLS.items() if any(page in test for test in cell.tests)]
    assert names == ["transformers-5.24", "transformers-newest"]
    assert any(page in text for text in run.test_arguments(CELLS["transformers-newest"]))
    every = {test for test in CELLS["transformers-4.57"].tests if "compat" in test}
    assert every <= {*CELLS["transformers-newest"].tests}


def test_a_test_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CellFailedError, match=r"no test file is called test_nothing\*\.py"):
        run.test_arguments(replace(PACKAGES[0], tests=("test_nothing*.py",)))


def test_cells_are_chosen_by_name_pattern_and_any_version() -> None:
    assert select([]) == list(CELLS.values())
    cells = select(["triton-*", "transformers-5.7", "onnx-newest", "triton-3.6"])
    assert [cell.name for cell in cells] == [
        *("onnx-newest", "triton-3.6", "triton-3.9", "transformers-5.7")
    ]
    assert cells[-1].requirements == ("transformers==5.7.*",)


@pytest.mark.parametrize("name", ["nope", "jax-1.0", "triton-", "transformers-best", "jax-*"])
def test_an_unknown_cell_ends_with_two_and_the_known_ones(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"no cell is called {name!r}, known: transformers-4.57, ")
    assert said.endswith("python-newest\n")


def test_a_cell_asks_pip_for_its_version_and_what_follows_it() -> None:
    assert CELLS["transformers-5.12"].requirements == ("transformers==5.12.*",)
    assert CELLS["onnx-lowest"].requirements == (f"onnx=={lowest('onnx')}", "onnxscript")
    assert CELLS["torch-newest"].requirements == ("torch",)
    assert CELLS["torch-locked"].requirements == ()
    assert CELLS["python-3.11"].requirements == ()
