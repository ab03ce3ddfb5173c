"""Ask the tools of backends again."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_reasons(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ask the tools of the backend that the folder of a test is named after, before and after."""
    backend = importlib.import_module(f"gdn_ops.backends.{request.path.parent.name}")
    backend.tool_reasons.cache_clear()
    yield
    backend.tool_reasons.cache_clear()
