"""Make calls for backends of kernels, and read what they launch, refuse and are made of."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import Backend
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.launches import recording
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge

SIZES = {"B": 1, "T": 8192, "H": 16, "HV": 64, "K": 128, "V": 128}

AWKWARD = Example(
    T=70, R=2, K=24, V=40, gate="extreme", beta="wide", initial_state=True, qk_l2norm=True, seed=3
)
"""Two chunks of 64, head dims off powers of two, zeros in the gate."""

PACKED = Example(
    T=300, lengths=(70, 0, 1, 165, 64, 0), H=2, R=2, K=48, V=80, dtype="bfloat16", gate="extreme",
    beta="wide", initial_state=True, seed=5,
)  # fmt: skip
"""Sequences of two chunks, none, one token, three chunks, one that is full, none."""


def meta_call(gradients: bool = False, **options: Any) -> Call:
    """Return a bound call of `gated_delta` on meta tensors, bfloat16 with a log gate and β."""
    B, T, H, HV, K, V = (options.pop(x) for x in ("B", "T", "H", "HV", "K", "V"))
    N, state = options.pop("N", None), options.pop("state", False)
    low: dict[str, Any] = {"device": "meta", "dtype": options.pop("dtype", torch.bfloat16)}
    arguments: dict[str, Any] = {
        "q": torch.empty(B, T, H, K, **low, requires_grad=gradients),
        "k": torch.empty(B, T, H, K, **low),
        "v": torch.empty(B, T, HV, V, **low),
        "beta": torch.empty(B, T, HV, device="meta"),
        "log_alpha": torch.empty(B, T, HV, device="meta"),
        "initial_state": torch.empty(N or B, HV, K, V, device="meta") if state else None,
        "cu_seqlens": None if N is None else torch.empty(N + 1, device="meta", dtype=torch.int64),
    }
    return bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments | options), check_values=False)


def linear_arguments(**changes: Any) -> dict[str, Any]:
    """Return a small call of `gated_delta` on the CPU, with changes."""
    K = changes.pop("K", 16)
    dtype = changes.pop("dtype", torch.float32)
    q = torch.randn(1, 4, 2, K).to(dtype)
    return {"q": q, "k": q, "v": q, "rule": "linear", **changes}


def launched(target: str, call: Callable[[], object]) -> list[str]:
    """Return the names of the kernels that a call on the meta device launches."""
    with torch.no_grad(), recording(target) as launches:
        call()
    return [launch.kernel.__name__ for launch in launches]


def forbid_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tensor that is not contiguous refuse to be made so."""

    def no_copy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.is_contiguous(), "a copy is made"
        return self

    monkeypatch.setattr(Tensor, "contiguous", no_copy)


def assert_same_bits(computed: Tensor, expected: Tensor) -> None:
    """Compare every bit, but for what kind of NaN a NaN is."""
    torch.testing.assert_close(computed, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(computed[number].signbit(), expected[number].signbit())


def check_definition(backend: str, example: Example) -> None:
    """Assert that a backend computes the definition, and its gradients."""
    verdict = judge(example, backend)
    assert verdict.passed, verdict


def check_reason(backend: str, arguments: dict[str, Any], reason: str) -> None:
    """Assert that a pinned backend refuses a call with a reason, and that explain gives it too."""
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**arguments, backend=backend)
    lines = str(error.value).splitlines()
    assert lines[0] == f"backend '{backend}' cannot run gated_delta on these inputs"
    K, dtype = arguments["q"].shape[-1], str(arguments["q"].dtype).removeprefix("torch.")
    given = f"  q {dtype} (1, 4, 2, {K}) cpu, v (1, 4, 2, {K}), rule linear"
    assert lines[1].startswith(given)
    assert lines[2] == f"  {backend}: {reason}"
    assert lines[3] == f'  try backend="{gdn_ops.explain(**arguments).backend}"'
    explanation = gdn_ops.explain(**arguments, backend=backend)
    assert "; ".join(dict(explanation.reasons)[backend]) == reason
    assert [backend, reason] in [line.split(maxsplit=1) for line in str(explanation).splitlines()]


def reasons_on_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a backend has against a call that says it is on a GPU."""
    call = meta_call(**SIZES)
    monkeypatch.setattr(type(call), "device", property(lambda self: torch.device("cuda")))
    instance = get_backend(backend)
    assert isinstance(instance, Backend)
    return instance.reasons(call)


def part(backend: str, module: str) -> Any:
    """Return a module of a backend."""
    return importlib.import_module(f"gdn_ops.backends.{backend}.{module}")


def using(backend: str, example: Example, **changes: Any) -> AbstractContextManager[None]:
    """Return a context in which a row with changes is what the calls of an example get."""
    tables = part(backend, "host.config").tables
    dtype = getattr(torch, example.dtype)
    key = tables.key(torch.device("cpu"), example.K, example.V, dtype)
    return tables.using(Row(key, dataclasses.replace(tables.rows[key], **changes)))  # type: ignore[no-any-return]
