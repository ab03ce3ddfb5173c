"""Name what a result depends on: the device, the driver, the packages and the source."""

from __future__ import annotations

import hashlib
import importlib
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from gdn_ops.dispatch.backend import Backend, installed_version


def cpu_model() -> str:
    """Return the processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the name of a torch device: the GPU's, or the processor's."""
    if device.partition(":")[0] == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return cpu_model()


def driver_version() -> str | None:
    """Return the version of the GPU driver, or None where there is none."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(path).is_file():
            # NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue ...
            words = Path(path).read_text().split()
            versions = [w for w in words if w[:1].isdigit() and "." in w]
            if versions:
                return versions[0]
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def package_version(package: str) -> str:
    """Return the version of an importable package, whatever distribution brings it."""
    version = installed_version(package)
    if version is None:
        version = getattr(importlib.import_module(package), "__version__", "unknown")
    return str(version)


def _source_files(module: ModuleType) -> list[Path]:
    """Return the files of a module: of its whole folder if it is, or is in, a package."""
    name = module.__name__
    # Each file or folder of gdn_ops.backends is a backend; elsewhere a top package is one.
    depth = 3 if name.startswith("gdn_ops.backends.") else 1
    top = sys.modules.get(".".join(name.split(".")[:depth]), module)
    if top.__name__ == "gdn_ops":
        top = module
    path = getattr(top, "__file__", None)
    if path is None:
        return []
    if not hasattr(top, "__path__"):
        return [Path(path)]
    paths = Path(path).parent.rglob("*")
    return sorted(
        p for p in paths if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so"
    )


def source_hash(cls: type[Backend]) -> str:
    """Return 16 hex digits of the SHA-256 over the source of a backend and of what it derives from.

    "unknown" for a class that was not read from a file.
    """
    digest = hashlib.sha256()
    files: dict[Path, str] = {}
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if module is None or base is Backend or not issubclass(base, Backend):
            continue
        paths = _source_files(module)
        root = paths[0].parent if paths else None
        files |= {p: f"{base.__module__}:{p.relative_to(root)}" for p in paths if root is not None}
    for path, name in sorted(files.items(), key=lambda item: item[1]):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if files else "unknown"


def circumstances(cls: type[Backend], device: str) -> dict[str, str]:
    """Return the versions that a backend's result on a torch device depends on, by name."""
    versions = {"torch": torch.__version__, "gdn_ops": installed_version("gdn_ops") or "unknown"}
    versions |= {package: package_version(package) for package in cls.requires}
    if cls.distribution not in versions:
        versions[cls.distribution] = installed_version(cls.distribution) or "unknown"
    if device.partition(":")[0] == "cuda":
        versions["driver"] = driver_version() or "unknown"
    return {**versions, **cls.tools(device), "source": source_hash(cls)}
