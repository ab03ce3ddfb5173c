"""Backends: what one is, how they are found, and which one runs a call.

Capability is data (`Limits`); `reasons` turns it into the text that users read. The choice
is deterministic: a pinned backend runs or raises, "auto" takes the first without reasons in
`AUTO_ORDER`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gdn_ops.bind import Call, dtype_name
from gdn_ops.errors import BackendUnsupportedError, SpecError
from gdn_ops.spec import Limits

logger = logging.getLogger("gdn_ops")

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("torch", "naive"),
    "cuda": ("triton", "tilelang", "torch", "naive"),
    "*": ("torch", "naive"),
}
"""Which backends "auto" tries, in order, per device type ("*" for any other device)."""

ENTRY_POINT_GROUP = "gdn_ops.backends"


class Forward(NamedTuple):
    """What a backend's forward returns.

    Attributes:
        o: (B, T, HV, V), dtype of v.
        final_state: (N, HV, K, V) in the compute dtype.
        saved: what its backward wants kept; empty unless the call needs gradients.
    """

    o: Tensor
    final_state: Tensor
    saved: tuple[Tensor, ...] = ()


class Grads(NamedTuple):
    """Gradients of the tensors of a call, in the order of `Call.tensors`; None where absent."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    alpha: Tensor | None
    log_alpha: Tensor | None
    beta: Tensor | None
    state: Tensor | None


class Backend:
    """One implementation of the ops. Subclasses set the class data and the methods.

    Attributes:
        name: what users pin.
        limits: what it can run.
        requires: import names of the packages it needs besides torch.
        distribution: the installed distribution that gives its version.
        differentiable: whether `forward` and `step` are plain differentiable torch code, so
            that autograd sees through them in eager mode.
        traceable_step: whether `step` may be traced through by torch.compile.
        compiles_per_shape: whether a new shape class costs seconds, so that tests draw from
            a few.
    """

    name: ClassVar[str]
    limits: ClassVar[Limits]
    requires: ClassVar[tuple[str, ...]] = ()
    distribution: ClassVar[str] = "gdn_ops"
    differentiable: ClassVar[bool] = False
    traceable_step: ClassVar[bool] = False
    compiles_per_shape: ClassVar[bool] = False

    def reasons(self, call: Call) -> list[str]:
        """Return why it cannot run this call, beyond what `limits` says."""
        return []

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        """Return empty tensors shaped as what `forward` saves for `backward`.

        It is called with fake tensors while a graph is traced.
        """
        return ()

    def forward(self, call: Call) -> Forward:
        """Run `gated_delta`."""
        raise NotImplementedError

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        """Return the gradients of `gated_delta`.

        Args:
            call: the call, on the tensors that the gradients are for.
            saved: what `forward` returned, or None: then form it anew from `call`, and
                differentiably where gradients are enabled (second derivatives).
            d_o: (B, T, HV, V) gradient of the output.
            d_state: (N, HV, K, V) gradient of the final state.
        """
        raise NotImplementedError

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run `gated_delta_step`; return (o, state), state being `call.state` if in place."""
        raise NotImplementedError


@dataclass(frozen=True)
class BackendInfo:
    """What `backends()` says of one backend.

    Attributes:
        name: what users pin.
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
    """Which backend would run a call and, for every other, all reasons why not.

    Attributes:
        op: name of the op.
        inputs: the call in one line.
        backend: the backend that would run, or None.
        reasons: (backend, reasons against it) in the order of preference.
    """

    op: str
    inputs: str
    backend: str | None
    reasons: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.reasons), default=0)
        lines = [f"{self.op} on {self.inputs}"]
        for name, reasons in self.reasons:
            mark = "->" if name == self.backend else "  "
            text = "; ".join(reasons) if reasons else "can run"
            lines.append(f"{mark} {name:<{width}}  {'runs' if mark == '->' else text}")
        if self.backend is None:
            is_pinned = any(not reasons for _, reasons in self.reasons)
            who = "the pinned backend cannot" if is_pinned else "no backend can"
            lines.append(f"{who} run this call")
        return "\n".join(lines)


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
    if cls.name == "auto":
        raise ValueError("backend name 'auto' is reserved")
    _discover()
    known = _backends.get(cls.name)
    if known is not None and known is not cls and not _announces(known, cls):
        holder = known if isinstance(known, str) else f"{known.__module__}.{known.__qualname__}"
        raise ValueError(f"backend name {cls.name!r} is taken by {holder}")
    _backends[cls.name] = cls
    return cls


