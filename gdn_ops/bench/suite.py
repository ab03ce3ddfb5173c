"""Run the benchmark: check the comparators of a plan, then take its measurements in order."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gdn_ops.bench import measures
from gdn_ops.bench.floors import Rates, measure_rates
from gdn_ops.bench.inputs import Inputs, Setting, find_case, make_inputs, with_grad
from gdn_ops.bench.peers import PEERS, Comparator, comparator
from gdn_ops.bench.rows import Result
from gdn_ops.bench.scaling import scaling_row
from gdn_ops.bench.steps import step_rows
from gdn_ops.bench.verify import verify
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.explain import list_backends
from gdn_ops.environment.devices import devices, threads
from gdn_ops.environment.versions import installed_versions
from gdn_ops.ops import explain
from gdn_ops.spec.language import Case

WHAT = ("forward", "forward+backward", "memory", "step", "scaling", "overhead", "import")
"""Every measurement, in the order in which they run."""

SCALING_TIMES = 8

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Hold the plan of a run: measurements, cases, backends, peers and setting.

    Attributes:
        what: names out of WHAT.
        cases: sequence cases for forward, forward+backward and scaling.
        memory_cases: sequence cases for memory.
        step_cases: step cases.
        backends: names of this library's backends.
        peers: names of other implementations.
        setting: dtype, device, repeats.
    """

    what: tuple[str, ...] = WHAT
    cases: tuple[Case, ...] = field(default_factory=lambda: (find_case("qwen-16-32-2048"),))
    memory_cases: tuple[Case, ...] = field(default_factory=lambda: (find_case("qwen-16-32-4096"),))
    step_cases: tuple[Case, ...] = field(default_factory=lambda: (find_case("qwen-16-32-step-b1"),))
    backends: tuple[str, ...] = ("torch",)
    peers: tuple[str, ...] = ("transformers",)
    setting: Setting = field(default_factory=Setting)

    def count(self) -> int:
        """Return the number of times that `run` will tell of its progress."""
        per_case = len({"forward", "forward+backward"} & set(self.what))
        total = 1 + len(self.cases) * (per_case + (per_case > 0))
        total += ("memory" in self.what) * len(self.memory_cases)
        total += ("step" in self.what) * len(self.step_cases)
        total += ("scaling" in self.what) * len(self.cases)
        return total + ("overhead" in self.what) + ("import" in self.what)


def make_plan(
    cases: Sequence[str],
    what: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    setting: Setting,
) -> Plan:
    """Turn names into a plan; without cases, it is the plan of the reference table.

    Raises:
        ValueError: a name is unknown.
    """
    for name in what:
        if name not in WHAT:
            raise ValueError(f"unknown measurement {name!r}, known: {', '.join(WHAT)}")
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}, known: {', '.join(PEERS)}")
    for name in backends:
        registry.get_backend(name)
    plan = Plan(tuple(what), backends=tuple(backends), peers=tuple(peers), setting=setting)
    if not cases:
        return plan
    found = [find_case(name) for name in cases]
    steps = tuple(case for case in found if case.sizes.T == 1)
    sequences = tuple(case for case in found if case.sizes.T != 1)
    wanted = tuple(w for w in plan.what if w != "step" or steps)
    return Plan(wanted, sequences, sequences, steps, plan.backends, plan.peers, setting)


def default_backends() -> tuple[str, ...]:
    """Return the names "torch" and, where that backend is available, "compile"."""
    usable = {info.name for info in list_backends() if info.status == "available"}
    return tuple(name for name in ("torch", "compile") if name in usable)


