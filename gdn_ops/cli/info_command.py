"""Run `gdn-ops info`: collect and show versions, devices, backends, certificates."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import gdn_ops
from gdn_ops.cli.parser import Options, add_command
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.registry import listed
from gdn_ops.environment import certificate, versions
from gdn_ops.environment.devices import devices, threads
from gdn_ops.environment.provenance import driver_version
from gdn_ops.spec.ops import OPS
from gdn_ops.terminal.output import print_json
from gdn_ops.terminal.progress import progress
from gdn_ops.terminal.tables import table, wrapped

LABELS = 14


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "info",
        run,
        "Show versions, devices, threads, and what every backend can run here.",
        examples=("gdn-ops info", "gdn-ops info --json"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Options) -> int:
    """Show what is here; return the exit code."""
    with progress(None, "looking at backends"):
        collected = collect()
    if options.json:
        print_json(collected)
    else:
        show(collected)
    return 0


def show(collected: dict[str, Any]) -> None:
    """Print a line per fact and a block per backend."""
    threads = collected["threads"]
    facts = [(name, version or "not installed") for name, version in collected["versions"].items()]
    facts += [("warning", text) for text in collected["warnings"]]
    if collected["driver"] is not None:
        facts.append(("driver", collected["driver"]))
    facts.append(("platform", collected["platform"]))
    facts += [(d["device"], f"{d['name']} {d['capability']}") for d in collected["devices"]]
    facts.append(("threads", f"{threads['torch']} of {threads['cores']} cores"))
    for name, fact in facts:
        line = f"{name:<{LABELS}}{fact}"
        # A warning is copied into reports: it stays a line.
        print(line if name == "warning" else wrapped(line, indent=" " * LABELS))
    print()
    rows = []
    for backend in gdn_ops.list_backends():
        (certificates,) = (
            row["certificates"] for row in collected["backends"] if row["name"] == backend.name
        )
        checks = ", ".join(map(": ".join, certificates.items())) or "-"
        rows.append((backend.name, backend.version or "-", backend.status, checks))
    print(table(("backend", "version", "status", "check"), [("", rows)]))
    print()
    for backend in gdn_ops.list_backends():
        line = f"{backend.name:<{LABELS}}{limits_text(backend.limits)}"
        print(wrapped(line, indent=" " * LABELS))


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
