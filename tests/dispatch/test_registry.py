"""How backends are found, why one is chosen, and what is said when none is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import (
    Backend,
    BackendUnsupportedError,
    Forward,
    Limits,
    SpecError,
    gated_delta,
    gated_delta_step,
    register_backend,
    use_backend,
)
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch import order, registry
from gdn_ops.dispatch.backend import is_missing
from gdn_ops.dispatch.explain import explain_call
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from paths import ROOT


@pytest.fixture(autouse=True)
def registry_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test does to the registry, and let every choice be new to the log."""
    registry.known_backends()
    for name in ("_backends", "_instances"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.setattr(registry, "_default", "auto")
    yield
    is_missing.cache_clear()


def arguments(**changes: Any) -> dict[str, Any]:
    """Return a small good `gated_delta` call: B=1, T=4, H=2, HV=4, K=8, V=6."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, 2, 8, generator=generator).unbind()
    good = {
        "q": q,
        "k": k,
        "v": torch.randn(1, 4, 4, 6, generator=generator),
        "alpha": torch.rand(1, 4, 4, generator=generator),
        "beta": torch.rand(1, 4, 4, generator=generator),
    }
    return {**good, **changes}


def step_arguments(**changes: Any) -> dict[str, Any]:
    return {**{name: x[:, 0] for name, x in arguments().items()}, **changes}


def bound(**changes: Any) -> Call:
    return bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments(**changes)))


def bound_step(**changes: Any) -> Call:
    return bind(GATED_DELTA_STEP, arguments_of(GATED_DELTA_STEP, step_arguments(**changes)))


def make_backend(backend_name: str, answer: float = 7.0, **limits_: Any) -> type[Backend]:
    """Return a backend class that answers one number everywhere."""

    class Constant(Backend):
        name = backend_name
        limits = Limits(**{"devices": ("cpu",), **limits_})

        def forward(self, call: Call) -> Forward:
            s = call.sizes
            return Forward(torch.full_like(call.tokens.v, answer), torch.zeros(s.N, s.HV, s.K, s.V))

        def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
            s = call.sizes
            return torch.full_like(call.tokens.v, answer), torch.zeros(s.N, s.HV, s.K, s.V)

    return Constant


# Limits are data; reasons are the text that users read.


@pytest.mark.parametrize(
    ("limits", "call", "reason"),
    [
        ({"devices": ("cuda",)}, {}, "device cpu (supported: cuda)"),
        ({"devices": ("cuda", "xpu")}, {}, "device cpu (supported: cuda, xpu)"),
        ({"dtypes": ("bfloat16",)}, {}, "dtype float32 (supported: bfloat16)"),
        (
            {"state_dtypes": ("float32", "float64")},
            {"initial_state": torch.zeros(1, 4, 8, 6, dtype=torch.bfloat16)},
            "state dtype bfloat16 (supported: float32, float64)",
        ),
        ({"rules": ("delta", "linear")}, {}, "rule gated_delta (supported: delta, linear)"),
        (
            {"ops": ("gated_delta_step",)},
            {},
            "op gated_delta (supported: gated_delta_step)",
        ),
        (
            {"grad": False},
            {"v": torch.zeros(1, 4, 4, 6, requires_grad=True)},
            "gradients needed (supported: forward only)",
        ),
        ({"varlen": False}, {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is not supported"),
        (
            {"chunk_sizes": (32, 64)},
            {"chunk_size": 16},
            "chunk_size=16 (supported: 32, 64)",
        ),
    ],
)
def test_a_limit_becomes_one_reason(
    limits: dict[str, Any], call: dict[str, Any], reason: str
) -> None:
    assert registry.reasons(make_backend("fake", **limits)(), bound(**call)) == [reason]
    assert registry.reasons(make_backend("fake")(), bound(**call)) == []


def test_head_dims_become_a_reason_for_each_axis() -> None:
    def of(**limits: Any) -> list[str]:
        return registry.reasons(make_backend("fake", **limits)(), bound())

    assert of(head_dims=(64, 128)) == ["K=8 (supported: 64, 128)", "V=6 (supported: 64, 128)"]
    assert of(head_dims=range(8, 257)) == ["V=6 (supported: 8 to 256)"]
    assert of(head_dim_multiple=4) == ["V=6 (supported: multiples of 4)"]
    assert of(head_dims=(6, 8), head_dim_multiple=2) == []


def test_all_reasons_are_given_and_those_of_the_backend_come_last() -> None:
    class Picky(make_backend("picky", dtypes=("float16",), grad=False)):  # type: ignore[misc]
        def reasons(self, call: Call) -> list[str]:
            return [f"T={call.sizes.T} is not my day"]

    assert registry.reasons(Picky(), bound(q=arguments()["q"].requires_grad_())) == [
        "dtype float32 (supported: float16)",
        "gradients needed (supported: forward only)",
        "T=4 is not my day",
    ]


def test_a_step_has_reasons_of_its_own() -> None:
    limits = {"ops": ("gated_delta",), "state_dtypes": ("float32",)}
    call = bound_step(state=torch.zeros(1, 4, 8, 6, dtype=torch.float16))
    assert registry.reasons(make_backend("fake", **limits)(), call) == [
        "op gated_delta_step (supported: gated_delta)",
        "state dtype float16 (supported: float32)",
    ]


# Choosing.


def test_a_pinned_backend_runs() -> None:
    register_backend(make_backend("seven"))
    assert (gated_delta(**arguments(), backend="seven") == 7).all()
    assert (gated_delta_step(**step_arguments(), backend="seven")[0] == 7).all()


def test_auto_takes_the_first_without_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("absent", "narrow", "seven", "torch"))
    register_backend(make_backend("narrow", answer=1.0, head_dims=(128,)))
    register_backend(make_backend("seven"))
    assert (gated_delta(**arguments()) == 7).all()
    assert (gated_delta_step(**step_arguments())[0] == 7).all()


def preference(**choice: Any) -> order.Preference:
    return order.Preference("seven", "gated_delta", "cpu", "made up", ("float32",), **choice)


@pytest.mark.parametrize(
    ("choice", "first"),
    [
        ({}, "seven"),
        ({"least_tokens": 4}, "seven"),
        ({"least_tokens": 5}, "torch"),
        ({"most_heads": 4}, "seven"),
        ({"most_heads": 3}, "torch"),
        ({"needs_grad": False}, "seven"),
        ({"needs_grad": True}, "torch"),
    ],
)
def test_a_measured_preference_comes_before_the_order(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], first: str
) -> None:
    register_backend(make_backend("seven"))
    call = bound()
    assert (call.sizes.T, call.sizes.N * call.sizes.HV) == (4, 4)
    monkeypatch.setattr(order, "PREFERENCES", (preference(**choice),))
    assert registry.select(call).name == first
    explained = explain_call(call)
    assert explained.backend == first
    assert explained.reasons[0][0] == first


def test_a_preference_is_for_its_op_its_device_and_its_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_backend(make_backend("seven"))
    for other in ({"op": "gated_delta_step"}, {"device": "sm_90"}, {"dtypes": ("bfloat16",)}):
        row = dataclasses.replace(preference(), **other)  # type: ignore[arg-type]
        monkeypatch.setattr(order, "PREFERENCES", (row,))
        assert registry.select(bound()).name == "torch"


def test_a_preferred_backend_that_cannot_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(make_backend("seven", head_dims=(128,)))
    monkeypatch.setattr(order, "PREFERENCES", (preference(),))
    assert registry.select(bound()).name == "torch"


def test_nothing_is_preferred_that_was_not_measured() -> None:
    for row in order.PREFERENCES:
        assert (ROOT / row.measured.split()[0]).is_file(), row
    assert order.AUTO_ORDER["cuda"][:2] == ("triton", "tilelang")


def test_auto_on_a_cpu_is_torch() -> None:
    assert registry.select(bound()).name == "torch"
    assert registry.AUTO_ORDER["cpu"][0] == "torch"


def test_a_backend_outside_the_order_is_never_picked_by_auto() -> None:
    register_backend(make_backend("seven"))
    assert registry.select(bound()).name == "torch"
    explained = gdn_ops.explain(**arguments())
    assert dict(explained.reasons)["seven"] == ("auto does not try it on cpu: pin it by name",)


def test_a_pinned_backend_that_cannot_run_raises_and_never_falls_back() -> None:
    register_backend(make_backend("narrow", dtypes=("float16",), head_dims=(128,)))
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta(**arguments(), backend="narrow")
    assert str(caught.value) == (
        "backend 'narrow' cannot run gated_delta on these inputs\n"
        "  q float32 (1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta\n"
        "  narrow: dtype float32 (supported: float16); K=8 (supported: 128); V=6 (supported: 128)\n"
        '  try backend="torch"'
    )
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta_step(**step_arguments(rule="linear", alpha=None), backend="narrow")
    assert str(caught.value) == (
        "backend 'narrow' cannot run gated_delta_step on these inputs\n"
        "  q float32 (1, 2, 8) cpu, v (1, 4, 6), rule linear\n"
        "  narrow: dtype float32 (supported: float16); K=8 (supported: 128); V=6 (supported: 128)\n"
        '  try backend="torch"'
    )


def test_auto_without_any_that_can_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("narrow", "plain"))
    register_backend(make_backend("narrow", head_dims=(128,)))
    register_backend(make_backend("plain", varlen=False, grad=False))
    packed = arguments(
        v=torch.zeros(1, 4, 4, 6, requires_grad=True), cu_seqlens=torch.tensor([0, 1, 4])
    )
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta(**packed)
    assert str(caught.value) == (
        "no backend can run gated_delta on these inputs\n"
        "  q float32 (1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta, "
        "cu_seqlens of 2 sequences, gradients needed\n"
        "  narrow: K=8 (supported: 128); V=6 (supported: 128)\n"
        "  plain: gradients needed (supported: forward only); cu_seqlens is not supported\n"
        f'  try backend="{registry.known_backends()[2]}"'
    )
    assert registry.known_backends()[2] in ("compile", "naive")


def test_without_a_cure_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setattr(registry, "_instances", {})
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("narrow", "plain"))
    register_backend(make_backend("narrow", head_dims=(128,)))
    register_backend(make_backend("plain", dtypes=("float16",)))
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta(**arguments())
    assert str(caught.value).splitlines()[-1] == "  no other backend can run it either"


# Explaining.


def test_explain_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry,
        "_backends",
        {name: registry._backends[name] for name in ("naive", "torch")},
    )
    register_backend(make_backend("narrow", dtypes=("float16",), head_dims=(128,)))
    text = gdn_ops.explain(**arguments())
    assert str(text) == (
        "gated_delta on q float32 (1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta\n"
        "-> torch   runs\n"
        "   naive   can run\n"
        "   narrow  dtype float32 (supported: float16); K=8 (supported: 128); V=6 (supported: 128)"
    )
    pinned = gdn_ops.explain(**arguments(), backend="naive")
    assert pinned.backend == "naive"
    assert str(pinned).splitlines()[1:3] == ["   torch   can run", "-> naive   runs (pinned)"]


def test_explain_of_a_pinned_backend_that_cannot_run_names_none() -> None:
    register_backend(make_backend("narrow", head_dims=(6, 7)))
    explained = gdn_ops.explain(**arguments(), backend="narrow")
    assert explained.backend is None
    assert dict(explained.reasons)["narrow"] == ("K=8 (supported: 6, 7)",)
    assert str(explained).splitlines()[-1] == "the pinned backend cannot run this call"
    assert "runs" not in str(explained)


def test_explain_says_when_no_backend_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setattr(registry, "_instances", {})
    register_backend(make_backend("narrow", head_dims=(8,)))
    assert str(gdn_ops.explain(**arguments())).splitlines()[1:] == [
        "   narrow  V=6 (supported: 8)",
        "no backend can run this call",
    ]


def test_explain_of_three_dimensions_is_that_of_the_step() -> None:
    explained = gdn_ops.explain(**step_arguments(), op="gated_delta_step")
    assert (explained.op, explained.backend) == ("gated_delta_step", "torch")
    assert not explained.pinned


def test_explain_runs_nothing_and_agrees_with_the_call() -> None:
    class Explosive(make_backend("explosive")):  # type: ignore[misc]
        def forward(self, call: Call) -> Forward:
            raise AssertionError("explain ran the backend")

    register_backend(Explosive)
    assert gdn_ops.explain(**arguments(), backend="explosive").backend == "explosive"
    with pytest.raises(AssertionError, match="explain ran the backend"):
        gated_delta(**arguments(), backend="explosive")


# Registering.


def test_backends_lists_name_limits_and_status() -> None:
    register_backend(make_backend("seven", devices=("imaginary",)))
    infos = {info.name: info for info in gdn_ops.list_backends()}
    assert infos["naive"].status == infos["torch"].status == "available"
    assert infos["torch"].limits is not None and "float64" in infos["torch"].limits.dtypes
    assert infos["seven"].status == "no supported device here (supported: imaginary)"
    assert str(infos["seven"]).endswith(
        ": no supported device here (supported: imaginary) (imaginary)"
    )
    assert list(infos)[:1] == ["torch"], "the order of preference comes first"


def test_a_checkout_that_is_not_installed_has_the_version_of_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_nowhere(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    class Foreign(make_backend("foreign")):  # type: ignore[misc]
        distribution = "foreign_kernels"

    register_backend(Foreign)
    monkeypatch.setattr(importlib.metadata, "version", is_nowhere)
    versions = {info.name: info.version for info in gdn_ops.list_backends()}
    assert (versions["torch"], versions["foreign"]) == (gdn_ops.__version__, None)


def test_register_backend_is_a_decorator_and_may_be_repeated() -> None:
    cls = make_backend("seven")
    assert register_backend(cls) is cls
    assert register_backend(cls) is cls
    registry.unregister_backend("seven")
    assert "seven" not in registry.known_backends()


def test_register_backend_refuses_what_is_no_backend() -> None:
    with pytest.raises(TypeError, match=r"^<class 'int'> is not a subclass of gdn_ops.Backend$"):
        register_backend(int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^3 is not a subclass of gdn_ops.Backend$"):
        register_backend(3)  # type: ignore[arg-type]

    class Nameless(Backend):
        limits = Limits(devices=("cpu",))

    class Limitless(Backend):
        name = "limitless"

    with pytest.raises(TypeError, match=r"^Nameless has no class attribute 'name'$"):
        register_backend(Nameless)
    with pytest.raises(TypeError, match=r"^Limitless has no class attribute 'limits'$"):
        register_backend(Limitless)


def test_register_backend_refuses_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(make_backend("seven"))
    with pytest.raises(ValueError, match=r"^backend name 'seven' is taken by .*Constant$"):
        register_backend(make_backend("seven"))
    with pytest.raises(ValueError, match=r"^backend name 'auto' is reserved$"):
        register_backend(make_backend("auto"))
    # A built-in one that nobody has loaded yet is taken all the same.
    monkeypatch.setitem(registry._backends, "naive", "gdn_ops.backends.naive")
    with pytest.raises(ValueError, match=r"^backend name 'naive' is taken by gdn_ops\.backends"):
        register_backend(make_backend("naive"))


# The process default.


def test_use_backend_holds_for_a_block_and_nests() -> None:
    register_backend(make_backend("seven"))
    register_backend(make_backend("eight", answer=8.0))
    expected = gated_delta(**arguments())
    with use_backend("seven"):
        assert (gated_delta(**arguments()) == 7).all()
        with use_backend("eight"):
            assert (gated_delta(**arguments()) == 8).all()
            explained = gdn_ops.explain(**arguments())
            assert (explained.backend, explained.pinned) == ("eight", True)
        assert (gated_delta_step(**step_arguments())[0] == 7).all()
        assert torch.equal(gated_delta(**arguments(), backend="torch"), expected), "pinning wins"
        with use_backend("auto"):
            assert torch.equal(gated_delta(**arguments()), expected)
    assert torch.equal(gated_delta(**arguments()), expected)


def test_use_backend_restores_the_default_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("naive"):
        raise KeyError
    assert registry.default_backend() == "auto"


def test_use_backend_without_a_block_sets_the_process_default() -> None:
    register_backend(make_backend("seven"))
    use_backend("seven")
    assert (gated_delta(**arguments()) == 7).all()
    use_backend("auto")
    assert registry.select(bound(), registry.default_backend()).name == "torch"


def test_the_process_default_never_falls_back_either() -> None:
    register_backend(make_backend("narrow", head_dims=(128,)))
    with use_backend("narrow"), pytest.raises(BackendUnsupportedError, match=r"^backend 'narrow'"):
        gated_delta(**arguments())


def test_use_backend_refuses_an_unknown_name_and_keeps_the_default() -> None:
    with pytest.raises(SpecError, match=r"^unknown backend 'tirton', known: torch, naive"):
        use_backend("tirton")
    assert registry.default_backend() == "auto"


ASK = """
import torch, gdn_ops
x, gate = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
try:
    print(gdn_ops.explain(x, x, x, gate).backend)
except gdn_ops.SpecError as error:
    print(error)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("setting", "chosen"), [("naive", "naive"), ("", "torch")])
