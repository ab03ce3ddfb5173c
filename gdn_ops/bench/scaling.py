"""Compare the forward of a long sequence with that of a short one, in a process of its own.

How cheap fresh memory pages are depends on what a process did before, and a long result needs many.
The process is this file, run as `python -m gdn_ops.bench.scaling JSON`.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.child import ask
from gdn_ops.bench.inputs import Setting, make_inputs
from gdn_ops.bench.rows import Row, make_row
from gdn_ops.bench.runner import Timing, interleave
from gdn_ops.spec.language import Case, Sizes


def scaling_row(case: Case, times: int, name: str, s: Setting) -> Row | str:
    """Compare the time of a forward `times` as long with `times` the time of the short forward.

    Returns:
        The row, or why the process failed.
    """
    order = {
        "name": name,
        "sizes": asdict(case.sizes),
        "times": times,
        "setting": asdict(s),
        "threads": torch.get_num_threads(),
    }
    samples = ask("gdn_ops.bench.scaling", order)
    if isinstance(samples, str):
        return samples
    longer, shorter = (Timing(tuple(samples[what])) for what in ("long", "short"))
    return make_row(
        "scaling",
        case.name,
        name,
        "x",
        longer.median / shorter.median / times,
        longer.best / shorter.best / times,
        s.repeats,
        against=f"T={case.sizes.T * times} over {times} times T={case.sizes.T}",
        judged=s.judged,
    )


def _forward(name: str, sizes: Sizes, s: Setting) -> functools.partial[Tensor]:
    x = make_inputs(sizes, s.torch_dtype, s.device)
    return functools.partial(
        ops.gated_delta, x.q, x.k, x.v, log_alpha=x.log_alpha, beta=x.beta, backend=name
    )


def _main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    s, sizes = Setting(**order["setting"]), Sizes(**order["sizes"])
    long = replace(sizes, T=sizes.T * order["times"])
    actions = {"short": _forward(order["name"], sizes, s), "long": _forward(order["name"], long, s)}
    with torch.no_grad():
        timing = interleave(actions, s.repeats, device=s.device)
    print(json.dumps({what: list(t.samples) for what, t in timing.items()}))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
