"""Find the backends, and select the one that runs a call.

The base class stands in `backend`, the reasons against a call in `reasons`. The choice is
deterministic: a pinned backend runs or raises, "auto" takes the first without reasons in the
order of `order`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import pkgutil
import warnings
from types import TracebackType

import torch

from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Backend as Backend
from gdn_ops.dispatch.backend import BackendInfo as BackendInfo
from gdn_ops.dispatch.backend import Explanation as Explanation
from gdn_ops.dispatch.backend import Forward as Forward
from gdn_ops.dispatch.backend import Grads as Grads
from gdn_ops.dispatch.backend import announces, check_members, installed_version, is_missing, load
from gdn_ops.dispatch.order import AUTO_ORDER as AUTO_ORDER
from gdn_ops.dispatch.order import auto_order as auto_order
from gdn_ops.dispatch.order import order_for
from gdn_ops.dispatch.reasons import device_status, unsupported
from gdn_ops.dispatch.reasons import reasons as reasons
from gdn_ops.dispatch.reasons import reasons_under_auto as reasons_under_auto
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError

logger = logging.getLogger("gdn_ops")

ENTRY_POINT_GROUP = "gdn_ops.backends"


_backends: dict[str, type[Backend] | str] = {}
_instances: dict[str, Backend] = {}
_logged: set[tuple[str, ...]] = set()
_discovered = False
_default = os.environ.get("GDN_OPS_BACKEND", "auto") or "auto"


def register_backend(cls: type[Backend]) -> type[Backend]:
    """Add a backend class under its name; usable as a decorator.

    Raises:
        TypeError: `cls` is no Backend subclass with a name and limits.
        ValueError: another class has the name already.
    """
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise TypeError(f"{cls!r} is not a subclass of gdn_ops.Backend")
    for required in ("name", "limits"):
        if not hasattr(cls, required):
            raise TypeError(f"{cls.__name__} has no class attribute {required!r}")
    check_members(cls)
    if cls.name == "auto":
        raise ValueError("backend name 'auto' is reserved")
    _discover()
    known = _backends.get(cls.name)
    if known is not None and known is not cls and not announces(known, cls):
        holder = known if isinstance(known, str) else f"{known.__module__}.{known.__qualname__}"
        raise ValueError(f"backend name {cls.name!r} is taken by {holder}")
    _backends[cls.name] = cls
    return cls


def unregister_backend(name: str) -> None:
    """Forget a backend that `register_backend` added."""
    _backends.pop(name, None)
    _instances.pop(name, None)


def _discover() -> None:
    """List the backends of this package's folder and of entry points; import none of them."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    folder = importlib.import_module("gdn_ops.backends")
    for module in pkgutil.iter_modules(folder.__path__):
        _backends.setdefault(module.name, f"gdn_ops.backends.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _backends.setdefault(entry.name, entry.value)


def known_backends() -> list[str]:
    """Return the names of all known backends: this machine's order first, then the rest."""
    _discover()
    order = AUTO_ORDER["cuda" if torch.cuda.is_available() else "cpu"]
    return [n for n in order if n in _backends] + sorted(set(_backends) - set(order))


def get_backend(name: str) -> Backend | str:
    """Return the backend of that name, or the reason why it is not installed.

    Raises:
        SpecError: no backend has that name.
    """
    instance = _instances.get(name)
    if instance is not None:
        return instance
    _discover()
    if name not in _backends:
        raise SpecError(f"unknown backend {name!r}, known: {', '.join(known_backends())}")
    source = _backends[name]
    if isinstance(source, str):
        loaded = load(source)
        if isinstance(loaded, str):
            return loaded
        source = _backends[name] = loaded
    if source.name != name:
        raise TypeError(f"backend {name!r} is {source.__qualname__}, whose name is {source.name!r}")
    check_members(source)
    for package in source.requires:
        if is_missing(package):
            return f"package {package!r} is not installed"
    instance = _instances[name] = source()
    return instance


def select(call: Call, name: str = "auto") -> Backend:
    """Return the backend that runs a call.

    Args:
        call: the bound call.
        name: a backend's name, which then runs or raises, or "auto".

    Raises:
        SpecError: no backend has that name.
        BackendUnsupportedError: the pinned backend, or every backend, has reasons.
    """
    if name != "auto":
        backend = get_backend(name)
        against = [backend] if isinstance(backend, str) else reasons(backend, call)
        if isinstance(backend, str) or against:
            raise _unsupported(call, [(name, against)])
        _warn_of_emulation(backend, call.device.type)
        _log(call.op.name, name, ())
        return backend
    skipped: list[tuple[str, list[str]]] = []
    for candidate in order_for(call):
        if candidate not in _backends and candidate not in _instances:
            _discover()
            if candidate not in _backends:
                continue
        backend = get_backend(candidate)
        against = [backend] if isinstance(backend, str) else reasons_under_auto(backend, call)
        if not isinstance(backend, str) and not against:
            _log(call.op.name, candidate, tuple(f"{n}: {'; '.join(r)}" for n, r in skipped))
            return backend
        skipped.append((candidate, against))
    raise _unsupported(call, skipped)


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
    return Explanation(call.op.name, call.describe(), chosen, tuple(rows), name != "auto")


def _unsupported(call: Call, rows: list[tuple[str, list[str]]]) -> BackendUnsupportedError:
    return unsupported(call, rows, cure=_first_that_can(call, {name for name, _ in rows}))


def _first_that_can(call: Call, tried: set[str]) -> str | None:
    for name in known_backends():
        if name in tried:
            continue
        backend = get_backend(name)
        if not isinstance(backend, str) and not reasons_under_auto(backend, call):
            return name
    return None


def _log(op: str, name: str, skipped: tuple[str, ...]) -> None:
    """Log the choice of a backend at INFO, once per op, backend and reasons."""
    key = (op, name, *skipped)
    if key in _logged:
        return
    _logged.add(key)
    because = f" ({' | '.join(skipped)})" if skipped else ""
    logger.info("%s runs on backend %r%s", op, name, because)


def _warn_of_emulation(backend: Backend, device_type: str) -> None:
    """Warn once per process that a kernel backend only emulates on this device."""
    if device_type not in backend.limits.emulated_devices:
        return
    key = ("emulation", backend.name, device_type)
    if key not in _logged:
        _logged.add(key)
        warnings.warn(
            f"backend {backend.name!r} emulates its kernels on {device_type} tensors: "
            f"for checking, not for speed",
            stacklevel=4,
        )


def list_backends() -> tuple[BackendInfo, ...]:
    """Return every known backend with its version, limits and status on this machine."""
    return tuple(_info(name) for name in known_backends())


def _info(name: str) -> BackendInfo:
    backend = get_backend(name)
    source = _backends[name]
    cls = source if isinstance(source, type) else None
    version = installed_version(cls.distribution) if cls else None
    status = backend if isinstance(backend, str) else device_status(backend.limits)
    return BackendInfo(name, version, cls.limits if cls else None, status)


def resolve(name: str) -> str:
    """Return the process default for the name "auto", and any other name unchanged."""
    return _default if isinstance(name, str) and name == "auto" else name


def default_backend() -> str:
    """Return the name that is the process default, for which `backend="auto"` stands."""
    return _default


class use_backend:  # noqa: N801  (reads as a verb, like torch.no_grad)
    """Set the process-wide default backend, at once or for a `with` block.

    Every call that says `backend="auto"` then runs as if it named this backend. The
    environment variable GDN_OPS_BACKEND sets the first default, at import.

    Args:
        name: a known backend, or "auto".

    Raises:
        SpecError: no backend has that name.
    """

    def __init__(self, name: str) -> None:
        global _default
        if name != "auto":
            get_backend(name)
        self.name = name
        self._previous = _default
        _default = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _default
        _default = self._previous


def traceable_step(name: str, device_type: str) -> str | None:
    """Return the name of the backend for a step if torch.compile may trace that step, else None.

    The backend is loaded here: a graph looks it up by `get_backend`, and imports nothing.
    """
    names = auto_order(device_type) if name == "auto" else (name,)
    for candidate in names:
        if candidate in known_backends():
            backend = get_backend(candidate)
            if not isinstance(backend, str):
                return candidate if backend.traceable_step else None
    return None


# What torch.compiler.assume_constant_result does, without its import of all of torch._dynamo,
# which takes as long as importing torch.
traceable_step._dynamo_marked_constant = True  # type: ignore[attr-defined]
