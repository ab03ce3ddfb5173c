"""What `gdn-ops info` says and every benchmark result carries: versions, devices, backends."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from typing import Any

import torch

import gdn_ops
from gdn_ops import certificate, registry, tested
from gdn_ops.capability import listed
from gdn_ops.provenance import cpu_model, driver_version

OPTIONAL_PACKAGES = (
    "numpy",
    "triton",
    "tilelang",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "hypothesis",
    "matplotlib",
)


def versions() -> dict[str, str | None]:
    """Return versions by name; None for an optional package that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gdn_ops": gdn_ops.__version__,
    }
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, str]]:
    """Return every device torch can use: its type, name and capability."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"device": "cpu", "name": cpu_model(), "capability": capability}]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        found.append({"device": f"cuda:{i}", "name": name, "capability": f"sm{major}{minor}"})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor(), "capability": ""})
    return found


def threads() -> dict[str, int]:
    """Return the cores of the machine and the threads torch computes with."""
    return {"cores": os.cpu_count() or 1, "torch": torch.get_num_threads()}


def collect() -> dict[str, Any]:
    """Return everything `gdn-ops info --json` prints, ready for JSON."""
    recorded = certificate.read_certificates()
    backends = []
    for info in gdn_ops.backends():
        limits = None if info.limits is None else _plain(dataclasses.asdict(info.limits))
        row = {"name": info.name, "version": info.version, "status": info.status}
        standings = _standings(info, recorded)
        backends.append({**row, "limits": limits, "certificates": standings})
    found = versions()
    return {
        "versions": found,
        "warnings": tested.warnings(found),
        "driver": driver_version(),
        "platform": platform.platform(terse=True),
        "devices": devices(),
        "threads": threads(),
        "backends": backends,
        "certificates": str(certificate.certificates_path()),
    }


def _standings(
    info: gdn_ops.BackendInfo, recorded: list[certificate.Certificate]
) -> dict[str, str]:
    """Return, by device that a backend runs or emulates on, whether it is certified there."""
    backend = registry.get_backend(info.name)
    if isinstance(backend, str):
        return {}
    limits, found = backend.limits, {}
    for device in devices():
        kind = device["device"].partition(":")[0]
        name, emulates = device["device"], kind in limits.emulated_devices
        if emulates or "*" in limits.devices or kind in limits.devices:
            standing = certificate.standing(type(backend), name, recorded)
            found[f"{name} (emulated)" if emulates else name] = str(standing)
    return found


def _plain(limits: dict[str, Any]) -> dict[str, Any]:
    """Return limits with ranges as text, so that JSON can hold them."""
    return {
        name: listed(value) if isinstance(value, range) else value for name, value in limits.items()
    }


def limits_text(limits: gdn_ops.Limits | None) -> str:
    """Return what a backend can run in one line; only what it cannot do everywhere."""
    if limits is None:
        return "-"
    parts = ["any device" if "*" in limits.devices else ", ".join(limits.devices)]
    if limits.emulated_devices:
        parts.append(f"emulates on {', '.join(limits.emulated_devices)}")
    if limits.min_capability:
        parts.append("sm{}{}+".format(*limits.min_capability))
    parts.append(", ".join(limits.dtypes))
    dims = limits.head_dims
    if dims is not None:
        parts.append(f"K, V {'' if isinstance(dims, range) else 'in '}{listed(dims)}")
    if limits.head_dim_multiple > 1:
        parts.append(f"K, V multiples of {limits.head_dim_multiple}")
    if len(limits.rules) < len(gdn_ops.GATED_DELTA.rules):
        parts.append(f"rules {', '.join(limits.rules)}")
    if len(limits.ops) < 2:
        parts.append(f"only {', '.join(limits.ops)}")
    if not limits.grad:
        parts.append("no gradients")
    elif limits.second_grad:
        parts.append("second gradients")
    if not limits.varlen:
        parts.append("no cu_seqlens")
    return "; ".join(parts)
