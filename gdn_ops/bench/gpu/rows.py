"""Define the rows of `gdn-ops bench gpu` as data, the most important first.

The numbers in `published` are other people's, for comparison only: they were measured by them, on
their machine, and stand in a column of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from gdn_ops.bench.floors import CHUNK
from gdn_ops.bench.inputs import Inputs, make_kernel_inputs, make_kernel_step_inputs
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP

PUBLISHED_ON = (
    "theirs: NVIDIA H200, CUDA graphs, FlashQLA's benchmark file (flash_qla, flashinfer 0.6.13, "
    "fla 0.5.1, torch 2.9.1); steps: onnxruntime and fla as reported for an H200"
)


@dataclass(frozen=True)
class Published:
    """Hold a time, "kernel" or "wall" as in `Outcome`, that somebody published for a row."""

    who: str
    ms: float
    what: str = "kernel"


@dataclass(frozen=True)
class Goal:
    """Hold a bound of "kernel" or "wall" (milliseconds) or "error", for an H200."""

    backend: str
    what: str
    at_most: float


@dataclass(frozen=True)
class GpuRow:
    """Describe one measurement: a direction and a shape.

    Attributes:
        what: "forward", "backward" or "step".
        heads: (H, HV).
        lengths: of the sequences; a step has as many ones as batch rows.
        packed: whether the sequences are packed along T with cu_seqlens, else batch rows.
        dims: (K, V).
        dtype: of q, k, v.
        state_dtype: of the state of a step.
        channels: whether every key channel has a decay of its own.
        published: other people's times.
        goals: bounds for our backends.
    """

    what: str
    heads: tuple[int, int]
    lengths: tuple[int, ...]
    packed: bool = False
    dims: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    channels: bool = False
    published: tuple[Published, ...] = ()
    goals: tuple[Goal, ...] = ()

    @property
    def sizes(self) -> Sizes:
        """Return the axes; a packed batch has one row."""
        (h, hv), (k, v), n = self.heads, self.dims, len(self.lengths)
        if self.packed:
            return Sizes(1, sum(self.lengths), h, hv, k, v, n)
        return Sizes(n, self.lengths[0], h, hv, k, v, n)

    @property
    def name(self) -> str:
        """Return the name that is printed and looked up: "forward 16/64 T=8192"."""
        n, length = len(self.lengths), self.lengths[0]
        if self.what == "step":
            shape = f"B={n} {self.state_dtype} state"
        elif self.packed and len(set(self.lengths)) == 1:
            shape = f"{n}x{length} packed"
        elif self.packed:
            shape = f"{sum(self.lengths)} in {n} packed"
        else:
            shape = f"T={length}" if n == 1 else f"B={n} T={length}"
        dims = "" if self.dims == (128, 128) else " K={} V={}".format(*self.dims)
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        kind = " channels" if self.channels else ""
        return f"{self.what} {self.heads[0]}/{self.heads[1]}{kind}{dims} {shape}{dtype}"

    def draw(self, device: str) -> Inputs:
        """Draw the operands on a device."""
        dtype = getattr(torch, self.dtype)
        if self.what == "step":
            state_dtype = getattr(torch, self.state_dtype)
            return make_kernel_step_inputs(
                self.sizes, dtype, state_dtype, device, channels=self.channels
            )
        lengths = self.lengths if self.packed else None
        return make_kernel_inputs(self.sizes, dtype, device, lengths, channels=self.channels)

    def work(self) -> tuple[float, float] | None:
        """Return (flops, bytes) of the row by the spec's cost model, or None for a backward."""
        element = 4 if self.dtype == "float32" else 2
        if self.what == "backward":
            return None
        cost = (GATED_DELTA_STEP if self.what == "step" else GATED_DELTA).cost
        moved = cost.bytes(self.sizes, element, channels=self.channels)
        if self.what == "step" and self.state_dtype != "float32":
            # The model counts a float32 state read and written; half as wide is half of both.
            moved -= cost.state_bytes(self.sizes)
        return cost.flops(self.sizes, CHUNK, channels=self.channels), moved


_THEIRS = {"forward": ("flash_qla", "flashinfer", "fla"), "backward": ("flash_qla", "fla")}
"""Whose times are published for a direction, in the order of a row's `theirs`."""


