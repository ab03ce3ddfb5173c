"""What compiled code uses of a GPU: registers, spills, stack, instructions of matrix units.

Read with the tools that Triton's wheel brings. Reading takes longer than a compilation that is
found in Triton's cache, so what was read is kept beside the code.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.runtime.cache import get_cache_manager

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KEPT = "gdn_ops_usage_1.json"
"""Name of what was read, with a number that changes when this file reads something else."""

_NVIDIA_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA|UTC\w*MMA)\b")
_NVIDIA_SPILL = re.compile(r"\bSTL\b")
_AMD_MATRIX = re.compile(r"\bv_(s?mfma)")


class Usage(NamedTuple):
    """What one kernel uses.

    Attributes:
        registers: per thread; on AMD vector and accumulation registers together.
        spills: on NVIDIA instructions that store a register to local memory, on AMD registers.
        stack: bytes of local memory per thread.
        instructions: of matrix units, counted by name.
    """

    registers: int
    spills: int
    stack: int
    instructions: dict[str, int]


class Product(NamedTuple):
    """A product of blocks in the source: (M, K) by (K, N)."""

    M: int
    N: int
    K: int
    dtype: str


def usage(compiled: Any) -> Usage:
    """Return what a compiled kernel of Triton uses."""
    cache = get_cache_manager(compiled.hash)
    kept = cache.get_file(_KEPT)
    if kept is not None:
        return Usage(**json.loads(Path(kept).read_text()))
    if "cubin" in compiled.asm:
        found = _nvidia(compiled.asm["cubin"])
    else:
        found = amd_usage(compiled.asm["amdgcn"])
    cache.put(json.dumps(found._asdict()), _KEPT, binary=False)
    return found


def _nvidia(cubin: bytes) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    return nvidia_usage(resources, code)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def nvidia_usage(resources: str, code: str) -> Usage:
    """Return the usage, given what cuobjdump says of resources and the code it lists."""
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(
        registers=sizes["REG"],
        spills=len(_NVIDIA_SPILL.findall(code)),
        stack=sizes["STACK"] + sizes["LOCAL"],
        instructions=dict(Counter(_NVIDIA_MATRIX.findall(code))),
    )


def amd_usage(assembly: str) -> Usage:
    """Return the usage, given the assembly with the metadata at its end."""

    def read(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{key}")
        return int(found[1])

    names = (name.upper() for name in _AMD_MATRIX.findall(assembly))
    return Usage(
        registers=read("vgpr_count"),
        spills=read("vgpr_spill_count"),
        stack=read("private_segment_fixed_size"),
        instructions=dict(Counter(names)),
    )


def products(ttir: str) -> list[Product]:
    """Return the products in Triton's own representation of a kernel."""
    pattern = re.compile(
        r"tt\.dot .*: tensor<(?:\d+x)?(\d+)x(\d+)x\w+> \* "
        r"tensor<(?:\d+x)?\d+x(\d+)x(\w+)> -> tensor<"
    )
    return [Product(int(m), int(n), int(k), dtype) for m, k, n, dtype in pattern.findall(ttir)]
