"""Read what NVIDIA machine code uses of a GPU: registers, spills, stack, matrix instructions.

cuobjdump reads it from a cubin, which may be for a GPU that this machine does not have.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn_ops.aot.loops import read_code
from gdn_ops.aot.machine_code import Code
from gdn_ops.aot.sass_listing import read_sass

_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA|UTC\w*MMA)\b")
_SPILL = re.compile(r"\bSTL\b")


class Usage(NamedTuple):
    """Hold what one kernel uses of a GPU.

    Attributes:
        registers: per thread; on AMD vector and accumulation registers together.
        spills: on NVIDIA instructions that store a register to local memory, on AMD registers.
        stack: bytes of local memory per thread.
        instructions: of matrix units, counted by name.
        code: the instructions of its loops.
    """

    registers: int
    spills: int
    stack: int
    instructions: dict[str, int]
    code: Code = Code()

    def values(self) -> dict[str, Any]:
        """Return the usage as values of JSON."""
        return self._asdict() | {"code": self.code.values()}

    @staticmethod
    def of(value: dict[str, Any]) -> Usage:
        """Return the usage that `values` was made of."""
        return Usage(**value | {"code": Code.of(value["code"])})


def cubin_usage(cubin: bytes, folders: Sequence[Path] = ()) -> Usage:
    """Return what the kernel in a cubin uses of a GPU.

    Args:
        cubin: the code of one kernel.
        folders: where to look for cuobjdump first: one that is older than the compiler may not
            know the GPU.

    Raises:
        FileNotFoundError: there is no cuobjdump.
    """
    cuobjdump = find_tool("cuobjdump", folders)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _run(cuobjdump, "--dump-resource-usage", file.name)
        code = _run(cuobjdump, "-sass", file.name)
    return nvidia_usage(resources, code)


def _run(tool: Path, *arguments: str) -> str:
    command = [str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def nvidia_usage(resources: str, code: str) -> Usage:
    """Return the usage of a kernel, given cuobjdump's report of resources and its listing."""
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(
        registers=sizes["REG"],
        spills=len(_SPILL.findall(code)),
        stack=sizes["STACK"] + sizes["LOCAL"],
        instructions=dict(Counter(_MATRIX.findall(code))),
        code=read_code(read_sass(code)),
    )


def find_tool(name: str, folders: Sequence[Path] = ()) -> Path:
    """Return the path of a tool: in `folders`, a CUDA toolkit, PATH or an installed wheel.

    Raises:
        FileNotFoundError: none has it; the text says what brings it.
    """
    for folder in (*folders, *_folders()):
        path = folder / name
        if os.access(path, os.X_OK) and path.is_file():
            return path
    raise FileNotFoundError(
        f"{name} was not found on PATH, in CUDA_HOME, in /usr/local/cuda nor in a wheel: "
        f"the package triton brings it (pip install 'gdn_ops[triton]'), and so does a CUDA toolkit"
    )


def _folders() -> Iterator[Path]:
    """Yield the folders where CUDA's tools may be, those that the user chose first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin"
    yield from map(Path, os.get_exec_path())
    yield Path("/usr/local/cuda/bin")
    yield from (root / "backends" / "nvidia" / "bin" for root in _roots("triton"))
    for root in _roots("nvidia"):
        yield from sorted(root.glob("*/bin"))


def _roots(package: str) -> list[Path]:
    """Return the folders of a package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