def test_the_environment_sets_the_first_default(setting: str, chosen: str) -> None:
    assert run(ASK, GDN_OPS_BACKEND=setting) == chosen


def test_an_unknown_backend_in_the_environment_is_an_error_at_the_first_call() -> None:
    known = ", ".join(registry.known_backends())
    assert run(ASK, GDN_OPS_BACKEND="nope") == f"unknown backend 'nope', known: {known}"


# Logging.


def test_a_choice_is_logged_once_per_distinct_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("narrow", "torch"))
    register_backend(make_backend("narrow", dtypes=("float16",)))
    with caplog.at_level(logging.INFO, logger="gdn_ops"):
        for _ in range(3):
            gated_delta(**arguments())
        double = {name: x.double() for name, x in arguments().items()}
        for _ in range(2):
            gated_delta(**double)
            gated_delta(**arguments(), backend="naive")
            gated_delta_step(**step_arguments())
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("gdn_ops", "INFO", f"{op} runs on backend {text}")
        for op, text in (
            ("gated_delta", "'torch' (narrow: dtype float32 (supported: float16))"),
            ("gated_delta", "'torch' (narrow: dtype float64 (supported: float16))"),
            ("gated_delta", "'naive'"),
            ("gated_delta_step", "'torch' (narrow: dtype float32 (supported: float16))"),
        )
    ]


