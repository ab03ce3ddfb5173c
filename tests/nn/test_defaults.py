"""Whatever dtype and device PyTorch is told to make tensors of by default, results are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops import gated_delta
from gdn_ops.nn import GatedDeltaNet, HybridLM, gate
from gdn_ops.testing.conformance import subjects
from gdn_ops.testing.example import Example
from gdn_ops.testing.runs import installed

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULTS = {
    "bfloat16": (torch.bfloat16, "cpu"),
    "float16": (torch.float16, "cpu"),
    "float64": (torch.float64, "cpu"),
    "meta": (torch.float32, "meta"),
}


@pytest.fixture(params=DEFAULTS)
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Return what sets other defaults, which are taken back behind the test."""
    dtype = torch.get_default_dtype()
    other_dtype, other_device = DEFAULTS[request.param]

    def change() -> None:
        torch.set_default_dtype(other_dtype)
        torch.set_default_device(other_device)

    yield change
    torch.set_default_dtype(dtype)
    # Any device, cpu too, leaves a mode behind that torch.compile cannot trace through.
    torch.set_default_device(None)
    context = torch._GLOBAL_DEVICE_CONTEXT
    if getattr(context, "device_context", default) is None:
        # torch 2.8 fails to tell the default device where it finds this.
        del context.device_context


Change = Callable[[], None]


def layer(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    made = {"dtype": torch.float32, "device": "cpu"}
    return GatedDeltaNet(16, 2, head_dim=8, **made, **options)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, 16, generator=generator, dtype=torch.float32, device="cpu")


def flat(results: Any) -> list[Tensor]:
    """Return every tensor in nested results."""
    if isinstance(results, Tensor):
        return [results]
    return [x for part in results if part is not None for x in flat(part)]


def assert_same(results: Any, expected: Any) -> None:
    for x, y in zip(flat(results), flat(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.device == y.device
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_the_gate_of_a_new_layer_is_float32(default: Change) -> None:
    default()
    for made in (GatedDeltaNet(16, 2), HybridLM("G", 10, 16, num_heads=2).blocks[0].mixer):
        assert made.A_log.dtype == made.dt_bias.dtype == torch.float32
        assert made.q_proj.weight.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("backend", ["torch", "naive", "cpp"])
def test_a_layer_computes_the_same(default: Change, backend: str) -> None:
    x, mask = inputs(), torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 9])
    cuts = torch.tensor([0, 4, 4, 9])

    def results() -> Any:
        made = layer(backend=backend)
        whole, packed = made(x, mask=mask), made(x[:1], cu_seqlens=cuts)
        _, state = made(x)
        y = made(x[:, :1], state)
        (d_x,) = torch.autograd.grad(y[0].sum(), state.memory)
        return whole, packed, y, made.zero_state(2), d_x

    expected = results()
    default()
    assert_same(results(), expected)


@pytest.mark.parametrize("pattern", ["GA", "MGA"])
def test_a_model_computes_the_same(default: Change, pattern: str) -> None:
    tokens = torch.randint(10, (1, 7), generator=torch.Generator().manual_seed(0))

    def results() -> Any:
        torch.manual_seed(0)
        made = {"dtype": torch.float32, "device": "cpu"}
        model = HybridLM(pattern, 10, 16, num_heads=2, window=4, **made)
        logits, state = model(tokens)
        more = model(tokens[:, :2], state)
        generator = torch.Generator().manual_seed(2)
        return logits, more, model.generate(tokens, 3, generator=generator)

    expected = results()
    default()
    assert_same(results(), expected)


def test_a_gate_is_float32_at_least(default: Change) -> None:
    a, A_log = inputs(), torch.zeros(16)
    expected = gate(a, A_log, A_log), gate(a.bfloat16(), A_log), gate(a.double(), A_log)
    default()
    assert_same(
        (gate(a, A_log, A_log), gate(a.bfloat16(), A_log), gate(a.double(), A_log)), expected
    )


@pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels:UserWarning")
@pytest.mark.parametrize("backend", ["torch", "naive", "cpp", "triton", "tilelang"])
def test_a_backend_passes_the_subjects_of_the_kit(default: Change, backend: str) -> None:
    dtype = "float64" if backend in ("torch", "naive") else "float32"
    example = Example(B=1, T=5, H=1, R=2, K=16, V=16, initial_state=True, dtype=dtype)
    checked = subjects(installed(backend))
    default()
    for subject in checked if dtype == "float64" else checked[:1]:
        subject.verify(backend, example)


def test_the_op_computes_the_same(default: Change) -> None:
    arguments = Example(B=2, T=70, H=2, R=2, K=8, V=8, qk_l2norm=True, dtype="float32").arguments()
    expected = gated_delta(**arguments, return_state=True)
    default()
    assert_same(gated_delta(**arguments, return_state=True), expected)
