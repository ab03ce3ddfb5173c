"""The kernels compute the definition on another machine, emulated, and touch no other memory."""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gdn_ops
from cpp_driver import Driver, compile_driver
from cpp_libraries import levels_here, needs_compiler
from cpp_structs import DOORS, Packed
from cpp_walks import check_walks
from gdn_ops.backends.cpp import build, library
from gdn_ops.dispatch import plans
from gdn_ops.gates import BoundedGate, SoftplusGate, raw_gated_delta_step
from gdn_ops.nn import GatedDeltaNet, kernels
from gdn_ops.testing import Example, conformance
from gdn_ops.testing.oracle import judge
from gdn_ops.testing.runs import installed
from layer_kernels import (
    CONVOLUTIONS,
    NORMS,
    ROUNDING,
    TOKENS,
    assert_close,
    check_ends,
    check_float16,
    check_in_place,
    normal,
)
from nn_layers import OPTIONS, WIDTH, make
from repeated_calls import DECODED, given

pytestmark = needs_compiler

RULES = ("gated_delta", "delta", "gated", "linear")
DTYPES = ("float32", "bfloat16", "float16")
ARM = "aarch64-linux-gnu-g++"
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1"

SHAPES = (
    Example(B=2, T=37, H=2, R=2, K=20, V=36, initial_state=True),
    Example(T=135, R=3, K=16, V=16, gate="extreme", beta="wide", log_gate=True),
    Example(T=33, K=7, V=5, gate="zero", qk_l2norm=True),
    Example(T=74, H=2, K=32, V=33, lengths=(0, 5, 64, 0, 5), strided=True),
    Example(T=52, R=2, K=20, V=36, channels=True, gate="extreme", initial_state=True),
)
"""Whole and cut chunks and panels, runs of chunks, zeros, empty sequences, memory with gaps."""


def emulator(*names: str) -> str:
    """Return an emulator; skip a test without."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {names[0]} (on Debian: qemu-user)")
    return found


def for_arm(folder: Path) -> tuple[str, ...]:
    if shutil.which(ARM) is None:
        pytest.skip(f"no {ARM} (on Debian: g++-aarch64-linux-gnu)")
    emulated = emulator("qemu-aarch64", "qemu-aarch64-static")
    environment = {**os.environ, "CXX": ARM, "CXXFLAGS": "-Werror"}
    # The emulator finds no libraries of the other machine by itself.
    return emulated, str(compile_driver(folder, environment, ("-static",)))


def with_sanitizers(folder: Path) -> tuple[str, ...]:
    compiler, _ = build.find_compiler()
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    program = str(folder / "empty")
    done = build._run([*compiler, *SANITIZED.split(), str(empty), "-o", program], os.environ)
    if done.returncode or build._run([program], os.environ).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    return (str(compile_driver(folder, {**os.environ, "CXXFLAGS": SANITIZED})),)


def for_x86(folder: Path, flags: str = "-O1") -> tuple[str, ...]:
    if "avx2" not in levels_here():
        pytest.skip("this machine is no x86-64")
    emulated = emulator("qemu-x86_64", "qemu-x86_64-static")
    return emulated, "-cpu", str(compile_driver(folder, {**os.environ, "CXXFLAGS": flags}))


ELSEWHERE = {"arm": for_arm, "sanitized": with_sanitizers}
"""The kernels for ARM64 under an emulator; those for this machine under two sanitizers."""

COMMANDS = {
    **ELSEWHERE,
    "x86": for_x86,
    "more": functools.partial(for_x86, flags="-O1 -mavx2 -mfma"),
}
"""Beside these, for a processor that is emulated: the usual build, and one that asks for more."""


def forward_and_backward() -> None:
    """Run the rule on packed sequences with a state, with all that a call may have."""
    q, k, v = (normal(1, 300, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    gates = normal(2, 1, 300, 2).sigmoid().requires_grad_()
    state = normal(2, 2, 8, 8)
    options = {"cu_seqlens": torch.tensor([0, 40, 300]), "initial_state": state}
    o, last = gdn_ops.gated_delta(q, k, v, *gates, **options, return_state=True, backend="cpp")
    (o.sum() + last.sum()).backward()


def forward_and_backward_of_channels() -> None:
    """Run it with a decay of every key channel."""
    q, k, v = (normal(1, 150, 1, 8, seed=seed).requires_grad_() for seed in range(3))
    alpha = normal(1, 150, 1, 8).sigmoid().requires_grad_()
    options = {"initial_state": normal(1, 1, 8, 8), "return_state": True, "backend": "cpp"}
    o, last = gdn_ops.gated_delta(q, k, v, alpha, **options)
    (o.sum() + last.sum()).backward()


OVERFLOW = "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"
"""Words of a sanitizer on a number beside an array, and of a vector that begins within it."""

CUT: tuple[Callable[[], None], ...] = (
    forward_and_backward,
    forward_and_backward_of_channels,
    *(case.check for case in (*DECODED, *CONVOLUTIONS, *NORMS, *TOKENS)),
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[str, ...]]:
    """Commands by name, each compiled when it is first asked for; a test is skipped without."""

    class Commands(dict[str, tuple[str, ...]]):
        def __missing__(self, name: str) -> tuple[str, ...]:
            self[name] = COMMANDS[name](tmp_path_factory.mktemp(name))
            return self[name]

    return Commands()


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let the backend run on a driver."""
    # Every module that asks for the library.
    for name, module in list(sys.modules.items()):
        asks = name.startswith("gdn_ops.backends.cpp.") or module is kernels
        if asks and module is not library:
            for door, stand_in in (("library", lambda: driver), ("missing", lambda: None)):
                if callable(getattr(module, door, None)):
                    monkeypatch.setattr(module, door, stand_in)
    # A plan that was made for the library does not fit a driver, nor the other way round.
    monkeypatch.setattr(plans, "_plans", OrderedDict())
    return driver


