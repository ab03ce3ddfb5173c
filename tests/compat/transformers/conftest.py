"""Load stand-ins for modeling modules, and start processes that import transformers once."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from compat_stand_ins import NAME, Load, stand_in
from tests.parallel.ranks import Ranks


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return what loads a stand-in for a modeling module."""

    def load(*, holds: bool = False, **changes: Any) -> types.ModuleType:
        module = stand_in(NAME, holds=holds)
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setitem(sys.modules, NAME, module)
        return module

    return load


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    # Importing transformers takes its time.
    started = Ranks(4)
    yield started
    started.close()
