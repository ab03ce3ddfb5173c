"""Start without kernels, and listen to what is said of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is compiled, in memory or on disk; the folder of the disk cache."""
    from tilelang_kernels.launching import forget

    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "gdn_ops"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What the logger of the package says, from now on."""
    caplog.set_level(logging.INFO, "gdn_ops")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("gdn_ops")]
