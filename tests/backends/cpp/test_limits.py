"""No width is too large for the kernels; importing and explaining builds nothing."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from gdn_ops.backends.cpp import library
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge
from processes import printed

WIDE = ((513, 7), (7, 1025), (300, 260), (1, 1))
"""K and V above what registers, panels and blocks hold, and the least."""


@pytest.fixture
def built() -> None:
    if library.missing() is not None:
        pytest.skip(f"backend 'cpp': {library.missing()}")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("K", "V"), WIDE)
def test_any_width_is_computed(K: int, V: int, dtype: str) -> None:
    example = Example(T=70, R=2, K=K, V=V, dtype=dtype, initial_state=True)
    verdict = judge(example, "cpp")
    assert verdict.passed, verdict


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("K", "V"), WIDE)
def test_a_token_of_any_width_is_decoded(K: int, V: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    token = {"q": normal(2, K), "k": normal(2, K) / K**0.5, "v": normal(4, V)}
    token |= {name: torch.sigmoid(normal(4)) for name in ("alpha", "beta")}
    token["state"] = normal(4, K, V)
    exact = {name: x.double() for name, x in token.items()}
    results = gdn_ops.gated_delta_step(**token, backend="cpp")
    expected = gdn_ops.gated_delta_step(**exact, backend="naive")
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_explaining_compiles_nothing_and_says_why_there_are_no_kernels() -> None:
    code = """
import subprocess, sys
from pathlib import Path
def refuse(*arguments, **options):
    raise SystemExit("a process was started")
subprocess.Popen.__init__ = refuse
from gdn_ops.backends.cpp import library
library.PACKAGE = Path(sys.argv[1])
import torch, gdn_ops
x = torch.zeros(1, 2, 1, 4)
print(dict(gdn_ops.explain(x, x, x, x[..., 0], x[..., 0]).reasons)["cpp"][0])
"""
    folder = "/nowhere"
    assert printed(code, folder, GDN_OPS_CACHE=folder) == (
        "not built: run gdn-ops build, with a C++ compiler (GCC or Clang) installed"
    )
