"""Say where the repository is, and what is built in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORT_LIBRARY = ROOT / "native" / "build" / "libgdn_ops_ort.so"
