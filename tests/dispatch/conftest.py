"""See which calls choose a backend anew."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from gdn_ops import Backend
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import plans, registry


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forget all plans; name the op of every call that a backend is selected for."""
    taken: list[str] = []
    select = registry.select

    def noted(call: Call, name: str = "auto") -> Backend:
        taken.append(call.op.name)
        return select(call, name)

    monkeypatch.setattr(registry, "select", noted)
    monkeypatch.setattr(plans, "_plans", OrderedDict())
    return taken
