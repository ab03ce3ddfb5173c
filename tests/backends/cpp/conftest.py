"""Run tests at every level of the C++ library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpp_libraries import LEVELS
from gdn_ops.backends.cpp import library


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test at one level, and leave the best one behind."""
    loaded = library.library()
    if not loaded.gdn_choose_level(request.param.encode()):
        pytest.skip(f"the library or this processor has no level {request.param}")
    yield request.param
    library.choose_level(loaded, "")
