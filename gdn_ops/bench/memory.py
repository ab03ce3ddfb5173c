"""Measure the peak memory of one forward and backward, in a process of its own.

The child builds the operands and runs once on a short prefix, so that libraries are loaded and
code is compiled. Then it runs once at full size; the result is the peak of `Device.peak`.

Run as `python -m gdn_ops.bench.memory`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from gdn_ops.bench.child import answer, ask
from gdn_ops.bench.device import Peak, find_device
from gdn_ops.bench.inputs import Setting, make_inputs, make_output_gradient
from gdn_ops.bench.peers import find_contender
from gdn_ops.spec.language import Sizes

WARMUP_TOKENS = 512


def measure_peak(name: str, sizes: Sizes, setting: Setting) -> Peak | str:
    """Return the peak memory of a contender, or why its process failed.

    Args:
        name: of a backend or a peer.
        sizes: the axes.
        setting: dtype and device.
    """
    order = {"name": name, "sizes": asdict(sizes), "setting": asdict(setting)}
    found = ask("gdn_ops.bench.memory", order)
    return found if isinstance(found, str) else Peak(**found)


def _measure(order: dict[str, Any]) -> dict[str, Any]:
    sizes, s = Sizes(**order["sizes"]), Setting(**order["setting"])
    c = find_contender(order["name"])
    if isinstance(c, str):
        raise SystemExit(c)
    for size in (replace(sizes, T=min(sizes.T, WARMUP_TOKENS)), sizes):
        x = make_inputs(size, s.torch_dtype, s.device).with_grad()
        d_o = make_output_gradient(size, s.torch_dtype, s.device)
        call = c.sequence(x)

        def run() -> object:
            return torch.autograd.grad(call.results()[0], x.operands(), d_o)  # noqa: B023

        peak = find_device(s.device).peak(run)
    return asdict(peak)


if __name__ == "__main__":
    answer(_measure)