def _announces(source: type[Backend] | str, cls: type[Backend]) -> bool:
    """Whether `source` is the not yet loaded entry of the package that defines `cls`."""
    own = cls.__module__.partition(".")[0]
    return isinstance(source, str) and source.partition(":")[0].partition(".")[0] == own


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
    """Return every known name: those of the order for this machine first, then the rest."""
    _discover()
    order = AUTO_ORDER["cuda" if torch.cuda.is_available() else "cpu"]
    return [n for n in order if n in _backends] + sorted(set(_backends) - set(order))


@functools.cache
def _package_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


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
        loaded = _load(source)
        if isinstance(loaded, str):
            return loaded
        source = _backends[name] = loaded
    if source.name != name:
        raise TypeError(f"backend {name!r} is {source.__qualname__}, whose name is {source.name!r}")
    for package in source.requires:
        if _package_missing(package):
            return f"package {package!r} is not installed"
    instance = _instances[name] = source()
    return instance


def _load(source: str) -> type[Backend] | str:
    """Import `module` or `module:Class`; only a missing foreign package is a reason."""
    module_name, _, attribute = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        own = package in ("", "gdn_ops", module_name.partition(".")[0])
        if own or not _package_missing(package):
            raise
        return f"package {package!r} is not installed"
    if attribute:
        found: Any = getattr(module, attribute)
    else:
        found = module.BACKEND
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise TypeError(f"{source} is not a subclass of gdn_ops.Backend")
    return found


def reasons(backend: Backend, call: Call) -> list[str]:
    """Return every reason why a backend cannot run a call; an empty list means it can."""
    found = _limit_reasons(backend.limits, call)
    found += backend.reasons(call)
    return found


def _limit_reasons(limits: Limits, call: Call) -> list[str]:
    """Turn limits as data into text, given a call."""
    found: list[str] = []
    device = call.device.type
    if call.op.name not in limits.ops:
        found.append(f"op {call.op.name} (supported: {', '.join(limits.ops)})")
    if "*" not in limits.devices and device not in limits.devices + limits.emulated_devices:
        found.append(f"device {device} (supported: {', '.join(limits.devices)})")
    dtype = dtype_name(call.q.dtype)
    if dtype not in limits.dtypes:
        found.append(f"dtype {dtype} (supported: {', '.join(limits.dtypes)})")
    if call.state is not None:
        state_dtype = dtype_name(call.state.dtype)
        if state_dtype not in limits.state_dtypes:
            supported = ", ".join(limits.state_dtypes)
            found.append(f"state dtype {state_dtype} (supported: {supported})")
    found += _head_dim_reasons(limits, call)
    if call.rule.name not in limits.rules:
        found.append(f"rule {call.rule} (supported: {', '.join(limits.rules)})")
    if call.needs_grad and not limits.grad:
        found.append("gradients needed (supported: forward only)")
    if call.cu_seqlens is not None and not limits.varlen:
        found.append("cu_seqlens is not supported")
    sizes = limits.chunk_sizes
    if sizes is not None and call.chunk_size is not None and call.chunk_size not in sizes:
        found.append(f"chunk_size={call.chunk_size} (supported: {_listed(sizes)})")
    if limits.min_capability and device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(call.device)
        if capability < limits.min_capability:
            have, need = ("".join(map(str, c)) for c in (capability, limits.min_capability))
            found.append(f"device sm{have} (needs sm{need} or newer)")
    return found


def _listed(allowed: range | tuple[int, ...]) -> str:
    if isinstance(allowed, range) and allowed.step == 1:
        return f"{allowed[0]} to {allowed[-1]}"
    return ", ".join(map(str, allowed))


def _head_dim_reasons(limits: Limits, call: Call) -> list[str]:
    found = []
    for axis, size in (("K", call.sizes.K), ("V", call.sizes.V)):
        allowed = limits.head_dims
        if allowed is not None and size not in allowed:
            found.append(f"{axis}={size} (supported: {_listed(allowed)})")
        elif size % limits.head_dim_multiple:
            found.append(f"{axis}={size} (supported: multiples of {limits.head_dim_multiple})")
    return found


