"""A check by several processes judges what one process judges, and loses no subject to a death."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gdn_ops.backends.naive import Naive
from gdn_ops.bench import device
from gdn_ops.bench.child import StoppedError
from gdn_ops.cli import check_command, check_worker
from gdn_ops.cli.check_worker import check_side_by_side
from gdn_ops.dispatch import registry
from gdn_ops.testing import conformance
from gdn_ops.testing.compiled import few_calls, per_shape, per_width
from gdn_ops.testing.conformance import Subject

TOLD: list[tuple[float, str]] = []


def side_by_side(backend: str, start: Any = None, **given: Any) -> conformance.CheckReport:
    TOLD.clear()
    options = {"seed": 3, "device": "cpu", "workers": 2, **given}
    if start is not None:
        options["start"] = start
    seconds = options.pop("seconds", 0.1)
    return check_side_by_side(backend, seconds, lambda *pair: TOLD.append(pair), **options)


def test_real_processes_judge_what_one_process_judges() -> None:
    report = side_by_side("torch", only="gate", seconds=1.0)
    alone = conformance.check("torch", 1.0, seed=3, only="gate")
    assert len(report.rows) == 2
    assert all(row.examples for row in report.rows)
    assert [row.subject for row in report.rows] == [row.subject for row in alone.rows]
    assert report.passed and alone.passed
    assert (report.backend, report.device, report.seed) == ("torch", "cpu", 3)
    assert {name for _, name in TOLD} == {row.subject for row in report.rows}
    assert all(0 < share <= 1 for share, _ in TOLD)


class InProcess:
    """A worker whose orders are carried out in this process; it ends at a subject."""

    dies: str = ""

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        events: list[dict[str, Any]] = []

        def emit(event: dict[str, Any]) -> None:
            events.append(event)
            if self.dies and event.get("at") == self.dies:
                raise KeyboardInterrupt

        try:
            check_worker.carry_out(order, emit)
        except KeyboardInterrupt:
            yield from events
            raise StoppedError("the process ended with signal SIGSEGV") from None
        yield from events

    def close(self) -> None:
        pass


def test_a_call_that_ends_its_process_fails_its_subject_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [s.name for s in conformance.subjects(Naive()) if "gate" in s.name]
    monkeypatch.setattr(InProcess, "dies", names[0])
    report = side_by_side("naive", InProcess, only="gate", workers=1)
    assert [row.subject for row in report.rows] == names
    dead, *others = report.rows
    assert dead.failure is not None
    assert dead.failure.startswith("the process ended with signal SIGSEGV\nfrom gdn_ops.testing")
    assert "'naive', Example(" in dead.failure
    assert all(row.passed and row.examples for row in others)
    assert not report.passed


def test_a_wrong_call_is_shown_as_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Naive):
        name = "wrong_naive"

        def forward(self, call: Any) -> Any:
            out = super().forward(call)
            return out._replace(o=out.o * 1.5)

    registry.register_backend(Wrong)
    try:
        report = side_by_side("wrong_naive", InProcess, only="outputs", workers=1, seconds=5.0)
    finally:
        registry.unregister_backend("wrong_naive")
    (row,) = report.rows
    assert row.failure is not None and row.failure.startswith("WRONG: ")
    assert "print(judge(Example(" in row.failure


def test_a_call_that_breaks_the_device_ends_the_process_before_others_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class EndedError(BaseException):
        pass

    def end(code: int) -> None:
        raise EndedError(code)

    def broken(self: device.Device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(backend: str, example: Any) -> Any:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(check_worker.os, "_exit", end)
    events: list[dict[str, Any]] = []
    (real, *_) = conformance.subjects(Naive())
    subject = check_worker._watched(replace(real, judge=fails), "cpu", events.append)
    example = conformance.Example(T=1)
    with pytest.raises(RuntimeError, match="misaligned"):
        subject.judge("naive", example)
    monkeypatch.setattr(device.Device, "synchronize", broken)
    with pytest.raises(EndedError):
        subject.judge("naive", example)
    assert events[0] == {"at": real.name, "code": real.code("naive", example)}


def test_few_widths_are_drawn_of_kernels_on_a_gpu_alone() -> None:
    class Kernels(Naive):
        name = "kernels"
        kernels = True

    own = Kernels()
    assert few_calls(own, "cuda:1") == per_width(own.limits) != {}
    assert few_calls(own, "cpu") == {}, "an emulation compiles nothing"
    assert few_calls(Naive(), "cuda") == {}
    compiled = registry.get_backend("compile")
    assert not isinstance(compiled, str)
    assert few_calls(compiled, "cpu") == per_shape(compiled.limits)
    seen = set()

    def look(backend: str, example: Any) -> conformance.Verdict:
        seen.add((example.K, example.V, example.dtype, example.chunk_size))
        return conformance.Verdict(0.0, "o", 0.0, 0.0)

    registry.register_backend(Kernels)
    try:
        given = {"examples": 30, "seed": 1}
        with pytest.MonkeyPatch.context() as patch:
            real = conformance.few_calls
            patch.setattr(conformance, "few_calls", lambda b, device: real(b, "cuda"))
            conformance.run_subject("kernels", Subject("looks", look), **given)  # type: ignore[arg-type]
        assert len(seen) == 3
        conformance.run_subject("kernels", Subject("looks", look), **given)  # type: ignore[arg-type]
        assert len(seen) > 10
    finally:
        registry.unregister_backend("kernels")


@pytest.mark.parametrize(
    "name, where, many",
    [("triton", "cuda", True), ("triton", "cpu", False), ("torch", "cuda", False)],
)
def test_kernels_are_checked_side_by_side_on_a_gpu_alone(
    name: str, where: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    asked: list[str] = []
    for kind, module, function in (
        ("many", check_worker, "check_side_by_side"),
        ("one", conformance, "check"),
    ):
        monkeypatch.setattr(module, function, lambda *_, kind=kind, **__: asked.append(kind))
    monkeypatch.setattr(check_command.certificate, "suspend", lambda *_: None)
    check_command.judge(name, 1.0, None, where)
    assert asked == ["many" if many else "one"]
