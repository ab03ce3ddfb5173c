"""Every backend returns what fits the dtype, however large what it forms on the way there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.dispatch.backend import is_missing
from gdn_ops.testing import Example
from gdn_ops.testing.example import Results, run
from gdn_ops.testing.oracle import judgement_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend '.*' emulates"),
    pytest.mark.usefixtures("one_thread"),
]

KERNELS = [name for name in ("triton", "tilelang") if not is_missing(name)]
EAGER = ["naive", "torch", "cpp", *KERNELS]
BACKENDS = [*EAGER, "compile"]


def check(
    backend: str, arguments: dict[str, Any], example: Example, cotangents: tuple[Tensor, Tensor]
) -> Results:
    """Assert that all results of a call are right, and return them."""
    results = run(arguments, backend, cotangents)
    verdict = judgement_of(arguments, cotangents, example).judge(results)
    assert verdict.passed, verdict
    return results


def ones(T: int, size: int, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return gradients of o and of the final state, of one head, all the same."""
    return torch.full((1, T, 1, size), unit).half(), torch.full((1, 1, size, size), unit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_float16_could_not_sum_is_read_right(backend: str) -> None:
    T, K = 9, 16
    k, v = torch.zeros(1, T, 1, K), torch.zeros(1, T, 1, K)
    k[..., 0] = 1
    v[..., 0] = 3.3e4 * (1 - 2 * (torch.arange(T) % 2)).view(1, T, 1)
    given: dict[str, Any] = {"q": k.half(), "k": k.half(), "v": v.half()}
    given |= {"alpha": torch.ones(1, T, 1), "beta": torch.ones(1, T, 1)}
    example = Example(T=T, K=K, V=K, dtype="float16", gate="one")
    results = check(backend, given, example, ones(T, K, 2.0**-10))
    assert results["o"].abs().max() == 8248
    assert results["final_state"].abs().max() == pytest.approx(3.299e4, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [65.0, 66.0, 65504.0])
def test_a_zero_key_writes_nothing(backend: str, unit: float) -> None:
    T, K = 9, 16
    q = torch.randn(1, T, 1, K, generator=torch.Generator().manual_seed(0)).half()
    given = {"q": q, "k": torch.zeros_like(q), "v": torch.full_like(q, unit)}
    example = Example(T=T, K=K, V=K, dtype="float16", rule="linear", qk_l2norm=True, beta="none")
    options = {"rule": "linear", "qk_l2norm": True}
    results = check(backend, given | options, example, ones(T, K, 2.0**-20))
    assert not results["o"].any() and not results["final_state"].any()
    assert not results["d_q"].any() and not results["d_v"].any()


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_are_right_where_half_of_the_keys_are_zero(backend: str, dtype: str) -> None:
    example = Example(
        T=31, R=2, K=16, V=16, dtype=dtype, beta="edges", scale=-2.0, qk_l2norm=True,
        initial_state=True, seed=7,
    )  # fmt: skip
    arguments = example.arguments()
    arguments["k"][:, ::2] = 0
    check(backend, arguments, example, example.cotangents())


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e3])
def test_the_norm_of_a_key_is_no_factor_of_values(backend: str, dtype: str, size: float) -> None:
    example = Example(T=31, R=2, K=16, V=16, dtype=dtype, qk_l2norm=True, seed=1)
    arguments = example.arguments()
    # Every second key would make 1e39 of the values, beyond float32, and be a zero for them.
    arguments["k"][:, ::2] *= size
    arguments["v"] = arguments["v"].clamp(-1, 1) * 1e36
    d_o, d_state = example.cotangents()
    check(backend, arguments, example, (d_o * 1e-10, d_state * 1e-10))


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("magnitude", ["half_range", "large_gradients", "tiny_keys"])
@pytest.mark.parametrize("rule", ["gated_delta", "linear"])
def test_every_magnitude_is_right_in_float16(backend: str, magnitude: str, rule: str) -> None:
    example = Example(
        T=70, R=2, K=16, V=32, dtype="float16", rule=rule, magnitude=magnitude, gate="slow",
        initial_state=True, qk_l2norm=magnitude == "tiny_keys", seed=2,
    )  # fmt: skip
    arguments, cotangents = example.arguments(), example.cotangents()
    check(backend, arguments, example, cotangents)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 4, 20])
