"""Cut sequences into runs: summaries of runs, which compose exactly."""

from __future__ import annotations

from gdn_ops.parallel.summary import Summary, compose, gated_delta_summary

__all__ = ["Summary", "compose", "gated_delta_summary"]
