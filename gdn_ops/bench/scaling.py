"""Compare the forward of a long sequence with that of a short one, in a process of its own.

How cheap fresh memory pages are depends on what a process did before, and a long result needs many.

Run as `python -m gdn_ops.bench.scaling`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from gdn_ops.bench.child import answer, ask
from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.inputs import Setting, make_inputs
from gdn_ops.bench.peers import find_contender
from gdn_ops.bench.rows import Row
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.spec.language import Case, Sizes


def scaling_row(case: Case, times: int, name: str, s: Setting) -> Row | str:
    """Compare the time of a forward `times` as long with `times` the time of the short forward.

    Returns:
        The row, or why the process failed.
    """
    long = replace(case.sizes, T=case.sizes.T * times)
    sizes = {"short": asdict(case.sizes), "long": asdict(long)}
    samples = ask("gdn_ops.bench.scaling", {"name": name, "sizes": sizes, "setting": asdict(s)})
    if isinstance(samples, str):
        return samples
    longer, shorter = (Timing(tuple(samples[what])) for what in ("long", "short"))
    return Row(
        "scaling",
        case.name,
        name,
        "x",
        longer.median / shorter.median / times,
        longer.best / shorter.best / times,
        s.repeats,
        against=f"T={long.T} over {times} times T={case.sizes.T}",
    )


def _measure(order: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    s = Setting(**order["setting"])
    c = find_contender(order["name"])
    if isinstance(c, str):
        raise SystemExit(c)
    actions: dict[str, Run] = {}
    for what, sizes in order["sizes"].items():
        actions[what] = c.sequence(make_inputs(Sizes(**sizes), s.torch_dtype, s.device)).run
    with torch.no_grad():
        timing = interleave(actions, s.repeats, device=find_device(s.device))
    return {what: t.samples for what, t in timing.items()}


if __name__ == "__main__":
    answer(_measure)
