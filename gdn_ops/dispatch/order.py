"""Order the backends that "auto" tries: a table, and measured exceptions to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdn_ops.call.bind import Call

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "torch", "naive"),
    "cuda": ("triton", "tilelang", "torch", "naive"),
    "*": ("torch", "naive"),
}
"""List the backends that "auto" tries, in order, per device type ("*" for any other)."""


@dataclass(frozen=True)
class Preference:
    """Describe a class of calls, on one kind of device, for which a backend measured fastest.

    Attributes:
        backend: name of the backend to try first.
        op: name of the op.
        device: kind of device, as `device_kind` names it.
        measured: on what, when and by how much; a file under benchmarks/results.
        dtypes: of q.
        least_tokens: the smallest T in the class.
        most_heads: the largest N * HV, sequences times value heads, in the class; None for any.
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
        """Return whether a call belongs to the class."""
        s = call.sizes
        return (
            (call.op.name, device_kind(call.device)) == (self.op, self.device)
            and str(call.tokens.q.dtype).removeprefix("torch.") in self.dtypes
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
    """Return the names of the backends "auto" tries for a device type, in order."""
    return AUTO_ORDER.get(device_type) or AUTO_ORDER["*"]


def device_kind(device: torch.device) -> str:
    """Return the kind of a device: "sm_90" and the like for an NVIDIA GPU, else its type."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def order_for(call: Call) -> tuple[str, ...]:
    """Return the names of the backends "auto" tries for a call, in order."""
    order = auto_order(call.device.type)
    for preference in PREFERENCES:
        if preference.covers(call):
            rest = tuple(name for name in order if name != preference.backend)
            return (preference.backend, *rest)
    return order
