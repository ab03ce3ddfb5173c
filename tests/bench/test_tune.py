"""Tuning tries what a backend offers, shows what fails, and prints the row to paste."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import Limits
from gdn_ops.backends.torch import Torch
from gdn_ops.bench import first_calls, turns
from gdn_ops.bench import tune as tuning
from gdn_ops.bench.candidates import AS_IT_IS, bound, directions
from gdn_ops.bench.child import StoppedError
from gdn_ops.bench.device import Run
from gdn_ops.bench.inputs import Setting, find_case, make_inputs
from gdn_ops.bench.tune import tune
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.kernel_support.backend import KernelBackend
from gdn_ops.kernel_support.tuning import Tunable as Tunes
from gdn_ops.spec.ops import GATED_DELTA
from gpu_stand_ins import FakeDevice

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
    case = replace(tiny, name="tiny-12", sizes=replace(tiny.sizes, T=12))
    short = {"tiny": case, "tiny-12": case}
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
    assert rows(lines, "forward") == [*first, *first], "alone and in turns"
    assert rows(lines, "backward") == [*first, "Config(tiles=8),"] * 2
    assert {tiles for what, tiles in Tunable.log if what == "backward"} == {0, 1, 2, 8}
    assert Tunable.current == 0


def test_the_row_to_paste_is_the_fastest_in_turns_that_can_be_pasted() -> None:
    lines = list(tune("tunable", ["tiny"], ONCE))
    for what in ("forward", "backward"):
        times = {
            line.partition(" ms  ")[2]: float(line.split()[3])
            for line in lines
            if line.startswith(f"{what} in turns ") and AS_IT_IS not in line
        }
        assert f"fastest {what}: {min(times, key=times.__getitem__)}" in lines


def test_steps_are_tuned_on_cases_of_one_token() -> None:
    lines = list(tune("tunable", ["tiny-step"], ONCE))
    assert rows(lines, "step") == [AS_IT_IS, "Config(tiles=1),", "Config(tiles=2),"] * 2
    assert {tiles for what, tiles in Tunable.log if what == "step"} == {0, 1, 2}


def test_a_candidate_is_printed_before_the_next_one_is_called() -> None:
    lines = tune("tunable", ["tiny"], ONCE)
    while not next(lines).endswith("Config(tiles=1),"):
        pass
    assert {tiles for _, tiles in Tunable.log} == {0, 1}


def test_a_configuration_that_fails_is_a_line_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tunable, "offered", (1, 3))
    lines = list(tune("tunable", ["tiny"], ONCE))
    line = "Config(tiles=3),  failed: RuntimeError: out of resource: shared memory"
    assert lines.count(line) == 2, "forward and backward"
    assert rows(lines, "forward") == [AS_IT_IS, "Config(tiles=1),"] * 2
    assert "fastest forward: Config(tiles=1)," in lines


@pytest.mark.parametrize("case", ["tiny", "tiny-step"])
def test_a_configuration_that_computes_something_else_is_a_line_and_not_the_end(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tunable, "wrong", 2)
    lines = list(tune("tunable", [case], ONCE))
    wrong = [line for line in lines if line.startswith("Config(tiles=2),  wrong: ")]
    assert len(wrong) == (2 if case == "tiny" else 1)
    assert all("off by 0.01, above" in line for line in wrong)
    what = "forward" if case == "tiny" else "step"
    assert rows(lines, what) == [AS_IT_IS, "Config(tiles=1),"] * 2


def test_the_backend_as_it_is_may_be_wrong_and_its_rows_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tunable, "wrong", 0)
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert any(line.startswith(f"{AS_IT_IS}  wrong: ") for line in lines)
    assert set(rows(lines, "forward")) == {"Config(tiles=1),", "Config(tiles=2),"}


# On a GPU, of which a made-up device stands in.


class Device(FakeDevice):
    """A device that counts the graphs that are alive, and on which configurations take a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0
        self.not_captured: set[int] = set()
        self.without_memory: set[int] = set()

    def graph(self, runs: Sequence[Run]) -> Callable[[], float]:
        # Which configuration it is, is known while it runs.
        before = len(Tunable.log)
        for run in runs:
            run()
        (tiles,) = {tiles for _, tiles in Tunable.log[before:]}
        self.refuses_capture = tiles in self.not_captured
        self.is_full = tiles in self.without_memory
        replay = super().graph(runs)
        self.alive.add(replay)
        self.most = max(self.most, len(self.alive))
        return replay