every_level = pytest.mark.parametrize(
    ("name", "level"),
    [("arm", "baseline"), *(("sanitized", level) for level in levels_here())],
)


def at_level(
    name: str, level: str, commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> Driver:
    """Let the backend run at a level of a driver; skip a test without."""
    driver = use(Driver(commands[name], level), monkeypatch)
    if not driver.has_level():
        pytest.skip(f"this processor has no level {level}")
    return driver


@every_level
def test_the_kernels_compute_the_definition_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    for dtype in DTYPES:
        for rule in RULES:
            for example in SHAPES:
                drawn = replace(example, rule=rule, dtype=dtype)
                verdict = judge(drawn, "cpp")
                assert verdict.passed, (drawn, verdict)
    assert len(driver.calls) >= 2 * len(DTYPES) * len(RULES) * len(SHAPES)


@every_level
def test_walks_are_right_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    for dtype in DTYPES:
        for rule in RULES:
            for example in SHAPES:
                check_walks(replace(example, rule=rule, dtype=dtype))
    # A forward and a walk, a backward that runs a forward first, and a walk back.
    assert len(driver.calls) == 5 * len(DTYPES) * len(RULES) * len(SHAPES)


@every_level
def test_the_kernels_around_the_rule_are_right_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    for dtype in ROUNDING:
        for case in (*CONVOLUTIONS, *NORMS, *TOKENS):
            case._replace(dtype=dtype).check()
        for kept in (3, 30):
            check_in_place(dtype, kept)
    check_ends()
    check_float16()
    assert set(driver.calls) == {door for door in DOORS if re.search("conv|norm|token", door)}


@every_level
def test_layers_are_right_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    for option in ("the paper", "grouped values", "no short conv", "a biased convolution of 3"):
        for dtype, bound in BOUNDS.items():
            layer, x = make(**OPTIONS[option]).to(dtype), normal(2, 9, WIDTH, dtype=dtype)
            exactly = copy.deepcopy(layer).double()
            # Those of 16 bits depend on every rounding on the way.
            has_grads = dtype == torch.float32
            results = (ran(layer, x, has_grads), ran(exactly, x.double(), has_grads))
            for own, wanted in zip(*results, strict=True):
                size = max(1.0, float(wanted.abs().max()))
                assert float((own - wanted).abs().max()) <= bound * size
    assert set(driver.calls) == set(DOORS) - {"gdn_decode", "gdn_decode_repeated"}


BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of layers, whose projections round too."""


def ran(layer: GatedDeltaNet, x: Tensor, has_grads: bool) -> list[Tensor]:
    """Return what a layer gives for some tokens, with gradients, and for two more one by one."""
    leaf = x[:, :7].clone().requires_grad_(has_grads)
    with torch.set_grad_enabled(has_grads):
        y, state = layer(leaf)
    out = [y.detach()]
    if has_grads:
        out += torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
    with torch.no_grad():
        for t in (7, 8):
            y, state = layer(x[:, t : t + 1], state)
            out += [y, *(s for s in state if s is not None)]
    return out


@every_level
def test_one_token_is_decoded_after_another_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    for case in DECODED:
        for dtype in ROUNDING:
            # Other states of `gated_delta` are copied first.
            own = case.state_dtype if case.op is gdn_ops.gated_delta else dtype
            for state_dtype in {case.state_dtype, own}:
                driver.calls.clear()
                case._replace(dtype=dtype, state_dtype=state_dtype).check()
                assert driver.calls == ["gdn_decode", *3 * ["gdn_decode_repeated"]]


@every_level
@pytest.mark.parametrize("of_channels", [False, True])
def test_raw_gates_are_made_elsewhere(
    name: str,
    level: str,
    of_channels: bool,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    B, H, K, V = 2, 3, 24, 40
    g = 3 * normal(B, H, K) if of_channels else 3 * normal(B, H)
    A_log, dt_bias = torch.linspace(-5, 2.5, H), normal(H * K if of_channels else H, seed=1)
    for gate in (SoftplusGate(A_log, dt_bias), BoundedGate(A_log, dt_bias, -4.5)):
        for seed in (2, 3):
            tokens = [normal(B, H, width, seed=seed) for width in (K, K, V)]
            call = (*tokens, g, normal(B, H, seed=4))
            options = {"state": normal(B, H, K, V, seed=5), "gate": gate, "qk_l2norm": True}
            found = raw_gated_delta_step(*call, **options, backend="cpp")
            assert driver.calls[-1].startswith("gdn_decode")
            exactly = raw_gated_delta_step(*call, **options, backend="naive")
            assert_close("o state", [*found], [*exactly])


@every_level
def test_a_gate_out_of_its_domain_changes_no_state_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = at_level(name, level, commands, monkeypatch)
    arguments = given(gdn_ops.gated_delta_step, backend="cpp")
    gdn_ops.gated_delta_step(**arguments)
    before = arguments["state"].clone()
    arguments["alpha"][-1, -1] = 1.5
    with pytest.raises(gdn_ops.SpecError, match="alpha"):
        gdn_ops.gated_delta_step(**arguments)
    assert driver.calls[-1] == "gdn_decode_repeated"
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_whole_kit_passes_elsewhere(
    name: str, commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = use(Driver(commands[name]), monkeypatch)
    for subject in conformance.subjects(installed("cpp")):
        row = conformance.run_subject("cpp", subject, examples=5, seed=0, shrink=False)
        assert row.passed and row.examples, row
    assert len(driver.calls) > 100


def on(processor: str, command: tuple[str, ...], level: str = "") -> Driver:
    """Return a driver on an emulated processor."""
    *emulator, program = command
    return Driver((*emulator, processor, program), level)


def test_a_processor_below_avx2_runs_the_baseline(
    commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {level: on("Nehalem", commands["x86"], level).has_level() for level in levels_here()}
    assert [level for level, is_there in old.items() if is_there] == ["baseline"]
    # A level that it lacks would end it by an illegal instruction.
    driver = use(on("Nehalem", commands["x86"]), monkeypatch)
    for dtype in DTYPES:
        verdict = judge(replace(SHAPES[0], dtype=dtype), "cpp")
        assert verdict.passed, (dtype, verdict)
    for dtype in ROUNDING:
        for case in (CONVOLUTIONS[0], NORMS[0], TOKENS[0]):
            case._replace(dtype=dtype).check()
    assert len(driver.calls) >= 2 * len(DTYPES)


def test_a_library_that_asks_for_more_has_no_level_on_a_processor_with_less(
    commands: Mapping[str, tuple[str, ...]],
) -> None:
    assert not on("Nehalem", commands["more"]).has_level()


def test_a_sanitizer_ends_the_program_that_touches_what_is_beside_an_array(
    commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Names of functions take most of the time.
    monkeypatch.setenv("ASAN_OPTIONS", "symbolize=0")
    driver = use(Driver(commands["sanitized"]), monkeypatch)
    whole = Packed.add
    noted: list[tuple[str, str]] = []

    def note(packed: Packed, name: str, size: int) -> None:
        if packed[name] and size:
            noted.append((packed.name, name))
        whole(packed, name, size)

    def cut(packed: Packed, name: str, size: int) -> None:
        # The last byte of one array.
        whole(packed, name, size - ((packed.name, name) == beside))

    for run in CUT:
        noted.clear()
        monkeypatch.setattr(Packed, "add", note)
        run()
        monkeypatch.setattr(Packed, "add", cut)
        # Few rows need few of these.
        for beside in dict.fromkeys(noted):
            if beside[1] != "partials":
                with pytest.raises(AssertionError, match=OVERFLOW):
                    run()
    assert set(driver.calls) == set(DOORS)
