"""Why one backend is chosen: pinned, by the order, measured, by default; and how it is told."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import pytest
import torch

import gdn_ops
from constant_backends import arguments, bound, make_backend, step_arguments
from gdn_ops import (
    BackendUnsupportedError,
    Forward,
    SpecError,
    gated_delta,
    gated_delta_step,
    register_backend,
    use_backend,
)
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import order, registry
from gdn_ops.dispatch.explain import explain_call
from paths import ROOT
from processes import printed

pytestmark = pytest.mark.usefixtures("registry_as_found")


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


PREFERENCE = order.Preference("seven", "gated_delta", "cpu", "made up", ("float32",))


@pytest.mark.parametrize(
    ("choice", "first"),
    [
        ({}, "seven"),
        ({"least_tokens": 4}, "seven"),
        ({"least_tokens": 5}, "cpp"),
        ({"most_heads": 4}, "seven"),
        ({"most_heads": 3}, "cpp"),
        ({"needs_grad": False}, "seven"),
        ({"needs_grad": True}, "cpp"),
        ({"op": "gated_delta_step"}, "cpp"),
        ({"device": "sm_90"}, "cpp"),
        ({"dtypes": ("bfloat16",)}, "cpp"),
    ],
)
def test_a_measured_preference_comes_before_the_order(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], first: str
) -> None:
    register_backend(make_backend("seven"))
    call = bound()
    assert (call.sizes.T, call.sizes.N * call.sizes.HV) == (4, 4)
    monkeypatch.setattr(order, "PREFERENCES", (dataclasses.replace(PREFERENCE, **choice),))
    assert registry.select(call).name == first
    explained = explain_call(call)
    assert explained.backend == first
    assert explained.reasons[0][0] == first


def test_a_preferred_backend_that_cannot_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(make_backend("seven", head_dims=(128,)))
    monkeypatch.setattr(order, "PREFERENCES", (PREFERENCE,))
    assert registry.select(bound()).name == "cpp"


def test_nothing_is_preferred_that_was_not_measured() -> None:
    for row in order.PREFERENCES:
        assert (ROOT / row.measured.split()[0]).is_file(), row
    assert order.AUTO_ORDER["cuda"][:2] == ("triton", "tilelang")


def test_auto_on_a_cpu_is_cpp_and_never_a_backend_outside_the_order() -> None:
    assert registry.AUTO_ORDER["cpu"][0] == "cpp"
    register_backend(make_backend("seven"))
    assert registry.select(bound()).name == "cpp"
    explained = gdn_ops.explain(**arguments())
    assert dict(explained.reasons)["seven"] == ("auto does not try it on cpu: pin it by name",)


# Explaining.


def test_explain_prints_a_table() -> None:
    for name in set(registry._backends) - {"naive", "torch"}:
        registry.unregister_backend(name)
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


def test_explain_says_when_no_backend_can_run() -> None:
    registry._backends.clear()
    register_backend(make_backend("narrow", head_dims=(8,)))
    assert str(gdn_ops.explain(**arguments())).splitlines()[1:] == [
        "   narrow  V=6 (supported: 8)",
        "no backend can run this call",
    ]


def test_explain_runs_nothing_and_agrees_with_the_call() -> None:
    class Explosive(make_backend("explosive")):  # type: ignore[misc]
        def forward(self, call: Call) -> Forward:
            raise AssertionError("explain ran the backend")

    register_backend(Explosive)
    assert gdn_ops.explain(**arguments(), backend="explosive").backend == "explosive"
    with pytest.raises(AssertionError, match="explain ran the backend"):
        gated_delta(**arguments(), backend="explosive")


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
        assert torch.equal(gated_delta(**arguments(), backend="cpp"), expected), "pinning wins"
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
    assert registry.select(bound(), registry.default_backend()).name == "cpp"


def test_the_process_default_never_falls_back_either() -> None:
    register_backend(make_backend("narrow", head_dims=(128,)))
    with use_backend("narrow"), pytest.raises(BackendUnsupportedError, match=r"^backend 'narrow'"):
        gated_delta(**arguments())


def test_use_backend_refuses_an_unknown_name_and_keeps_the_default() -> None:
    with pytest.raises(SpecError, match=r"^unknown backend 'tirton', known: cpp, torch, naive"):
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


@pytest.mark.parametrize(
    ("setting", "answer"),
    {
        "naive": "naive",
        "": "cpp",
        "nope": "GDN_OPS_BACKEND: unknown backend 'nope', known: {known}",
    }.items(),
)
def test_the_environment_sets_the_first_default(setting: str, answer: str) -> None:
    known = ", ".join(registry.known_backends())
    assert printed(ASK, GDN_OPS_BACKEND=setting) == answer.format(known=known)


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
