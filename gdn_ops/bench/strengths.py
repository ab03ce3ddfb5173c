"""Compare the time of a forward with erase and write with one whose strength is beta (GDN-2)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.device import find_device
from gdn_ops.bench.inputs import Inputs, Setting, draw_strengths
from gdn_ops.bench.rows import Result, Row
from gdn_ops.bench.turns import REST, interleave
from gdn_ops.bench.verify import (
    ROUNDING_BAND,
    ZERO_TOKENS,
    Check,
    first_tokens,
    head_axes,
    refuse,
    relative_error,
)
from gdn_ops.spec.language import Case

AGAINST = "a strength of beta"


def strengths_row(case: Case, name: str, x: Inputs, s: Setting, result: Result) -> None:
    """Add the row of a backend, and its check, or the reason why it does not run the call.

    Args:
        case: of the operands.
        name: of the backend.
        x: the operands of sequences; erase (B, T, HV, K) and write (B, T, HV, V) are drawn.
        s: the setting.
        result: takes the row, the check or the reason.

    Raises:
        RefusedError: the backend's o is wrong, so that its time means nothing.
    """
    erase, write = draw_strengths(case.sizes, s.device)
    apart: dict[str, Any] = {"log_alpha": x.log_alpha, "erase": erase, "write": write}
    reasons = dict(ops.explain(x.q, x.k, x.v, **apart, backend=name).reasons)[name]
    if reasons:
        result.skipped.append((f"strengths, {case.name}", name, "; ".join(reasons)))
        return
    with torch.no_grad():
        check = _check(case, name, x, erase, write)
        result.checks.append(check)
        refuse([check])
        run = functools.partial(ops.gated_delta, x.q, x.k, x.v, backend=name)
        runs = {
            "apart": functools.partial(run, **apart),
            "beta": functools.partial(run, log_alpha=x.log_alpha, beta=x.beta),
        }
        rest = REST if s.device == "cpu" else 0.0
        timing = interleave(runs, s.repeats, device=find_device(s.device), rest=rest)
    long, short = timing["apart"], timing["beta"]
    median, best = long.median / short.median, long.best / short.best
    result.rows.append(
        Row("strengths", case.name, name, "x", median, best, s.repeats, against=AGAINST)
    )


def _check(case: Case, name: str, x: Inputs, erase: Tensor, write: Tensor) -> Check:
    """Compare o of the first tokens with the definition, which may round as often as it does."""
    few = first_tokens(x)
    strengths = {"erase": erase[:, :ZERO_TOKENS], "write": write[:, :ZERO_TOKENS]}

    def o(y: Inputs, backend: str, **given: Any) -> Tensor:
        out: Tensor = ops.gated_delta(
            y.q, y.k, y.v, log_alpha=y.log_alpha, backend=backend, **given
        )
        return out

    exact = o(few.double(), "naive", **{n: y.double() for n, y in strengths.items()})
    axes = head_axes(exact)
    working = relative_error(o(few, "naive", **strengths), exact, axes)
    allowed = 2 * working + ROUNDING_BAND * torch.finfo(x.q.dtype).eps
    error = relative_error(o(few, name, **strengths), exact, axes)
    return Check(name, case.name, "o with erase and write", error, allowed)
