"""The kernels compute the definition at every level, from any memory, with any threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from gdn_ops.backends.cpp import calls, library
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

RULES = ("gated_delta", "delta", "gated", "linear")
DTYPES = ("float32", "bfloat16", "float16")

SHAPES = (
    Example(B=2, T=67, H=2, R=2, K=40, V=72, initial_state=True),
    Example(T=300, R=3, K=16, V=16, gate="extreme", beta="wide", log_gate=True),
    Example(T=33, K=7, V=5, gate="zero", qk_l2norm=True),
    Example(T=140, H=2, K=64, V=33, lengths=(0, 5, 130, 0, 5), strided=True),
)
"""Whole and cut chunks and panels, runs of chunks, zeros, empty sequences, memory with gaps."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_level_computes_the_definition(level: str, rule: str, dtype: str) -> None:
    assert library.level() == level
    for example in SHAPES:
        drawn = replace(example, rule=rule, dtype=dtype)
        verdict = judge(drawn, "cpp")
        assert verdict.passed, (drawn, verdict)


def inputs(T: int, H: int = 2, R: int = 2, width: int = 48, **sizes: int) -> dict[str, Tensor]:
    """Return the arguments of a call, gates with an exact 0 among them."""
    generator = torch.Generator().manual_seed(T)
    heads, V = H * R, sizes.get("V", width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, T, *shape, generator=generator)

    x = {"q": normal(H, width), "k": normal(H, width) / width**0.5, "v": normal(heads, V)}
    x |= {"alpha": torch.sigmoid(normal(heads) + 2), "beta": torch.sigmoid(normal(heads))}
    x["alpha"][0, T // 2] = 0
    return x


def results(x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return output, final state and all gradients of a call."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    o, state = gdn_ops.gated_delta(**leaves, return_state=True, backend="cpp", **options)
    (o.square().sum() + state.square().sum()).backward()
    return [o.detach(), state.detach(), *(y.grad for y in leaves.values() if y.grad is not None)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the threads of torch, and set them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (3, 1)])
def test_the_number_of_threads_changes_no_bit(
    heads: tuple[int, int], threads: Callable[[int], None]
) -> None:
    x = inputs(200, *heads, width=96)
    threads(1)
    alone = results(x)
    for count in (2, 3, 5, 8):
        threads(count)
        for one, other in zip(results(x), alone, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("count", [8, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_key_head_add_up(
    level: str, dtype: str, count: int, threads: Callable[[int], None]
) -> None:
    """Judge gradients that are summed over value heads and columns of V, and see them repeat."""
    threads(count)
    for sizes in ({"R": 3, "V": 40}, {"H": 2, "R": 2, "V": 130}, {"R": 1, "V": 70}):
        shape = {"T": 290, "K": 24, "log_gate": True, "initial_state": True, **sizes}
        verdict = judge(Example(dtype=dtype, gate="extreme", qk_l2norm=True, **shape), "cpp")
        assert verdict.passed, (sizes, verdict)
    packed = Example(T=240, lengths=(0, 5, 200, 0, 35), R=2, K=16, V=96, dtype=dtype)
    assert judge(packed, "cpp").passed
    x = inputs(200, 1, 2, width=96)
    assert all(map(torch.equal, results(x), results(x)))


def test_a_large_result_is_that_of_its_parts(level: str) -> None:
    """Compare what is written past the caches with what is written through them."""
    x = inputs(1100, 2, 8, width=16, V=128)
    o, state, _, _, d_v, *_ = results(x)
    assert o.numel() * 4 >= 1 << 23
    for head in range(2):
        heads = {"q": slice(head, head + 1), "k": slice(head, head + 1)}
        part = {
            name: y[:, :, heads.get(name, slice(8 * head, 8 * head + 8))] for name, y in x.items()
        }
        own_o, own_state, _, _, own_d_v, *_ = results(part)
        assert torch.equal(own_o, o[:, :, 8 * head : 8 * head + 8])
        assert torch.equal(own_state, state[:, 8 * head : 8 * head + 8])
        assert torch.equal(own_d_v, d_v[:, :, 8 * head : 8 * head + 8])


@pytest.mark.parametrize("each", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_of_a_few_tokens_are_rows_of_a_batch(dtype: str, each: int) -> None:
    rule = {"rule": "gated_delta", "dtype": dtype, "initial_state": True, "K": 12, "V": 20}
    for lengths in ((each,) * 7, (each,) * 6 + (each + 1,), (0, each, 2 * each)):
        verdict = judge(Example(T=sum(lengths), lengths=lengths, H=2, R=2, **rule), "cpp")
        assert verdict.passed, (lengths, verdict)
    x = {name: y[:, : 6 * each] for name, y in inputs(30).items()}
    ends = torch.arange(0, 6 * each + 1, each, dtype=torch.int32)
    rows = {name: y[0].unflatten(0, (6, each)) for name, y in x.items()}
    with torch.no_grad():
        o, state = gdn_ops.gated_delta(**x, cu_seqlens=ends, return_state=True, backend="cpp")
        own_o, own_state = gdn_ops.gated_delta(**rows, return_state=True, backend="cpp")
    assert torch.equal(o[0].unflatten(0, (6, each)), own_o)
    assert torch.equal(state, own_state)


def test_eight_threads_may_call_at_once() -> None:
    calls = [inputs(T) for T in (1, 33, 64, 90, 128, 129, 200, 300)]
    alone = [results(x) for x in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, right in zip(pool.map(results, calls), alone, strict=True):
                assert all(map(torch.equal, got, right))


def fenced(x: Tensor, fences: list[Tensor]) -> Tensor:
    """Return a copy of a tensor between two stretches of NaN, which are kept in `fences`."""
    room = 64
    memory = torch.full((x.numel() + 2 * room,), torch.nan, dtype=x.dtype)
    inside = memory[room : room + x.numel()].view(x.shape)
    inside.copy_(x.detach())
    fences += [memory[:room], memory[room + x.numel() :]]
    return inside


@pytest.mark.parametrize("T, width", [(1, 3), (31, 17), (65, 48), (140, 5)])
def test_nothing_beside_the_inputs_is_read(level: str, T: int, width: int) -> None:
    fences: list[Tensor] = []
    x = inputs(T, width=width, V=width + 2)
    within = {name: fenced(y, fences) for name, y in x.items()}
    for got, right in zip(results(within), results(x), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K, V", [(3, 5), (16, 33), (64, 128)])
def test_decoding_writes_nothing_beside_the_state(
    level: str, K: int, V: int, state_dtype: torch.dtype
) -> None:
    fences: list[Tensor] = []
    token = {n: y[:, 0] for n, y in inputs(1, width=K, V=V).items()}
    state = torch.randn(1, 4, K, V).to(state_dtype)
    within = fenced(state, fences)
    with torch.no_grad():
        o, new = gdn_ops.gated_delta_step(**token, state=state, backend="cpp")
        again, _ = gdn_ops.gated_delta_step(**token, state=within, inplace=True, backend="cpp")
    assert torch.equal(o, again) and torch.equal(new, within)
    assert all(fence.isnan().all() for fence in fences)


def test_memory_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def gdn_forward(self, call: bytes) -> int:
            return 1

        def gdn_decode_repeated(self, *call: object) -> int:
            return 1

    x = inputs(33)
    state = torch.zeros(1, 4, 48, 48)
    token = {n: y[:, 0] for n, y in x.items()} | {"state": state, "inplace": True}
    gdn_ops.gated_delta_step(**token, backend="cpp")
    before = state.clone()
    for module in ("backend", "prepared"):
        monkeypatch.setattr(f"gdn_ops.backends.cpp.{module}.library", Full)
    for function, arguments in ((gdn_ops.gated_delta, x), (gdn_ops.gated_delta_step, token)):
        text = message_of(MemoryError, function, **arguments, backend="cpp")
        assert text == 'backend "cpp": no memory for a thread to work in'
    assert torch.equal(state, before)


def test_a_library_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn_ops.backends.cpp.backend.missing", lambda: "not built: run it")
    x = inputs(4)
    text = message_of(gdn_ops.BackendUnsupportedError, gdn_ops.gated_delta, **x, backend="cpp")
    assert "  cpp: not built: run it\n" in text
    assert gdn_ops.explain(**x).backend != "cpp"


def test_states_are_kept_as_long_as_the_kernels_say() -> None:
    span = calls.CHUNK * calls.CHUNKS_PER_STATE
    for T in (span - 1, span, span + 1, 3 * span):
        judged = judge(Example(T=T, K=16, V=16, initial_state=True), "cpp")
        assert judged.passed, (T, judged)
