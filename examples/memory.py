"""Show what the memory can and cannot do: laws without training, with their closed forms. Seconds.

    python examples/memory.py

Keys are random unit vectors of width d unless said, values too; a pair (k, v) is recalled with
amplitude ⟨v, Sᵀk⟩: 1 is perfect, 0 is gone. Computed by the op itself, in float64.

collisions    N pairs at once: mean ‖Sᵀk − v‖², and, without a closed form, how often the nearest of
              256 values is the right one
overwrite     some keys of an orthonormal set are written again with other values
clearing      256 pairs, then tokens that erase: how much of ‖S‖² is left
stale         256 pairs, perhaps a reset, then 16 others: amplitude of the last 32 of the first
retention     a needle, then T other tokens: a repeated sentence of n keys, or fresh keys
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from laws import delta_error, gated_error, overwritten_error
from plots import Point, draw, name_ends, panels, save, table
from torch import Tensor
from torch.nn import functional

from gdn_ops import gated_delta

D = 64
"""Width of keys and of values."""

SENTENCE = 16
"""Different keys of the repeated haystack."""

LENGTHS = (64, 128, 256, 512, 1024, 2048)
"""Tokens after the needle."""


@dataclass(frozen=True)
class Setting:
    """One member of the family with constant gates."""

    rule: str
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def label(self) -> str:
        decay = f", α = {self.alpha}" if "gated" in self.rule else ""
        step = f", β = {self.beta:g}" if "delta" in self.rule else ""
        return f"{self.rule.replace('_', ' ')}{decay}{step}"


COLLIDING = (
    Setting("linear"),
    Setting("gated", 0.98),
    Setting("delta"),
    Setting("delta", beta=0.5),
    Setting("gated_delta", 0.98),
)
WRITING = tuple(by for by in COLLIDING if by.beta == 1)
KEEPING = (
    Setting("linear"),
    Setting("gated", 0.999),
    Setting("delta"),
    Setting("delta", beta=0.1),
    Setting("gated_delta", 0.999, 0.1),
)


class Draws:
    """Random keys and values of `memories` memories side by side."""

    def __init__(self, memories: int, seed: int = 0) -> None:
        self.memories = memories
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        shape = (self.memories, *shape)
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def unit(self, count: int) -> Tensor:
        """Return (memories, count, D), unit vectors."""
        return functional.normalize(self.normal(count, D), dim=-1)

    def orthonormal(self) -> Tensor:
        """Return (memories, D, D), whose rows are an orthonormal basis."""
        return torch.linalg.qr(self.normal(D, D))[0]


def write(k: Tensor, v: Tensor, by: Setting, state: Tensor | None = None) -> Tensor:
    """Write pairs (memories, T, D) one after another; return the memory (memories, 1, D, D)."""
    k, v = k[:, :, None], v[:, :, None]
    gates: dict[str, Tensor] = {"beta": k.new_full(k.shape[:3], by.beta)}
    if "gated" in by.rule:
        gates["alpha"] = k.new_full(k.shape[:3], by.alpha)
    return gated_delta(k, k, v, rule=by.rule, initial_state=state, return_state=True, **gates)[1]


def recall(memory: Tensor, k: Tensor) -> Tensor:
    """Return Sᵀk, (memories, T, D)."""
    return k @ memory[:, 0]


def squared_error(memory: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ‖Sᵀk − v‖², (memories, T)."""
    return (recall(memory, k) - v).square().sum(-1)


