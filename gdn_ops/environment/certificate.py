"""Record certificates: which backend passed its check, on which device, with what versions.

`gdn-ops check` records its result, pass or fail. With GDN_OPS_REQUIRE_CERTIFIED=1, "auto" passes
over a backend of compiled kernels that holds no certificate for the device of a call: what a
compiler makes of a kernel on one machine says nothing about another. A certificate counts for
the very driver, packages and source it was issued for. The file is read once per process.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import vetoes
from gdn_ops.environment.provenance import circumstances, device_name
from gdn_ops.kernel_support.cache import cache_folder as cache_folder
from gdn_ops.spec.switches import is_on

REQUIRED = is_on("GDN_OPS_REQUIRE_CERTIFIED", "1")
"""Make "auto" pass over uncertified backends of compiled kernels. Read at import."""

SCHEMA = 1
"""Version of the file's layout; a file of another one is ignored."""

KEPT = 16
"""Certificates kept per backend and device, one per combination of driver, packages, source."""


@dataclass(frozen=True)
class Certificate:
    """Hold the result of one check of a backend.

    Attributes:
        backend: its name.
        device: name of the device that ran the calls, "NVIDIA H200".
        built_with: what the result depends on, by name: driver, torch, gdn_ops, the packages
            that the backend requires, and the hash of its source.
        passed: whether every subject passed.
        examples: how many calls were judged.
        seconds: how long it took.
        seed: of the random calls.
        date: UTC day, ISO 8601.
    """

    backend: str
    device: str
    built_with: dict[str, str]
    passed: bool
    examples: int
    seconds: float
    seed: int
    date: str


def certificates_path() -> Path:
    """Return the path of the file of certificates."""
    return cache_folder() / "certificates.json"


def read_certificates() -> list[Certificate]:
    """Return every recorded certificate, newest last.

    A file that cannot be read as certificates is ignored, with a warning.
    """
    path = certificates_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']}, should be {SCHEMA}")
        return [_checked(row) for row in data["certificates"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{path} holds no certificates and is ignored ({text}); the next check replaces it",
            stacklevel=2,
        )
        return []


def _checked(row: dict[str, object]) -> Certificate:
    """Return a row of the file as a certificate, after a check of every field's type."""
    certificate = Certificate(**row)  # type: ignore[arg-type]
    kinds = {"passed": bool, "examples": int, "seconds": (int, float), "seed": int}
    kinds |= {"built_with": dict}
    for field in fields(certificate):
        value = getattr(certificate, field.name)
        if not isinstance(value, kinds.get(field.name, str)):  # type: ignore[arg-type]
            raise TypeError(f"{field.name} is {value!r}")
    return certificate


def record(result: Certificate) -> Path:
    """Record the result of a check, in place of an older one for the same circumstances.

    So a failed check revokes the certificate of a passed one.

    Args:
        result: what `gdn-ops check` found.

    Returns:
        The file.

    Raises:
        OSError: the cache folder cannot be written.
    """
    kept = [c for c in read_certificates() if _key(c) != _key(result)]
    same = [c for c in kept if (c.backend, c.device) == (result.backend, result.device)]
    for old in same[: max(0, len(same) - KEPT + 1)]:
        kept.remove(old)
    return _write([*kept, result])


def suspend(cls: type[Backend], device: str) -> None:
    """Withdraw the certificate of a backend for a torch device as it is now.

    Done before a check, whose result is recorded after it: a kernel that ends the process, or
    that hangs until somebody ends it, so loses its certificate.
    """
    recorded = read_certificates()
    here, name = circumstances(cls, device), device_name(device)
    kept = [c for c in recorded if not (c.passed and _key(c) == (cls.name, name, here))]
    if len(kept) < len(recorded):
        _write(kept)


def _write(certificates: Iterable[Certificate]) -> Path:
    """Replace the file of certificates; a reader sees the old or the new one, never a part."""
    path = certificates_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(c) for c in certificates]
    handle, name = tempfile.mkstemp(prefix=".certificates-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "certificates": rows}, file, indent=2)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    reason_against.cache_clear()
    return path


def _key(c: Certificate) -> tuple[str, str, dict[str, str]]:
    return c.backend, c.device, c.built_with


def issue(
    cls: type[Backend], device: str, *, passed: bool, examples: int, seconds: float, seed: int
) -> Certificate:
    """Return the certificate of a check that ran today on this machine."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    here = circumstances(cls, device)
    return Certificate(
        cls.name, device_name(device), here, passed, examples, round(seconds, 1), seed, today
    )


@dataclass(frozen=True)
class Standing:
    """Describe whether a backend is certified on a device.

    Attributes:
        state: "certified", "failed", "stale" or "none".
        date: of the check; empty for "none".
        changed: what has changed since then, for "stale".
    """

    state: str
    date: str = ""
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.state == "none":
            return "not certified"
        if self.state == "stale":
            return f"stale, certified on {self.date}: {', '.join(self.changed)}"
        return f"{self.state} on {self.date}"


def standing(
    cls: type[Backend], device: str, known: Iterable[Certificate] | None = None
) -> Standing:
    """Return the standing of a backend on a torch device, given the recorded certificates.

    Args:
        cls: the backend.
        device: torch device; its name is looked up, so that two equal GPUs share one.
        known: certificates, read from the file by default.
    """
    name = device_name(device)
    recorded = read_certificates() if known is None else known
    own = [c for c in recorded if (c.backend, c.device) == (cls.name, name)]
    if not own:
        return Standing("none")
    here = circumstances(cls, device)
    for c in own:
        if c.built_with == here:
            return Standing("certified" if c.passed else "failed", c.date)
    passed = [c for c in own if c.passed]
    if not passed:
        return Standing("none")
    return Standing("stale", passed[-1].date, _changes(passed[-1].built_with, here))


def _changes(then: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    changes = []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key, "absent"), now.get(key, "absent")
        if old != new:
            changes.append("its source changed" if key == "source" else f"{key} {old} is now {new}")
    return tuple(changes)


@functools.cache
def reason_against(cls: type[Backend], device: str) -> str | None:
    """Return why "auto" may not choose a backend on a torch device, or None if it may.

    The answer is remembered until a certificate is written: no call but the first reads a file.
    """
    now, name = standing(cls, device), device_name(device)
    if now.state == "certified":
        return None
    packages = cls.requires or ("gdn_ops",)
    here = circumstances(cls, device)
    versions = ", ".join(f"{package} {here[package]}" for package in packages)
    cure = f"run gdn-ops check --backend {cls.name}"
    if now.state == "failed":
        return f"failed its check on {name} with {versions} on {now.date}: {cure}"
    if now.state == "stale":
        return f"its certificate for {name} is stale ({', '.join(now.changed)}): {cure}"
    return f"not certified on {name} with {versions}: {cure}"


def veto(backend: Backend, call: Call) -> str | None:
    """Return the reason against an uncertified backend, or None if it needs no certificate."""
    if not (REQUIRED and backend.kernels):
        return None
    return reason_against(type(backend), str(call.device))  # type: ignore[arg-type]


vetoes.append(veto)