# What is not installed, and what is broken.


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that writes a module and announces a backend in it."""

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(registry._backends, name, name)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_a_missing_foreign_package_means_not_installed(module: Callable[[str, str], None]) -> None:
    module("lacking", "import a_package_that_nobody_has.part\n")
    reason = "package 'a_package_that_nobody_has' is not installed"
    assert registry.get_backend("lacking") == reason
    info = next(info for info in gdn_ops.list_backends() if info.name == "lacking")
    assert (info.status, info.limits, info.version) == (reason, None, None)
    assert str(info) == f"lacking -: {reason} (-)"
    assert dict(gdn_ops.explain(**arguments()).reasons)["lacking"] == (reason,)
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta(**arguments(), backend="lacking")
    assert f"\n  lacking: {reason}\n" in str(caught.value)


def test_a_package_that_a_backend_requires_may_be_missing() -> None:
    class Needy(make_backend("needy")):  # type: ignore[misc]
        requires = ("a_package_that_nobody_has",)

    register_backend(Needy)
    with pytest.raises(BackendUnsupportedError) as caught:
        gated_delta(**arguments(), backend="needy")
    assert str(caught.value).splitlines()[2:] == [
        "  needy: package 'a_package_that_nobody_has' is not installed",
        '  try backend="torch"',
    ]


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("raise ImportError('libbroken.so: undefined symbol')", ImportError, "undefined symbol"),
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("import gdn_ops.no_such_part", ModuleNotFoundError, "gdn_ops.no_such_part"),
        ("import torch.no_such_part", ModuleNotFoundError, "torch.no_such_part"),
        ("from torch import no_such_name", ImportError, "no_such_name"),
        (
            "from gdn_ops.registry import Backend",
            ImportError,
            "^broken imports gdn_ops.registry, which is now gdn_ops.dispatch.registry$",
        ),
        (
            "from gdn_ops.spec import Limits",
            ImportError,
            "^broken imports gdn_ops.spec, which is now gdn_ops.spec.language$",
        ),
        ("BACKEND = int", TypeError, "broken is not a subclass of gdn_ops.Backend"),
        ("x = 1", AttributeError, "BACKEND"),
        (
            "import gdn_ops\n"
            "class BACKEND(gdn_ops.Backend):\n"
            "    name, limits = 'other', gdn_ops.Limits(devices=('cpu',))\n",
            TypeError,
            "backend 'broken' is BACKEND, whose name is 'other'",
        ),
    ],
)
def test_any_other_failure_of_a_backends_import_propagates(
    module: Callable[[str, str], None], code: str, error: type[Exception], text: str
) -> None:
    module("broken", code)
    with pytest.raises(error, match=text):
        gated_delta(**arguments(), backend="broken")
    with pytest.raises(error, match=text):
        gdn_ops.list_backends()


def test_a_failure_in_reasons_propagates() -> None:
    class Faulty(make_backend("faulty")):  # type: ignore[misc]
        def reasons(self, call: Call) -> list[str]:
            raise RuntimeError("driver is gone")

    register_backend(Faulty)
    with pytest.raises(RuntimeError, match="driver is gone"):
        gated_delta(**arguments(), backend="faulty")
    with pytest.raises(RuntimeError, match="driver is gone"):
        gdn_ops.explain(**arguments())


# Emulation.


def test_an_emulating_backend_runs_when_pinned_and_warns_once() -> None:
    register_backend(make_backend("kernel", devices=("cuda",), emulated_devices=("cpu",)))
    with pytest.warns(UserWarning) as caught:
        o = gated_delta(**arguments(), backend="kernel")
    assert (o == 7).all()
    (warning,) = caught
    assert str(warning.message) == (
        "backend 'kernel' emulates its kernels on cpu tensors: for checking, not for speed"
    )
    assert warning.filename == __file__, "the warning should point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated_delta(**arguments(), backend="kernel")
        gated_delta_step(**step_arguments(), backend="kernel")


def test_auto_never_picks_an_emulating_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("kernel", "torch"))
    register_backend(make_backend("kernel", devices=("cuda",), emulated_devices=("cpu",)))
    explained = gdn_ops.explain(**arguments())
    assert explained.backend == "torch"
    reason = "emulates on cpu, for checking only: pin it by name"
    assert dict(explained.reasons)["kernel"] == (reason,)
    assert (gated_delta(**arguments()) != 7).any()
    register_backend(make_backend("narrow", head_dims=(128,)))
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("kernel", "narrow"))
    with pytest.raises(BackendUnsupportedError, match=f"kernel: {reason}"):
        gated_delta(**arguments())


def test_the_status_of_an_emulating_backend_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: nothing is emulated")
    register_backend(make_backend("kernel", devices=("cuda",), emulated_devices=("cpu",)))
    info = next(info for info in gdn_ops.list_backends() if info.name == "kernel")
    assert info.status == "emulates only: no supported device here"


# Another distribution.

USE_THIRD_PARTY = """
import torch
import gdn_ops

