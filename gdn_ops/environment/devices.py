"""List the devices and threads that torch computes with."""

from __future__ import annotations

import os
import platform

import torch

from gdn_ops.environment.provenance import cpu_model
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.names import nearest


def devices() -> list[dict[str, str]]:
    """Return every device torch can use: its type, name and capability."""
    capability = torch.backends.cpu.get_cpu_capability()
    listed = [{"device": "cpu", "name": cpu_model(), "capability": capability}]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        listed.append({"device": f"cuda:{i}", "name": name, "capability": f"sm{major}{minor}"})
    if torch.backends.mps.is_available():
        listed.append({"device": "mps", "name": platform.processor(), "capability": ""})
    return listed


def threads() -> dict[str, int]:
    """Return the cores of the machine and the threads torch computes with."""
    return {"cores": os.cpu_count() or 1, "torch": torch.get_num_threads()}


def check_device(name: str) -> None:
    """Refuse a device that torch does not see here.

    Raises:
        SpecError: it is none of `devices`.
    """
    here = [row["device"] for row in devices()]
    known = dict.fromkeys([*here, *(x.partition(":")[0] for x in here)])
    if name not in known:
        near = nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else ""
        raise SpecError(f"device {name!r} is not available: torch sees {', '.join(here)}{hint}")
