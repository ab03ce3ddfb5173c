"""Measure a backend's configurations and print rows to paste into its table.

Steps are timed for cases of one token, forward and backward for the others. On a GPU all candidates
are called once before anything is timed, side by side, so that they are compiled; the time is that
of the device's work, replayed from a graph where it can be captured. Each candidate is checked and
timed for itself, and its line is printed at once; one that fails, or computes something else, is a
line with its fault. The fastest of these are then timed in turns, against drift.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from gdn_ops.bench.candidates import AS_IT_IS, Direction, bound, candidates, directions
from gdn_ops.bench.contender import Contender, error_line
from gdn_ops.bench.device import Device, find_device
from gdn_ops.bench.first_calls import Trial, make_first_calls
from gdn_ops.bench.gpu.device import BrokenDeviceError, Cuda
from gdn_ops.bench.inputs import Setting, find_case, inputs_of, make_step_inputs
from gdn_ops.bench.turns import rounds, take_turns
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError
from gdn_ops.spec.language import Case
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP

FINALISTS = 4
"""Candidates that are timed in turns, beside AS_IT_IS: so many graphs are alive at a time."""

QUICK_SAMPLES = 5
"""Samples of a candidate that is timed for itself."""

GPU_ROUNDS = 30
"""Rounds in which the fastest take turns on a GPU; on a CPU the setting says how many."""


def tune(name: str, cases: Sequence[str], setting: Setting) -> Iterator[str]:
    """Measure the candidate configurations of a backend.

    Returns:
        An iterator that measures. It yields lines to print for each case, or qwen-16-32-2048: a row
        per candidate, then the fastest in turns, then that to paste.

    Raises:
        SpecError, ValueError: the backend cannot be tuned, or only emulates on the device, or a
            case cannot be taken: raised before anything is measured.
        BackendUnsupportedError: the backend cannot run a case.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        raise ValueError(f"backend {name!r} is not available: {backend}")
    kind = setting.device.partition(":")[0]
    if kind in backend.limits.emulated_devices:
        raise ValueError(f"backend {name!r} only emulates on {kind}: tune it with --device cuda")
    chosen = [find_case(name) for name in dict.fromkeys(cases or ["qwen-16-32-2048"])]
    for case in chosen:
        if case.lengths:
            raise SpecError(
                f"case {case.name!r} is many sequences in one row, which --tune does not measure"
            )
    for case in chosen:
        _check(backend, case, setting)
    return _lines(backend, chosen, setting)


def _check(backend: Backend, case: Case, setting: Setting) -> None:
    """Refuse a case that the backend cannot run, or for which it has nothing to tune."""
    if case.sizes.T == 1:
        drawn = make_step_inputs(
            case.sizes, setting.torch_dtype, setting.device, channels=case.channels
        )
        x, spec = drawn, GATED_DELTA_STEP
    else:
        x, spec = inputs_of(case, setting), GATED_DELTA
    call = bound(spec, x)
    candidates(backend, call)
    against = registry.reasons(backend, call)
    if against:
        raise BackendUnsupportedError(
            f"backend {backend.name!r} cannot run case {case.name!r}: {'; '.join(against)}"
        )


def find_measured(setting: Setting) -> Device:
    """Return the device that is measured."""
    if setting.device.startswith("cuda"):
        return Cuda(torch.device(setting.device).index or 0)
    return find_device(setting.device)


def _lines(backend: Backend, cases: Sequence[Case], setting: Setting) -> Iterator[str]:
    """Measure the candidates on each case, and yield the lines of `tune`."""
    failed: set[Trial] = set()
    device = find_measured(setting)
    if device.is_gpu:
        yield f"calling every candidate of {backend.name} once, to compile it"
        for trial, error in make_first_calls(backend, cases, setting):
            if error:
                failed.add(trial)
                yield f"{trial.case}, {trial.what}: {_failed(trial.candidate, error)}"
    for case in cases:
        yield f"{case}, {setting.dtype}"
        for direction in directions(backend, case, setting):
            names = (Trial(case.name, direction.what, c.name) for c in direction.space)
            tried = [c for c, t in zip(direction.space, names, strict=True) if t not in failed]
            try:
                yield from _Ranking(direction, device, setting).lines(tried)
            except BrokenDeviceError as error:
                yield f"the device no longer answers, nothing more is measured: {error}"
                return


