"""Run the demo, with a progress bar while it works, and print what it finds as tables and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gdn_ops.demo import measure
from gdn_ops.demo.measure import BackendRow, Decode, ResetEffect
from gdn_ops.demo.memory import Memory, make_memory, operands, to_bytes
from gdn_ops.dispatch import explain
from gdn_ops.spec.errors import SpecError
from gdn_ops.terminal.progress import progress
from gdn_ops.terminal.tables import table, wrapped

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""

BASELINE = "torch"
"""The backend that the others' times are compared with."""

CONTINUATION = 240
"""Bytes that the demo adds to the text."""

SHORTEST = 64
"""Bytes below which there is nothing to remember."""


@dataclass(frozen=True)
class Findings:
    """Hold every measurement that the demo prints.

    Attributes:
        text: the bytes that were read.
        contexts: how many last bytes each head looks at.
        key_width, value_width: K and V.
        majority, table: accuracy of the two baselines.
        rules: (rule, accuracy).
        reset: what clearing does.
        backends: a row per known backend.
        decode: the continuation.
    """

    text: bytes
    contexts: tuple[int, ...]
    key_width: int
    value_width: int
    majority: float
    table: float
    rules: list[tuple[str, float]]
    reset: ResetEffect
    backends: list[BackendRow]
    decode: Decode


@torch.no_grad()
def measure_all(
    text: bytes, backend: str = "auto", count: int = CONTINUATION, memory: Memory | None = None
) -> Findings:
    """Measure everything on one text, showing progress.

    Args:
        text: at least SHORTEST bytes.
        backend: for everything but the comparison of backends.
        count: bytes to continue the text by.
        memory: the features; the demo's own when None.

    Raises:
        SpecError: the text is too short.
    """
    if len(text) < SHORTEST:
        raise SpecError(f"the text has {len(text)} bytes, should have at least {SHORTEST}")
    memory = memory or make_memory()
    names = [info.name for info in explain.list_backends()]
    with progress(7 + len(names), "bytes to keys and values", is_quiet=True) as now:
        now("bytes to keys and values")
        x = to_bytes(text)
        given = operands(memory, x)
        now("baselines")
        majority, exact_table = (
            measure.majority_accuracy(x),
            measure.table_accuracy(x, memory.contexts),
        )
        now("four rules")
        rules = measure.rule_accuracies(memory, x, given, backend)
        now("resets at chapter boundaries")
        reset = measure.reset_effect(memory, x, measure.boundaries(text), backend)
        now("the definition in float64")
        rows = measure.backend_rows(names, given, measure.definition(given), now)
        now("continuing the text")
        decoded = measure.decode(memory, x, count, backend)
    widths = memory.signs.shape[-1], memory.codes.shape[-1]
    return Findings(
        text, memory.contexts, *widths, majority, exact_table, rules, reset, rows, decoded
    )


def as_data(findings: Findings) -> dict[str, Any]:
    """Return the findings as plain data: texts as UTF-8, what is none replaced."""
    data = {"schema": SCHEMA, "bytes": len(findings.text), **asdict(findings)}
    del data["text"]
    data["decode"]["added"] = findings.decode.added.decode(errors="replace")
    return data


def show(findings: Findings) -> None:
    """Print the findings."""
    heads = ", ".join(map(str, findings.contexts))
    size = f"{findings.key_width} x {findings.value_width}"
    _say(
        f"A memory of {len(findings.contexts)} heads of {size} numbers reads "
        f"{len(findings.text)} bytes once.\n"
        f"Keys: the last {heads} bytes as random signs; values: the next byte. No training.\n"
    )
    _show_accuracy(findings)
    _show_reset(findings.reset)
    _show_backends(findings.backends, len(findings.text))
    _show_decode(findings.text, findings.decode)


def _say(text: str) -> None:
    print(wrapped(text))


def _show_accuracy(findings: Findings) -> None:
    rows = [(f'rule="{rule}"', f"{rate:.1%}") for rule, rate in findings.rules]
    rows.append(("always the most common byte", f"{findings.majority:.1%}"))
    rows.append(("exact table of the same contexts, last seen", f"{findings.table:.1%}"))
    print("Next-byte accuracy, first reading")
    print(table(("predictor", "next byte right"), [("", rows)]) + "\n")


def _show_reset(reset: ResetEffect) -> None:
    rows: list[tuple[str, ...]] = [
        (f"accuracy, {where}", f"{kept:.1%}", f"{cleared:.1%}")
        for where, kept, cleared in (
            (f"{measure.AFTER} bytes after a boundary", reset.kept, reset.cleared),
            ("all other bytes", reset.kept_later, reset.cleared_later),
        )
    ]
    leaks = (f"{leak:.3g}" for leak in (reset.leak_kept, reset.leak_cleared))
    rows.append(("largest change of o if the past was another text", *leaks))
    print("A reset at a chapter boundary")
    print(table(("", "memory kept", "alpha = 0 there"), [("", rows)]))
    exact = "exactly nothing" if reset.leak_cleared == 0 else f"{reset.leak_cleared:.3g}"
    count = len(reset.boundaries)
    plural = "boundary" if count == 1 else "boundaries"
    _say(f"{count} {plural}; after a reset, {exact} of the past is left.\n")


def _show_backends(rows: list[BackendRow], tokens: int) -> None:
    """Print times, and ratios to the baseline: all of one process, in turns, after warm-ups."""
    prefix, is_longer = min(tokens, measure.PREFIX), tokens > measure.PREFIX
    ran = [row for row in rows if row.reason is None]
    base = next((row for row in ran if row.name == BASELINE), None)
    base_prefix, base_whole = (base.prefix, base.whole) if base else (None, None)
    against = f"time over {BASELINE}'s"
    cells = []
    for row in ran:
        part = _ratio(row.prefix, base_prefix)
        whole = _ratio(row.whole, base_whole)
        times = [_milliseconds(row.prefix), part]
        times += [_milliseconds(row.whole), whole] if is_longer else []
        cells.append((row.name, *times, f"{row.first:.1f} s", f"{row.error:.1e}"))
    lengths = (prefix, tokens) if is_longer else (prefix,)
    head = ["backend", *(x for n in lengths for x in (f"{n} tokens", against))]
    warmed = "on both lengths" if is_longer else "before"
    print(f"Backends on the same operands, in turns, each warmed up {warmed}")
    print(table((*head, "first calls cost", "worst head's error"), [("", cells)]))
    for row in rows:
        if row.reason is not None:
            print(wrapped(f"left out: {row.name}: {row.reason}", indent="  "))
    _say(
        "First calls cost: what the first call of each length took beyond the later ones, mostly "
        "compiling. Errors are against float64."
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _ratio(seconds: float | None, base: float | None) -> str:
    return "-" if seconds is None or not base else f"{seconds / base:.2f}"


def _show_decode(text: bytes, decoded: Decode) -> None:
    count = len(decoded.added)
    print("\nThe text goes on after the bar, byte by byte (gated_delta_step):")
    tail = text[-80:].decode(errors="replace")
    _say(f"...{tail}|{decoded.added.decode(errors='replace')}\n")
    _say(
        f"{count} steps in {decoded.seconds:.2f} s. Against one prefill over text and continuation:"
        f" largest relative error {decoded.error:.1e},"
        f" same next byte at {decoded.same_bytes} of {count} positions."
    )
