"""The wheel and the source distribution hold exactly the folders, and the wheel works."""

from __future__ import annotations

import ast
import os
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from paths import FOLDERS, ROOT, copy_source
from processes import build_distribution, install, output_of

SMOKE = """
import sys
import torch
import gdn_ops
from pathlib import Path

installed = Path(sys.argv[1]).resolve()
assert Path(gdn_ops.__file__).resolve().is_relative_to(installed), gdn_ops.__file__
from gdn_ops.backends import naive
assert Path(naive.__file__).resolve().is_relative_to(installed), naive.__file__

torch.manual_seed(0)
q, k = (torch.nn.functional.normalize(torch.randn(2, 37, 2, 8), dim=-1) for _ in "qk")
v, alpha, beta = torch.randn(2, 37, 4, 6), torch.rand(2, 37, 4), torch.rand(2, 37, 4)
outputs, gradients = [], []
for backend in ("naive", "torch"):
    inputs = [x.clone().requires_grad_() for x in (q, k, v, alpha, beta)]
    o = gdn_ops.gated_delta(*inputs, backend=backend)
    outputs.append(o.detach())
    gradients.append(torch.autograd.grad(o.square().sum(), inputs))
torch.testing.assert_close(*outputs)
torch.testing.assert_close(*gradients)

names = [info.name for info in gdn_ops.list_backends()]
assert {"naive", "torch"} <= set(names), names
print(gdn_ops.__version__, "passes")
"""


def build(source: Path, out: Path, kind: str) -> Path:
    """Build a wheel or an sdist of a source tree, without what is compiled; return the file.

    tests/backends/cpp/test_installed.py has the compiled library.
    """
    return build_distribution(source, out, kind, GDN_OPS_BUILD_CPP="0")


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        assert max(Counter(archive.namelist()).values()) == 1, "a file stands twice in the wheel"
        return {name: archive.read(name) for name in archive.namelist()}


def on_disk() -> dict[str, bytes]:
    """Return every file of the package's folders, by its name in the wheel."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            is_source = "__pycache__" not in path.parts and path.suffix != ".so"
            if path.is_file() and is_source and path.name[0] != ".":
                name = path.relative_to(ROOT / folder).as_posix()
                if folder != "gdn_ops" or name.partition("/")[0] not in ("backends", "export"):
                    files[f"{package}/{name}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that no build leaves anything in the repository."""
    return copy_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("sdist"), "--sdist")


def test_the_wheel_holds_exactly_the_files_of_the_folders(wheel: Path) -> None:
    expected = on_disk()
    built = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    missing, extra = sorted(set(expected) - set(built)), sorted(set(built) - set(expected))
    assert not missing, f"not in the wheel (a package missing in pyproject.toml?): {missing}"
    assert not extra, f"in the wheel, but not in the folders: {extra}"
    changed = [name for name in expected if built[name] != expected[name]]
    assert not changed, f"other bytes in the wheel than on disk: {changed}"


def test_the_sdist_builds_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    again = build(tree, tmp_path_factory.mktemp("again"), "--wheel")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_sdist_carries_the_sources_of_the_library_for_onnxruntime(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"native/{path.name}" for path in (ROOT / "native").iterdir() if path.is_file()}
    assert len(sources) >= 5 and sources <= carried


def test_the_links_lead_to_the_folders() -> None:
    for name in ("backends", "export"):
        link = ROOT / "gdn_ops" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_the_wheel_carries_version_licence_command_and_type_marker(wheel: Path) -> None:
    tree = ast.parse((ROOT / "gdn_ops" / "_version.py").read_text())
    version = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    files = contents(wheel)
    info = f"gdn_ops-{version}.dist-info"
    metadata = files[f"{info}/METADATA"].decode().splitlines()
    assert f"Version: {version}" in metadata
    assert "License-Expression: MIT" in metadata
    assert f"{info}/licenses/LICENSE" in files
    assert "gdn-ops = gdn_ops.cli:main" in files[f"{info}/entry_points.txt"].decode()
    assert "gdn_ops/py.typed" in files


def test_all_pulls_everything_a_user_may_want_and_dev_everything_a_check_needs() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert extras["all"] == ["gdn_ops[triton,tilelang,onnx,testing,cli]"]
    assert "gdn_ops[triton,cuda-tilelang,onnx,testing,cli,docs,bench]" in extras["dev"]
    assert set(extras) == {
        *("triton", "tilelang", "cuda-tilelang", "onnx", "testing", "cli"),
        *("docs", "bench", "dev", "all"),
    }


def test_the_installed_wheel_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    install(target, wheel)
    printed = output_of("-c", SMOKE, target, cwd=elsewhere, PYTHONPATH=str(target))
    assert printed.endswith("passes")
