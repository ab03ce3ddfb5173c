"""Continue a prompt with an exported model, by numpy and onnxruntime alone.

    gdn-ops export --model Qwen3.5-0.8B --out exported --flavour onnxruntime
    python examples/onnx_numpy.py exported 12,7,99

The folder says all that is needed: gdn_ops.json which output is the next value of which state, and
the graph its shapes. A program in C++ or C# does the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

COUNT = 32
"""Tokens that are added, always the most likely one."""


def generate(folder: Path, tokens: list[int]) -> list[int]:
    """Return the tokens that a model adds to some."""
    states = json.loads((folder / "gdn_ops.json").read_text())["states"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    # Keys and values are empty, or have room for all where the graph writes them into a buffer.
    sizes = {"batch": 1, "past_sequence": 0, "key_capacity": len(tokens) + COUNT}
    inputs = {value.name: value.shape for value in session.get_inputs()}
    values = {
        name: np.zeros([sizes.get(size, size) for size in inputs[name]], np.float32)
        for name in states
    }
    read, total = tokens, 0
    added: list[int] = []
    for _ in range(COUNT):
        places = np.arange(total, total + len(read))
        total += len(read)
        feeds = {"input_ids": np.array([read]), "attention_mask": np.ones((1, total), np.int64)}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.broadcast_to(places, (3, 1, len(read)))
        logits, *new = session.run(["logits", *states.values()], {**feeds, **values})
        values = dict(zip(states, new, strict=True))
        read = [int(logits[0, -1].argmax())]
        added += read
    return added


if __name__ == "__main__":
    prompt = [int(token) for token in sys.argv[2].split(",")]
    print(*generate(Path(sys.argv[1]), prompt), sep=",")
