"""Measure the demo: accuracy, resets, backends, decode. Nothing here prints."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gdn_ops.demo.memory import Memory, Operands, continue_text, operands, predict, read_through
from gdn_ops.dispatch import explain
from gdn_ops.spec.errors import BackendUnsupportedError
from gdn_ops.spec.ops import RULES

AFTER = 400
"""Bytes after a boundary that count as shortly after it."""

ROUNDS = 3
"""Count the times each backend is timed on each length, in turns with the others."""

PREFIX = 1024
"""Tokens on which backends are compared with the definition, which is slow."""


@dataclass(frozen=True)
class ResetEffect:
    """Hold the effect of alpha = 0 at chapter boundaries.

    Attributes:
        boundaries: positions of the first byte of every chapter but the first.
        kept, cleared: accuracy on the bytes shortly after a boundary, without and with resets.
        kept_later, cleared_later: the same on all other bytes.
        leak_kept, leak_cleared: largest change of o after the last boundary when everything
            before it (but the last context) is replaced by other bytes.
    """

    boundaries: tuple[int, ...]
    kept: float
    cleared: float
    kept_later: float
    cleared_later: float
    leak_kept: float
    leak_cleared: float


@dataclass(frozen=True)
class BackendRow:
    """Hold the times and the error of one backend on the operands of the demo.

    Attributes:
        name: of the backend.
        prefix: median seconds on the prefix, after a call of that length that does not count.
        whole: the same on the whole text; None where that is no longer than the prefix, or where
            the definition would be too slow.
        first: seconds that the first calls took beyond these medians: mostly compiling.
        error: worst over heads of max |o - o64| / max |o64| on the prefix.
        reason: why it was not run, or None.
    """

    name: str
    prefix: float = 0.0
    whole: float | None = None
    first: float = 0.0
    error: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Decode:
    """Hold a continuation and how it compares with one prefill over text and continuation.

    Attributes:
        added: the bytes that were generated.
        seconds: of all steps together.
        error: max |o_step - o_prefill| / max |o_prefill|.
        same_bytes: number of positions at which both predict the same next byte.
    """

    added: bytes
    seconds: float
    error: float
    same_bytes: int


def hit_rate(predicted: Tensor, x: Tensor, where: Tensor | None = None) -> float:
    """Return the share of bytes that were predicted correctly.

    Args:
        predicted: (T,) predicted[t] is for x[t + 1].
        x: (T,) the bytes.
        where: (T - 1,) bool, which of x[1:] count; all when None.
    """
    hits = (predicted[:-1] == x[1:]).float()
    if where is not None:
        hits = hits[where]
    return float(hits.mean()) if len(hits) else float("nan")


def majority_accuracy(x: Tensor) -> float:
    """Return the accuracy of always predicting the text's most frequent byte."""
    common = torch.bincount(x, minlength=256).argmax()
    return hit_rate(common.expand(len(x)), x)


def table_accuracy(x: Tensor, contexts: tuple[int, ...]) -> float:
    """Return the accuracy of an exact table: what came last after the longest known context."""
    text, table, hits = bytes(x.tolist()), dict[bytes, int](), 0
    for t in range(len(text) - 1):
        keys = [text[t - n + 1 : t + 1] for n in sorted(contexts, reverse=True) if n <= t + 1]
        guess = next((table[key] for key in keys if key in table), -1)
        hits += guess == text[t + 1]
        table.update((key, text[t + 1]) for key in keys)
    return hits / max(1, len(text) - 1)


def rule_accuracies(
    memory: Memory, x: Tensor, given: Operands, backend: str = "auto"
) -> list[tuple[str, float]]:
    """Return the next-byte accuracy of each rule of the family."""
    accuracies = []
    for rule in RULES:
        o, _ = read_through(given, rule.name, backend)
        accuracies.append((rule.name, hit_rate(predict(memory, o)[0], x)))
    return accuracies


