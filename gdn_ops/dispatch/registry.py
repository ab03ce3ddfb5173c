"""Find the backends, and select the one that runs a call.

The base class stands in `backend`. The choice is deterministic: a pinned backend runs or raises,
"auto" takes the first without reasons in the order of `order`. Reasons are text, as users read
them; `explain` tells them all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import pkgutil
import warnings
from collections.abc import Callable

import torch

from gdn_ops.call.bind import Call
from gdn_ops.call.structure import DTYPE_NAMES, shown
from gdn_ops.dispatch import forks as forks
from gdn_ops.dispatch.backend import Backend as Backend
from gdn_ops.dispatch.backend import Forward as Forward
from gdn_ops.dispatch.backend import Grads as Grads
from gdn_ops.dispatch.backend import announces, check_members, is_missing, load
from gdn_ops.dispatch.order import AUTO_ORDER as AUTO_ORDER
from gdn_ops.dispatch.order import auto_order as auto_order
from gdn_ops.dispatch.order import order_for
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError, SpecTypeError
from gdn_ops.spec.names import unknown
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits

logger = logging.getLogger("gdn_ops")

ENTRY_POINT_GROUP = "gdn_ops.backends"

Veto = Callable[[Backend, Call], str | None]

vetoes: list[Veto] = []
"""Functions that return a reason why "auto" may not give a call to a backend, or None."""

_backends: dict[str, type[Backend] | str] = {}
_instances: dict[str, Backend] = {}
_logged: set[tuple[str, ...]] = set()
_discovered = False
_default = os.environ.get("GDN_OPS_BACKEND", "auto") or "auto"


def register_backend(cls: type[Backend]) -> type[Backend]:
    """Add a backend class under its name; usable as a decorator.

    Raises:
        TypeError: `cls` is no Backend subclass with a name, limits and members of their types.
        ValueError: the name is reserved or not a plain one, or another class has it already.

    Example:
        >>> from gdn_ops import Backend, Limits, list_backends, register_backend
        >>> @register_backend
        ... class Mine(Backend):
        ...     name = "mine"
        ...     limits = Limits(devices=("cpu",))
        >>> "mine" in [info.name for info in list_backends()]
        True
    """
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise TypeError(f"{cls!r} is not a subclass of gdn_ops.Backend")
    check_members(cls)
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
        SpecError: no backend has that name (SpecTypeError if it is no string).
    """
    if not isinstance(name, str):
        raise SpecTypeError(f"backend {shown(name)}, should be a string")
    instance = _instances.get(name)
    if instance is not None:
        return instance
    _discover()
    if name not in _backends:
        place = "GDN_OPS_BACKEND: " if name == os.environ.get("GDN_OPS_BACKEND") else ""
        raise SpecError(place + unknown("backend", name, known_backends()))
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


def backend_class(name: str) -> type[Backend] | None:
    """Return the class of a known backend, or None where its module cannot be imported here."""
    get_backend(name)
    source = _backends[name]
    return source if isinstance(source, type) else None


def reasons(backend: Backend, call: Call, *, on_any_device: bool = False) -> list[str]:
    """Return every reason why a backend cannot run a call; an empty list means it can.

    Args:
        backend: the backend.
        call: the bound call.
        on_any_device: leave out that its tensors are on another device than it needs.
    """
    against = _limit_reasons(backend.limits, call, on_any_device)
    if type(backend).reasons is not Backend.reasons:
        own = backend.reasons(call)
        if not isinstance(own, (list, tuple)):
            raise TypeError(
                f"{backend.name}.reasons returns {own!r}, should return a list of texts"
            )
        against += own
    return against


def reasons_under_auto(backend: Backend, call: Call) -> list[str]:
    """Return every reason why "auto" may not give a call to a backend.

    Emulation is a reason, and so is what a veto returns.
    """
    device = call.device.type
    if device in backend.limits.emulated_devices:
        return [f"emulates on {device}, for checking only: pin it by name"]
    against = reasons(backend, call)
    against += [reason for veto in vetoes if (reason := veto(backend, call)) is not None]
    return against


def _limit_reasons(limits: Limits, call: Call, on_any_device: bool) -> list[str]:
    """Return the reasons against a call that follow from a backend's limits."""
    against: list[str] = []
    device = call.device.type

    def check(text: str, value: str, supported: tuple[str, ...]) -> None:
        if value not in supported:
            against.append(f"{text.format(value)} (supported: {', '.join(supported)})")

    check("op {}", call.op.name, limits.ops)
    if not (on_any_device or "*" in limits.devices or device in limits.emulated_devices):
        check("device {}", device, limits.devices)
    check("dtype {}", DTYPE_NAMES[call.tokens.q.dtype], limits.dtypes)
    if call.state is not None:
        check("state dtype {}", DTYPE_NAMES[call.state.dtype], limits.state_dtypes)
    against += _head_dim_reasons(limits, call)
    check("rule {}", call.rule.name, limits.rules)
    against += _width_reasons(limits, call)
    if call.needs_grad and not limits.grad:
        against.append("gradients needed (supported: forward only)")
    if call.transforms.has_tangent and not limits.forward_mode:
        against.append("forward-mode tangents (supported: reverse mode)")
    if call.cu_seqlens is not None and not limits.varlen:
        against.append("cu_seqlens is not supported")
    sizes = limits.chunk_sizes
    if sizes is not None and call.chunk_size is not None and call.chunk_size not in sizes:
        against.append(f"chunk_size={call.chunk_size} (supported: {listed(sizes)})")
    if limits.min_capability and device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(call.device)
        if capability < limits.min_capability:
            have, need = ("".join(map(str, c)) for c in (capability, limits.min_capability))
            against.append(f"device sm{have} (needs sm{need} or newer)")
    return against


