"""What `bench gpu` asks of a real GPU; `pytest -m gpu`."""

from __future__ import annotations

import shutil

import pytest
import torch

from gdn_ops.bench.gpu.device import Card, Cuda
from gdn_ops.bench.gpu.measuring import measure_row
from gdn_ops.bench.gpu.rows import GpuRow
from gpu_stand_ins import contender

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def test_a_graph_replays_what_was_captured_and_takes_as_long() -> None:
    device = Cuda()
    with device.working(), torch.no_grad():
        x = torch.ones(1 << 26, device=device.torch_device)

        def work() -> None:
            x.mul_(2.0)

        work()
        once, often = (device.graph([work] * n) for n in (1, 10))
        x.fill_(1.0)
        times = [(once(), often()) for _ in range(5)]
        assert x[0].item() == 2.0**55
    single, tenfold = (min(t) for t in zip(*times, strict=True))
    assert 7 < tenfold / single < 13
    assert device.peak(lambda: torch.ones(1 << 20, device="cuda")).bytes >= 4 << 20
    assert torch.cuda.get_device_properties(0).total_memory > device.l2 > 0


def test_a_run_that_waits_for_the_device_is_not_captured() -> None:
    device = Cuda()
    x = torch.ones(8, device=device.torch_device)
    with device.working(), pytest.raises(RuntimeError, match="synchronizing"):
        device.graph([lambda: x.sum().item()])
    with device.working():
        assert device.graph([lambda: x.mul_(1.0)])() > 0


def test_the_card_tells_its_clocks() -> None:
    card = Cuda().card()
    if shutil.which("nvidia-smi"):
        assert card.sm_mhz is not None and card.most_sm_mhz is not None
        assert 0 < card.sm_mhz <= card.most_sm_mhz
    else:
        assert card == Card()


def test_marks_on_the_device_are_apart_as_long_as_its_work() -> None:
    device = Cuda()
    with device.working():
        x = torch.ones(1 << 28, device=device.torch_device)
        device.keep_busy()
        start = device.mark()
        x.mul_(2.0)
        middle, stop = device.mark(), device.mark()
        device.synchronize()
    assert device.between(start, middle) > 10 * device.between(middle, stop)


@pytest.mark.parametrize("what", ["forward", "backward", "step"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_is_measured(what: str, backend: str) -> None:
    lengths = (1, 1) if what == "step" else (256,)
    row = GpuRow(what, (2, 4), lengths)
    (outcome,) = measure_row(row, [contender(backend)], Cuda(), 60.0, lambda event: None)
    assert outcome.status == "measured", outcome.reason
    assert outcome.error is not None and outcome.error < 0.05
    assert outcome.kernel is not None and outcome.wall is not None
    assert 0 < outcome.kernel < outcome.wall
    if backend == "triton":
        assert outcome.kernel_by == "graph", outcome.reason
        assert outcome.launches and all(launch["ms"] > 0 for launch in outcome.launches)
