"""Run the benchmark: check the contenders of a plan, then take its measurements in order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from gdn_ops.bench import measures
from gdn_ops.bench.child import call
from gdn_ops.bench.floors import measure_rates
from gdn_ops.bench.inputs import Setting, find_case, make_inputs
from gdn_ops.bench.packed import packed_rows
from gdn_ops.bench.peers import Contender, check_peers, find_contender, peers_on
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import TARGETS, Result, describe_system, with_target
from gdn_ops.bench.steps import step_rows
from gdn_ops.bench.verify import verify
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.explain import list_backends
from gdn_ops.environment.devices import threads
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Case
from gdn_ops.spec.names import unknown

WHAT = ("forward", "forward+backward", "memory", "step", "packed", "scaling", "overhead", "import")
"""Every measurement, in the order in which they run."""

REFERENCE = (
    *("qwen-16-32-2048", "qwen-16-32-4096", "qwen-16-32-step-b1"),
    *("packed-8192x1", "packed-2048x4-8"),
)
"""Cases of the reference table: of the times, of memory, of the step, of packed sequences."""

SCALING_TIMES = 8

SEQUENCES = ("forward", "forward+backward", "memory", "scaling")
"""Measurements of cases of sequences; "step" is of one token, "packed" of many in one row."""

USES = {
    "peer": SEQUENCES[:3],
    "repeats": ("forward", "forward+backward", "packed", "scaling"),
    "backend": tuple(what for what in WHAT if what != "import"),
    "dtype": tuple(what for what in WHAT if what != "import"),
    "device": tuple(what for what in WHAT if what != "import"),
    "threads": tuple(what for what in WHAT if what != "import"),
}
"""The measurements that an option has an effect on."""


@dataclass(frozen=True)
class Plan:
    """Hold the plan of a run: measurements, cases, backends, peers and setting.

    Attributes:
        what: names out of WHAT.
        cases: sequence cases for forward, forward+backward and scaling.
        memory_cases: sequence cases for memory.
        step_cases: step cases.
        packed_cases: cases of many short sequences in one row.
    """

    what: tuple[str, ...]
    cases: tuple[Case, ...]
    memory_cases: tuple[Case, ...]
    step_cases: tuple[Case, ...]
    packed_cases: tuple[Case, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    setting: Setting

    def count(self) -> int:
        """Return the number of lines that `run` will log."""
        timed = len({"forward", "forward+backward"} & set(self.what))
        # A check comes before what is timed.
        per_case = timed + (timed > 0) + ("scaling" in self.what)
        total = 1 + len(self.cases) * per_case + len({"overhead", "import"} & set(self.what))
        total += ("memory" in self.what) * len(self.memory_cases)
        total += ("packed" in self.what) * len(self.packed_cases)
        return total + ("step" in self.what) * len(self.step_cases)


def make_plan(
    cases: Sequence[str],
    what: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    setting: Setting,
) -> Plan:
    """Turn names into a plan; without cases, it is the plan of the reference table.

    Raises:
        SpecError: a name is unknown.
    """
    for name in what:
        if name not in WHAT:
            raise SpecError(unknown("measurement", name, WHAT))
    check_peers(peers, *_kinds(setting.device))
    for name in backends:
        registry.get_backend(name)
    chosen = tuple(find_case(name) for name in dict.fromkeys(cases or REFERENCE))
    packed, steps, timed = (
        tuple(case for case in chosen if _kind(case) == kind) for kind in _KINDS
    )
    weighed = timed
    if not cases:
        timed, weighed = timed[:1], timed[1:]
    return Plan(tuple(what), timed, weighed, steps, packed, tuple(backends), tuple(peers), setting)


_KINDS = {
    "packed": (("packed",), "many sequences in one row"),
    "step": (("step",), "a case of one token"),
    "sequence": (SEQUENCES, "a sequence"),
}
"""Kinds of cases: the measurements of each, and what it is in words."""


def _kind(case: Case) -> str:
    if case.lengths:
        return "packed"
    return "step" if case.sizes.T == 1 else "sequence"


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
    needed = {"packed": "of packed sequences", "step": "of one token", "sequence": "of a sequence"}
    for name in what:
        needs = next((kind for kind, (takes, _) in _KINDS.items() if name in takes), None)
        if cases and needs is not None and needs not in kinds.values():
            raise SpecError(f"--what {name} needs a case {needed[needs]}, got {', '.join(cases)}")


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


def system(setting: Setting) -> dict[str, object]:
    """Return the date, setting, devices, threads and versions that identify a run."""
    return describe_system(
        device=setting.device, dtype=setting.dtype, repeats=setting.repeats, threads=threads()
    )


def run(plan: Plan, log: Log = lambda text: None) -> Result:
    """Check the contenders of a plan, then take its measurements.

    `log` is told in one line what starts now, `plan.count()` times.

    Raises:
        RefusedError: a contender's numbers are wrong; nothing was timed on that case.
        SpecError: a backend's name is unknown.
    """
    return _Suite(plan, Result(system(plan.setting)), log).run()


@dataclass
class _Suite:
    """Take the measurements of one plan and collect its result."""

    plan: Plan
    result: Result
    log: Log

    def run(self) -> Result:
        plan, s, result = self.plan, self.plan.setting, self.result
        contenders = self._contenders()
        self.log("the machine's own rates")
        self.rates = measure_rates(s.torch_dtype, s.device)
        result.rates = {
            "gflops": self.rates.flops / 1e9,
            "gbytes": self.rates.bytes / 1e9,
            "gbytes_cached": self.rates.cached_bytes / 1e9,
        }
        for case in plan.cases:
            self._sequences(case, contenders)
        self._own([c.name for c in contenders if not c.is_peer])
        # At the end: its processes give gigabytes back, and a virtual machine may take seconds to
        # get the pages that the next fresh result needs.
        for case in plan.memory_cases if "memory" in plan.what else ():
            self.log(f"memory, {case.name}")
            x = make_inputs(case.sizes, s.torch_dtype, s.device).with_grad()
            weighed = [c for c in contenders if not c.reasons(x, "backward")]
            names = [c.name for c in weighed]
            peer = next((c.name for c in weighed if c.is_peer), None)
            peak = functools.partial(call, measures.measure_peak, sizes=case.sizes, s=s)
            measures.memory_rows(case.name, names, peer, peak, result)
        if s.has_targets:
            result.rows = [with_target(row, TARGETS) for row in result.rows]
        return result

    def _contenders(self) -> list[Contender]:
        """Return the contenders that can run here, peers first, and note why the rest cannot."""
        contenders = {
            name: find_contender(name) for name in (*self.plan.peers, *self.plan.backends)
        }
        self.result.skipped += [
            ("all", n, why) for n, why in contenders.items() if isinstance(why, str)
        ]
        return [c for c in contenders.values() if not isinstance(c, str)]

    def _sequences(self, case: Case, contenders: list[Contender]) -> None:
        """Check the contenders on a case, then time them."""
        wanted = [what for what in ("forward", "forward+backward") if what in self.plan.what]
        if not wanted:
            return
        s, gradients = self.plan.setting, "forward+backward" in wanted
        x = make_inputs(case.sizes, s.torch_dtype, s.device)
        self.log(f"conformance, {case.name}")
        against = {c.name: "; ".join(c.reasons(x, "forward")) for c in contenders}
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
        for what in wanted:
            self.log(f"{what}, {case.name}")
            timed = [c for c in contenders if what == "forward" or not backward[c.name]]
            if timed:
                self.result.rows += measures.sequence_rows(what, case, x, timed, s, self.rates)

    def _own(self, names: list[str]) -> None:
        """Measure step, packed, scaling, overhead and import, which concern this library alone."""
        plan, s, rows = self.plan, self.plan.setting, self.result.rows
        for case in plan.step_cases if "step" in plan.what else ():
            self.log(f"step, {case.name}")
            rows += step_rows(case, names, s, self.rates)
        for case in plan.packed_cases if "packed" in plan.what else ():
            self.log(f"packed sequences, {case.name}")
            packed_rows(case, names, s, self.result)
        for case in plan.cases if "scaling" in plan.what else ():
            self.log(f"scaling, {case.name}")
            for name in names:
                row = measures.scaling_row(case, SCALING_TIMES, name, s)
                if isinstance(row, str):
                    self.result.skipped.append(("scaling", name, row))
                else:
                    rows.append(row)
        if "overhead" in plan.what:
            self.log("overhead per call")
            rows += [measures.overhead_row(name, s) for name in names]
        if "import" in plan.what:
            self.log("import")
            rows.append(measures.import_row())
