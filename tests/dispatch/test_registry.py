"""How backends are registered and found, and what is said of those that are not there."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import gdn_ops
from constant_backends import arguments, make_backend
from errors import message_of
from gdn_ops import (
    Backend,
    BackendUnsupportedError,
    Limits,
    SpecTypeError,
    gated_delta,
    register_backend,
)
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import registry
from good_calls import draft, token
from paths import ROOT
from processes import install, printed

pytestmark = pytest.mark.usefixtures("registry_as_found")


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
    assert list(infos)[:1] == ["cpp"], "the order of preference comes first"


def test_a_checkout_that_is_not_installed_has_the_version_of_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Foreign(make_backend("foreign")):  # type: ignore[misc]
        distribution = "foreign_kernels"

    register_backend(Foreign)
    nowhere = mock.Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    versions = {info.name: info.version for info in gdn_ops.list_backends()}
    assert (versions["torch"], versions["foreign"]) == (gdn_ops.__version__, None)


def test_register_backend_is_a_decorator_and_may_be_repeated() -> None:
    cls = make_backend("seven")
    assert register_backend(cls) is cls
    assert register_backend(cls) is cls
    registry.unregister_backend("seven")
    assert "seven" not in registry.known_backends()


class Nameless(Backend):
    limits = Limits(devices=("cpu",))


class Limitless(Backend):
    name = "limitless"


def half(**members: Any) -> type[Backend]:
    """Return a backend class without methods, with members."""
    return type("Half", (Backend,), {"name": "half", "limits": Limits(("cpu",)), **members})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (int, "<class 'int'> is not a subclass of gdn_ops.Backend"),
        (3, "3 is not a subclass of gdn_ops.Backend"),
        (Nameless, "Nameless has no class attribute 'name'"),
        (Limitless, "Limitless has no class attribute 'limits'"),
        (half(name=5), "Half.name is 5, should be a string"),
        (half(limits=None), "Half.limits is None, should be a gdn_ops.Limits"),
        (half(requires="numpy"), "Half.requires is 'numpy', should be a tuple of names"),
        (half(distribution=None), "Half.distribution is None, should be a string"),
    ],
)
def test_register_backend_refuses_what_is_no_backend(value: Any, text: str) -> None:
    assert message_of(TypeError, register_backend, value) == text


@pytest.mark.parametrize("name", ["", "a b", "torch,naive", "-x", "x\n", "a/b"])
def test_register_backend_refuses_a_name_that_no_list_can_hold(name: str) -> None:
    assert message_of(ValueError, register_backend, half(name=name)) == (
        f"backend name is {name!r}, should be of letters, digits, '_', '-' and '.', and begin with "
        "none of the last two"
    )


@pytest.mark.parametrize("value", [None, [], 5, b"torch", Backend])
def test_a_name_that_is_no_string_is_refused(value: Any) -> None:
    shown = f"is {value}" if value in (None, 5) else f"has type {type(value).__name__}"
    for function in (gdn_ops.use_backend, registry.get_backend):
        assert message_of(SpecTypeError, function, value) == f"backend {shown}, should be a string"


@pytest.mark.parametrize(
    ("method", "limit", "op"),
    [
        ("forward", "ops", "gated_delta"),
        ("decode_one", "ops", "gated_delta_step"),
        ("decode_one", "ops", "gated_delta_steps"),
    ],
)
def test_a_method_that_limits_promise_and_nobody_wrote_is_named(
    method: str, limit: str, op: str
) -> None:
    register_backend(half())
    given = arguments() if op == "gated_delta" else draft() if op.endswith("s") else token()
    text = message_of(NotImplementedError, getattr(gdn_ops, op), **given, backend="half")
    assert text == f"backend 'half' has no method {method!r}, which its limits promise: {limit}="


@pytest.mark.parametrize(
    ("method", "count"),
    [("summarise", 1), ("resume", 2), ("summarise_gradients", 4), ("resume_gradients", 5)],
)
def test_a_stage_that_a_backend_promises_and_nobody_wrote_is_named(method: str, count: int) -> None:
    stage = getattr(half(has_stages=True)(), method)
    text = message_of(NotImplementedError, stage, *[None] * count)
    assert text == f"backend 'half' has no method {method!r}, which has_stages=True promises"


@pytest.mark.parametrize(("method", "count"), [("walk", 1), ("walk_back", 3)])
def test_a_walk_that_a_backend_promises_and_nobody_wrote_is_named(method: str, count: int) -> None:
    text = message_of(NotImplementedError, getattr(half(has_walks=True)(), method), *[None] * count)
    assert text == f"backend 'half' has no method {method!r}, which has_walks=True promises"


@pytest.mark.parametrize("reasons", [None, "it is slow"])
def test_reasons_that_are_no_list_are_refused(reasons: Any) -> None:
    register_backend(half(reasons=lambda self, call: reasons))
    text = message_of(TypeError, gated_delta, **arguments(), backend="half")
    assert text == f"half.reasons returns {reasons!r}, should return a list of texts"


def test_register_backend_refuses_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(make_backend("seven"))
    with pytest.raises(ValueError, match=r"^backend name 'seven' is taken by .*Constant$"):
        register_backend(make_backend("seven"))
    for name in ("auto", "all", "none"):
        text = message_of(ValueError, register_backend, make_backend(name))
        assert text == f"backend name {name!r} is reserved"
    # A built-in one that nobody has loaded yet is taken all the same.
    monkeypatch.setitem(registry._backends, "naive", "gdn_ops.backends.naive")
    with pytest.raises(ValueError, match=r"^backend name 'naive' is taken by gdn_ops\.backends"):
        register_backend(make_backend("naive"))


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
    text = message_of(BackendUnsupportedError, gated_delta, **arguments(), backend="lacking")
    assert f"\n  lacking: {reason}\n" in text


def test_a_package_that_a_backend_requires_may_be_missing() -> None:
    class Needy(make_backend("needy")):  # type: ignore[misc]
        requires = ("a_package_that_nobody_has",)

    register_backend(Needy)
    text = message_of(BackendUnsupportedError, gated_delta, **arguments(), backend="needy")
    assert text.splitlines()[2:] == [
        "  needy: package 'a_package_that_nobody_has' is not installed",
        '  try backend="cpp"',
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
    site.mkdir()
    install(site, source)
    assert printed(USE_THIRD_PARTY, PYTHONPATH=str(site)).splitlines() == [
        "third_party 3.2.1: available (cpu)",
        "backend 'third_party' cannot run gated_delta on these inputs",
        "  q float32 (2, 9, 2, 8) cpu, v (2, 9, 6, 5), rule gated_delta",
        "  third_party: log_alpha is not supported",
        '  try backend="cpp"',
        "cpp",
    ]
