"""Measure a backend's configurations and print rows to paste into its table.

A backend takes part by exposing `engine(call)`, a dataclass with the fields `chunk_size` and
`chunks`; then every pair of CHUNK_SIZES and CHUNKS is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from gdn_ops import library, registry
from gdn_ops.bench.inputs import Setting, find_case, make_inputs, make_output_gradient, with_grad
from gdn_ops.bench.peers import Comparator
from gdn_ops.bench.runner import Timing, interleave
from gdn_ops.bench.verify import verify
from gdn_ops.bind import Call, bind
from gdn_ops.gated_delta import GATED_DELTA
from gdn_ops.spec import Case

CHUNK_SIZES = (16, 32, 64)
CHUNKS = (1, 2, 4, 8)


def _variant(backend: registry.Backend, chunk_size: int, chunks: int) -> registry.Backend:
    """Return a copy of a backend whose engine cuts calls in another way."""
    kind: Any = type(backend)

    def engine(self: Any, call: Call) -> Any:
        return replace(kind.engine(self, call), chunk_size=chunk_size, chunks=chunks)

    found: registry.Backend = type(kind.__name__, (kind,), {"engine": engine})()
    return found


def _comparator(backend: registry.Backend, name: str) -> Comparator:
    defaults = {n: default for n, default, _ in GATED_DELTA.parameters()}

    def run(x: Any) -> torch.Tensor:
        return library.run(backend, bind(GATED_DELTA, defaults | x._asdict()))[0]

    return Comparator(name, run)


def tune(name: str, cases: Sequence[str], setting: Setting) -> Iterator[str]:
    """Measure forward, and forward and backward, of every candidate in turns.

    Args:
        name: of the backend.
        cases: names; qwen-16-32-2048 without.
        setting: dtype, device, repeats.

    Yields:
        Lines to print: a row per candidate, then the row to paste.

    Raises:
        ValueError: the backend cannot be tuned.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        raise ValueError(f"backend {name!r} is not available: {backend}")
    if not hasattr(backend, "engine"):
        raise ValueError(f"backend {name!r} exposes no configurations to tune")
    pairs = [(size, chunks) for size in CHUNK_SIZES for chunks in CHUNKS]
    candidates = {str(p): _comparator(_variant(backend, *p), str(p)) for p in pairs}
    for name in cases or ["qwen-16-32-2048"]:
        case = find_case(name)
        times = _measure(case, candidates, setting)
        yield f"{case}, {setting.dtype}: (tokens per chunk, chunks per segment)"
        for pair in candidates:
            row = (f"{what} {t[pair].median * 1e3:8.2f} ms" for what, t in times.items())
            yield f"{pair:>9}  " + "  ".join(row)
        best = min(candidates, key=lambda pair: times["forward+backward"][pair].median)
        yield f'fastest forward and backward: "{setting.device.partition(":")[0]}": {best},'


def _measure(
    case: Case, candidates: dict[str, Comparator], setting: Setting
) -> dict[str, dict[str, Timing]]:
    """Check the candidates on a case, then time them in turns."""
    x = make_inputs(case.sizes, setting.torch_dtype, setting.device)
    d_o = make_output_gradient(case.sizes, setting.torch_dtype, setting.device)
    verify(list(candidates.values()), case, x, gradients=True)
    leaves = with_grad(x)

    def forward(c: Comparator) -> Callable[[], object]:
        return lambda: c.run(x)

    def both(c: Comparator) -> Callable[[], object]:
        return lambda: torch.autograd.grad(c.run(leaves), leaves, d_o)

    times = {}
    for what, make in (("forward", forward), ("forward+backward", both)):
        actions = {name: make(c) for name, c in candidates.items()}
        times[what] = interleave(actions, setting.repeats, device=setting.device)
    return times
