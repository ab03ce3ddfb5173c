"""Measure speculation with prompt lookup: `python benchmarks/speculation.py`.

A HybridLM of bytes (pattern GA, hidden 256, four layers) learns the Python files of gdn_ops for two
hundred steps, and then continues the beginnings of some by the most likely bytes: alone, by prompt
lookup, and with a draft that is always wrong, in turns. A model this small repeats itself, and code
does too: it is the text that prompt lookup is for. `results/speculation.json` has tokens a second,
the best of several rounds, and tokens a call.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.nn import HybridLM

RESULT = Path(__file__).parent / "results" / "speculation.json"
SOURCES = Path(__file__).parents[1] / "gdn_ops" / "nn"
PROMPTS = ("attention.py", "gates.py", "values.py", "weights.py")
PROMPT, COUNT, ROUNDS = 512, 256, 3


def trained(steps: int) -> tuple[HybridLM, float]:
    """Return a model that has learnt, and its last loss in nats a byte."""
    torch.manual_seed(0)
    model = HybridLM("GA", 256, 256, num_layers=4, num_heads=4, window=128)
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-3)
    loss = torch.tensor(0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(data) - 257, (8,))
        rows = torch.stack([data[start : start + 257] for start in starts.tolist()])
        logits, _ = model(rows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.2f}", flush=True)
    return model.eval(), loss.item()


def always_wrong(known: Tensor) -> Any:
    """Return a draft that proposes other bytes than those that follow."""
    return lambda text: (known[len(text) : len(text) + 4] + 1) % 256


def measure(model: HybridLM, prompt: Tensor) -> dict[str, dict[str, Any]]:
    """Return seconds and calls of every way to continue a prompt, by name."""
    calls = [0]
    handle = model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    plain = model.generate(prompt, COUNT, temperature=0)
    ways: dict[str, dict[str, Any]] = {
        "alone": {},
        "prompt lookup, 4": {"draft_tokens": 4},
        "prompt lookup, 8": {"draft_tokens": 8},
        "always wrong, 4": {"draft": always_wrong(plain[0])},
    }
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for _ in range(ROUNDS):
        for name, options in ways.items():
            calls[0] = 0
            before = time.perf_counter()
            tokens = model.generate(prompt, COUNT, temperature=0, **options)
            rows[name]["seconds"].append(time.perf_counter() - before)
            rows[name] |= {"calls": calls[0], "equal": bool(torch.equal(tokens, plain))}
    handle.remove()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speculation with prompt lookup.")
    parser.add_argument("--steps", type=int, default=200, help="train for so many steps")
    parser.add_argument("--threads", type=int, default=1, help="run with so many threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, loss = trained(options.steps)
    load, cases = os.getloadavg()[0], {}
    for name in PROMPTS:
        data = bytearray((SOURCES / name).read_bytes()[:PROMPT])
        cases[name] = measure(model, torch.frombuffer(data, dtype=torch.uint8).long()[None])
    summary = {}
    for way in cases[PROMPTS[0]]:
        seconds = sum(min(case[way]["seconds"]) for case in cases.values())
        calls = sum(case[way]["calls"] for case in cases.values())
        made = COUNT * len(cases)
        summary[way] = {
            "tokens_per_second": round(made / seconds, 1),
            "tokens_per_call": round(made / calls, 2),
            "equal": all(case[way]["equal"] for case in cases.values()),
        }
        print(way, summary[way])
    sizes = {"parameters": sum(p.numel() for p in model.parameters()), "loss": round(loss, 3)}
    report = {**describe_system(threads=options.threads, load=load), **sizes}
    write_json(
        {**report, "prompt": PROMPT, "count": COUNT, "ways": summary, "cases": cases}, RESULT
    )


if __name__ == "__main__":
    main()
