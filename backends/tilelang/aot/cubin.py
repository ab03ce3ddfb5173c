"""Compile a kernel for a GPU ahead of time, and read the resources that its code uses.

    traced function -> TileLang: CUDA source -> nvcc: cubin -> cuobjdump: registers, spills, ...

The same passes and the same options of nvcc as for a launch, without a driver. The result
is cached on disk, by the text of the traced function and everything else that shapes the code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tilelang
from tilelang import tvm
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from gdn_ops.aot.gpu_limits import Product, refusal
from gdn_ops.aot.sass import Usage, cubin_usage, find_tool
from gdn_ops.backends.tilelang.host import cache, toolchain
from gdn_ops.backends.tilelang.host.config import TARGETS

_KEPT = 2
"""Version of cached results: changes when this file, gdn_ops.aot.sass or what it reads
code with finds something else."""

_OPTIONS = ("--cubin", "-O3", "-lineinfo", "-std=c++20", "-Xptxas", "-v")


class Compiled(NamedTuple):
    """Hold the resources that compiled code uses.

    Attributes:
        shared: bytes of shared memory of a program.
        threads: of a program, with those that TileLang adds to copy.
        usage: what cuobjdump says of the code.
        stored, loaded: bytes of registers that are spilled and loaded again, as ptxas reports.
        remarks: performance warnings of ptxas, like products that wait for each other.
    """

    shared: int
    threads: int
    usage: Usage
    stored: int
    loaded: int
    remarks: tuple[str, ...]


def compiled(function: Any, target: str) -> Compiled:
    """Compile a traced function, or return the cached result.

    Args:
        function: the prim_func that a factory makes.
        target: one of TARGETS.

    Raises:
        ValueError: the target is not one of them, or the function is not one kernel.
        FileNotFoundError: there is no nvcc, or no cuobjdump.
        Exception: whatever TileLang or nvcc says against the kernel.
    """
    check(target)
    kept = _kept(function, target)
    if kept.exists():
        return _parsed(kept.read_text())
    source, dynamic = lowered(function, target)
    cubin, report = assembled(source, target)
    result = read(dynamic, threads_of(source), cubin, report)
    _keep(kept, result)
    return result


def check(target: str) -> None:
    """Check that a target is known, and that this machine can compile for it.

    Raises:
        ValueError: the target is not one of TARGETS.
        FileNotFoundError: there is no nvcc, or no cuobjdump.
    """
    if target not in TARGETS:
        raise ValueError(refusal(target, TARGETS))
    find_tool("cuobjdump", [nvcc().parent])


def nvcc() -> Path:
    """Return the path of the nvcc that TileLang uses.

    Raises:
        FileNotFoundError: there is none.
    """
    path = toolchain.nvcc()
    if path is None:
        raise FileNotFoundError("; ".join(toolchain.gpu_reasons()))
    return path


@functools.cache
def _version_of_nvcc() -> str:
    command = [str(nvcc()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _kept(function: Any, target: str) -> Path:
    """Return the file that caches the result of a function."""
    shapes = {
        "kept": _KEPT,
        "function": function.script(show_meta=True),
        "target": target,
        "options": _OPTIONS,
        "tilelang": tilelang.__version__,
        "nvcc": _version_of_nvcc(),
    }
    key = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    return cache.folder() / "usage" / f"{key}.json"


def _parsed(text: str) -> Compiled:
    fields = json.loads(text)
    usage, remarks = Usage.of(fields["usage"]), tuple(fields["remarks"])
    return Compiled(**fields | {"usage": usage, "remarks": remarks})


def _keep(path: Path, result: Compiled) -> None:
    """Write a result to its cache file, atomically; a full disk only costs time later."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(result._asdict() | {"usage": result.usage.values()}, file)
        os.replace(file.name, path)


def lowered(function: Any, target: str) -> tuple[str, int]:
    """Return the CUDA source of a traced function, and its bytes of dynamic shared memory."""
    gpu = {"kind": "cuda", "arch": target}
    with tvm.transform.PassContext(opt_level=3), tvm.target.Target(gpu):
        artifact = tilelang.lower(function, target=gpu)
    kernels = artifact.device_mod.functions.values()
    if len(kernels) != 1:
        raise ValueError(f"{len(kernels)} kernels, should be one")
    (attributes,) = (kernel.attrs for kernel in kernels)
    return artifact.kernel_source, int(attributes.get("dyn_shared_memory_buf") or 0)


def assembled(source: str, target: str) -> tuple[bytes, str]:
    """Compile a CUDA source; return the cubin and the report of ptxas.

    Raises:
        RuntimeError: nvcc refuses the source; the text is what it says.
    """
    folders = (TILELANG_TEMPLATE_PATH, CUTLASS_INCLUDE_DIR)
    host = toolchain.compiler()
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        file.write_text(source)
        command = [
            str(nvcc()),
            *([f"-ccbin={host}"] if host else []),
            f"-arch={target}",
            *_OPTIONS,
            *(f"-I{path}" for path in folders),
            *("-o", str(cubin), str(file)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        if done.returncode:
            errors = [x for x in report.splitlines() if re.search(r"\b(error|fatal) *:", x)]
            raise RuntimeError("\n".join(errors) or report)
        return cubin.read_bytes(), report


def threads_of(source: str) -> int:
    """Return the threads of a program, which a CUDA source declares.

    Raises:
        ValueError: it does not.
    """
    bounds = re.search(r"__launch_bounds__\((\d+)", source)
    if bounds is None:
        raise ValueError("the source has no __launch_bounds__")
    return int(bounds[1])


def read(dynamic: int, threads: int, cubin: bytes, report: str) -> Compiled:
    """Return the resources that code uses.

    Args:
        dynamic: bytes of its dynamic shared memory.
        threads: of a program.
        cubin: the code.
        report: what ptxas says of it.
    """

    def number(what: str) -> int:
        return sum(map(int, re.findall(rf"(\d+) bytes {what}", report)))

    return Compiled(
        shared=dynamic + number("smem"),
        threads=threads,
        usage=cubin_usage(cubin, [nvcc().parent]),
        stored=number("spill stores"),
        loaded=number("spill loads"),
        remarks=tuple(re.findall(r"Potential Performance Loss: (.*)", report)),
    )


def products(function: Any) -> list[Product]:
    """Return the matrix products of tiles in a traced function."""
    gemms: list[Product] = []

    def visit(node: Any) -> None:
        if isinstance(node, tvm.tirx.Call) and node.op.name == "tl.tileop.gemm":
            m, n, k = map(int, node.args[5:8])
            gemms.append(Product(m, n, k, str(node.args[0].args[0].buffer.dtype)))

    tvm.tirx.stmt_functor.post_order_visit(function.body, visit)
    return gemms
