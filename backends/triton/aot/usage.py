"""Read the GPU resources that Triton's compiled code uses, and the products in it.

The tools are those that Triton's wheel brings. Reading takes longer than a compilation that is
found in Triton's cache, so the result is cached beside the code.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from gdn_ops.aot.amd_listing import read_amd
from gdn_ops.aot.gpu_limits import Product
from gdn_ops.aot.loops import read_code
from gdn_ops.aot.sass import Usage, cubin_usage

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KEPT = "gdn_ops_usage_5.json"
"""Name of the cached result, with a number that changes when this file, gdn_ops.aot.sass or what
it reads code with finds something else."""

_AMD_MATRIX = re.compile(r"\bv_(s?mfma)")


def usage(compiled: Any) -> Usage:
    """Return the resources that a compiled kernel of Triton uses."""
    cache = get_cache_manager(compiled.hash)
    kept = cache.get_file(_KEPT)
    if kept is not None:
        return Usage.of(json.loads(Path(kept).read_text()))
    if "cubin" in compiled.asm:
        facts = cubin_usage(compiled.asm["cubin"], [_TOOLS])
    else:
        facts = amd_usage(compiled.asm["amdgcn"])
    cache.put(json.dumps(facts.values()), _KEPT, binary=False)
    return facts


def amd_usage(assembly: str) -> Usage:
    """Return the resources that AMD code uses, from the metadata at the end of its assembly."""

    def read(key: str) -> int:
        entry = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if entry is None:
            raise ValueError(f"the assembly has no .{key}")
        return int(entry[1])

    names = (name.upper() for name in _AMD_MATRIX.findall(assembly))
    return Usage(
        registers=read("vgpr_count"),
        spills=read("vgpr_spill_count"),
        stack=read("private_segment_fixed_size"),
        instructions=dict(Counter(names)),
        code=read_code(read_amd(assembly)),
    )


def products(ttir: str) -> list[Product]:
    """Return the matrix products in Triton's own representation of a kernel."""
    pattern = re.compile(
        r"tt\.dot .*: tensor<(?:\d+x)?(\d+)x(\d+)x\w+> \* "
        r"tensor<(?:\d+x)?\d+x(\d+)x(\w+)> -> tensor<"
    )
    return [Product(int(m), int(n), int(k), dtype) for m, k, n, dtype in pattern.findall(ttir)]
