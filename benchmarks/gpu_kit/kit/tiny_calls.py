"""Make tiny calls of a backend for tools that slow a GPU down: `python tiny_calls.py BACKEND`."""

from __future__ import annotations

import os
import sys

import torch

from gdn_ops.testing import Example
from gdn_ops.testing.decode_laws import single_steps_equal_one_prefill

DEVICE = os.environ.get("KIT_DEVICE", "cuda")
EXAMPLES = (
    Example(T=70, R=2, K=64, V=64, dtype="bfloat16", device=DEVICE),
    Example(T=50, lengths=(17, 0, 33), K=64, V=64, dtype="bfloat16", device=DEVICE),
    Example(T=33, K=16, V=24, initial_state=True, device=DEVICE),
)


def main(backend: str) -> None:
    """Run a forward and a backward of each example, then single steps."""
    for example in EXAMPLES:
        example.run(backend)
    single_steps_equal_one_prefill(backend, EXAMPLES[2])
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    print(f"{backend}: {len(EXAMPLES)} calls with gradients, and steps")


if __name__ == "__main__":
    main(sys.argv[1])
