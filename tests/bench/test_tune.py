"""Tuning tries what a backend offers, shows what fails, and prints the row to paste."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import Limits
from gdn_ops.backends.torch import Torch
from gdn_ops.bench import tune as tuning
from gdn_ops.bench import turns
from gdn_ops.bench.inputs import Setting, find_case
from gdn_ops.bench.tune import AS_IT_IS, tune
from gdn_ops.bench.verify import RefusedError
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.spec.ops import GATED_DELTA

ONCE = Setting(repeats=1)


@dataclass(frozen=True)
class Config:
    tiles: int

    def __str__(self) -> str:
        return f"Config(tiles={self.tiles}),"


class Tunable(Torch):
    """The torch backend with configurations that change a log, and one that is wrong if asked."""

    name = "tunable"
    log: ClassVar[list[tuple[str, int]]] = []
    current: ClassVar[int] = 0
    offered: ClassVar[tuple[int, ...]] = (1, 2)
    wrong: ClassVar[int | None] = None

    def tunables(self, call: Any) -> Sequence[object]:
        gradients = (Config(8),) if call.needs_grad else ()
        return (*map(Config, self.offered), *gradients)

    @contextlib.contextmanager
    def using(self, config: object) -> Iterator[None]:
        assert isinstance(config, Config)
        previous, Tunable.current = Tunable.current, config.tiles
        try:
            yield
        finally:
            Tunable.current = previous

    def forward(self, call: Any) -> gdn_ops.Forward:
        if self.current == 3:
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        self.log.append(("forward", self.current))
        out = super().forward(call)
        return out._replace(o=self.changed(out.o))

    def backward(self, call: Any, *arguments: Any) -> gdn_ops.Grads:
        self.log.append(("backward", self.current))
        return super().backward(call, *arguments)

    def decode_one(self, call: Any) -> tuple[Tensor, Tensor]:
        self.log.append(("step", self.current))
        o, state = super().decode_one(call)
        return self.changed(o), state

    def changed(self, o: Tensor) -> Tensor:
        return o * 1.01 if self.current == self.wrong else o


@pytest.fixture(autouse=True)
def tunable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tunable, "log", [])
    # Everything that pytest holds is looked through before each round: seconds, and of no use here.
    monkeypatch.setattr(turns.gc, "collect", lambda: 0)
    # Long enough to have a tail; the definition in float64 takes its time.
    tiny = find_case("tiny")
    short = {"tiny": replace(tiny, name="tiny-12", sizes=replace(tiny.sizes, T=12))}
    monkeypatch.setattr(tuning, "find_case", lambda name: short.get(name) or find_case(name))
    registry.register_backend(Tunable)
    yield
    registry.unregister_backend("tunable")


def rows(lines: list[str], what: str) -> list[str]:
    return [line.partition(" ms  ")[2] for line in lines if line.startswith(f"{what} ")]


def test_every_configuration_is_timed_in_its_context_the_backward_too() -> None:
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert lines[0].startswith("tiny-12: B=2 T=12")
    first = [AS_IT_IS, "Config(tiles=1),", "Config(tiles=2),"]
    assert rows(lines, "forward") == first
    assert rows(lines, "forward+backward") == [*first, "Config(tiles=8),"]
    assert {tiles for what, tiles in Tunable.log if what == "backward"} == {0, 1, 2, 8}
    assert Tunable.current == 0


def test_the_row_to_paste_is_the_fastest_that_can_be_pasted() -> None:
    lines = list(tune("tunable", ["tiny"], ONCE))
    for what in ("forward", "forward+backward"):
        times = {
            line.partition(" ms  ")[2]: float(line.split()[1])
            for line in lines
            if line.startswith(f"{what} ") and AS_IT_IS not in line
        }
        assert f"fastest {what}: {min(times, key=times.__getitem__)}" in lines


def test_steps_are_tuned_on_cases_of_one_token() -> None:
    lines = list(tune("tunable", ["tiny-step"], ONCE))
    assert rows(lines, "step") == [AS_IT_IS, "Config(tiles=1),", "Config(tiles=2),"]
    assert {tiles for what, tiles in Tunable.log if what == "step"} == {0, 1, 2}


def test_a_configuration_that_fails_is_a_line_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tunable, "offered", (1, 3))
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert "Config(tiles=3),  failed: RuntimeError: out of resource: shared memory" in lines
    assert rows(lines, "forward") == [AS_IT_IS, "Config(tiles=1),"]
    assert "fastest forward: Config(tiles=1)," in lines


@pytest.mark.parametrize("case", ["tiny", "tiny-step"])
def test_a_configuration_that_computes_something_else_is_refused(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tunable, "wrong", 2)
    with pytest.raises(RefusedError, match=r"Config\(tiles=2\),.* off by 0.01, above"):
        list(tune("tunable", [case], ONCE))


def test_an_emulation_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(devices=("cuda",), emulated_devices=("cpu",))
    monkeypatch.setattr(Tunable, "limits", limits)
    with pytest.raises(ValueError, match="'tunable' only emulates on cpu: tune it with --device"):
        list(tune("tunable", ["tiny"], ONCE))


def test_a_backend_without_configurations_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'naive' exposes no configurations to tune"):
        list(tune("naive", ["tiny"], ONCE))
    # What torch offers is the chunking of sequences.
    with pytest.raises(ValueError, match="'torch' exposes no configurations to tune"):
        list(tune("torch", ["tiny-step"], ONCE))
    with pytest.raises(ValueError, match="is many sequences in one row, which --tune"):
        list(tune("torch", ["packed-8192x1"], ONCE))
    monkeypatch.setattr(tuning.registry, "get_backend", lambda name: "package 'x' is missing")
    with pytest.raises(ValueError, match="'tunable' is not available: package 'x' is missing"):
        list(tune("tunable", ["tiny"], ONCE))


@pytest.mark.parametrize("name, chunks", [("torch", [1, 2, 4, 8]), ("compile", [1])])
def test_torch_runs_with_the_chunking_that_is_tried(name: str, chunks: list[int]) -> None:
    backend = registry.get_backend(name)
    assert isinstance(backend, Torch) and isinstance(backend, tuning.Tunable)
    q = torch.randn(1, 3, 1, 4)
    given = {"q": q, "k": q, "v": q, "alpha": torch.ones(1, 3, 1)}
    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, given))

    def cut() -> tuple[int, int]:
        return (plan := backend.plan(call)).chunk_size, plan.chunks

    with torch.no_grad():
        before, tried = cut(), []
        for config in backend.tunables(call):
            with backend.using(config):
                tried.append(cut())
            assert str(config) == f'"cpu": {tried[-1]},'
            assert cut() == before
        assert tried == [(size, n) for size in (16, 32, 64) for n in chunks]
    text = "config is int, should be one of `tunables`"
    with pytest.raises(TypeError, match=text), backend.using(32):
        pass