def _width_reasons(limits: Limits, call: Call) -> list[str]:
    """Return the reasons against a call's gates; they name the op where ops differ in them."""
    against: list[str] = []
    widths, is_sequence = call.widths, call.op.name == GATED_DELTA.name
    for kind, width, taken, decoded in (
        ("decay", widths.decay, limits.decays, limits.decode_decays),
        ("erase", widths.erase, limits.erases, limits.decode_erases),
        ("write", widths.write, limits.writes, limits.decode_writes),
    ):
        supported = taken if is_sequence or decoded is None else decoded
        if width not in supported:
            place = "" if decoded is None else f" in {call.op.name}"
            against.append(f"{width} {kind}{place} (supported: {', '.join(supported)})")
    is_taken = limits.apart
    if limits.decode_apart is not None and not is_sequence:
        is_taken = limits.decode_apart
    if widths.apart and not is_taken:
        place = "" if limits.decode_apart is None else f" in {call.op.name}"
        against.append(f"erase and write{place} (supported: beta)")
    return against


def listed(allowed: range | tuple[int, ...]) -> str:
    """Return numbers as text: "1 to 256", "multiples of 16 from 16 to 256", "64, 128"."""
    if not isinstance(allowed, range) or allowed[0] % allowed.step:
        return ", ".join(map(str, allowed))
    ends = f"{allowed[0]} to {allowed[-1]}"
    return ends if allowed.step == 1 else f"multiples of {allowed.step} from {ends}"


def _head_dim_reasons(limits: Limits, call: Call) -> list[str]:
    against: list[str] = []
    allowed, multiple = limits.head_dims, limits.head_dim_multiple
    if allowed is None and multiple == 1:
        return against
    for axis, size in (("K", call.sizes.K), ("V", call.sizes.V)):
        if allowed is not None and size not in allowed:
            against.append(f"{axis}={size} (supported: {listed(allowed)})")
        elif size % multiple:
            against.append(f"{axis}={size} (supported: multiples of {multiple})")
    return against


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


def is_first(backend: Backend, call: Call, name: str) -> bool:
    """Return whether `select` would return a backend again, by the first name that it tries.

    Args:
        backend: what it returned for a call like this one: its limits are not asked again.
        call: the call, which may be on tensors without memory.
        name: as given to `select`.
    """
    first = order_for(call)[0] if name == "auto" else name
    if _instances.get(first) is not backend or backend.reasons(call):
        return False
    if name == "auto":
        for veto in vetoes:
            if veto(backend, call) is not None:
                return False
    return True


def _unsupported(call: Call, rows: list[tuple[str, list[str]]]) -> BackendUnsupportedError:
    """Return the error for a call: its inputs, the reasons by backend, and a backend that can."""
    cure = _first_that_can(call, {name for name, _ in rows})
    who = "no backend" if len(rows) != 1 else f"backend {rows[0][0]!r}"
    verb = "can" if len(rows) != 1 else "cannot"
    lines = [f"{who} {verb} run {call.op.name} on these inputs", f"  {call.describe()}"]
    lines += [f"  {name}: {'; '.join(against)}" for name, against in rows]
    lines.append(f'  try backend="{cure}"' if cure else "  no other backend can run it either")
    return BackendUnsupportedError("\n".join(lines))


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
            stacklevel=5,
        )


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

    Example:
        >>> import torch
        >>> from gdn_ops import explain, use_backend
        >>> q = torch.randn(1, 100, 4, 16)
        >>> with use_backend("naive"):
        ...     explain(q, q, q, rule="linear").backend
        'naive'
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

    def __exit__(self, *exception: object) -> None:
        global _default
        _default = self._previous


def traceable_step(name: str, device_type: str) -> str | None:
    """Return the name of the backend for a step if torch.compile may trace that step, else None.

    For "auto" it is the first in the order behind which there are no kernels for the device: a
    graph fuses plain torch with what is around it, and an exported one runs without a library. The
    backend is loaded here: a graph looks it up by `get_backend`, and imports nothing.
    """
    names = auto_order(device_type) if name == "auto" else (name,)
    for candidate in names:
        backend = get_backend(candidate) if candidate in known_backends() else ""
        if isinstance(backend, str):
            continue
        if backend.traceable_step:
            return candidate
        if backend.kernels:
            return None
    return None


# Do as torch.compiler.assume_constant_result does, without its import of all of torch._dynamo,
# which takes as long as importing torch.
traceable_step._dynamo_marked_constant = True  # type: ignore[attr-defined]
