"""Compile the C modules by which Triton launches kernels, without the library of a driver.

They are linked with an empty library of the driver's name, and loaded with its functions looked up
only when one is called, which nothing here does. On a machine with a driver they find the real one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARY = "libcuda.so.1"


def stand_in() -> None:
    """Let Triton find an empty library in place of the driver's.

    Raises:
        OSError, subprocess.CalledProcessError: there is no C compiler, or it fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="gdn_ops-"))
    command = ["cc", "-shared", "-o", str(folder / LIBRARY), f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([*command, "-x", "c", os.devnull], check=True)
    ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    sys.setdlopenflags(os.RTLD_LAZY)


def compile_utilities() -> None:
    """Compile the module by which Triton loads code."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def compile_launcher(kernel: Any) -> None:
    """Compile the module by which Triton launches a compiled kernel; one serves many kernels."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(kernel.src, kernel.metadata)
