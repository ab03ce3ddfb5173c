"""The hypothesis profiles: HYPOTHESIS_PROFILE=ci, the default, is repeatable; fuzz is random."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from torch import Tensor

from fences import fenced
from gdn_ops.bench.floors import Rates
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import is_missing

# Drawing tensors is slow by hypothesis' measure, and the first call of a backend may compile.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "fuzz",
    max_examples=10_000,
    deadline=None,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests record out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDN_OPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: on small tensors a second one only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def given_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the machine's rates: measuring them takes seconds and tests no logic."""
    monkeypatch.setattr("gdn_ops.bench.suite.measure_rates", lambda *_: Rates(1e11, 1e10, 1e10))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every tensor that a call allocates, NaN inside and a number in its fences."""
    tensors: list[Tensor] = []
    empty = torch.empty

    def fenced_empty(*size: Any, **options: Any) -> Tensor:
        inside = empty(*size, **options)
        if not inside.is_floating_point():
            return inside
        tensors.append(fenced(inside.fill_(float("nan")), 7.0))
        return tensors[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fenced_empty)
        patch.setattr(torch, "empty_like", lambda x, **o: fenced_empty(x.shape, dtype=x.dtype))
        yield tensors


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the convolution and the norm of a tiny model run in several blocks."""
    from gdn_ops.nn import blocks

    monkeypatch.setattr(blocks, "_BLOCK", 1 << 10)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    from gdn_ops.backends import compile as compile_backend

    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")
    yield
    torch.compiler.reset()


@pytest.fixture
def registry_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test does to the registry, and let every choice be new to the log."""
    registry.known_backends()
    for name in ("_backends", "_instances"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.setattr(registry, "_default", "auto")
    yield
    is_missing.cache_clear()


@pytest.fixture(autouse=True)
def process_group_as_found() -> Iterator[None]:
    """Leave the process group that an example on a page or in a docstring has made."""
    was_there = torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not was_there:
        torch.distributed.destroy_process_group()