def amplitude(memory: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ⟨v, Sᵀk⟩, (memories, T)."""
    return (recall(memory, k) * v).sum(-1)


def point(
    law: str, by: Setting, x: float, values: Tensor, expected: float | None, line: str = ""
) -> Point:
    """Average over memories; values is (memories, ...)."""
    each = values.flatten(1).mean(1)
    error = float(each.std() / len(each) ** 0.5)
    return Point(law, line or by.label, by.rule, x, float(each.mean()), error, expected)


def collisions(draws: Draws) -> Iterator[Point]:
    """N pairs in one memory of d key dimensions."""
    for pairs in (D // 4, D // 2, D, 2 * D, 4 * D):
        codes = draws.unit(256)
        pick = torch.randint(256, (draws.memories, pairs), generator=draws.random)
        k, v = draws.unit(pairs), codes.gather(1, pick[..., None].expand(-1, -1, D))
        for by in COLLIDING:
            memory, x = write(k, v, by), pairs / D
            if by.rule == "linear":
                expected = (pairs - 1) / D
            elif by.rule == "gated":
                expected = gated_error(pairs, D, by.alpha)
            else:
                expected = delta_error(pairs, D, by.alpha, by.beta)
            yield point("collisions", by, x, squared_error(memory, k, v), expected)
            nearest = (recall(memory, k) @ codes.mT).argmax(-1)
            yield point("nearest value", by, x, (nearest == pick).double(), None)


def overwrite(draws: Draws) -> Iterator[Point]:
    """Write 32 orthonormal keys, then the first of them again with other values."""
    keys = 32
    k = draws.orthonormal()[:, :keys]
    old, new = draws.unit(keys), draws.unit(keys)
    for again in (4, 8, 16, 24, 28):
        for by in WRITING:
            memory = write(torch.cat([k, k[:, :again]], 1), torch.cat([old, new[:, :again]], 1), by)
            written, kept = overwritten_error(keys, again, by.alpha, "delta" in by.rule)
            error = squared_error(memory, k[:, :again], new[:, :again])
            yield point("written again", by, again, error, written)
            error = squared_error(memory, k[:, again:], old[:, again:])
            yield point("left alone", by, again, error, kept)


def clearing(draws: Draws) -> Iterator[Point]:
    """Erase by tokens whose value is 0, or by the gate."""
    delta = Setting("delta")
    full = write(draws.unit(4 * D), draws.unit(4 * D), delta)
    energy = full.square().sum((1, 2, 3))
    basis, fresh = draws.orthonormal(), draws.unit(4 * D)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        ways = [
            ("α = 0", Setting("gated_delta", 0.0), fresh, 0.0),
            ("α = 0.9", Setting("gated", 0.9), fresh, 0.9 ** (2 * tokens)),
            ("α = 0.99", Setting("gated", 0.99), fresh, 0.99 ** (2 * tokens)),
            ("delta, random keys", delta, fresh, (1 - 1 / D) ** tokens),
        ]
        if tokens <= D:
            ways.append(("delta, orthonormal keys", delta, basis, 1 - tokens / D))
        for line, by, keys, expected in ways:
            k = keys[:, :tokens]
            left = write(k, torch.zeros_like(k), by, full).square().sum((1, 2, 3)) / energy
            yield point("clearing", by, tokens, left[:, None], expected, line)


def stale(draws: Draws) -> Iterator[Point]:
    """Ask for the last 32 of 256 pairs after 16 others, with and without a reset in between."""
    late, others = 32, 16
    k, v, after, values = (draws.unit(n) for n in (4 * D, 4 * D, others, others))
    ages = [others + m for m in range(late)]
    for by in (Setting("linear"), Setting("delta"), Setting("gated_delta", 1.0)):
        memory, factor = write(k, v, by), 1 - 1 / D
        if by.rule == "gated_delta":
            # One token of α = 0 that writes nothing.
            nothing = torch.zeros_like(k[:, :1])
            memory = write(k[:, :1], nothing, Setting("gated_delta", 0.0), memory)
            factor = 0.0
        factor = 1.0 if by.rule == "linear" else factor
        left = amplitude(write(after, values, by, memory), k[:, -late:], v[:, -late:])
        line = f"{by.rule}, reset" if by.rule == "gated_delta" else by.rule
        yield point("stale", by, others, left, sum(factor**m for m in ages) / late, line)


def retention(draws: Draws) -> Iterator[Point]:
    """Write a needle, then hay; ask for the needle."""
    needle, value = draws.unit(1), draws.unit(1)
    sentence, words = draws.unit(SENTENCE), draws.unit(SENTENCE)
    passes = -(-LENGTHS[-1] // SENTENCE)
    hays = {
        "repeated haystack": (sentence.repeat(1, passes, 1), words.repeat(1, passes, 1)),
        "fresh haystack": (draws.unit(LENGTHS[-1]), draws.unit(LENGTHS[-1])),
    }
    for law, (k, v) in hays.items():
        for by in KEEPING if law == "fresh haystack" else (*KEEPING[:3], REPEATED):
            memory, start = write(needle, value, Setting("linear")), 0
            for tokens in LENGTHS:
                memory = write(k[:, start:tokens], v[:, start:tokens], by, memory)
                start = tokens
                kept = by.alpha**tokens
                if "delta" in by.rule:
                    fresh = law == "fresh haystack"
                    kept *= (1 - by.beta / D) ** tokens if fresh else 1 - SENTENCE / D
                yield point(law, by, tokens, amplitude(memory, needle, value), kept)


REPEATED = Setting("gated_delta", 0.999)
"""With β = 1, so that four passes over a sentence have written all of it."""


def measure(memories: int) -> list[Point]:
    """Return every point of every law."""
    laws = (collisions, overwrite, clearing, stale, retention)
    return [p for i, law in enumerate(laws) for p in law(Draws(memories, i))]


def plot(points: list[Point], folder: Path) -> list[Path]:
    """Draw every law; return the files."""
    squared, pairs = "mean ‖Sᵀk − v‖²", "pairs over key width"
    kept = "amplitude of the needle over that written"
    sheets = {
        "collisions": (
            ("collisions", "more pairs than dimensions", pairs, squared),
            ("nearest value", "the trap: nearest of 256 values", pairs, "share of right answers"),
        ),
        "writing": (
            ("written again", "written again: the new value", "keys written again, of 32", squared),
            ("left alone", "left alone: the old value", "keys written again, of 32", squared),
            ("clearing", "clearing", "tokens that erase", "share of ‖S‖² that is left"),
        ),
        "retention": (
            ("repeated haystack", f"repeated haystack, {SENTENCE} keys", "tokens", kept),
            ("fresh haystack", "fresh haystack", "tokens", kept),
        ),
    }
    paths = []
    for name, sheet in sheets.items():
        figure, axes = panels(len(sheet), 4.6, 3.4)
        for axis, (law, *texts) in zip(axes, sheet, strict=True):
            is_log = law not in ("written again", "left alone")
            ends = draw(axis, points, law, *texts, is_log=is_log)
            if name == "retention":
                # Without a decay or a correction the spread grows with the haystack.
                axis.set_ylim(-0.2, 1.4)
            name_ends(axis, ends)
        paths.append(folder / f"{name}.png")
        save(figure, paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memories", type=int, default=128, help="to average over")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of plots and table")
    given = parser.parse_args(arguments)
    # The products of one chunk are small: a second thread costs more than it gives.
    torch.set_num_threads(1)
    points = measure(given.memories)
    paths = plot(points, given.out)
    rows = ",\n".join(json.dumps(asdict(p), ensure_ascii=False) for p in points)
    (given.out / "memory.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    for law in dict.fromkeys(p.law for p in points):
        print(f"{table(points, law)}\n")
    print("measured (closed form);", ", ".join(map(str, paths)))


if __name__ == "__main__":
    main()
