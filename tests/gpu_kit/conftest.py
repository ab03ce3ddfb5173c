"""Fixtures of the tests of the GPU kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_kit_runs import Ran, Runs, make_kit, run_plan


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A small kit of stand-ins."""
    return make_kit(tmp_path / "gpu-kit")


@pytest.fixture
def run(kit: Path) -> Runs:
    """Run stages, each a dict, by the script of the kit."""

    def run_stages(*stages: dict[str, Any], **options: Any) -> Ran:
        return run_plan(kit, stages, **options)

    return run_stages
