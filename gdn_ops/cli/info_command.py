"""Collect what `gdn-ops info` shows: versions, devices, backends, certificates."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import gdn_ops
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.registry import listed
from gdn_ops.environment import certificate, versions
from gdn_ops.environment.devices import devices, threads
from gdn_ops.environment.provenance import driver_version
from gdn_ops.spec.ops import OPS


def collect() -> dict[str, Any]:
    """Return everything `gdn-ops info --json` prints, ready for JSON."""
    recorded = certificate.read_certificates()
    backends = []
    for info in gdn_ops.list_backends():
        row = {"name": info.name, "version": info.version, "status": info.status}
        limits = info.limits and _plain(dataclasses.asdict(info.limits))
        backends.append({**row, "limits": limits, "certificates": _standings(info, recorded)})
    installed = versions.installed_versions()
    return {
        "versions": installed,
        "warnings": versions.warnings(installed),
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
    """Return whether a backend is certified, by device that it runs or emulates on."""
    backend = registry.get_backend(info.name)
    if isinstance(backend, str):
        return {}
    limits, standings = backend.limits, {}
    for device in devices():
        kind = device["device"].partition(":")[0]
        name, emulates = device["device"], kind in limits.emulated_devices
        if emulates or "*" in limits.devices or kind in limits.devices:
            standing = certificate.standing(type(backend), name, recorded)
            standings[f"{name} (emulated)" if emulates else name] = str(standing)
    return standings


def _plain(limits: dict[str, Any]) -> dict[str, Any]:
    """Return limits with ranges as text, so that JSON can hold them."""
    return {
        name: listed(value) if isinstance(value, range) else value for name, value in limits.items()
    }


def limits_text(limits: gdn_ops.Limits | None) -> str:
    """Return what a backend can run as one line, without limits that exclude nothing."""
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
    if len(limits.ops) < len(OPS):
        parts.append(f"only {', '.join(limits.ops)}")
    if not limits.grad:
        parts.append("no gradients")
    elif limits.second_grad:
        parts.append("second gradients")
    if not limits.varlen:
        parts.append("no cu_seqlens")
    return "; ".join(parts)
