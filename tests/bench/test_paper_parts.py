"""The parts of `gdn-ops bench paper`: break-even lengths, rounds within a time, energy counters."""

from __future__ import annotations

import functools
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_ops.bench.device import Device
from gdn_ops.bench.paper import energy, pages, show, timing
from gdn_ops.bench.paper.attention import FullAttention, KeyValueCache
from gdn_ops.bench.paper.break_even import BreakEven, break_even
from gdn_ops.bench.paper.energy import Counter, find_counter
from gdn_ops.bench.paper.published import LENGTHS, THROUGHPUT, kept, published_break_even
from gdn_ops.bench.paper.results import Cell, rows_of
from gdn_ops.bench.paper.timing import MOST, Sample, Spread, measure, rounds_within
from gdn_ops.nn import SlidingWindowAttention


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect no garbage before rounds, which takes longer than these rounds do."""
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)


SIZES = (1024, 2048, 4096, 8192)


def test_a_crossing_is_found_where_lines_meet() -> None:
    # Exactly linear, as the time of attention is: 2 + T / 1000 meets 5 at 3000.
    attention = {n: 2 + n / 1000 for n in SIZES}
    found = break_even(dict.fromkeys(SIZES, 5.0), attention)
    assert found.where == "between"
    assert found.length == pytest.approx(3000)
    assert str(found) == "3000"


def test_what_is_always_slower_has_no_crossing() -> None:
    attention = {n: 2 + n / 1000 for n in SIZES}
    assert break_even(dict.fromkeys(SIZES, 99.0), attention) == BreakEven("above", 8192)
    assert str(break_even(attention, attention)) == "> 8192"


def test_what_is_always_faster_has_its_crossing_below() -> None:
    attention = {n: 2 + n / 1000 for n in SIZES}
    found = break_even(dict.fromkeys(SIZES, 1.0), attention)
    assert found == BreakEven("below", 1024)
    assert str(found) == "< 1024"


def test_of_several_crossings_the_last_one_counts() -> None:
    own = {1024: 1.0, 2048: 3.0, 4096: 3.0, 8192: 1.0}
    found = break_even(own, dict.fromkeys(SIZES, 2.0))
    assert found == BreakEven("between", 6144)


def test_one_that_becomes_slower_again_never_stays_faster() -> None:
    own = {1024: 1.0, 2048: 1.0, 4096: 1.0, 8192: 3.0}
    assert break_even(own, dict.fromkeys(SIZES, 2.0)).where == "above"


def test_times_of_other_lengths_are_refused() -> None:
    text = r"^break_even: lengths are \[1024\] and \[2048\], should be the same ones$"
    with pytest.raises(ValueError, match=text):
        break_even({1024: 1.0}, {2048: 1.0})
    with pytest.raises(ValueError, match=r"^break_even: a time at length 1024 is not finite$"):
        break_even({1024: math.nan}, {1024: 1.0})


def test_the_published_curves_cross_where_the_paper_draws_it() -> None:
    assert published_break_even("gdn").length == pytest.approx(4755, abs=1)
    assert published_break_even("h1").length == pytest.approx(2161, abs=1)
    assert all(len(speeds) == len(LENGTHS) for speeds in THROUGHPUT.values())
    assert kept("attention") == pytest.approx(26.5 / 55)
    assert kept("linear") is None


class Clock:
    """Say the time, which passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "count"), ((0, 1), (25, 2), (35, 3), (10_000, MOST)))
def test_rounds_are_added_while_they_fit(seconds: float, count: int) -> None:
    clock, found = Clock(), 0
    for _ in rounds_within(seconds, clock):
        found += 1
        clock.now += 11.0
    # One is taken in any case, whatever it takes; each took 11 seconds.
    assert found == count


@pytest.mark.parametrize(("warm", "first"), ((None, ["a", "b"]), (["b"], ["b"])))
def test_calls_to_warm_up_do_not_count(warm: list[str] | None, first: list[str]) -> None:
    calls: list[str] = []
    actions = {name: functools.partial(calls.append, name) for name in ("a", "b")}
    spreads, left_out = measure(actions, 0, Device(), warm=warm)
    assert calls == [*first, "a", "b"]
    assert {name: len(x.samples) for name, x in spreads.items()} == {"a": 1, "b": 1}
    assert left_out == {}


def test_warming_up_takes_of_the_time() -> None:
    clock, calls = Clock(), []

    def work() -> None:
        calls.append(clock.now)
        clock.now += 10

    measure({"a": work}, 35, Device(), clock=clock)
    # One to warm up and two rounds; a third one would end after 40 seconds.
    assert len(calls) == 3


