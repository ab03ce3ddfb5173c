"""Compute the floor of a case: the least time by the cost model, at this machine's rates.

What a processor computes at most is measured by multiply-adds on registers, which the library of
the C++ kernels has; a matrix product of torch reaches a part of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from gdn_ops.backends.cpp import calls, library
from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.turns import interleave
from gdn_ops.spec.language import OpSpec, Sizes

CHUNK = 32
"""Tokens per chunk in the floor: the smallest in use, so that the floor is low."""

CACHED = 8 << 20
"""Bytes moved below which a call's traffic may stay in cache."""

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_SQUARE = {"cpu": 1024, "cuda": 8192}
_ROUNDS = 1 << 18
"""Rounds of multiply-adds that are timed at once: about a millisecond."""


@dataclass(frozen=True)
class Rates:
    """Hold the rates that this machine reaches, measured in the same run.

    Attributes:
        products: flops of a matrix product of plain torch, per second, a multiply-add counted as
            two.
        bytes: read plus written by a large copy, per second.
        cached_bytes: the same for scaling 2 MiB in place, as a step does with its state.
        registers: flops of multiply-adds on registers, per second; None where it is not measured.
    """

    products: float
    bytes: float
    cached_bytes: float
    registers: float | None = None

    @property
    def flops(self) -> float:
        """Return the highest rate of flops that was seen, per second."""
        return max(self.products, self.registers or 0.0)

    def floor(self, spec: OpSpec, sizes: Sizes, element: int, *, channels: bool = False) -> float:
        """Return the least seconds of a forward by the cost model.

        Args:
            spec, sizes: the op, and the axes of a call.
            element: bytes of an element of q, k, v.
            channels: whether every key channel has a decay.
        """
        compute = spec.cost.flops(sizes, CHUNK, channels=channels) / self.flops
        moved = spec.cost.bytes(sizes, element, channels=channels)
        return max(compute, moved / (self.cached_bytes if moved < CACHED else self.bytes))

    def to_json(self) -> dict[str, float | None]:
        """Return the rates in GFLOP/s and GB/s."""
        return {
            "gflops": self.products / 1e9,
            "gflops_registers": None if self.registers is None else self.registers / 1e9,
            "gbytes": self.bytes / 1e9,
            "gbytes_cached": self.cached_bytes / 1e9,
        }


def _multiply_adds(dtype: torch.dtype, device: str) -> tuple[Run, int] | None:
    """Return multiply-adds on registers, in all threads, and their flops; None where they are not.

    Those of bfloat16 are of pairs, where the kernels multiply pairs.
    """
    if device != "cpu" or dtype not in calls.TYPES or library.missing() is not None:
        return None
    door = library.library().gdn_multiply_add
    door.restype, door.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    arguments = (calls.TYPES[dtype], library.threads())
    return lambda: door(_ROUNDS, *arguments), door(1, *arguments) * _ROUNDS


def measure_rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 10) -> Rates:
    """Measure the rates of the machine, each from the best of its repeats.

    The product is the faster of one large square and a batch of squares of 128 that stays in
    cache, the shape of the work in a chunk.
    """
    kind = device.partition(":")[0]
    n = _SQUARE.get(kind, _SQUARE["cpu"])
    batch = n * n // 16384
    square = torch.randn(n, n, dtype=torch.float32, device=device).to(dtype)
    small = torch.randn(batch, 128, 128, dtype=torch.float32, device=device).to(dtype)
    source = torch.ones(_COPY_BYTES.get(kind, _COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target, state = (
        torch.empty_like(source),
        torch.ones((2 << 20) // 4, dtype=torch.float32, device=device),
    )
    out, small_out = torch.empty_like(square), torch.empty_like(small)
    long: dict[str, Run] = {
        "square": lambda: torch.mm(square, square, out=out),
        "batch": lambda: torch.bmm(small, small, out=small_out),
        "copy": lambda: target.copy_(source),
    }
    # A short action is easily disturbed: the best of many.
    short: dict[str, Run] = {"cached": lambda: state.mul_(1.0)}
    counted = _multiply_adds(dtype, device)
    if counted is not None:
        short["registers"] = counted[0]
    with torch.no_grad():
        timing = interleave(long, repeats, warmups=2, device=find_device(device))
        timing |= interleave(short, 50 * repeats, device=find_device(device), collect=False)
    products = max(2 * n**3 / timing["square"].best, 2 * batch * 128**3 / timing["batch"].best)
    large = 2 * source.numel() / timing["copy"].best
    cached = 2 * 4 * state.numel() / timing["cached"].best
    registers = None if counted is None else counted[1] / timing["registers"].best
    return Rates(products, large, cached, registers)
