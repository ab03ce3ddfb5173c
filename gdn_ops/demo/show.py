"""Run and print the demo: a progress bar while it works, then tables and text."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from gdn_ops.demo import measure
from gdn_ops.demo.measure import BackendRow, Decode, ResetEffect
from gdn_ops.demo.memory import Memory, make_memory, operands, to_bytes
from gdn_ops.dispatch import explain

CONTINUATION = 240
"""Bytes that the demo adds to the text."""

SHORTEST = 64
"""Bytes below which there is nothing to remember."""


@dataclass(frozen=True)
class Findings:
    """Hold every measurement that the demo prints.

    Attributes:
        majority, table: accuracy of the two baselines.
        rules: (rule, accuracy).
        reset: what clearing does.
        backends: a row per known backend.
        decode: the continuation.
    """

    majority: float
    table: float
    rules: list[tuple[str, float]]
    reset: ResetEffect
    backends: list[BackendRow]
    decode: Decode


def shipped_text() -> bytes:
    """Return the text that comes with the package."""
    return resources.files("gdn_ops").joinpath("data", "chapters.txt").read_bytes()


@torch.no_grad()
def run(
    text: bytes,
    console: Console,
    backend: str = "auto",
    count: int = CONTINUATION,
    memory: Memory | None = None,
) -> Findings:
    """Measure everything on one text, showing progress, then print it.

    Args:
        text: at least SHORTEST bytes.
        console: where to print.
        backend: for everything but the comparison of backends.
        count: bytes to continue the text by.
        memory: the features; the demo's own when None.

    Raises:
        ValueError: the text is too short.
    """
    if len(text) < SHORTEST:
        raise ValueError(f"the text has {len(text)} bytes, should have at least {SHORTEST}")
    memory = memory or make_memory()
    names = [info.name for info in explain.list_backends()]
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("bytes to keys and values", total=6 + len(names))

        def now(what: str) -> None:
            progress.update(task, description=what, advance=1, refresh=True)

        x = to_bytes(text)
        given = operands(memory, x)
        now("baselines")
        majority, table = measure.majority_accuracy(x), measure.table_accuracy(x, memory.contexts)
        now("four rules")
        rules = measure.rule_accuracies(memory, x, given, backend)
        now("resets at chapter boundaries")
        reset = measure.reset_effect(memory, x, measure.boundaries(text), backend)
        now("the definition in float64")
        exact = measure.definition(given)
        rows = []
        for name in names:
            now(f"backend {name}")
            rows.append(measure.backend_row(name, given, exact))
        now("continuing the text")
        decoded = measure.decode(memory, x, count, backend)
    findings = Findings(majority, table, rules, reset, rows, decoded)
    _print(console, memory, text, findings)
    return findings


def _print(console: Console, memory: Memory, text: bytes, findings: Findings) -> None:
    heads = ", ".join(map(str, memory.contexts))
    K, V = memory.signs.shape[-1], memory.codes.shape[-1]
    console.print(
        f"A memory of {memory.heads} heads of {K} x {V} numbers reads {len(text)} bytes once.\n"
        f"Keys: the last {heads} bytes as random signs; values: the next byte. No training.\n"
    )
    _print_accuracy(console, findings)
    _print_reset(console, findings.reset)
    _print_backends(console, findings.backends, len(text))
    _print_decode(console, text, findings.decode)


def _print_accuracy(console: Console, findings: Findings) -> None:
    table = Table("predictor", "next byte right", title="Next-byte accuracy, first reading")
    for rule, rate in findings.rules:
        table.add_row(f'rule="{rule}"', f"{rate:.1%}")
    table.add_section()
    table.add_row("majority: always the commonest byte", f"{findings.majority:.1%}")
    table.add_row("exact table of the same contexts, last seen", f"{findings.table:.1%}")
    console.print(table)


def _print_reset(console: Console, reset: ResetEffect) -> None:
    title = "A reset at a chapter boundary"
    table = Table("", "memory kept", "alpha = 0 at boundaries", title=title)
    for where, kept, cleared in (
        (f"{measure.AFTER} bytes after a boundary", reset.kept, reset.cleared),
        ("all other bytes", reset.kept_later, reset.cleared_later),
    ):
        table.add_row(f"accuracy, {where}", f"{kept:.1%}", f"{cleared:.1%}")
    leaks = (f"{leak:.3g}" for leak in (reset.leak_kept, reset.leak_cleared))
    table.add_row("largest change of o if the past was another text", *leaks)
    console.print(table)
    exact = "exactly nothing" if reset.leak_cleared == 0 else f"{reset.leak_cleared:.3g}"
    console.print(
        f"{len(reset.boundaries)} boundaries; after a reset, {exact} of the past is left.\n"
    )


def _print_backends(console: Console, rows: list[BackendRow], tokens: int) -> None:
    prefix = min(tokens, measure.PREFIX)
    table = Table(
        "backend",
        "first call",
        f"{prefix} tokens",
        f"{tokens} tokens",
        "worst head's error against float64",
        title="Backends on the same operands",
    )
    for row in rows:
        if row.reason is not None:
            table.add_row(row.name, escape(row.reason))
            continue
        whole = "-" if row.whole is None else f"{row.whole * 1e3:.0f} ms"
        times = (f"{row.first * 1e3:.0f} ms", f"{row.prefix * 1e3:.0f} ms", whole)
        table.add_row(row.name, *times, f"{row.error:.1e}")
    console.print(table)


def _print_decode(console: Console, text: bytes, decoded: Decode) -> None:
    count = len(decoded.added)
    console.print("\nThe text goes on, byte by byte (gated_delta_step):")
    tail = text[-80:].decode(errors="replace")
    console.print(f"[dim]...{escape(tail)}[/dim]{escape(decoded.added.decode(errors='replace'))}\n")
    console.print(
        f"{count} steps in {decoded.seconds:.2f} s. Against one prefill over text and continuation:"
        f" largest relative error {decoded.error:.1e},"
        f" same next byte at {decoded.same_bytes} of {count} positions."
    )