class InProcess:
    """A worker whose orders are carried out in this process; some end it."""

    dies: ClassVar[int | None] = None
    closed: ClassVar[int] = 0

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.desk = first_calls.Desk(self.events.append)

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        if order["candidate"] == f"Config(tiles={self.dies}),":
            raise StoppedError("the process ended with signal SIGSEGV")
        self.events.clear()
        self.desk.carry_out(order)
        yield from self.events

    def close(self) -> None:
        InProcess.closed += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made, seconds = Device(), {0: 3e-3, 1: 2e-3, 2: 1e-3}
    forward = Tunable.forward

    def slow(self: Tunable, call: Any) -> gdn_ops.Forward:
        made.now += seconds.get(self.current, 5e-3)
        return forward(self, call)

    monkeypatch.setattr(Tunable, "forward", slow)
    monkeypatch.setattr(Tunable, "limits", replace(Torch.limits, grad=False))
    monkeypatch.setattr(tuning, "find_measured", lambda setting: made)
    monkeypatch.setattr(first_calls, "find_case", tuning.find_case)
    monkeypatch.setattr(InProcess, "closed", 0)
    calls = functools.partial(first_calls.make_first_calls, start=InProcess)
    monkeypatch.setattr(tuning, "make_first_calls", calls)
    # A context is of a thread; here a class holds it for all of them.
    monkeypatch.setattr(first_calls.os, "cpu_count", lambda: 1)
    return made


def test_all_are_called_before_anything_is_timed_and_the_fastest_is_found(device: Device) -> None:
    lines = tune("tunable", ["tiny"], ONCE)
    assert next(lines) == "calling every candidate of tunable once, to compile it"
    assert next(lines).startswith("tiny-12: ")
    assert [tiles for _, tiles in Tunable.log] == [0, 1, 2]
    assert device.captured == []
    rest = list(lines)
    assert rest[-1] == "fastest forward: Config(tiles=2),"
    assert "forward in turns      2.0000 ms  Config(tiles=1)," in rest
    assert InProcess.closed == 1


def test_what_ends_a_worker_or_fails_there_is_a_line_and_never_timed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tunable, "offered", (4, 1, 3))
    monkeypatch.setattr(InProcess, "dies", 4)
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert {*lines[1:3]} == {
        "tiny-12, forward: Config(tiles=3),  failed: RuntimeError: out of resource: shared memory",
        "tiny-12, forward: Config(tiles=4),  failed: the process ended with signal SIGSEGV",
    }
    assert rows(lines, "forward") == [AS_IT_IS, "Config(tiles=1),"] * 2
    assert InProcess.closed == 2


def test_what_has_no_memory_beside_the_others_is_tried_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, forward = [1, 2], Tunable.forward

    def fits_alone(self: Tunable, call: Any) -> gdn_ops.Forward:
        if self.current in full:
            full.remove(self.current)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, call)

    monkeypatch.setattr(Tunable, "forward", fits_alone)
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert full == []
    assert not any("failed" in line for line in lines)
    assert lines[-1] == "fastest forward: Config(tiles=2),"


def test_only_those_in_turns_have_graphs_that_stay(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tunable, "offered", tuple(range(1, 12)))
    monkeypatch.setattr(Tunable, "forward", without_failures(Tunable.forward))
    lines = list(tune("tunable", ["tiny"], ONCE))
    assert len([line for line in lines if line.startswith("forward  ")]) == 12
    assert len([line for line in lines if line.startswith("forward in turns")]) == 5
    assert len(device.captured) == 12 + 5
    assert device.most == 5


