"""Find the compilers that building a kernel needs, and check the versions of its packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Final

TILELANG: Final = "0.1.15"
"""The release of TileLang that the emulation is written for: any 0.1.15.x."""

DEFAULT_CUDA: Final = Path("/usr/local/cuda")
"""The folder of CUDA that is tried last."""

NO_CPP: Final = "no C++ compiler, which emulation needs: install g++, or set CXX"
NO_NVCC: Final = (
    "no nvcc, which TileLang compiles with: pip install 'tilelang[nvcc]', or set CUDA_HOME"
)


def compiler() -> str | None:
    """Return the path of the C++ compiler: CXX, or else g++, clang++ or c++; None without one."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cpu_reasons() -> list[str]:
    """Return why kernels cannot be emulated on CPU tensors: a missing C++ compiler."""
    named = os.environ.get("CXX")
    if compiler() is not None:
        return []
    return [f"{NO_CPP}; CXX is {named!r}, which is no program"] if named else [NO_CPP]


def nvcc() -> Path | None:
    """Return the path of nvcc, searched for as TileLang does; None without one.

    CUDA_HOME or CUDA_PATH, then PATH, then the package nvidia-cuda-nvcc, then /usr/local/cuda.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return _program(Path(home))
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    return _packaged() or _program(DEFAULT_CUDA)


def _program(home: Path) -> Path | None:
    path = home / "bin" / "nvcc"
    return path if path.is_file() else None


def _packaged() -> Path | None:
    """Return the nvcc of the package nvidia-cuda-nvcc; those for CUDA 12 have none."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "nvcc" and file.parent.name == "bin":
            return Path(str(file.locate()))
    return None


def gpu_reasons() -> list[str]:
    """Return why kernels cannot be compiled for a GPU: a missing nvcc."""
    if nvcc() is not None:
        return []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return [f"{NO_NVCC}; it is {home!r}, which has no bin/nvcc"] if home else [NO_NVCC]


def version_reasons() -> list[str]:
    """Return why the installed TileLang is not one that kernels are known to work with.

    Returns:
        One reason for TileLang itself, one for the apache-tvm-ffi that it loads. Nothing where
        TileLang is not installed: that is a reason of its own.
    """
    try:
        version = importlib.metadata.version("tilelang")
    except importlib.metadata.PackageNotFoundError:
        return []
    reasons = []
    if not re.fullmatch(re.escape(TILELANG) + r"([.+-].*)?", version):
        cure = "pip install 'gdn_ops[tilelang]'"
        reasons.append(f"tilelang is {version}, should be {TILELANG}: {cure}")
    return reasons + _ffi_reasons(version)


def _ffi_reasons(tilelang: str) -> list[str]:
    name = "apache-tvm-ffi"
    wanted = next(
        (line for line in importlib.metadata.requires("tilelang") or [] if line.startswith(name)),
        name,
    )
    wanted = wanted.partition(";")[0].removeprefix(name).strip()
    cure = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return [f"{name} is not installed, tilelang {tilelang} needs it: {cure}"]
    if all(_allows(part.strip(), version) for part in wanted.split(",") if part.strip()):
        return []
    return [f"{name} is {version}, tilelang {tilelang} needs {wanted}: {cure}"]


def _allows(clause: str, version: str) -> bool:
    """Return whether a version is inside one clause of a range, like "<0.1.13"."""
    match = re.fullmatch(r"(<=|>=|==|!=|~=|<|>)\s*([\w.]+?)(\.\*)?", clause)
    if match is None:
        return True
    operator, bound, star = match.groups()
    have, limit = _numbers(version), _numbers(bound)
    width = max(len(have), len(limit))
    padded_have, padded_limit = (x + (0,) * (width - len(x)) for x in (have, limit))
    starts = have[: len(limit)] == limit
    return {
        "<": padded_have < padded_limit,
        "<=": padded_have <= padded_limit,
        ">": padded_have > padded_limit,
        ">=": padded_have >= padded_limit,
        "==": starts if star else padded_have == padded_limit,
        "!=": not starts if star else padded_have != padded_limit,
        "~=": padded_have >= padded_limit and have[: len(limit) - 1] == limit[:-1],
    }[operator]


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version: (0, 1, 12) of "0.1.12.post1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