def _failed(row: str, error: str) -> str:
    return f"{row}  failed: {error}"


class _Ranking:
    """Time the candidates of a direction: each for itself, then the fastest in turns.

    Attributes:
        quick: the median time of every candidate, in seconds.
        remarks: what else is in that time, which is not compared with one of the device's work.
    """

    def __init__(self, direction: Direction, device: Device, setting: Setting) -> None:
        self.direction, self.device, self.setting = direction, device, setting
        self.quick: dict[str, float] = {}
        self.remarks: dict[str, str] = {}

    def lines(self, space: Sequence[Contender]) -> Iterator[str]:
        """Yield a line per candidate once it is measured, those of the fastest, and the row."""
        what, samplers = self.direction.what, {}
        # The operands were drawn elsewhere than on the stream on which candidates work.
        self.device.synchronize()
        for c in space:
            try:
                line = self._alone(c)
            except Exception as error:
                line = self._failed(c, error)
            yield line
        for c in self._finalists(space):
            try:
                samplers[c.name] = self._again(c)
            except Exception as error:
                yield self._failed(c, error)
        times = self._in_turns(samplers)
        for row, time in times.items():
            yield f"{what} in turns  {time * 1e3:10.4f} ms  {row}"
        own = [row for row in times if row != AS_IT_IS]
        if own:
            yield f"fastest {what}: {min(own, key=times.__getitem__)}"

    def _alone(self, c: Contender) -> str:
        """Check and time a candidate for itself; return its line."""
        # The graph of the one before it has ended, and held memory.
        self.device.forget()
        with self.device.working():
            run, results = self.direction.first_call(c)
            fault = self.direction.fault(c.name, results)
            if fault:
                return f"{c.name}  wrong: {fault}"
            del results
            sampler, remark = self.device.sampler(run)
            samples = [sampler() for _ in range(min(QUICK_SAMPLES, self.setting.repeats))]
        self.quick[c.name], self.remarks[c.name] = statistics.median(samples), remark
        line = f"{self.direction.what}  {self.quick[c.name] * 1e3:10.4f} ms  {c.name}"
        return f"{line}  {remark}".rstrip()

    def _failed(self, c: Contender, error: Exception) -> str:
        """Return the line of a candidate that failed.

        Raises:
            BrokenDeviceError: the device no longer answers.
        """
        try:
            self.device.synchronize()
        except Exception:
            raise BrokenDeviceError(f"{c.name}: {error_line(error)}") from error
        return _failed(c.name, error_line(error))

    def _finalists(self, space: Sequence[Contender]) -> list[Contender]:
        """Return AS_IT_IS and the fastest; only those that were timed alike are compared."""
        alike = [name for name, remark in self.remarks.items() if not remark] or [*self.quick]
        own = sorted((name for name in alike if name != AS_IT_IS), key=self.quick.__getitem__)
        chosen = {*own[:FINALISTS], *({AS_IT_IS} & {*alike})}
        return [c for c in space if c.name in chosen]

    def _again(self, c: Contender) -> Callable[[], float]:
        """Return what times a candidate, in the way in which it was timed for itself.

        Raises:
            RuntimeError: it cannot be timed in that way now.
        """
        with self.device.working():
            run, _ = self.direction.first_call(c)
            sampler, remark = self.device.sampler(run)
        if bool(remark) != bool(self.remarks[c.name]):
            raise RuntimeError(f"not compared: {remark or 'captured only this time'}")
        return sampler

    def _in_turns(self, samplers: Mapping[str, Callable[[], float]]) -> dict[str, float]:
        """Return the median times of candidates that take turns."""
        is_gpu = self.device.is_gpu
        count = GPU_ROUNDS if is_gpu else self.setting.repeats
        with self.device.working():
            samples = take_turns(samplers, rounds(count, collect=not is_gpu))
        return {name: statistics.median(times) for name, times in samples.items()}
