"""The example that trains a model of transformers has the losses of one process on several."""

from __future__ import annotations

import re

import pytest
import torch

from compat_models import SMALL, has_convolutions
from paths import ROOT
from processes import output_of
from tests.parallel.launches import launch
from tests.parallel.test_training import TORCHRUN, Losses, check_close, losses
from tests.parallel.trainings import train_transformers

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

# Not as many on every rank.
ARGUMENTS = ("--steps", "6", "--rows", "2", "--length", "101")

LINE = re.compile(r"step (\d+): (\d+\.\d+) nats per byte, gradient (\d+\.\d+)")


def history(count: int) -> Losses:
    """Return the losses and norms that all processes saw."""
    endings = launch(count, train_transformers, ARGUMENTS)
    found = losses(endings)
    assert [ending.result for ending in endings] == [found] * len(endings)
    return found


@pytest.fixture(scope="module")
def alone() -> Losses:
    """Return the losses and norms of one process that torchrun did not start."""
    if not SMALL.startswith("qwen3_5"):
        pytest.skip("this transformers has no Qwen3.5")
    has_convolutions(SMALL)
    return history(0)


def test_losses_on_4_processes_are_those_of_one(alone: Losses) -> None:
    assert len(alone) == 6 and alone[-1][0] < alone[0][0] - 0.5
    check_close(history(4), alone)


@pytest.mark.parametrize("count", [1, 2])
def test_torchrun_starts_it(alone: Losses, count: int) -> None:
    script, environment = ROOT / "examples" / "train_transformers.py", {"OMP_NUM_THREADS": "1"}
    printed = output_of(*TORCHRUN, count, script, *ARGUMENTS, PYTHONPATH=str(ROOT), **environment)
    found = LINE.findall(printed)
    assert [int(step) for step, *_ in found] == [1, 2, 3, 4, 5, 6]
    check_close([(float(nats), float(norm)) for _, nats, norm in found], alone)