def test_what_has_no_memory_is_left_out_and_the_rest_is_timed() -> None:
    def too_large() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    calls: list[int] = []
    spreads, left_out = measure({"a": lambda: None, "b": too_large}, 0, Device())
    assert left_out == {"b": "out of memory: CUDA out of memory. Tried to allocate 9 GiB."}
    assert set(spreads) == {"a"}
    assert len(calls) == 1


class Steps(Counter):
    """Count 3 J more at every reading."""

    name = "a stand-in"

    def __init__(self) -> None:
        self.read = 0

    def joules(self) -> float:
        self.read += 1
        return 3.0 * self.read


def test_energy_is_counted_for_each_sample_and_token() -> None:
    spreads, _ = measure({"a": lambda: None}, 0, Device(), Steps())
    assert [x.joules for x in spreads["a"].samples] == [3.0]
    assert Spread((Sample(1, 5.0), Sample(2, 7.0), Sample(3, 6.0))).joules == 6.0
    cell = Cell("gdn", 128, 50, 2)
    (row,) = rows_of("training", {cell: Spread((Sample(2.0, 5.0),))}, "float32")
    assert (row.joules_per_token, row.tokens_per_second, row.ratio) == (0.05, 50.0, None)
    data = {
        "energy": {"counter": "a stand-in", "reason": None},
        "rows": [vars(row)],
        "system": {"model": {"width": 128}},
    }
    assert "energy of training in mJ a token, a stand-in, idle power included" in show._energy(data)
    assert "  GDN  50" in show._energy(data)
    assert pages.energy(data).endswith("| GDN | 50 |")


def zone(folder: Path, name: str, kind: str, microjoules: int, most: int = 999) -> Path:
    """Make a zone of RAPL."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_rapl_sums_packages_and_knows_that_counters_start_anew(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    (tmp_path / "intel-rapl").mkdir()
    counter = find_counter("cpu", tmp_path)
    assert isinstance(counter, energy.Rapl)
    assert counter.name == "RAPL, 2 packages"
    assert counter.joules() == 0
    second.joinpath("energy_uj").write_text("150")
    assert counter.joules() == pytest.approx(50e-6)
    # From 900 past 999 to 20: 120 more.
    first.joinpath("energy_uj").write_text("20")
    assert counter.joules() == pytest.approx(170e-6)


def test_the_reason_why_nothing_is_counted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    text = f"there is no {gone}: this system, or virtual machine, shows no counters"
    assert find_counter("cpu", gone) == text
    assert find_counter("cpu", tmp_path) == f"{tmp_path} has no intel-rapl zone of a package"
    assert find_counter("mps") == "no counter of mps is known"
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (path / "energy_uj").write_text("much")
    assert str(find_counter("cpu", tmp_path)).startswith("RAPL cannot be read: invalid literal")

    def denied(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(energy, "_integer", denied)
    file = path / "max_energy_range_uj"
    text = f"{file} cannot be read: Permission denied; root may read it"
    assert find_counter("cpu", tmp_path) == text


def test_a_gpu_is_counted_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    text = "package 'pynvml' is not installed: pip install nvidia-ml-py"
    assert find_counter("cuda") == text
    asked: list[str] = []
    nvml: Any = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "handle"
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 5000
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = types.SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    counter = find_counter("cuda:0")
    assert isinstance(counter, energy.Nvml)
    assert (asked, counter.joules(), counter.name) == (["GPU-1-2"], 5.0, "NVML")

    def not_supported(handle: str) -> int:
        raise RuntimeError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = not_supported
    assert find_counter("cuda:0") == "NVML cannot count: Not Supported"


def test_full_attention_is_attention_in_a_window_that_holds_all() -> None:
    torch.manual_seed(0)
    windowed = SlidingWindowAttention(32, 2, 50)
    full = FullAttention(32, 2)
    full.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 40, 32)
    with torch.no_grad():
        expected, _ = windowed(x)
        y, held = full(x[:, :30])
        torch.testing.assert_close(y, expected[:, :30])
        roomy = full.empty_cache(2, 40)
        roomy.keys[:, :, :30], roomy.values[:, :, :30] = held.keys, held.values
        state = KeyValueCache(roomy.keys, roomy.values, 30)
        for t in range(30, 40):
            y, state = full(x[:, t : t + 1], state)
            torch.testing.assert_close(y, expected[:, t : t + 1])
        # Written in place: a token copies no earlier ones.
        assert state.keys.data_ptr() == roomy.keys.data_ptr()
        assert state.tokens == 40
