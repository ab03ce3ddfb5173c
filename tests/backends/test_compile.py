"""What the compile backend compiles, and how often."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import parallel_num_threads
from torch.overrides import _get_current_function_mode

import gdn_ops
from errors import message_of
from gdn_ops.backends import compile as compile_backend
from paths import ROOT
from processes import printed, python

CURE = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    monkeypatch.setattr(compile_backend.Compile, "compiler", "eager")
    monkeypatch.setattr(compile_backend, "_functions", {})


def run(backend: str, B: int, T: int, *, grad: bool, strided: bool = False) -> list[Tensor]:
    """Run a call of 2 key heads and 4 value heads; return o and, if asked for, gradients."""
    draw = torch.Generator().manual_seed(T)
    q, k, v = torch.randn(3, B, T, 4, 8, generator=draw)
    q, k = q[:, :, :2], torch.nn.functional.normalize(k[:, :, :2], dim=-1)
    if strided:
        v = torch.randn(B, T, 4, 20, generator=draw)[..., :8]
    gates = torch.rand(2, B, T, 4, generator=draw).unbind()
    x = [y.detach().requires_grad_(grad) for y in (q, k, v, *gates)]
    o = gdn_ops.gated_delta(*x[:3], alpha=x[3], beta=x[4], backend=backend)
    return [o, *torch.autograd.grad(o.square().sum(), x)] if grad else [o]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_a_new_length_does_not_compile_again(grad: bool, B: int, strided: bool) -> None:
    run("compile", B, 40, grad=grad, strided=strided)
    before = len(compile_backend._functions)
    assert before == (2 if grad else 1)
    for T in (1, 7, 31, 32, 1000, 1024, 2049):
        got = run("compile", B, T, grad=grad, strided=strided)
        for one, right in zip(got, run("torch", B, T, grad=grad, strided=strided), strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)
        assert len(compile_backend._functions) == before, T


def test_a_new_number_of_rows_compiles_once() -> None:
    for B in (1, 2, 3, 2, 1, 3):
        run("compile", B, 33, grad=False)
    assert len(compile_backend._functions) == 3


@pytest.mark.parametrize(("T", "functions"), [(1, 0), (16, 0), (17, 2)])
def test_a_batch_whose_rows_fill_half_a_chunk_compiles_nothing(T: int, functions: int) -> None:
    got = run("compile", 3, T, grad=True)
    assert len(compile_backend._functions) == functions
    for one, right in zip(got, run("torch", 3, T, grad=True), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


def test_packed_sequences_that_share_segments_compile_nothing() -> None:
    x = {
        "q": torch.randn(1, 60, 1, 4),
        "k": torch.randn(1, 60, 1, 4),
        "v": torch.randn(1, 60, 1, 4),
    }
    cu_seqlens = torch.tensor([0, 1, 3, 10, 10, 60])
    o = gdn_ops.gated_delta(**x, rule="linear", cu_seqlens=cu_seqlens, backend="compile")
    right = gdn_ops.gated_delta(**x, rule="linear", cu_seqlens=cu_seqlens, backend="naive")
    torch.testing.assert_close(o, right, rtol=1e-4, atol=1e-4)
    # The one of 50 tokens, and the one of 7, have a chunk of their own size to themselves.
    assert len(compile_backend._functions) == 1


def step(q: Tensor, k: Tensor, backend: str = "compile") -> Tensor:
    """Run a step of one head on a state of ones; return o."""
    state = torch.ones(len(q), 1, 4, 4, dtype=torch.float32, device="cpu")
    o, _ = gdn_ops.gated_delta_step(q, k, k, state=state, rule="delta", backend=backend)
    return o


def vectors() -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(0)).unbind()
    return q, torch.nn.functional.normalize(k, dim=-1)


def test_arguments_that_were_one_tensor_may_be_two_in_the_next_call() -> None:
    q, k = vectors()
    for arguments in ((k, k), (q, k), (k, k)):
        torch.testing.assert_close(step(*arguments), step(*arguments, "naive"))
    assert len(compile_backend._functions) == 1


def test_a_compilation_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [RuntimeError("no compiler today")]

    def flaky(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if failures:
            raise failures.pop()
        return graph.forward

    monkeypatch.setattr(compile_backend.Compile, "compiler", flaky)
    q, k = vectors()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler today"):
        step(q, k)
    assert not compile_backend._functions
    # The lock is free, for another thread too.
    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(step, q, k).result(60), step(q, k, "naive"))


def test_a_cache_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code = "import torch, gdn_ops\nx = torch.ones(3, 1, 1, 16)\n"
    code += "try: gdn_ops.gated_delta_step(*x, rule='linear', backend='compile')\n"
    code += "except RuntimeError as error: print(error)"
    assert printed(code, TORCHINDUCTOR_CACHE_DIR=str(file)) == (
        f"compile: cannot write to disk: [Errno 17] File exists: '{file}'; {CURE}"
    )


STEP = """
import torch, gdn_ops
x = torch.ones(3, 1, 1, 16)
try: gdn_ops.gated_delta_step(*x, rule='linear', backend='compile')
except RuntimeError as error: print(error)
"""


def test_a_cache_without_a_name_is_the_default_one(tmp_path: Path) -> None:
    here, default = tmp_path / "here", tmp_path / "default"
    here.mkdir()
    default.mkdir()
    named = {"PYTHONPATH": str(ROOT), "TMPDIR": str(default), "TRITON_CACHE_DIR": ""}
    done = python("-c", STEP, cwd=here, TORCHINDUCTOR_CACHE_DIR="", **named)
    assert (done.returncode, done.stdout) == (0, "")
    assert not list(here.iterdir())
    assert list(default.glob("torchinductor_*"))


def test_a_space_in_the_name_of_the_cache_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path / "a folder")
    assert printed(STEP, TORCHINDUCTOR_CACHE_DIR=folder) == (
        f"compile: the C++ compiler cannot read from {folder!r}, whose name has a space; {CURE}"
    )


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(compile_backend.Compile, "compiler", full)
    assert message_of(RuntimeError, step, *vectors()) == (
        f"compile: cannot write to disk: [Errno 28] No space left on device; {CURE}"
    )


def test_a_call_after_the_first_takes_no_lock_and_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k = vectors()
    right = step(q, k)
    monkeypatch.setattr(compile_backend, "_lock", None)
    monkeypatch.setattr(compile_backend, "_elsewhere", None)
    torch.testing.assert_close(step(q, k), right)


def test_every_compilation_is_for_the_threads_of_its_caller_and_in_one_thread(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    seen = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append((parallel_num_threads(), threading.get_ident()))
        return graph.forward

    monkeypatch.setattr(compile_backend.Compile, "compiler", look)
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        # Each B is a shape class of its own.
        q, k = (x.expand(count, 1, 4).contiguous() for x in vectors())
        step(q, k)
    torch.set_num_threads(1)
    counts, workers = zip(*seen, strict=True)
    assert counts == (1, 3, 2)
    assert len(set(workers)) == 1 and threading.get_ident() not in workers


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_thread_that_compiles_keeps_no_threads_for_its_products(one_thread: None) -> None:
    # With more of them than processors every parallel region of others took twice as long.
    torch.set_num_threads(3)
    x = torch.ones(2**20, dtype=torch.float32, device="cpu")
    x.exp()
    compile_backend._elsewhere(lambda: None)
    before = set(os.listdir("/proc/self/task"))

    def compute() -> set[str]:
        torch.set_num_threads(3)
        x.exp()
        return set(os.listdir("/proc/self/task"))

    during = compile_backend._elsewhere(compute)
    assert len(during - before) == 2
    # A thread that has ended may be listed for a moment.
    deadline = time.monotonic() + 10
    while (during - before) & set(os.listdir("/proc/self/task")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (during - before) & set(os.listdir("/proc/self/task"))


def test_what_a_release_of_torch_traces_again_under_a_mode_runs_in_another_thread() -> None:
    # torch 2.8 does under a device mode, and cannot trace what it then meets.
    threads = []

    def built(tensors: Any, constants: Any) -> Tensor:
        threads.append(threading.get_ident())
        if _get_current_function_mode() is not None:
            raise torch._dynamo.exc.TorchDynamoException("a mode")
        return tensors[0] + constants[0]

    one = torch.ones(2, dtype=torch.float32, device="cpu")
    run = compile_backend._without_modes(built)
    with torch.device("cpu"):
        assert run((one,), (2.0,)).tolist() == [3.0, 3.0]
    own = threading.get_ident()
    assert [thread == own for thread in threads] == [True, False, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_a_compilation_and_the_child_compiles(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    begun, ended = threading.Event(), []

    def slow(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        begun.set()
        time.sleep(0.5)
        ended.append(time.monotonic())
        return graph.forward

    monkeypatch.setattr(compile_backend.Compile, "compiler", slow)
    q, k = vectors()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(step, q, k)
        assert begun.wait(60)
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(compile_backend.Compile, "compiler", "eager")
            # Ended by a signal if it waits for ever, and then not with 0.
            signal.alarm(60)
            is_same = torch.allclose(step(q, k), step(q, k, "naive"))
            os._exit(not (ended and is_same))
        assert ended and os.waitpid(child, 0)[1] == 0
        torch.testing.assert_close(first.result(60), step(q, k, "naive"))
