"""Make tiny calls of a backend for tools that slow a GPU down: `python tiny_calls.py BACKEND`."""

from __future__ import annotations

import os
import sys

import torch

import gdn_ops
from gdn_ops.testing import Example
from gdn_ops.testing.decode_laws import single_steps_equal_one_prefill

DEVICE = os.environ.get("KIT_DEVICE", "cuda")
EXAMPLES = (
    Example(T=70, R=2, K=64, V=64, dtype="bfloat16", device=DEVICE),
    Example(T=50, lengths=(17, 0, 33), K=64, V=64, dtype="bfloat16", device=DEVICE),
    Example(T=33, K=16, V=24, initial_state=True, device=DEVICE),
    Example(T=33, K=16, V=24, initial_state=True, channels=True, device=DEVICE),
    Example(T=33, K=16, V=24, channels=True, apart="channels", device=DEVICE),
)

STEPS = Example(T=17, K=16, V=32, initial_state=True, device=DEVICE)
"""Tokens that are decoded one by one, as wide as every backend takes them."""


def takes(backend: str, example: Example) -> bool:
    """Return whether a backend runs an example: not all take decays of channels, or erase."""
    return not dict(gdn_ops.explain(**example.arguments(), backend=backend).reasons)[backend]


def main(backend: str) -> None:
    """Run a forward and a backward of each example that a backend takes, then single steps."""
    taken = [example for example in EXAMPLES if takes(backend, example)]
    for example in taken:
        example.run(backend)
    single_steps_equal_one_prefill(backend, STEPS)
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    print(f"{backend}: {len(taken)} calls with gradients, and steps")


if __name__ == "__main__":
    main(sys.argv[1])
