"""Explain which backend runs a call, and list the backends with their status on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdn_ops.call.bind import Call
from gdn_ops.call.layouts import layout_notes
from gdn_ops.dispatch.backend import Backend, installed_version
from gdn_ops.dispatch.order import order_for
from gdn_ops.dispatch.registry import (
    backend_class,
    get_backend,
    known_backends,
    reasons,
    reasons_under_auto,
)
from gdn_ops.spec.rules import Limits


@dataclass(frozen=True)
class BackendInfo:
    """Describe one backend, as `list_backends()` returns it.

    Attributes:
        name: what users pass as `backend=`.
        version: of the distribution that brings it, or None.
        limits: what it can run; None where it could not be imported.
        status: "available", or why not on this machine.
    """

    name: str
    version: str | None
    limits: Limits | None
    status: str

    def __str__(self) -> str:
        devices = ", ".join(self.limits.devices) if self.limits else "-"
        return f"{self.name} {self.version or '-'}: {self.status} ({devices})"


@dataclass(frozen=True)
class Explanation:
    """Hold the backend that would run a call and, for every other, all reasons why not.

    Attributes:
        op: name of the op.
        inputs: the call in one line.
        backend: the backend that would run, or None.
        reasons: (backend, reasons against it) in the order of preference.
        pinned: whether the call names its backend.
        notes: what is allowed, and looks like a mistake, or makes that backend slower.
    """

    op: str
    inputs: str
    backend: str | None
    reasons: tuple[tuple[str, tuple[str, ...]], ...]
    pinned: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.reasons), default=0)
        lines = [f"{self.op} on {self.inputs}"]
        for name, against in self.reasons:
            mark, text = "  ", "; ".join(against) or "can run"
            if name == self.backend:
                mark, text = "->", "runs (pinned)" if self.pinned else "runs"
            lines.append(f"{mark} {name:<{width}}  {text}")
        if self.backend is None:
            is_pinned = any(not against for _, against in self.reasons)
            who = "the pinned backend cannot" if is_pinned else "no backend can"
            lines.append(f"{who} run this call")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain_call(call: Call, name: str = "auto") -> Explanation:
    """Return which backend would run a bound call and every reason against the others."""
    order = order_for(call)
    names = [n for n in order if n in known_backends()]
    names += [n for n in known_backends() if n not in names]
    rows: list[tuple[str, tuple[str, ...]]] = []
    chosen: str | None = None
    if name != "auto":
        get_backend(name)
    for candidate in names:
        backend = get_backend(candidate)
        if isinstance(backend, str):
            rows.append((candidate, (backend,)))
            continue
        pinned = candidate == name
        against = reasons(backend, call) if pinned else reasons_under_auto(backend, call)
        if not against and name == "auto" and candidate not in order:
            against = [f"auto does not try it on {call.device.type}: pin it by name"]
        if not against and chosen is None and name in ("auto", candidate):
            chosen = candidate
        rows.append((candidate, tuple(against)))
    notes = tuple(layout_notes(call.sizes))
    runs = None if chosen is None else get_backend(chosen)
    if runs is not None and not isinstance(runs, str):
        notes += tuple(runs.remarks(call))
    return Explanation(call.op.name, call.describe(), chosen, tuple(rows), name != "auto", notes)


def list_backends() -> tuple[BackendInfo, ...]:
    """Return every known backend with its version, limits and status on this machine.

    Example:
        >>> from gdn_ops import list_backends
        >>> [backend.name for backend in list_backends() if backend.name == "torch"]
        ['torch']
    """
    return tuple(_info(name) for name in known_backends())


def _info(name: str) -> BackendInfo:
    backend, cls = get_backend(name), backend_class(name)
    version = installed_version(cls.distribution) if cls else None
    status = backend if isinstance(backend, str) else status_of(backend)
    return BackendInfo(name, version, cls.limits if cls else None, status)


def status_of(backend: Backend) -> str:
    """Return "available", or why a backend is not available on this machine."""
    return backend.absence() or device_status(backend.limits)


def _devices_here() -> set[str]:
    """Return the device types that this machine has."""
    here = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    return here | {"mps"} if torch.backends.mps.is_available() else here


def runs_or_emulates_here(limits: Limits) -> bool:
    """Return whether a device of this machine is one that a backend runs or emulates on."""
    return bool({"*", *_devices_here()} & {*limits.devices, *limits.emulated_devices})


def device_status(limits: Limits) -> str:
    """Return "available", or why a backend with these limits is not available on this machine."""
    if {"*", *_devices_here()} & set(limits.devices):
        return "available"
    if runs_or_emulates_here(limits):
        return "emulates only: no supported device here"
    return f"no supported device here (supported: {', '.join(limits.devices)})"