def system(setting: Setting) -> dict[str, object]:
    """Return the date, setting, devices, threads and versions that identify a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": setting.device,
        "dtype": setting.dtype,
        "repeats": setting.repeats,
        "devices": devices(),
        "threads": threads(),
        "versions": installed_versions(),
    }


def run(plan: Plan, tell: Tell = lambda text: None) -> Result:
    """Check the comparators of a plan, then take its measurements.

    Args:
        plan: what to measure.
        tell: told in one line what starts now, `plan.count()` times.

    Raises:
        RefusedError: a comparator's numbers are wrong; nothing was timed on that case.
        SpecError: a backend's name is unknown.
    """
    s = plan.setting
    result = Result(system(s))
    comparators = _comparators(plan, result)
    tell("the machine's own rates")
    rates = measure_rates(s.torch_dtype, s.device)
    result.rates = {
        "gflops": rates.flops / 1e9,
        "gbytes": rates.bytes / 1e9,
        "gbytes_cached": rates.cached_bytes / 1e9,
    }
    for case in plan.cases:
        _sequences(plan, case, comparators, rates, result, tell)
    _small(plan, [c.name for c in comparators if not c.is_peer], rates, result, tell)
    # At the end: its processes give gigabytes back, and a virtual machine may take seconds to get
    # the pages that the next fresh result needs.
    if "memory" in plan.what:
        for case in plan.memory_cases:
            tell(f"memory, {case.name}")
            rows, skipped = measures.memory_rows(case, comparators, s)
            result.rows += rows
            result.skipped += skipped
    return result


def _comparators(plan: Plan, result: Result) -> list[Comparator]:
    """Return the comparators that can run here, peers first, and note why the rest cannot."""
    found = []
    for name in (*plan.peers, *plan.backends):
        c = comparator(name)
        if isinstance(c, str):
            result.skipped.append(("all", name, c))
        else:
            found.append(c)
    return found


def _runnable(
    comparators: list[Comparator], case: Case, x: Inputs, result: Result
) -> list[Comparator]:
    """Return the comparators that can run these operands, and note why the others cannot."""
    found = []
    for c in comparators:
        if not c.is_peer:
            answer = explain(x.q, x.k, x.v, log_alpha=x.log_alpha, beta=x.beta, backend=c.name)
            if answer.backend is None:
                reasons = "; ".join(dict(answer.reasons)[c.name])
                result.skipped.append((case.name, c.name, reasons))
                continue
        found.append(c)
    return found


def _sequences(
    plan: Plan,
    case: Case,
    comparators: list[Comparator],
    rates: Rates,
    result: Result,
    tell: Tell,
) -> None:
    """Check the comparators on a case, then time them."""
    wanted = [what for what in ("forward", "forward+backward") if what in plan.what]
    if not wanted:
        return
    s, gradients = plan.setting, "forward+backward" in wanted
    x = make_inputs(case.sizes, s.torch_dtype, s.device)
    tell(f"conformance, {case.name}")
    comparators = _runnable(comparators, case, with_grad(x) if gradients else x, result)
    result.checks += verify(comparators, case, x, gradients=gradients) if comparators else []
    for what in wanted:
        tell(f"{what}, {case.name}")
        if not comparators:
            continue
        result.rows += measures.sequence_rows(what, case, x, comparators, s, rates)


def _small(plan: Plan, names: list[str], rates: Rates, result: Result, tell: Tell) -> None:
    """Measure step, scaling, overhead and import, which concern this library alone."""
    s = plan.setting
    if "step" in plan.what:
        for case in plan.step_cases:
            tell(f"step, {case.name}")
            result.rows += step_rows(case, names, s, rates)
    if "scaling" in plan.what:
        for case in plan.cases:
            tell(f"scaling, {case.name}")
            for name in names:
                row = scaling_row(case, SCALING_TIMES, name, s)
                if isinstance(row, str):
                    result.skipped.append(("scaling", name, row))
                else:
                    result.rows.append(row)
    if "overhead" in plan.what:
        tell("overhead per call")
        result.rows += [measures.overhead_row(name, s) for name in names]
    if "import" in plan.what:
        tell("import")
        result.rows.append(measures.import_row(s))