info = {info.name: info for info in gdn_ops.list_backends()}["third_party"]
print(info)
torch.manual_seed(0)
q, k = (torch.nn.functional.normalize(torch.randn(2, 9, 2, 8), dim=-1) for _ in "qk")
v, alpha, beta = torch.randn(2, 9, 6, 5), torch.rand(2, 9, 6), torch.rand(2, 9, 6)
start = torch.randn(2, 6, 8, 5)
results = [
    gdn_ops.gated_delta(
        q, k, v, alpha, beta, initial_state=start, return_state=True, backend=backend
    )
    for backend in ("third_party", "naive")
]
torch.testing.assert_close(*results)
try:
    gdn_ops.gated_delta(q, k, v, None, beta, log_alpha=alpha.log(), backend="third_party")
except gdn_ops.BackendUnsupportedError as error:
    print(error)
print(gdn_ops.explain(q, k, v, alpha, beta).backend)
"""


def test_a_backend_of_another_distribution_is_found_by_its_entry_point(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "tests" / "third_party_backend", source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", str(site), str(source)], check=True, timeout=300)
    printed = run(USE_THIRD_PARTY, PYTHONPATH=str(site))
    assert printed.splitlines() == [
        "third_party 3.2.1: available (cpu)",
        "backend 'third_party' cannot run gated_delta on these inputs",
        "  q float32 (2, 9, 2, 8) cpu, v (2, 9, 6, 5), rule gated_delta",
        "  third_party: log_alpha is not supported",
        '  try backend="torch"',
        "torch",
    ]
