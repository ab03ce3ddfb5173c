"""Turn limits into text: the reasons why a backend cannot run a call, as users read them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gdn_ops.call.bind import Call, dtype_name
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.errors import BackendUnsupportedError
from gdn_ops.spec.language import Limits

Veto = Callable[[Backend, Call], str | None]

vetoes: list[Veto] = []
"""Functions that return a reason why "auto" may not give a call to a backend, or None."""


def reasons(backend: Backend, call: Call, *, on_any_device: bool = False) -> list[str]:
    """Return every reason why a backend cannot run a call; an empty list means it can.

    Args:
        backend: the backend.
        call: the bound call.
        on_any_device: leave out that its tensors are on another device than it needs.
    """
    found = _limit_reasons(backend.limits, call, on_any_device)
    found += backend.reasons(call)
    return found


def reasons_under_auto(backend: Backend, call: Call) -> list[str]:
    """Return every reason why "auto" may not give a call to a backend.

    Emulation is a reason, and so is what a veto returns.
    """
    device = call.device.type
    if device in backend.limits.emulated_devices:
        return [f"emulates on {device}, for checking only: pin it by name"]
    found = reasons(backend, call)
    found += [reason for veto in vetoes if (reason := veto(backend, call)) is not None]
    return found


def _limit_reasons(limits: Limits, call: Call, on_any_device: bool) -> list[str]:
    """Return the reasons against a call that follow from a backend's limits."""
    found: list[str] = []
    device = call.device.type
    if call.op.name not in limits.ops:
        found.append(f"op {call.op.name} (supported: {', '.join(limits.ops)})")
    is_free = on_any_device or "*" in limits.devices
    if not is_free and device not in limits.devices + limits.emulated_devices:
        found.append(f"device {device} (supported: {', '.join(limits.devices)})")
    dtype = dtype_name(call.tokens.q.dtype)
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
        found.append(f"chunk_size={call.chunk_size} (supported: {listed(sizes)})")
    if limits.min_capability and device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(call.device)
        if capability < limits.min_capability:
            have, need = ("".join(map(str, c)) for c in (capability, limits.min_capability))
            found.append(f"device sm{have} (needs sm{need} or newer)")
    return found


def listed(allowed: range | tuple[int, ...]) -> str:
    """Return numbers as text: "1 to 256", "multiples of 16 from 16 to 256", "64, 128"."""
    if not isinstance(allowed, range) or allowed[0] % allowed.step:
        return ", ".join(map(str, allowed))
    ends = f"{allowed[0]} to {allowed[-1]}"
    return ends if allowed.step == 1 else f"multiples of {allowed.step} from {ends}"


def _head_dim_reasons(limits: Limits, call: Call) -> list[str]:
    found = []
    for axis, size in (("K", call.sizes.K), ("V", call.sizes.V)):
        allowed = limits.head_dims
        if allowed is not None and size not in allowed:
            found.append(f"{axis}={size} (supported: {listed(allowed)})")
        elif size % limits.head_dim_multiple:
            found.append(f"{axis}={size} (supported: multiples of {limits.head_dim_multiple})")
    return found


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


def unsupported(
    call: Call, rows: list[tuple[str, list[str]]], cure: str | None
) -> BackendUnsupportedError:
    """Return the error for a call: its inputs, the reasons by backend, and a backend that can."""
    who = "no backend" if len(rows) != 1 else f"backend {rows[0][0]!r}"
    verb = "can" if len(rows) != 1 else "cannot"
    lines = [f"{who} {verb} run {call.op.name} on these inputs", f"  {call.describe()}"]
    lines += [f"  {name}: {'; '.join(against)}" for name, against in rows]
    lines.append(f'  try backend="{cure}"' if cure else "  no other backend can run it either")
    return BackendUnsupportedError("\n".join(lines))
