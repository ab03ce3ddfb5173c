"""Warm-ups of `bench gpu` compile, before anything is timed, all that the timed rows launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_ops.aot import sampling
from gdn_ops.aot.results import Sample
from gdn_ops.bench.gpu import worker
from gdn_ops.bench.gpu.rows import ROWS, GpuRow
from gdn_ops.bench.gpu.schedule import Plan, run
from gdn_ops.bench.gpu.worker import Desk
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.kernel_support.backend import KernelBackend
from gdn_ops.kernel_support.launches import Launch, recording
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gpu_stand_ins import FakeDevice, stand_in


class Clerk:
    """A worker that writes its orders down and does nothing."""

    def __init__(self, orders: list[dict[str, Any]]) -> None:
        self.orders = orders

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        self.orders.append(order)
        yield from ()

    def close(self) -> None:
        pass


@pytest.fixture
def warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[GpuRow]]:
    """Return the rows on which a run calls each of its contenders to warm it up."""
    orders: list[dict[str, Any]] = []
    plan = Plan(("triton", "tilelang"), ("fla",))
    run(plan, {"device": "NVIDIA H200"}, tmp_path, start=lambda: Clerk(orders))  # type: ignore[arg-type, return-value]
    rows: dict[str, list[GpuRow]] = {"triton": [], "tilelang": [], "fla": []}
    monkeypatch.setattr(worker, "warm_row", lambda row, c, device: rows[c.name].append(row))
    device = FakeDevice()
    monkeypatch.setattr(worker, "find_contender", lambda name: stand_in(name, device))
    for order in orders:
        if order["do"] == "warm":
            Desk(device, lambda event: None).carry_out(order)  # type: ignore[arg-type]
    return rows


def meta_launches(name: str, row: GpuRow) -> list[Launch]:
    """Return what a backend launches on an H100 for the call of a row."""
    backend, s, low = registry.get_backend(name), row.sizes, getattr(torch, row.dtype)
    assert isinstance(backend, KernelBackend)
    step = row.what == "step"
    tokens = (s.B,) if step else (s.B, s.T)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = {
        "q": empty(*tokens, s.H, s.K, dtype=low),
        "k": empty(*tokens, s.H, s.K, dtype=low),
        "v": empty(*tokens, s.HV, s.V, dtype=low),
        "log_alpha": empty(*tokens, s.HV, *((s.K,) if row.channels else ())),
        "beta": empty(*tokens, s.HV),
    }
    stored = getattr(torch, row.state_dtype) if step else torch.float32
    state = empty(s.N, s.HV, s.K, s.V, dtype=stored)
    given |= {"state": state} if step else {"initial_state": state}
    options: dict[str, Any] = {"inplace": True} if step else {}
    if row.packed:
        given["cu_seqlens"] = empty(s.N + 1, dtype=torch.int64)
    op = GATED_DELTA_STEP if step else GATED_DELTA
    call = bind(op, arguments_of(op, {**given, **options}), check_values=False)
    call = replace(call, needs_grad=row.what == "backward")
    with recording(backend.targets[1] if name == "triton" else backend.targets[0]) as launches:
        sampling.run(backend, Sample(row.name, call, False))
    return launches


def compiled_for(name: str, row: GpuRow) -> set[str]:
    """Return the specialisations that a backend's compiler makes code for in a row."""
    backend = registry.get_backend(name)
    assert isinstance(backend, KernelBackend)
    if row.channels and "channel" not in backend.limits.of(decode=row.what == "step").decays:
        return set()
    launches = meta_launches(name, row)
    assert launches
    if name == "tilelang":
        return {f"{x.kernel.__name__} {sorted(x.kwargs.items())}" for x in launches}
    from gdn_ops.backends.triton.aot.compiler import specialised

    kinds = set()
    for launch in launches:
        _, options, specialisation = specialised(launch, "sm_90")
        kinds.add(f"{launch.kernel.__name__} {specialisation} {options}")
    return kinds


@pytest.mark.parametrize("name", ["triton", "tilelang"])
def test_warm_ups_compile_all_that_the_rows_launch(
    name: str, warmed: dict[str, list[GpuRow]]
) -> None:
    pytest.importorskip(name)
    # A contender is warmed up for each direction in a process of its own; the cache is on disk.
    before: dict[str, set[str]] = {"forward": set(), "backward": set(), "step": set()}
    for row in warmed[name]:
        before[row.what] |= compiled_for(name, row)
    for row in ROWS:
        missing = compiled_for(name, row) - before[row.what]
        assert not missing, (row.name, missing)


def test_everybody_is_warmed_up_on_every_row_the_most_important_first(
    warmed: dict[str, list[GpuRow]],
) -> None:
    for rows in warmed.values():
        for what in ("forward", "backward", "step"):
            own = [row for row in rows if row.what == what]
            assert own == [row for row in ROWS if row.what == what]
