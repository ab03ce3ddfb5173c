"""Describe the machines of the cost model: devices, the links between them, and what both reach.

Processors, clocks and bandwidths of GPUs are those of `gdn_ops.aot.processors`. No GPU has
confirmed a figure here: sheets are the vendors', and the shares that are reached are of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gdn_ops.aot.processors import GPUS, Gpu

DATED: Final = "2026-11-30"
"""The day of these figures."""

_LINKED: Final = 0.8
"""Share of a link's bandwidth that transfers reach. NCCL's src/graph/tuning.cc caps a ring at 370
of the 450 GB/s of NVLink 4 and at 235 of the 300 GB/s of NVLink 3; assumed elsewhere."""


@dataclass(frozen=True)
class Link:
    """Describe what connects devices.

    Attributes:
        hop: seconds from one device to the next.
        bandwidth: bytes per second that a device sends while it receives as many, as reached.
        source: where the figures are from.
    """

    hop: float
    bandwidth: float
    source: str


# Hops are those that NCCL's src/graph/tuning.cc has for a ring with the protocol Simple.
LINKS: Final = {
    "nvlink3": Link(3.4e-6, _LINKED * 300e9, "A100 data sheet: NVLink 600 GB/s, both directions"),
    "nvlink4": Link(3.4e-6, _LINKED * 450e9, "H100, H200 data sheets: 900 GB/s, both directions"),
    "nvlink5": Link(3.4e-6, _LINKED * 900e9, "Blackwell data sheet: 1.8 TB/s, both directions"),
    "xgmi": Link(
        3.4e-6, _LINKED * 448e9,
        "MI300X data sheet: seven links of 128 GB/s, both directions; hop assumed as NVLink's",
    ),
    "pcie4": Link(5.7e-6, _LINKED * 32e9, "PCI Express 4.0, 16 lanes: 32 GB/s a direction"),
    "pcie5": Link(5.7e-6, _LINKED * 64e9, "PCI Express 5.0, 16 lanes: 64 GB/s a direction"),
    "ib200": Link(9.6e-6, _LINKED * 25e9, "InfiniBand HDR: 200 Gbit/s a device (DGX A100)"),
    "ib400": Link(9.6e-6, _LINKED * 50e9, "InfiniBand NDR: 400 Gbit/s a device (DGX H100, B200)"),
    "loopback": Link(
        100e-6, 2.6e9,
        "measured: gloo between processes of one machine, benchmarks/results/parallel.json",
    ),
    "ethernet10": Link(50e-6, _LINKED * 1.25e9, "10 Gbit/s Ethernet; hop assumed"),
}  # fmt: skip
"""By name."""


MOST_COLUMNS: Final = 256
"""The largest K and V that the triton backend takes."""


@dataclass(frozen=True)
class Machine:
    """Describe nodes of equal devices.

    Attributes:
        name: of a device.
        backend: whose work is counted: "triton" or "cpp".
        staged: largest K and V with which that backend runs a piece of a sequence in stages
            (`Backend.has_stages`), as a gather then does; 0 where it has none.
        products: peak of matrix products of the op, flops per second, by dtype of q, k and v.
        linear: the same of linear layers.
        bandwidth: of a device's memory, bytes per second.
        memory: of a device, bytes.
        launch: seconds from one launch to the next.
        reached: share of the roofline that the op's launches reach.
        dense: share of the peak that linear layers reach.
        wave: value heads × blocks of columns that a device walks at a time; 1 where any number
            of heads fills it.
        columns: of V, in a block.
        devices: of a node.
        start: seconds of an exchange before its first byte moves.
        inside: the link of the devices of a node.
        between: that of nodes.
        source: where the figures are from.
    """

    name: str
    backend: str
    staged: int
    products: Mapping[str, float]
    linear: Mapping[str, float]
    bandwidth: float
    memory: int
    launch: float
    reached: float
    dense: float
    wave: int
    columns: int
    devices: int
    start: float
    inside: Link
    between: Link
    source: str

    def shared(self, processes: int) -> Machine:
        """Return a device that has its part of this one, which so many processes share."""
        return dataclasses.replace(
            self,
            products={dtype: rate / processes for dtype, rate in self.products.items()},
            linear={dtype: rate / processes for dtype, rate in self.linear.items()},
            bandwidth=self.bandwidth / processes,
            memory=self.memory // processes,
        )


def _gpu(
    gpu: Gpu, gigabytes: int, inside: str, between: str, *, reached: float, together: int,
    columns: int, float32: float, source: str,
) -> Machine:  # fmt: skip
    """Return a node of eight GPUs.

    Args:
        gpu: processors, clock and bandwidth.
        gigabytes: of memory.
        inside, between: names of links.
        reached: share of the roofline of bytes; fitted to the times that `gdn-ops compile`
            predicts for the launches of the triton backend.
        together: programs of a walk that a processor holds.
        columns: of V in such a program.
        float32: rate of float32 products as the triton backend forms them, of that in 16 bits.
        source: of the memory, and of what stands here only.
    """
    peak = 2 * gpu.processors * gpu.multiply_adds * gpu.clock
    # Linear layers in float32 are in float32 by torch's default, not in TF32.
    linear = {"bfloat16": peak, "float16": peak, "float32": peak / (8 if "MI" in gpu.name else 15)}
    # float16 products of the op are TF32 on NVIDIA, float32 on AMD: docs/backends.md.
    half = float32 if "MI" in gpu.name else 0.5
    return Machine(
        gpu.name, "triton", MOST_COLUMNS,
        {"bfloat16": peak, "float16": half * peak, "float32": float32 * peak}, linear,
        gpu.bandwidth, gigabytes * 10**9, 3.6e-6, reached, 0.6, together * gpu.processors, columns,
        8, 8.4e-6, LINKS[inside], LINKS[between],
        f"{gpu.sources}; {source}; 3.6 µs a launch and 0.6 of the peak in linear layers are "
        "assumed; an exchange starts after 8.4 µs: NCCL's src/graph/tuning.cc",
    )  # fmt: skip


_H200 = GPUS["sm_90"]
MACHINES: Final[Mapping[str, Machine]] = {
    "a100": _gpu(
        GPUS["sm_80"], 80, "nvlink3", "ib200", reached=0.6, together=1, columns=32, float32=1 / 6,
        source="A100 data sheet: 80 GB, TF32 at half the rate of 16 bits",
    ),
    "h100": _gpu(
        _H200._replace(name="H100 SXM", bandwidth=3.35e12), 80, "nvlink4", "ib400", reached=0.77,
        together=2, columns=64, float32=1 / 6,
        source="H100 data sheet: 80 GB, 3.35 TB/s, else as H200",
    ),
    "h200": _gpu(
        _H200, 141, "nvlink4", "ib400", reached=0.77, together=2, columns=64, float32=1 / 6,
        source="H200 data sheet: 141 GB, TF32 at half the rate of 16 bits",
    ),
    "b200": _gpu(
        GPUS["sm_100"], 180, "nvlink5", "ib400", reached=0.35, together=1, columns=64,
        float32=1 / 6, source="DGX B200 data sheet: 1440 GB in eight GPUs",
    ),
    "mi300x": _gpu(
        GPUS["gfx942"], 192, "xgmi", "ib400", reached=0.22, together=2, columns=16, float32=1 / 8,
        source="MI300X data sheet: 192 GB, 163.4 TFLOP/s in float32",
    ),
    "cpu": Machine(
        "two cores of an Intel Xeon", "cpp", 0,
        {"float32": 368e9, "bfloat16": 368e9, "float16": 368e9},
        {"float32": 297e9, "bfloat16": 61e9, "float16": 61e9},
        23.8e9, 16 * 10**9, 40e-6, 0.55, 1.0, 1, 128, 1, 0.0, LINKS["loopback"],
        LINKS["ethernet10"],
        "measured: benchmarks/results/cpu-float32-bfloat16.json has the rates of products on "
        "registers, of torch's products and of copies, and the overhead of a call; 0.55 of the "
        "first is what forward and backward of the op reach there; 16 GB are assumed",
    ),
}  # fmt: skip
"""By the name that the command line knows."""
