"""Measure many short sequences: packed in one row by cu_seqlens, and as the rows of a batch.

The batch is padded to the longest sequence with tokens that change nothing, as a user without
packing does: log_alpha = beta = 0 at the end of a row. Both compute the same numbers, which are
compared with the definition of the batch in float64 before anything is timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gdn_ops.bench.contender import Contender
from gdn_ops.bench.device import find_device
from gdn_ops.bench.inputs import Inputs, Setting, make_inputs, make_output_gradient
from gdn_ops.bench.peers import find_contender
from gdn_ops.bench.rows import PACKED, Result, timed_rows
from gdn_ops.bench.turns import interleave
from gdn_ops.bench.verify import ROUNDING_BAND, Check, RefusedError, head_axes, relative_error
from gdn_ops.spec.language import Case

RESULTS = ("o", "state", "dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate")


def pack(case: Case, s: Setting) -> tuple[Inputs, Tensor]:
    """Draw a case with its cu_seqlens and a state of zeros; return it and where its tokens lie.

    Returns:
        The inputs, and (T,) int64: the place of every token among those of the padded batch.
    """
    size = case.sizes
    drawn = list(itertools.islice(itertools.cycle(case.lengths), size.N))
    lengths = torch.tensor(drawn, dtype=torch.int64, device="cpu")
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    inside = torch.arange(max(case.lengths), device="cpu") < lengths[:, None]
    x = make_inputs(size, s.torch_dtype, s.device)
    shape = (size.N, size.HV, size.K, size.V)
    state = torch.zeros(shape, dtype=torch.float32, device=s.device)
    places = inside.flatten().nonzero().flatten()
    return replace(x, state=state, cu_seqlens=bounds.to(s.device)), places.to(s.device)


def pad(x: Tensor, places: Tensor, sequences: int, longest: int) -> Tensor:
    """Spread packed tokens (1, T, ...) over the rows of a batch (N, longest, ...) of zeros."""
    rows = x.new_zeros(sequences * longest, *x.shape[2:])
    padded: Tensor = rows.index_copy(0, places, x[0]).unflatten(0, (sequences, longest))
    return padded


def results(c: Contender, x: Inputs, d_o: Tensor, gradients: bool) -> list[Tensor]:
    """Return o, the final state and, if wanted, the gradients of all operands."""
    if not gradients:
        with torch.no_grad():
            return list(c.sequence(x).results())
    leaves = x.with_grad()
    o, state = c.sequence(leaves).results()
    return [o.detach(), state.detach(), *torch.autograd.grad(o, leaves.operands(), d_o)]


def packed_rows(case: Case, names: list[str], s: Setting, result: Result) -> None:
    """Check backends on a packed case and on its batch, then add their times to a result.

    Raises:
        RefusedError: a backend's numbers are wrong; none was timed on that case.
    """
    x, places = pack(case, s)
    spread: Callable[[Tensor], Tensor] = functools.partial(
        pad, places=places, sequences=case.sizes.N, longest=max(case.lengths)
    )
    d_o = make_output_gradient(case.sizes, s.torch_dtype, s.device)
    batch = replace(x.map(lambda y: y if y is x.state else spread(y)), cu_seqlens=None)
    calls = {"packed": (x, d_o), "batch": (batch, spread(d_o))}
    contenders = [c for name in names if not isinstance(c := find_contender(name), str)]
    can: dict[str, list[str]] = {}
    for c in contenders:
        lacks = {
            what: "; ".join(c.reasons(y, what))
            for what, y in (("forward", x), ("forward+backward", x.with_grad()))
        }
        can[c.name] = [what for what, why in lacks.items() if not why]
        left_out = [(PACKED[what] + f", {case.name}", c.name, why) for what, why in lacks.items()]
        result.skipped += [entry for entry in left_out if entry[2]]
    contenders = [c for c in contenders if can[c.name]]
    result.checks += _verify(case, contenders, can, calls, places)
    for what, label in PACKED.items():
        able = [c for c in contenders if what in can[c.name]]
        with torch.set_grad_enabled(what != "forward"):
            actions = {
                c.name + suffix: c.run(what, *calls[form])
                for c in able
                for form, suffix in (("packed", ""), ("batch", " batch"))
            }
            timing = interleave(actions, s.repeats, device=find_device(s.device))
        for c in able:
            other = f"{c.name} batch"
            pair = {name: timing[name] for name in (c.name, other)}
            result.rows += timed_rows(label, case.name, "ms", pair, other)


def _verify(
    case: Case,
    contenders: list[Contender],
    can: dict[str, list[str]],
    calls: dict[str, tuple[Inputs, Tensor]],
    places: Tensor,
) -> list[Check]:
    """Return the worst check of every contender, packed and as a batch, against float64."""
    batch, d_o = calls["batch"]
    naive = find_contender("naive")
    assert not isinstance(naive, str)
    exact = results(naive, batch.double(), d_o.double(), True)
    working = results(naive, batch, d_o, True)
    band = ROUNDING_BAND * torch.finfo(batch.q.dtype).eps

    def tokens(y: Tensor, i: int, is_batch: bool) -> Tensor:
        """Return the tokens of a result, packed; states as they are."""
        if RESULTS[i] in ("state", "dstate") or not is_batch:
            return y
        return y.flatten(0, 1)[places].unsqueeze(0)

    def off(y: Tensor, i: int, is_batch: bool) -> float:
        z = tokens(exact[i], i, True)
        axes = (0, 2, 3) if RESULTS[i] in ("state", "dstate") else head_axes(z)
        return relative_error(tokens(y, i, is_batch), z, axes)

    allowed = [2 * off(y, i, True) + band for i, y in enumerate(working)]
    checks = []
    for c in contenders:
        found = [
            Check(
                c.name, f"{case.name}, {form}", RESULTS[i], off(y, i, form == "batch"), allowed[i]
            )
            for form, (x, d) in calls.items()
            for i, y in enumerate(results(c, x, d, "forward+backward" in can[c.name]))
        ]
        failed = [check for check in found if not check.passed]
        checks.append(max(failed or found, key=lambda check: check.error / check.allowance))
    wrong = "; ".join(str(check) for check in checks if not check.passed)
    if wrong:
        raise RefusedError(f"no times are shown, the numbers are wrong: {wrong}")
    return checks
