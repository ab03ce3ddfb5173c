"""Try the compile backend's own compiler in many threads, under modes and after forks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compose_subjects import NO_GRADIENTS
from gdn_ops import gated_delta, gated_delta_step
from gdn_ops.backends.compile import Compile
from processes import printed

pytestmark = pytest.mark.usefixtures("one_thread")
THREADS = 6
RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

compilations: list[torch.fx.GraphModule] = []
"""The graphs that the compiler was given."""


def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile as the backend does, and count."""
    compilations.append(graph)
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    return compiled


@pytest.fixture(scope="module", autouse=True)
def counted_compiler() -> Iterator[None]:
    """Use the real compiler for the tests of this file, and count what it compiles."""
    # Keep what it has compiled from test to test, under its own name.
    torch._dynamo.register_backend(counted, name="gdn_ops_counted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compile, "compiler", "gdn_ops_counted")
        yield


def tensors(T: int = 40, H: int = 1) -> dict[str, Tensor]:
    """Return the arguments of a call of one row, H heads and K = V = 8."""
    draw = torch.Generator().manual_seed(T)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "generator": draw}
    q, k, v = torch.randn(3, 1, T, H, 8, **options).unbind()
    alpha, beta = torch.rand(2, 1, T, H, **options).unbind()
    k = torch.nn.functional.normalize(k, dim=-1)
    return {"q": q, "k": k, "v": v, "alpha": alpha, "beta": beta}


def sequence(x: dict[str, Tensor], backend: str = "compile") -> list[Tensor]:
    """Run a sequence, with gradients where they are on; return o and the gradients."""
    is_grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    x = {name: y.detach().requires_grad_(is_grad) for name, y in x.items()}
    o = gated_delta(**x, backend=backend)
    if not is_grad:
        return [o]
    return [o.detach(), *torch.autograd.grad(o.float().square().sum(), list(x.values()))]


def step(x: dict[str, Tensor], backend: str = "compile") -> list[Tensor]:
    """Run the first token in place on a state of zeros; return o and the state."""
    state = torch.zeros(1, x["v"].shape[2], 8, 8, dtype=torch.float32, device="cpu")
    first = {name: y[:, 0] for name, y in x.items()}
    o, new = gated_delta_step(**first, state=state, inplace=True, backend=backend)
    assert new is state
    return [o, new]


OPS: dict[str, Callable[..., list[Tensor]]] = {"sequence": sequence, "step": step}


class Silent(TorchFunctionMode):
    """Call every function of torch as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def setting(set_to: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(usual)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
    "another device": lambda: torch.device("meta"),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: setting(torch.set_num_threads, 2, 1),
    "function mode": Silent,
    "no function modes": torch._C.DisableTorchFunction,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "anomaly": torch.autograd.detect_anomaly,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}

SETTINGS = ("default dtype", "deterministic", "threads")
"""Names the modes that concern the whole process."""


@pytest.fixture(scope="module")
def compiled_once() -> None:
    """Compile what `tensors` need, as float32 and as autocast makes them, first under autocast."""
    with MODES["autocast"]():
        for run in OPS.values():
            run(tensors())
    for run in OPS.values():
        run(tensors())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_no_mode_of_the_caller_compiles_again(op: str, mode: str) -> None:
    x, before = tensors(), len(compilations)
    with MODES[mode]():
        got, right = OPS[op](x), OPS[op](x, "torch")
    # Functions of torch 2.8 look at settings of the process, guards or not: once for each function.
    most = {"sequence": 2, "step": 1}[op] if mode in SETTINGS and RELEASE < (2, 11) else 0
    assert 0 < before <= len(compilations) <= before + most
    low = {"rtol": 0.02, "atol": 0.02} if mode == "autocast" else TOLERANCE
    for one, other in zip(got, right, strict=True):
        assert one.dtype == other.dtype and one.is_inference() == (mode == "inference mode")
        torch.testing.assert_close(one, other, **low)


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("op", OPS)
def test_no_mode_of_another_thread_compiles_again(op: str) -> None:
    x, before = tensors(), len(compilations)
    inside, over = threading.Event(), threading.Event()

    def stay() -> None:
        with MODES["autocast"](), MODES["inference mode"](), MODES["another device"](), Silent():
            inside.set()
            over.wait(60)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stay)
        assert inside.wait(60)
        try:
            got = OPS[op](x)
        finally:
            over.set()
    assert len(compilations) == before
    for one, other in zip(got, OPS[op](x, "torch"), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("T", [1, 7, 31, 32, 64, 97, 1000])
def test_a_new_length_does_not_compile_again(T: int) -> None:
    x, before = tensors(T), len(compilations)
    for one, other in zip(sequence(x), sequence(x, "torch"), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert len(compilations) == before


def test_many_threads_that_call_first_at_once_compile_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Compile, "compiler", "eager")
        for heads in range(1, 13):
            sequence(tensors(40, heads))
            step(tensors(40, heads))
    # Of a sequence and of a step, each by half of the threads.
    x, together, before = tensors(40, 2), threading.Barrier(THREADS), len(compilations)
    right = [run(x, "torch") for run in OPS.values()]

    def first(i: int) -> list[Tensor]:
        together.wait(60)
        return list(OPS.values())[i % 2](x)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(first, range(THREADS)))
    assert len(compilations) == before + 3
    for i, got in enumerate(results):
        for one, other in zip(got, right[i % 2], strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.usefixtures("compiled_once")
def test_what_torch_forgets_is_compiled_again() -> None:
    x, before = tensors(), len(compilations)
    torch.compiler.reset()
    with torch.inference_mode():
        got, right = step(x), step(x, "torch")
    assert len(compilations) == before + 1
    torch.testing.assert_close(got, right, **TOLERANCE)
    step(x)
    assert len(compilations) == before + 1


FORKS = """
import os, signal, sys, threading, torch
from compose_subjects import backward_of_torch, in_a_fork
from gdn_ops.backends.compile import Compile
from test_compile_threads import sequence, step, tensors

torch.set_num_threads(2)
old, new = tensors(), tensors(40, 3)
right = [*sequence(old), *step(old)]
with torch.no_grad():
    right_new = [*sequence(new, "torch"), *step(new, "torch")]
right_new_gradients = sequence(new, "torch")
tolerance = dict(rtol=1e-4, atol=1e-4)

def without_gradients():
    with torch.no_grad():
        got = [*sequence(old), *step(old)]
    torch.testing.assert_close(got, [right[0], *right[-2:]], **tolerance)
    with torch.no_grad():
        torch.testing.assert_close([*sequence(new), *step(new)], right_new, **tolerance)

def with_gradients():
    torch.testing.assert_close(sequence(old), right[:-2], **tolerance)
    torch.testing.assert_close(sequence(new), right_new_gradients, **tolerance)

print(in_a_fork(without_gradients))
print(in_a_fork(with_gradients))
print(in_a_fork(backward_of_torch))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_forked_after_compiling_computes_and_compiles() -> None:
    here = os.path.dirname(__file__)
    paths = os.pathsep.join((here, os.path.dirname(here)))
    output = printed(FORKS, OMP_NUM_THREADS="2", PYTHONPATH=paths, PYTHONWARNINGS="ignore")
    without, with_gradients, torch_says = output.splitlines()
    assert without == "works"
    # Gradients are there wherever torch has them in forks.
    assert torch_says == "works" or torch_says.startswith(NO_GRADIENTS), output
    assert with_gradients == torch_says, output