def boundaries(text: bytes) -> tuple[int, ...]:
    """Return where chapters start, byte 0 left out; the middle of the text if there are none."""
    starts = [m.start() for m in re.finditer(rb"^(?:Chapter |#+ )", text, re.MULTILINE)]
    return tuple(start for start in starts if start > 0) or (len(text) // 2,)


def reset_effect(
    memory: Memory, x: Tensor, cuts: tuple[int, ...], backend: str = "auto"
) -> ResetEffect:
    """Compare a memory that is cleared at every boundary with one that is not."""
    soon = torch.zeros(len(x) - 1, dtype=torch.bool, device="cpu")
    for cut in cuts:
        soon[cut : cut + AFTER] = True
    rates, leaks = [], []
    last = cuts[-1]
    other = x.clone()
    # The last context before the boundary stays: it is in the keys after it.
    changed = max(0, last - max(memory.contexts) - 1)
    other[:changed] = other[:changed].flip(0)
    for resets in ((), cuts):
        o, _ = read_through(operands(memory, x, resets), backend=backend)
        predicted = predict(memory, o)[0]
        rates += [hit_rate(predicted, x, soon), hit_rate(predicted, x, ~soon)]
        o_other, _ = read_through(operands(memory, other, resets), backend=backend)
        leaks.append(float((o - o_other)[:, last:].abs().max()))
    return ResetEffect(cuts, rates[0], rates[2], rates[1], rates[3], leaks[0], leaks[1])


def _prefix(given: Operands, tokens: int, dtype: torch.dtype) -> Operands:
    cut = {name: getattr(given, name)[:, :tokens].to(dtype) for name in ("q", "k", "v", "alpha")}
    return replace(given, **cut)


def definition(given: Operands) -> Tensor:
    """Return o of the definition in float64 on the prefix, (1, T', H, V)."""
    return read_through(_prefix(given, PREFIX, torch.float64), backend="naive")[0]


def backend_rows(
    names: Sequence[str],
    given: Operands,
    exact: Tensor,
    now: Callable[[str], None] = lambda text: None,
) -> list[BackendRow]:
    """Compare backends with the definition, and time them in turns, or say why one did not run.

    A backend may compile for each length: so each length is run once before any time counts.

    Args:
        names: of the backends.
        given: operands of the whole text.
        exact: what `definition` returned for them.
        now: is told what starts.
    """
    prefix = _prefix(given, PREFIX, given.q.dtype)
    is_longer = given.q.shape[1] > PREFIX
    warm: dict[str, _Warm] = {}
    reasons: dict[str, str] = {}
    for name in names:
        now(f"backend {name}")
        try:
            alone = name == "naive" or not is_longer
            warm[name] = _warm_up(name, (prefix,) if alone else (prefix, given), exact)
        except BackendUnsupportedError as refusal:
            reasons[name] = " ".join(str(refusal).split())
    now("backends in turns")
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(ROUNDS):
        order = list(warm)[turn % max(1, len(warm)) :] + list(warm)[: turn % max(1, len(warm))]
        for name in order:
            for i, tokens in enumerate(warm[name].lengths):
                seconds, _ = _timed(name, tokens)
                times.setdefault((name, i), []).append(seconds)
    rows = []
    for name in names:
        if name in reasons:
            rows.append(BackendRow(name, reason=reasons[name]))
            continue
        medians = [statistics.median(times[name, i]) for i in range(len(warm[name].lengths))]
        first = max(0.0, sum(warm[name].seconds) - sum(medians))
        whole = medians[1] if len(medians) > 1 else None
        rows.append(BackendRow(name, medians[0], whole, first, warm[name].error))
    return rows


@dataclass(frozen=True)
class _Warm:
    """Hold a backend that has run once on each length: the operands, its seconds, its error."""

    lengths: tuple[Operands, ...]
    seconds: tuple[float, ...]
    error: float


def _timed(name: str, given: Operands) -> tuple[float, Tensor]:
    start = time.perf_counter()
    o, _ = read_through(given, backend=name)
    return time.perf_counter() - start, o


def _warm_up(name: str, lengths: tuple[Operands, ...], exact: Tensor) -> _Warm:
    """Run a backend once on each length; the first is compared with the definition.

    Raises:
        BackendUnsupportedError: it is not available here, or cannot run this.
    """
    info = next(info for info in explain.list_backends() if info.name == name)
    if info.status != "available":
        raise BackendUnsupportedError(info.status)
    results = [_timed(name, given) for given in lengths]
    difference = (results[0][1][:, : exact.shape[1]].double() - exact).abs().amax((0, 1, 3))
    error = float((difference / exact.abs().amax((0, 1, 3))).max())
    return _Warm(lengths, tuple(seconds for seconds, _ in results), error)


def decode(memory: Memory, x: Tensor, count: int, backend: str = "auto") -> Decode:
    """Continue a text by `count` bytes and compare the steps with one prefill over all."""
    o, state = read_through(operands(memory, x), backend=backend)
    first = int(predict(memory, o)[0, -1])
    start = time.perf_counter()
    added, stepped = continue_text(memory, x, state, first, count, backend)
    seconds = time.perf_counter() - start
    whole, _ = read_through(operands(memory, torch.cat((x, added))), backend=backend)
    again = whole[:, len(x) :]
    error = float((stepped - again).abs().max() / again.abs().max())
    same = int((predict(memory, stepped) == predict(memory, again)).sum())
    return Decode(bytes(added.tolist()), seconds, error, same)
