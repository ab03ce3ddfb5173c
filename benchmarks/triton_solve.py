"""Judge the inverse of `triton` in one pass of TF32: `python benchmarks/triton_solve.py`.

T is rounded to bfloat16 in the end, so its products are one pass of TF32, where three passes would
be nearly float32. Calls of bfloat16 are drawn with keys that repeat or nearly do, strengths up to 2
and every kind of gate, in chunks of 64, and judged by the oracle on outputs and states, one call in
seven on gradients too. TF32 operands are cut off, as tensor cores do, not rounded.
`results/triton-solve.json` has the worst share of what the oracle allows, and the call.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gdn_ops.backends.triton.emulation import builder
from gdn_ops.backends.triton.host import forward
from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge

RESULT = Path(__file__).parent / "results" / "triton-solve.json"


def cut_to_tf32(values: Any) -> Any:
    """Return float32 values without the bits that TF32 does not have."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    cut = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), cut, values).astype(np.float32)


def draw(rng: random.Random) -> Example:
    """Draw a call of two chunks at most, of one or two heads."""
    return Example(
        dtype="bfloat16",
        T=rng.choice([63, 64, 65, 100, 128]),
        R=rng.choice([1, 2]),
        K=rng.choice([8, 16, 32]),
        V=16,
        gate=rng.choice(["uniform", "slow", "extreme", "one", "strong"]),
        beta=rng.choice(["unit", "wide", "wide", "edges"]),
        keys=rng.choice(["random", "parallel", "repeated", "repeated"]),
        initial_state=rng.random() < 0.5,
        qk_l2norm=rng.random() < 0.5,
        log_gate=rng.random() < 0.5,
        chunk_size=64,
        seed=rng.randrange(10**6),
    )


def main() -> int:
    """Judge the calls; return 1 if any is wrong, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--seed", type=int, default=7, help="of the draws (default: 7)")
    parser.add_argument(
        "--products", choices=("tf32", "tf32x3"), default="tf32", help="of the inverse"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    asked = parser.parse_args()
    rng, wrong = random.Random(asked.seed), 0
    worst: dict[str, dict[str, Any]] = {}
    with (
        mock.patch.object(forward, "solve_precision", lambda call: asked.products),
        mock.patch.object(builder, "round_to_tf32", cut_to_tf32),
    ):
        for _ in range(asked.calls):
            example = draw(rng)
            verdict = judge(example, "triton", gradients=rng.random() < 0.15)
            wrong += not verdict.passed
            kind = f"keys {example.keys}, beta {example.beta}"
            known = worst.setdefault(kind, {"calls": 0, "worst": 0.0})
            known["calls"] += 1
            if verdict.worst > known["worst"]:
                known |= {"worst": verdict.worst, "where": verdict.where, "call": repr(example)}
    result = {"system": describe_system(), "seed": asked.seed, "products": asked.products}
    write_json(result | {"calls": asked.calls, "wrong": wrong, "worst": worst}, asked.out)
    for kind in sorted(worst):
        print(
            f"{kind:32} {worst[kind]['calls']:6} calls, {worst[kind]['worst']:.3f} of what may be"
        )
    print(f"{asked.calls} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