def auto_order(device_type: str) -> tuple[str, ...]:
    """Return the names "auto" tries for a device type, in order."""
    return AUTO_ORDER.get(device_type, AUTO_ORDER["*"])


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
    for candidate in auto_order(call.device.type):
        if candidate not in _backends and candidate not in _instances:
            _discover()
            if candidate not in _backends:
                continue
        backend = get_backend(candidate)
        against = [backend] if isinstance(backend, str) else _reasons_under_auto(backend, call)
        if not isinstance(backend, str) and not against:
            _log(call.op.name, candidate, tuple(f"{n}: {'; '.join(r)}" for n, r in skipped))
            return backend
        skipped.append((candidate, against))
    raise _unsupported(call, skipped)


def _reasons_under_auto(backend: Backend, call: Call) -> list[str]:
    device = call.device.type
    if device in backend.limits.emulated_devices:
        return [f"emulates on {device}, for checking only: pin it by name"]
    return reasons(backend, call)


def explain_call(call: Call, name: str = "auto") -> Explanation:
    """Return which backend would run a bound call and every reason against the others."""
    order = auto_order(call.device.type)
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
        against = reasons(backend, call) if pinned else _reasons_under_auto(backend, call)
        if not against and name == "auto" and candidate not in order:
            against = [f"auto does not try it on {call.device.type}: pin it by name"]
        if not against and chosen is None and name in ("auto", candidate):
            chosen = candidate
        rows.append((candidate, tuple(against)))
    return Explanation(call.op.name, call.describe(), chosen, tuple(rows))


def _unsupported(call: Call, rows: list[tuple[str, list[str]]]) -> BackendUnsupportedError:
    """Build the error: the inputs, each backend's reasons and a cure."""
    who = "no backend" if len(rows) != 1 else f"backend {rows[0][0]!r}"
    verb = "can" if len(rows) != 1 else "cannot"
    lines = [f"{who} {verb} run {call.op.name} on these inputs", f"  {call.describe()}"]
    lines += [f"  {name}: {'; '.join(against)}" for name, against in rows]
    cure = _first_that_can(call, {name for name, _ in rows})
    lines.append(f'  try backend="{cure}"' if cure else "  no other backend can run it either")
    return BackendUnsupportedError("\n".join(lines))


def _first_that_can(call: Call, tried: set[str]) -> str | None:
    for name in known_backends():
        if name in tried:
            continue
        backend = get_backend(name)
        if not isinstance(backend, str) and not _reasons_under_auto(backend, call):
            return name
    return None


def _log(op: str, name: str, skipped: tuple[str, ...]) -> None:
    """Log a choice at INFO, once per distinct reason; torch.compile cannot trace a logger."""
    key = (op, name, *skipped)
    if key in _logged or torch.compiler.is_compiling():
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


def backends() -> tuple[BackendInfo, ...]:
    """Return every known backend with its version, limits and status on this machine."""
    return tuple(_info(name) for name in known_backends())


def _info(name: str) -> BackendInfo:
    backend = get_backend(name)
    source = _backends[name]
    cls = source if isinstance(source, type) else None
    version = None
    if cls is not None:
        try:
            version = importlib.metadata.version(cls.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = None
    status = backend if isinstance(backend, str) else _device_status(backend.limits)
    return BackendInfo(name, version, cls.limits if cls else None, status)


def _device_status(limits: Limits) -> str:
    here = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    if torch.backends.mps.is_available():
        here.add("mps")
    if "*" in limits.devices or here & set(limits.devices):
        return "available"
    if here & set(limits.emulated_devices):
        return "emulates only: no supported device here"
    return f"no supported device here (supported: {', '.join(limits.devices)})"


def resolve(name: object) -> object:
    """Return the process default where a call leaves the choice open."""
    return _default if isinstance(name, str) and name == "auto" else name


def default_backend() -> str:
    """Return the process default: what `backend="auto"` stands for."""
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


def traceable_step(name: str, device_type: str) -> bool:
    """Return whether torch.compile may trace through the step of the backend that would run."""
    names = auto_order(device_type) if name == "auto" else (name,)
    for candidate in names:
        if candidate in known_backends():
            backend = get_backend(candidate)
            if not isinstance(backend, str):
                return backend.traceable_step
    return False


# What torch.compiler.assume_constant_result does, without its import of all of torch._dynamo,
# which takes as long as importing torch.
traceable_step._dynamo_marked_constant = True  # type: ignore[attr-defined]
