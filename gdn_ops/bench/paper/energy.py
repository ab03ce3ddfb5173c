"""Read the energy that a processor or a GPU has taken, where it has a counter.

CPUs: the package zones of RAPL, which Linux shows under /sys/class/powercap. GPUs: NVML, by the
package pynvml. Both count everything that the chip does, idle power and other programs too.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter:
    """Count joules.

    Attributes:
        name: what counts, in words.
    """

    name = ""

    def joules(self) -> float:
        """Return the energy since some moment, in J; it never falls."""
        raise NotImplementedError


class Rapl(Counter):
    """Count the energy of all CPU packages, whose own counters start anew at a largest value.

    Args:
        zones: folders with the files energy_uj and max_energy_range_uj.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.name = f"RAPL, {len(zones)} package{'s' if len(zones) > 1 else ''}"
        self._zones = zones
        self._range = {zone: _integer(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _integer(zone / "energy_uj") for zone in zones}
        self._total = 0

    def joules(self) -> float:
        for zone in self._zones:
            now = _integer(zone / "energy_uj")
            self._total += (now - self._last[zone]) % (self._range[zone] + 1)
            self._last[zone] = now
        return self._total / 1e6


class Nvml(Counter):
    """Count the energy of one GPU.

    Args:
        nvml: the module pynvml, after nvmlInit.
        uuid: of the GPU, as torch names it.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self.name = "NVML"
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def joules(self) -> float:
        """Return the energy since the driver was loaded, in J."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def find_counter(device: str, powercap: Path = POWERCAP) -> Counter | str:
    """Return the counter of a device that torch sees, or why there is none.

    Args:
        device: as torch names it.
        powercap: the folder of the zones of RAPL.
    """
    if device.startswith("cuda"):
        return _nvml(device)
    return _rapl(powercap) if device == "cpu" else f"no counter of {device} is known"


def _rapl(powercap: Path) -> Counter | str:
    if not powercap.is_dir():
        return f"there is no {powercap}: this system, or virtual machine, shows no counters"
    # One colon: those with two are parts of a package and counted in it.
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        packages = [z for z in zones if (z / "name").read_text().startswith("package")]
        if not packages:
            return f"{powercap} has no intel-rapl zone of a package"
        return Rapl(packages)
    except PermissionError as error:
        return f"{error.filename} cannot be read: {error.strerror}; root may read it"
    except (OSError, ValueError) as error:
        return f"RAPL cannot be read: {error}"


def _nvml(device: str) -> Counter | str:
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return "package 'pynvml' is not installed: pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        counter = Nvml(nvml, str(torch.cuda.get_device_properties(device).uuid))
        counter.joules()
    except Exception as error:
        # NVML has an error class of its own for every GPU that cannot do something.
        return f"NVML cannot count: {error}"
    return counter


def _integer(path: Path) -> int:
    return int(path.read_text())
