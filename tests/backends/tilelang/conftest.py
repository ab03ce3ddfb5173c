"""Start without kernels, and listen to what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled, in memory or on disk; the folder of the disk cache."""
    from gdn_ops.backends.tilelang.host import launcher

    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "_launched", {})
    monkeypatch.setattr(launcher, "_built", {})
    yield tmp_path / "gdn_ops"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What the logger of the package says, from now on."""
    caplog.set_level(logging.INFO, "gdn_ops")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("gdn_ops")]