def _sequences(
    what: str,
    heads: tuple[int, int],
    *lengths: int,
    theirs: tuple[float, ...] = (),
    triton: float | None = None,
    tilelang: float | None = None,
    dims: tuple[int, int] = (128, 128),
    batch: bool = False,
) -> GpuRow:
    """Return a row of sequences; `theirs`, `triton` and `tilelang` are milliseconds."""
    names = _THEIRS[what][: len(theirs)]
    published = tuple(Published(n, ms) for n, ms in zip(names, theirs, strict=True))
    pairs = (("triton", triton), ("tilelang", tilelang))
    goals = tuple(Goal(name, "kernel", bound) for name, bound in pairs if bound is not None)
    packed = len(lengths) > 1 and not batch
    return GpuRow(what, heads, lengths, packed, dims, published=published, goals=goals)


_forward = functools.partial(_sequences, "forward")
_backward = functools.partial(_sequences, "backward")


def _step(batch: int, state: str = "float32") -> GpuRow:
    """Return the row of an in-place step: one token for each row of a batch."""
    row = GpuRow("step", (16, 64), (1,) * batch, state_dtype=state)
    if (batch, state) != (1, "float32"):
        return row
    published = (
        Published("onnxruntime", 0.0058),
        Published("onnxruntime", 0.0185, "wall"),
        Published("fla", 0.083, "wall"),
    )
    goals = (Goal("triton", "kernel", 0.008), Goal("triton", "wall", 0.025))
    return GpuRow("step", (16, 64), (1,), published=published, goals=goals)


def _kda(what: str, heads: int, *lengths: int) -> GpuRow:
    """Return a row of Kimi Delta Attention, which has as many key heads as value heads."""
    packed = what != "step" and len(lengths) > 1
    return GpuRow(what, (heads, heads), lengths, packed, channels=True)


_QUARTERS = (5809, 1244, 406, 733)
"""8192 tokens in four sequences, cut as in FlashQLA's benchmark."""

_FLOAT32 = GpuRow(
    "forward", (16, 32), (2048,), dtype="float32", goals=(Goal("triton", "error", 1e-5),)
)

ROWS = (
    _forward((16, 64), 8192, theirs=(0.397, 0.392, 0.814), triton=0.50, tilelang=0.39),
    _forward((16, 32), 8192, theirs=(0.280, 0.394, 0.472), triton=0.30, tilelang=0.28),
    _backward((16, 32), 8192, theirs=(0.789, 1.444), triton=1.1, tilelang=0.76),
    _step(1),
    _forward((16, 64), *[8192] * 4, theirs=(1.214, 0.827, 3.362), triton=1.5, tilelang=0.83),
    _kda("forward", 32, 8192),
    _kda("backward", 32, 8192),
    _kda("step", 32, 1),
    _forward((2, 8), 32768, theirs=(0.320, 1.655, 0.902), tilelang=0.24),
    _backward((16, 32), *_QUARTERS, theirs=(1.259, 1.467), tilelang=0.80),
    _forward((16, 64), 2048, theirs=(0.113, 0.105, 0.220)),
    _step(64),
    _forward((16, 32), 512),
    _kda("forward", 32, *_QUARTERS),
    _kda("step", 32, *[1] * 64),
    _FLOAT32,
    _forward((16, 32), *[2048] * 8, batch=True),
    _step(1, "bfloat16"),
    _backward((16, 32), 32768, theirs=(2.515, 5.697), tilelang=2.5),
    _forward((16, 64), 32768, theirs=(1.521, 1.552, 3.331)),
    _forward((16, 32), *[8192] * 4, theirs=(0.611, 0.425, 1.898)),
    _forward((2, 8), 8192, theirs=(0.119, 0.417, 0.234)),
    _backward((4, 8), 8192, theirs=(0.321, 0.722)),
    _backward((2, 4), 32768, theirs=(0.548, 2.311)),
    _step(512),
    _step(8),
    _step(256),
    _step(64, "bfloat16"),
    _kda("forward", 64, 2048),
    _kda("backward", 32, *_QUARTERS),
    _forward((30, 30), 8192, dims=(96, 192)),
    _backward((30, 30), 2048, dims=(96, 192)),
    _forward((16, 32), 128),
    _forward((16, 32), *[512] * 16, batch=True),
    _backward((16, 32), 512),
    _backward((16, 32), *[2048] * 4, batch=True),
    _step(8, "bfloat16"),
    _step(256, "bfloat16"),
    _step(512, "bfloat16"),
)


def find_row(name: str) -> GpuRow:
    """Return the row of that name.

    Raises:
        ValueError: no row has that name.
    """
    rows = {row.name: row for row in ROWS}
    if name not in rows:
        raise ValueError(f"unknown row {name!r}, known: {', '.join(rows)}")
    return rows[name]
