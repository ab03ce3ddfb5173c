"""Run the benchmark: check the contenders of a plan, then take its measurements in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gdn_ops.bench import measures, sharing
from gdn_ops.bench.child import call
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.floors import Rates, measure_rates
from gdn_ops.bench.inputs import Setting, find_case, inputs_of
from gdn_ops.bench.packed import packed_rows
from gdn_ops.bench.peers import check_peers, find_contender, peers_on
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import TARGETS, Result, Row, describe_system, with_target
from gdn_ops.bench.steps import step_rows
from gdn_ops.bench.strengths import strengths_row
from gdn_ops.bench.verify import check_zeros, first_error, verify
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.explain import list_backends
from gdn_ops.environment.devices import threads
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Case
from gdn_ops.spec.names import unknown

SEQUENCES = ("forward", "forward+backward", "memory", "threads", "load", "scaling")
CHANNELS = ("forward", "forward+backward", "channels", "strengths")
"""Measurements of cases of sequences; "step" is of one token, "packed" of many in one row.

CHANNELS are those of sequences with a decay of every key channel.
"""

WHAT = (*SEQUENCES[:3], "step", "packed", *SEQUENCES[3:], *CHANNELS[2:], "overhead", "import")
"""Every measurement, in the order in which they are listed."""

_LAYER = ("qwen-16-32-2048",)
_KDA = ("kimi-8-8-1024",)
_FORWARDS = (*_LAYER, "qwen-16-32-prompt-256", *_KDA)
REFERENCE: dict[str, tuple[str, ...]] = {
    "forward": _FORWARDS,
    "forward+backward": (*_LAYER, *_KDA),
    "memory": ("qwen-16-32-4096",),
    "step": ("qwen-16-32-step-b1", "kimi-32-step-b1"),
    "packed": ("packed-8192x1", "packed-2048x4-8"),
    **dict.fromkeys(SEQUENCES[3:], _LAYER),
    **dict.fromkeys(CHANNELS[2:], _KDA),
}
"""Cases of the reference table, by measurement."""

BESIDE = ("forward", "step")
"""The measurements of the reference table in a second dtype: what peers do in it."""

SCALING_TIMES = 8

_ALL_BUT_IMPORT = tuple(what for what in WHAT if what != "import")
USES = {
    "peer": (*SEQUENCES[:3], "step"),
    "repeats": ("forward", "forward+backward", "packed", *SEQUENCES[3:], *CHANNELS[2:]),
    **dict.fromkeys(("backend", "dtype", "device", "threads"), _ALL_BUT_IMPORT),
}
"""The measurements that an option has an effect on."""


@dataclass(frozen=True)
class Part:
    """Hold what is measured in one dtype: the cases of every measurement, none for some."""

    setting: Setting
    cases: Mapping[str, tuple[Case, ...]]

    @property
    def timed(self) -> tuple[Case, ...]:
        """Return the cases of forward and of forward+backward, each once."""
        both = (self.cases.get(what, ()) for what in ("forward", "forward+backward"))
        return tuple(dict.fromkeys(case for cases in both for case in cases))

    def count(self) -> int:
        """Return the number of lines that `run` will log."""
        # The rates, and a check for each case that is timed.
        lines = 1 + len(self.timed)
        return lines + sum(max(1, len(cases)) for cases in self.cases.values())


@dataclass(frozen=True)
class Plan:
    """Hold the plan of a run: what is measured in each dtype, of which backends and peers."""

    parts: tuple[Part, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]

    def count(self) -> int:
        """Return the number of lines that `run` will log."""
        return sum(part.count() for part in self.parts)


def make_plan(
    cases: Sequence[str],
    what: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    *settings: Setting,
) -> Plan:
    """Turn names into a plan, with a part for each setting, which differ in their dtype.

    Without cases it is the plan of the reference table, of which settings after the first have
    BESIDE only.

    Raises:
        SpecError: a name is unknown.
    """
    for name in what:
        if name not in WHAT:
            raise SpecError(unknown("measurement", name, WHAT))
    check_peers(peers, *_kinds(settings[0].device))
    for name in backends:
        registry.get_backend(name)
    chosen = tuple(find_case(name) for name in dict.fromkeys(cases))
    parts = []
    for i, setting in enumerate(settings):
        taken: dict[str, tuple[Case, ...]] = {}
        # Measure this library's own import once: it has no dtype.
        for name in what if i == 0 else (name for name in what if name != "import"):
            if not cases and i > 0 and name not in BESIDE:
                continue
            of_kind = tuple(case for case in chosen if name in _KINDS[_kind(case)][0])
            of_table = tuple(find_case(case) for case in REFERENCE.get(name, ()))
            taken[name] = of_kind if cases else of_table
        known = {name: found for name, found in taken.items() if found or name not in REFERENCE}
        parts.append(Part(setting, known))
    return Plan(tuple(parts), tuple(backends), tuple(peers))


_KINDS = {
    "packed": (("packed",), "many sequences in one row"),
    "step": (("step",), "a case of one token"),
    "sequence": (SEQUENCES, "a sequence"),
    "channels": (CHANNELS, "a sequence with a decay of every key channel"),
}
"""Kinds of cases: the measurements of each, and what it is in words."""


def _kind(case: Case) -> str:
    if case.lengths:
        return "packed"
    if case.sizes.T == 1:
        return "step"
    return "channels" if case.channels else "sequence"


def check_effect(cases: Sequence[str], what: Sequence[str]) -> None:
    """Refuse cases that none of the measurements takes, and measurements without a case.

    Raises:
        SpecError: there is one.
    """
    kinds = {name: _kind(find_case(name)) for name in cases}
    for name, kind in kinds.items():
        wanted, words = _KINDS[kind]
        if not set(wanted) & set(what):
            raise SpecError(
                f"case {name!r} is {words}, which --what {','.join(what)} does not measure: "
                f"{', '.join(wanted)} does"
            )
    needed = {
        "packed": "of packed sequences",
        "step": "of one token",
        "sequence": "of a sequence",
        "channels": "whose key channels decay",
    }
    for name in what:
        needs = [kind for kind, (takes, _) in _KINDS.items() if name in takes]
        if cases and needs and not {*needs} & {*kinds.values()}:
            text = f"--what {name} needs a case {needed[needs[0]]}"
            raise SpecError(f"{text}, got {', '.join(cases)}")


def default_peers(device: str) -> tuple[str, ...]:
    """Return the names of the peers that run on a device, installed or not."""
    return peers_on(*_kinds(device))


def _kinds(device: str) -> tuple[str, ...]:
    # The peers of GPUs have a benchmark of their own.
    return ("*", "cpu") if device == "cpu" else ("*",)


def default_backends() -> tuple[str, ...]:
    """Return the names "torch" and, where these backends are available, "cpp" and "compile"."""
    usable = {info.name for info in list_backends() if info.status == "available"}
    return tuple(name for name in ("cpp", "torch", "compile") if name in usable)


def every_backend(device: str) -> tuple[str, ...]:
    """Return the names of the available backends that run on a device, not only emulate there.

    The definition is left out: it takes minutes where others take milliseconds.
    """
    kind = device.partition(":")[0]
    usable = {
        info.name
        for info in list_backends()
        if info.status == "available" and info.limits and {"*", kind} & set(info.limits.devices)
    }
    return tuple(name for name in registry.known_backends() if name in usable - {"naive"})


def system(setting: Setting, *others: Setting) -> dict[str, object]:
    """Return the date, settings, devices, threads and versions that identify a run."""
    dtypes = ",".join(one.dtype for one in (setting, *others))
    return describe_system(
        device=setting.device, dtype=dtypes, repeats=setting.repeats, threads=threads()
    )


def run(plan: Plan, log: Log = lambda text: None) -> Result:
    """Check the contenders of a plan, then take its measurements.

    `log` is told in one line what starts now, `plan.count()` times.

    Raises:
        RefusedError: a contender's numbers are wrong; nothing was timed on that case.
        SpecError: a backend's name is unknown.
    """
    return _Suite(plan, Result(system(*(part.setting for part in plan.parts))), log).run()


@dataclass
class _Suite:
    """Take the measurements of one plan and collect its result."""

    plan: Plan
    result: Result
    log: Log

    def run(self) -> Result:
        contenders = self._contenders()
        for part in self.plan.parts:
            self._stamped(part, functools.partial(self._part, part, contenders))
        # At the end: its processes give gigabytes back, and a virtual machine may take seconds to
        # get the pages that the next fresh result needs.
        for part in self.plan.parts:
            self._stamped(part, functools.partial(self._memory, part, contenders))
        if self.plan.parts[0].setting.device == "cpu":
            self.result.rows = [with_target(row, TARGETS) for row in self.result.rows]
        return self.result

    def _stamped(self, part: Part, measure: Callable[[], None]) -> None:
        """Measure, and note the dtype of what is new in the result."""
        result, dtype = self.result, part.setting.dtype
        rows, checks = len(result.rows), len(result.checks)
        measure()
        result.rows[rows:] = [
            row if row.what == "import" else replace(row, dtype=dtype) for row in result.rows[rows:]
        ]
        result.checks[checks:] = [replace(one, dtype=dtype) for one in result.checks[checks:]]

    def _contenders(self) -> list[Contender]:
        """Return the contenders that can run here, peers first, and note why the rest cannot."""
        contenders = {
            name: find_contender(name) for name in (*self.plan.peers, *self.plan.backends)
        }
        self.result.skipped += [
            ("all", n, why) for n, why in contenders.items() if isinstance(why, str)
        ]
        found = [c for c in contenders.values() if not isinstance(c, str)]
        self.result.system["peers"] = {c.name: c.version for c in found if c.is_peer}
        return found

    def _part(self, part: Part, contenders: list[Contender]) -> None:
        """Take all measurements of one dtype but those of memory."""
        s = part.setting
        self.log(f"the machine's own rates, {s.dtype}")
        rates = measure_rates(s.torch_dtype, s.device)
        self.result.rates[s.dtype] = rates.to_json()
        for case in part.timed:
            self._sequences(part, case, contenders, rates)
        for case in part.cases.get("step", ()):
            self.log(f"step, {case.name}, {s.dtype}")
            step_rows(case, contenders, s, rates, self.result)
        self._own(part, [c for c in contenders if not c.is_peer])

    def _memory(self, part: Part, contenders: list[Contender]) -> None:
        """Measure peak memory, each contender's in a process of its own."""
        s = part.setting
        for case in part.cases.get("memory", ()):
            self.log(f"memory, {case.name}, {s.dtype}")
            x = inputs_of(case, s).with_grad()
            weighed = [c for c in contenders if not c.reasons(x, "backward")]
            names = [c.name for c in weighed]
            peer = next((c.name for c in weighed if c.is_peer), None)
            peak = functools.partial(call, measures.measure_peak, case=case, s=s)
            measures.memory_rows(case.name, names, peer, peak, self.result)

    def _sequences(self, part: Part, case: Case, contenders: list[Contender], rates: Rates) -> None:
        """Check the contenders on a case, then time them."""
        whats = ("forward", "forward+backward")
        wanted = [what for what in whats if case in part.cases.get(what, ())]
        s, gradients = part.setting, "forward+backward" in wanted
        x = inputs_of(case, s)
        self.log(f"conformance, {case.name}, {s.dtype}")
        against = {
            c.name: "; ".join(c.reasons(x, "forward")) or first_error(c, x) for c in contenders
        }
        contenders = [c for c in contenders if not against[c.name]]
        backward = {c.name: "; ".join(c.reasons(x.with_grad(), "backward")) for c in contenders}
        self.result.skipped += [(case.name, name, why) for name, why in against.items() if why]
        if gradients:
            self.result.skipped += [
                (f"forward+backward, {case.name}", name, why)
                for name, why in backward.items()
                if why
            ]
        if contenders:
            differentiable = {c.name for c in contenders if gradients and not backward[c.name]}
            self.result.checks += verify(contenders, case, x, gradients=differentiable)
            self.result.checks += check_zeros(contenders, case, x)
        for what in wanted:
            self.log(f"{what}, {case.name}, {s.dtype}")
            timed = [c for c in contenders if what == "forward" or not backward[c.name]]
            if timed:
                self.result.rows += measures.sequence_rows(what, case, x, timed, s, rates)

    def _own(self, part: Part, ours: list[Contender]) -> None:
        """Take the measurements that concern this library alone."""
        s, names, rows = part.setting, [c.name for c in ours], self.result.rows
        for case in part.cases.get("packed", ()):
            self.log(f"packed sequences, {case.name}, {s.dtype}")
            packed_rows(case, names, s, self.result)
        for what, measure in (("threads", sharing.threads_row), ("load", sharing.load_row)):
            for case in part.cases.get(what, ()):
                self.log(f"{what}, {case.name}, {s.dtype}")
                x = inputs_of(case, s)
                able = [c for c in ours if not c.reasons(x, "forward")]
                self._add(what, {c.name: functools.partial(measure, case, c, x, s) for c in able})
        for case in part.cases.get("channels", ()):
            self.log(f"channels, {case.name}, {s.dtype}")
            x = inputs_of(case, s)
            able = [c for c in ours if not c.reasons(x, "forward")]
            rows += [measures.channels_row(case, c, x, s) for c in able]
        for case in part.cases.get("strengths", ()):
            self.log(f"strengths, {case.name}, {s.dtype}")
            for name in names:
                strengths_row(case, name, inputs_of(case, s), s, self.result)
        for case in part.cases.get("scaling", ()):
            self.log(f"scaling, {case.name}, {s.dtype}")
            scaling = functools.partial(measures.scaling_row, case, SCALING_TIMES, s=s)
            self._add("scaling", {name: functools.partial(scaling, name) for name in names})
        if "overhead" in part.cases:
            self.log(f"overhead per call, {s.dtype}")
            rows += [measures.overhead_row(name, s) for name in names]
        if "import" in part.cases:
            self.log("import")
            rows.append(measures.import_row())

    def _add(self, what: str, measured: Mapping[str, Callable[[], Row | str]]) -> None:
        """Add the rows that functions return, or the reasons why there are none."""
        for name, measure in measured.items():
            row = measure()
            if isinstance(row, str):
                self.result.skipped.append((what, name, row))
            else:
                self.result.rows.append(row)
