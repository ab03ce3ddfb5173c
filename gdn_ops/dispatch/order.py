"""In which order "auto" tries the backends: a table, and measured exceptions to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdn_ops.call.bind import Call

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("torch", "naive"),
    "cuda": ("triton", "tilelang", "torch", "naive"),
    "*": ("torch", "naive"),
}
"""Which backends "auto" tries, in order, per device type ("*" for any other device)."""


@dataclass(frozen=True)
class Preference:
    """A class of calls on one kind of device where a backend was measured to be the fastest.

    Attributes:
        backend: is tried first.
        op: name of the op.
        device: kind of device, as `device_kind` names it.
        measured: on what, when and by how much; a file under benchmarks/results.
        dtypes: of q.
        least_tokens: of the longest run that a sequence may have, T.
        most_heads: sequences times value heads, N * HV.
        needs_grad: only with gradients, only without, or None for both.
    """

    backend: str
    op: str
    device: str
    measured: str
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    least_tokens: int = 0
    most_heads: int | None = None
    needs_grad: bool | None = None

    def covers(self, call: Call) -> bool:
        """Return whether a call is one of the class."""
        s = call.sizes
        return (
            (call.op.name, device_kind(call.device)) == (self.op, self.device)
            and str(call.q.dtype).removeprefix("torch.") in self.dtypes
            and self.least_tokens <= s.T
            and (self.most_heads is None or self.most_heads >= s.N * s.HV)
            and self.needs_grad in (None, call.needs_grad)
        )


PREFERENCES: tuple[Preference, ...] = ()
"""The exceptions to AUTO_ORDER, the first that covers a call decides.

A row is added with the measurement that it rests on and not before: until a device class has been
measured, `triton` comes before `tilelang` on every GPU.
"""


def auto_order(device_type: str) -> tuple[str, ...]:
    """Return the names "auto" tries for a device type, in order."""
    return AUTO_ORDER.get(device_type, AUTO_ORDER["*"])


def device_kind(device: torch.device) -> str:
    """Return "sm_90" and the like for an NVIDIA GPU, and the type of any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def order_for(call: Call) -> tuple[str, ...]:
    """Return the names "auto" tries for a call, in order."""
    order = auto_order(call.device.type)
    for preference in PREFERENCES:
        if preference.covers(call):
            rest = tuple(name for name in order if name != preference.backend)
            return (preference.backend, *rest)
    return order
