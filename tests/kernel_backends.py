"""Check what backends of kernels have in common, and make calls for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import Backend
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.kernel_support.launches import recording
from gdn_ops.spec.ops import GATED_DELTA
from processes import printed

SIZES = {"B": 1, "T": 8192, "H": 16, "HV": 64, "K": 128, "V": 128}


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


def row_of(configs: Any, capability: tuple[int, int]) -> str:
    """Return the row of configurations that a GPU of a compute capability gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        configs._target_of.cache_clear()
        found = configs.tables.target(torch.device("cuda", 0))
    configs._target_of.cache_clear()
    return found


def check_reason(backend: str, arguments: dict[str, Any], reason: str) -> None:
    """Assert that a pinned backend refuses a call with a reason, and that explain gives it too."""
    with pytest.raises(gdn_ops.BackendUnsupportedError) as error:
        gdn_ops.gated_delta(**arguments, backend=backend)
    lines = str(error.value).splitlines()
    assert lines[0] == f"backend '{backend}' cannot run gated_delta on these inputs"
    assert lines[2] == f"  {backend}: {reason}"
    assert lines[3] == '  try backend="torch"'
    found = gdn_ops.explain(**arguments, backend=backend)
    assert "; ".join(dict(found.reasons)[backend]) == reason
    assert [backend, reason] in [line.split(maxsplit=1) for line in str(found).splitlines()]


def check_saved(backend: Backend, call: Call, target: str) -> None:
    """Assert that what a forward saves is what the tracer was told."""
    with torch.no_grad(), recording(target):
        saved = backend.forward(call).saved
    told = backend.saved_like(call)
    assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in told]


def check_emulation(backend: str) -> None:
    """Assert that a backend emulates on the CPU with one warning, and only if it is asked to."""
    registry._logged.discard(("emulation", backend, "cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gdn_ops.gated_delta(**linear_arguments(), backend=backend)
        gdn_ops.gated_delta(**linear_arguments(), backend=backend)
    assert [str(w.message) for w in caught] == [
        f"backend '{backend}' emulates its kernels on cpu tensors: for checking, not for speed"
    ]
    assert gdn_ops.explain(**linear_arguments()).backend == "torch"


def check_absence(package: str) -> None:
    """Assert that the backend of a package that is not there says so, in a list and in an error."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a)\n"
        "import gdn_ops, torch\n"
        f"print([b.status for b in gdn_ops.list_backends() if b.name == {package!r}][0])\n"
        "q = torch.ones(1, 4, 2, 16)\n"
        f"try: gdn_ops.gated_delta(q, q, q, rule='linear', backend={package!r})\n"
        "except gdn_ops.BackendUnsupportedError as error: print(str(error).splitlines()[2])\n"
    )
    assert printed(code).splitlines() == [
        f"package {package!r} is not installed",
        f"  {package}: package {package!r} is not installed",
    ]
