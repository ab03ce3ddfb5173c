"""Compute the floor of a case: the least time by the cost model, at this machine's rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdn_ops.bench.device import find_device
from gdn_ops.bench.turns import interleave
from gdn_ops.spec.language import OpSpec, Sizes

CHUNK = 32
"""Tokens per chunk in the floor: the smallest in use, so that the floor is low."""

CACHED = 8 << 20
"""Bytes moved below which a call's traffic may stay in cache."""

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_SQUARE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """Hold the rates that plain torch reaches on this machine, measured in the same run.

    Attributes:
        flops: of a matrix product, per second, a multiply-add counted as two.
        bytes: read plus written by a large copy, per second.
        cached_bytes: the same for scaling 2 MiB in place, as a step does with its state.
    """

    flops: float
    bytes: float
    cached_bytes: float

    def floor(self, spec: OpSpec, sizes: Sizes, element: int) -> float:
        """Return the least seconds of a forward by the cost model, q, k, v of `element` bytes."""
        compute = spec.cost.flops(sizes, CHUNK) / self.flops
        moved = spec.cost.bytes(sizes, element)
        return max(compute, moved / (self.cached_bytes if moved < CACHED else self.bytes))


def measure_rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 10) -> Rates:
    """Measure the rates of plain torch, each from the best of its repeats.

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
    with torch.no_grad():
        timing = interleave(
            {
                "square": lambda: torch.mm(square, square, out=out),
                "batch": lambda: torch.bmm(small, small, out=small_out),
                "copy": lambda: target.copy_(source),
            },
            repeats,
            warmups=2,
            device=find_device(device),
        )
        # A short action is easily disturbed: the best of many.
        short = interleave(
            {"cached": lambda: state.mul_(1.0)},
            50 * repeats,
            device=find_device(device),
            collect=False,
        )
    flops = max(2 * n**3 / timing["square"].best, 2 * batch * 128**3 / timing["batch"].best)
    large = 2 * source.numel() / timing["copy"].best
    return Rates(flops, large, 2 * 4 * state.numel() / short["cached"].best)
