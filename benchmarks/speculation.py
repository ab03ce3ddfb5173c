"""Measure speculation on a CPU: `python benchmarks/speculation.py`.

A random HybridLM (pattern GA, hidden 512, four layers, float32) continues a text by its most
likely tokens: alone, by prompt lookup, and with drafts that know what it will say and are right
about each token with a given chance, in turns. The text is a prompt and what the model said behind
it: by then it goes round in a circle, which is as repetitive as text can be. The other drafts say
what a text is worth that repeats less.
How often prompt lookup is right about real text is counted apart, without a model: on files of
gdn_ops, as bytes, as if a model wrote them. `results/speculation.json` has tokens a second of the
best of several rounds, and tokens a call.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.nn import HybridLM, PromptLookup

RESULT = Path(__file__).parent / "results" / "speculation.json"
SOURCES = Path(__file__).parents[1] / "gdn_ops" / "nn"
FILES = ("attention.py", "gates.py", "values.py", "weights.py")
VOCABULARY, PROMPT, BEFORE, COUNT = 4096, 64, 256, 64
SHARES = (1.0, 0.8, 0.5, 0.0)
NUMBERS = (4, 8)


def knowing(tokens: Tensor, share: float, number: int) -> Callable[[Tensor], Tensor]:
    """Return a draft that is right about a share of the tokens (length,)."""
    generator = torch.Generator().manual_seed(0)
    is_wrong = torch.rand(len(tokens), generator=generator, dtype=torch.float32) >= share
    said = torch.where(is_wrong, (tokens + 1) % VOCABULARY, tokens)
    return lambda text: said[len(text) : len(text) + number]


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return tokens a second and a call of every way to continue a prompt, by name."""
    torch.manual_seed(0)
    sizes = {"num_layers": 4, "num_heads": 4, "window": 512}
    model = HybridLM("GA", VOCABULARY, 512, **sizes).eval()
    prompt = model.generate(torch.randint(VOCABULARY, (1, PROMPT)), BEFORE, temperature=0)
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    plain = model.generate(prompt, COUNT, temperature=0)
    ways: dict[str, dict[str, Any]] = {"alone": {}}
    for number in NUMBERS:
        ways[f"prompt lookup, {number}"] = {"draft_tokens": number}
        for share in SHARES:
            draft = {"draft": knowing(plain[0], share, number), "draft_tokens": number}
            ways[f"right {share:.0%}, {number}"] = draft
    best, results = dict.fromkeys(ways, float("inf")), {}
    for _ in range(rounds):
        for name, options in ways.items():
            calls[0] = 0
            before = time.perf_counter()
            tokens = model.generate(prompt, COUNT, temperature=0, **options)
            best[name] = min(best[name], time.perf_counter() - before)
            results[name] = {
                "tokens_per_second": round(COUNT / best[name], 1),
                "tokens_per_call": round(COUNT / calls[0], 2),
                "times_alone": round(best["alone"] / best[name], 2),
                "equal": bool(torch.equal(tokens, plain)),
            }
    return results


def looked_up(name: str, number: int) -> float:
    """Return bytes a call, if a model wrote a file and prompt lookup proposed its bytes."""
    data = torch.frombuffer(bytearray((SOURCES / name).read_bytes()), dtype=torch.uint8).long()
    look, place, calls = PromptLookup(number, longest=8), len(data) // 2, 0
    first = place
    while place < len(data):
        proposed, said = look(data[:place]), data[place : place + number]
        count = min(len(proposed), len(said))
        accepted = int((proposed[:count] == said[:count]).long().cumprod(0).sum())
        place, calls = place + accepted + 1, calls + 1
    return round((place - first) / calls, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speculation on a CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="measure every way so many times")
    parser.add_argument("--threads", type=int, default=1, help="run with so many threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load, ways = os.getloadavg()[0], measure(options.rounds)
    for name, row in ways.items():
        print(f"{name:20} {row}")
    files = {f"{name}, {n}": looked_up(name, n) for name in FILES for n in NUMBERS}
    print(files)
    report = describe_system(
        threads=options.threads, load=load, prompt=PROMPT + BEFORE, count=COUNT
    )
    write_json({**report, "ways": ways, "files": files}, RESULT)


if __name__ == "__main__":
    main()
