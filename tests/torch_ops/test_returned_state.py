"""Transforms take a backend that returns the state that it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from gdn_ops import Forward, gated_delta
from gdn_ops.dispatch.registry import get_backend


def test_vmap_takes_a_backend_that_returns_the_state_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = type(get_backend("naive"))
    monkeypatch.setattr(backend, "forward", lambda self, call: Forward(call.tokens.v, call.state))
    q, k, v = torch.zeros(3, 2, 1, 0, 1, 4, dtype=torch.float32, device="cpu").unbind()
    state = torch.ones(2, 1, 1, 4, 4, dtype=torch.float32, device="cpu")

    def run(*x: Tensor) -> Tensor:
        options: Any = {"rule": "linear", "return_state": True, "backend": "naive"}
        final: Tensor = gated_delta(*x[:3], initial_state=x[3], **options)[1]
        return final

    assert torch.equal(vmap(run)(q, k, v, state), state)
