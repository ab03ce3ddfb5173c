"""Load stand-ins for modeling modules."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from compat_stand_ins import NAME, Load, stand_in


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