def test_a_sequence_takes_a_state_of_16_bits(
    backend: str, state_dtype: torch.dtype, T: int
) -> None:
    example = Example(T=T, R=2, K=16, V=16, initial_state=True, seed=3)
    arguments = example.arguments()
    state = arguments["initial_state"].to(state_dtype)
    narrow = arguments | {"initial_state": state}
    assert dict(gdn_ops.explain(**narrow, backend=backend).reasons)[backend] == ()
    for cotangents in (None, example.cotangents()):
        results = run(narrow, backend, cotangents)
        wide = run(arguments | {"initial_state": state.float()}, backend, cotangents)
        assert results["final_state"].dtype == torch.float32
        for name, x in results.items():
            assert torch.equal(x, wide[name].to(x.dtype)), name
    assert results["d_initial_state"].dtype == state_dtype


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_step_takes_a_state_of_16_bits(backend: str, dtype: str) -> None:
    example = Example(B=2, T=1, R=2, K=16, V=16, initial_state=True, dtype=dtype, seed=4)
    given = example.arguments()
    state = given.pop("initial_state")
    del given["chunk_size"]
    for name in ("q", "k", "v", "alpha", "beta"):
        given[name] = given[name].squeeze(1)
    for state_dtype in (torch.float16, torch.bfloat16):
        narrow = state.to(state_dtype)
        o, new = gdn_ops.gated_delta_step(**given, state=narrow, backend=backend)
        expected, wide = gdn_ops.gated_delta_step(**given, state=narrow.float(), backend="naive")
        assert new.dtype == state_dtype and o.dtype == given["v"].dtype
        assert (o.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
        assert (new.float() - wide).norm() <= 2**-8 * wide.norm()


@pytest.mark.parametrize("magnitude", ["half_range", "large_gradients", "tiny_keys"])
def test_a_magnitude_is_what_its_example_says(magnitude: str) -> None:
    example = Example(
        T=40, K=16, V=16, dtype="float16", rule="linear", magnitude=magnitude, initial_state=True
    )
    for qk_l2norm in (False, True):
        given = replace(example, qk_l2norm=qk_l2norm)
        results = run(
            {n: x.double() if isinstance(x, Tensor) else x for n, x in given.arguments().items()},
            "naive",
            given.cotangents(),
        )
        in_float16 = ("o", "d_q", "d_k", "d_v")
        assert all(float(results[name].abs().max()) < 65504 for name in in_float16)
        sizes = {
            "half_range": results["final_state"],
            "large_gradients": results["d_initial_state"],
            "tiny_keys": 1000 * given.arguments()["v"].float(),
        }
        assert float(sizes[magnitude].abs().max()) > 65504


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_faint_decay_leaves_of_a_large_state_what_is_as_large_as_the_values(dtype: str) -> None:
    example = Example(
        T=9, K=16, V=16, R=2, lengths=(4, 0, 5), dtype=dtype, gate="slow", magnitude="faint",
        initial_state=True, seed=3,
    )  # fmt: skip
    given = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in example.arguments().items()
    }
    state = run(given, "naive", None)["final_state"]
    flushed = given | {"alpha": torch.where(given["alpha"] < 1e-37, 0.0, given["alpha"])}
    lost = run(flushed, "naive", None)["final_state"] - state
    sizes = state.flatten(2).norm(dim=-1)
    assert (given["alpha"] < 1.2e-38).any() and (given["alpha"] > 0).all()
    assert (lost[::2].flatten(2).norm(dim=-1) > 0.05 * sizes[::2]).all()
    assert lost[1].norm() == 0 and state[1].norm() > 1e12
