"""Train every row with every seed, side by side in processes of one thread, and gather the cells.

Run as `python -m gdn_ops.bench.ablation.run`, this is a worker.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gdn_ops.bench.ablation.table import ABSENT, FULL, TASKS, VARIANTS, WIDTH, Settings
from gdn_ops.bench.ablation.tasks import VOCABULARY
from gdn_ops.bench.ablation.training import build, chances, run
from gdn_ops.bench.child import Emit, StoppedError, Worker, carry_out_orders, spread
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import describe_system
from gdn_ops.ops import explain

SCHEMA = 1
"""Version of the layout of the JSON; raised when a field changes its meaning."""

COMMAND = (sys.executable, "-m", "gdn_ops.bench.ablation.run")

LONGEST = 86400.0
"""Seconds after which a process is ended that trains one row with one seed: it hangs."""

Values = dict[tuple[str, str], list[float | None]]
"""Hold the value of each seed, by row and task."""


def measure(
    rows: Sequence[str],
    tasks: Sequence[str],
    settings: Settings,
    processes: int | None = None,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Train rows on tasks and return the table as plain data.

    Args:
        rows, tasks: their names.
        settings: sizes.
        processes: how many train side by side, in this one if 1; one per core if None. Numbers
            do not depend on it.
        log: is told in a line what is done, for each row and seed.

    Raises:
        ValueError: a process ended before its training was done.
    """
    count = max(1, min(processes or os.cpu_count() or 1, len(rows) * settings.seeds))
    start = time.perf_counter()
    orders = [
        {"row": row, "seed": seed, "tasks": list(tasks), "settings": settings.to_json()}
        for seed in range(settings.seeds)
        for row in rows
    ]
    found: dict[tuple[str, str, int], float | None] = {}
    busy = 0.0
    for order, events in _here(orders) if count == 1 else _side_by_side(orders, count):
        for event in events:
            found[order["row"], event["task"], order["seed"]] = event["value"]
            busy += event["seconds"]
        log(f"{order['row']}, seed {order['seed']}")
    values = {
        (row, task): [found[row, task, seed] for seed in range(settings.seeds)]
        for row in rows
        for task in tasks
    }
    return {
        "schema": SCHEMA,
        "system": describe_system(
            device="cpu", dtype="float32", backend=_backend(), processes=count
        ),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(busy, 1),
        "settings": {**settings.to_json(), "width": WIDTH},
        "tasks": _tasks(tasks),
        "rows": [_row(name) for name in rows],
        "cells": [_cell(row, task, values) for row in rows for task in tasks],
        "absent": [{"what": what, "reason": reason} for what, reason in ABSENT.items()],
    }


Events = list[dict[str, Any]]


def _here(orders: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Events]]:
    """Carry out orders in this process, with one thread as in others."""
    for order in orders:
        events: Events = []
        carry_out(order, events.append)
        yield order, events


def _side_by_side(
    orders: Sequence[dict[str, Any]], count: int
) -> Iterator[tuple[dict[str, Any], Events]]:
    """Carry out orders in processes of their own."""
    for order, events in spread(orders, lambda: Worker(COMMAND), LONGEST, count):
        if isinstance(events, StoppedError):
            raise ValueError(f"row {order['row']}, seed {order['seed']}: {events}") from events
        yield order, events


def carry_out(order: dict[str, Any], emit: Emit) -> None:
    """Train one row with one seed; emit the value of each task, and how long a core took for it."""
    threads, settings = torch.get_num_threads(), Settings(**order["settings"])
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        for task, value in run(order["row"], order["seed"], order["tasks"], settings):
            end = time.process_time()
            event = {"task": task, "value": None if value is None else round(value, 6)}
            emit({**event, "seconds": end - start})
            start = end
    finally:
        torch.set_num_threads(threads)


def _backend() -> str | None:
    """Return the backend that runs the sequences of these models, by name."""
    shape = (2, 64, 4, 16)
    q = torch.zeros(shape, dtype=torch.float32, device="cpu", requires_grad=True)
    gate = torch.zeros(shape[:3], dtype=torch.float32, device="cpu")
    return explain(q, q, q, log_alpha=gate, beta=gate, qk_l2norm=True).backend


def _tasks(tasks: Sequence[str]) -> list[dict[str, Any]]:
    by_chance = chances(tasks)
    return [
        {"name": t, "what": TASKS[t].what, "unit": TASKS[t].unit, "chance": round(by_chance[t], 6)}
        for t in tasks
    ]


def _row(name: str) -> dict[str, Any]:
    """Return what a row is, and its figures in the paper."""
    v, parameters = VARIANTS[name], build(name, 0, VOCABULARY).parameters()
    return {
        "name": name,
        "differs": v.differs,
        "options": v.arguments,
        "parameters": sum(p.numel() for p in parameters),
        "paper": None
        if v.perplexity is None
        else {"perplexity": v.perplexity, "accuracy": v.accuracy},
    }


def _cell(row: str, task: str, values: Values) -> dict[str, Any]:
    """Return a cell: the value of each seed, their mean and range, and how they differ from full.

    `against_full` are differences of the same seed, `better` and `worse` how many seeds there are
    of each kind; these are null where there is no full row.
    """
    own = values[row, task]
    finite = [x for x in own if x is not None]
    cell: dict[str, Any] = {"row": row, "task": task, "values": own}
    cell |= {
        "mean": round(statistics.mean(finite), 6) if finite else None,
        "lowest": min(finite, default=None),
        "highest": max(finite, default=None),
        "diverged": len(own) - len(finite),
    }
    full = values.get((FULL, task))
    gains = None if full is None else [_gain(task, x, y) for x, y in zip(own, full, strict=True)]
    cell["against_full"] = gains
    cell["better"] = None if gains is None else sum(g is not None and g > 0 for g in gains)
    cell["worse"] = None if gains is None else sum(g is not None and g < 0 for g in gains)
    return cell


def _gain(task: str, value: float | None, full: float | None) -> float | None:
    """Return by how much a value is better than that of the full row; negative where worse."""
    if value is None or full is None:
        return None
    return round(TASKS[task].sign * (value - full), 6)


if __name__ == "__main__":
    carry_out_orders(lambda emit: lambda order: carry_out(order, emit))
