"""Prove that a backend computes the function and its gradients: the testing kit.

It needs hypothesis (`pip install gdn_ops[testing]`). `strategies` draws calls from the spec,
`oracle` judges results against the definition in float64, `laws` states what holds in exact
arithmetic, `conformance` runs all of it on one backend.
"""

from __future__ import annotations

from gdn_ops.testing.example import Example

__all__ = ["Example"]
