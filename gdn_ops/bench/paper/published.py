"""Hold figures that the paper publishes, arXiv 2412.06464, with the hardware that they are from."""

from __future__ import annotations

from gdn_ops.bench.paper.break_even import BreakEven, break_even

HARDWARE = "one H100, models of 1.3 billion parameters, a training step of 32k tokens"
"""Name the machine of figure 3."""

LENGTHS = (2048, 4096, 8192, 16384)

THROUGHPUT: dict[str, tuple[float, ...]] = {
    "attention": (55.0, 47.6, 37.9, 26.5),
    "h1": (54.6, 53.4, 52.5, 52.5),
    "h2": (50.0, 49.6, 49.4, 49.0),
    "mamba2": (48.1, 48.2, 48.2, 48.1),
    "gdn": (46.1, 45.7, 45.8, 45.9),
    "deltanet": (45.9, 45.6, 45.6, 45.2),
}
"""Figure 3: thousands of tokens a second at LENGTHS. Its curves of Samba and Mamba1 have no
counterpart here; its Mamba2 is the layer of its authors, and its attention a Transformer++."""


def published_break_even(name: str) -> BreakEven:
    """Return from which length on a mixer of figure 3 is faster than its attention."""
    own, other = (
        {length: 1 / x for length, x in zip(LENGTHS, THROUGHPUT[mixer], strict=True)}
        for mixer in (name, "attention")
    )
    return break_even(own, other)


def kept(name: str) -> float | None:
    """Return the speed of a mixer at the longest length over that at the shortest."""
    speeds = THROUGHPUT.get(name)
    return None if speeds is None else speeds[-1] / speeds[0]