def without_failures(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward in which no configuration fails."""

    def run(self: Tunable, call: Any) -> gdn_ops.Forward:
        previous, Tunable.current = Tunable.current, 9 if self.current == 3 else self.current
        try:
            return forward(self, call)
        finally:
            Tunable.current = previous

    return run


def test_a_candidate_without_memory_for_its_graph_fails_alone(device: Device) -> None:
    device.without_memory = {2}
    lines = list(tune("tunable", ["tiny"], ONCE))
    why = "RuntimeError: operation failed due to a previous error during capture"
    assert f"Config(tiles=2),  failed: {why}" in lines
    assert lines[-1] == "fastest forward: Config(tiles=1),"


def test_times_of_events_are_not_ranked_with_those_of_graphs(device: Device) -> None:
    device.not_captured = {2}
    lines = list(tune("tunable", ["tiny"], ONCE))
    remark = "not captured: RuntimeError: called a synchronizing CUDA operation"
    assert f"forward      1.0000 ms  Config(tiles=2),  {remark}" in lines
    assert "forward in turns      2.0000 ms  Config(tiles=1)," in lines
    assert not any("in turns" in line and "tiles=2" in line for line in lines)
    assert lines[-1] == "fastest forward: Config(tiles=1),"
    # Where none can be captured, all are timed alike.
    device.not_captured = {0, 1, 2}
    assert list(tune("tunable", ["tiny"], ONCE))[-1] == "fastest forward: Config(tiles=2),"


def test_a_device_that_no_longer_answers_ends_it_with_a_name(device: Device) -> None:
    lines = tune("tunable", ["tiny"], ONCE)
    while not next(lines).startswith("forward "):
        pass
    device.is_broken = True
    device.is_full = True
    device.without_memory = {1}
    assert list(lines) == [
        "the device no longer answers, nothing more is measured: Config(tiles=1),: RuntimeError: "
        "CUDA error: an illegal memory access was encountered"
    ]


def test_candidates_of_a_real_backend_are_called_in_real_workers() -> None:
    backend = registry.get_backend("torch")
    assert isinstance(backend, Torch)
    done = dict(first_calls.make_first_calls(backend, [find_case("tiny")], Setting()))
    assert set(done.values()) == {""}
    assert {trial.what for trial in done} == {"forward", "backward"}
    assert first_calls.Trial("tiny", "backward", AS_IT_IS) in done


@pytest.mark.parametrize("name", ["triton", "tilelang"])
def test_a_choice_of_the_backward_is_no_candidate_for_the_forward(name: str) -> None:
    pytest.importorskip(name)
    backend = registry.get_backend(name)
    assert isinstance(backend, KernelBackend)
    case = find_case("qwen-16-32-2048")
    case = replace(case, sizes=replace(case.sizes, T=128, H=1, HV=2))
    spaces = {
        d.what: [c.name for c in d.space] for d in directions(backend, case, Setting("bfloat16"))
    }
    x = make_inputs(case.sizes, torch.bfloat16)
    own, *others = backend.tunables(bound(GATED_DELTA, x))
    differs = {
        str(row): {f for f, value in vars(row.config).items() if value != getattr(own.config, f)}
        for row in others
    }
    for names in spaces.values():
        assert names[:2] == [AS_IT_IS, str(own)]
    of_backward = {row for row, fields in differs.items() if fields <= {"token_gradients"}}
    assert of_backward and not of_backward & {*spaces["forward"]}
    assert of_backward & {*spaces["backward"]}
    if name == "triton":
        of_forward = {row for row, fields in differs.items() if fields <= {"prepare"}}
        assert of_forward & {*spaces["forward"]} and not of_forward & {*spaces["backward"]}
    chunks = {row for row, fields in differs.items() if fields == {"C"}}
    assert chunks <= {*spaces["forward"]} & {*spaces["backward"]}


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
    assert isinstance(backend, Torch) and isinstance(backend, Tunes)
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
