"""Every bad call ends in a text that names the argument, what it is and what it should be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import gdn_ops
from errors import message_of
from gdn_ops import SpecError, SpecTypeError, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.spec.switches import is_on
from good_calls import HV, B, T, draft, ints, packed, pooled, sequence, token, zeros
from processes import printed, python

RULES = ("gated_delta", "delta", "gated", "linear")


FLOATS = "float64, float32, bfloat16, float16"


def pool(**changes: Any) -> dict[str, Any]:
    """Return a good step of two rows on a pool, with changes."""
    return pooled(0, 1, **changes)


# One argument of a good call is changed: to what, and what the text says it should be.

BAD_SHAPES = [
    (sequence, "q", (2, 8, 64), "(B, T, H, K): 4 dimensions, not 3"),
    (sequence, "v", (), "(B, T, HV, V): 4 dimensions, not 0"),
    (sequence, "alpha", (2, 8), "(B, T, HV) or (B, T, HV, K)"),
    (sequence, "beta", (2, 8), "(B, T, HV): 3 dimensions, not 2"),
    (sequence, "alpha", (2, 8, 8, 15), "(B, T, HV, K) = (2, 8, 8, 16); K is fixed by q"),
    (sequence, "k", (2, 7, 4, 16), "(B, T, H, K) = (2, 8, 4, 16); T is fixed by q"),
    (
        sequence,
        "k",
        (2, 8, 2, 32),
        "(B, T, H, K) = (2, 8, 4, 16); H is fixed by q, K is fixed by q",
    ),
    (sequence, "v", (1, 8, 8, 6), "(B, T, HV, V) = (2, 8, 8, 6); B is fixed by q"),
    (sequence, "alpha", (2, 8, 4), "(B, T, HV) = (2, 8, 8); HV is fixed by v"),
    (sequence, "beta", (2, 1, 8), "(B, T, HV) = (2, 8, 8); T is fixed by q"),
    (
        sequence,
        "initial_state",
        (2, 8, 6, 16),
        "(N, HV, K, V) = (2, 8, 16, 6); K is fixed by q, V is fixed by v; initial_state "
        "looks like (N, HV, V, K): initial_state.transpose(-1, -2) turns it",
    ),
    (sequence, "initial_state", (3, 8, 16, 6), "(N, HV, K, V) = (2, 8, 16, 6); N is fixed by q"),
    (token, "q", (2, 1, 4, 16), "(B, H, K): 3 dimensions, not 4"),
    (token, "k", (2, 4, 8), "(B, H, K) = (2, 4, 16); K is fixed by q"),
    (token, "v", (3, 8, 6), "(B, HV, V) = (2, 8, 6); B is fixed by q"),
    (token, "alpha", (2, 4), "(B, HV) = (2, 8); HV is fixed by v"),
    (
        token,
        "state",
        (2, 8, 6, 16),
        "(B, HV, K, V) = (2, 8, 16, 6); K is fixed by q, V is fixed by v; state looks like "
        "(B, HV, V, K): state.transpose(-1, -2) turns it",
    ),
    (token, "state", (8, 16, 6), "(B, HV, K, V): 4 dimensions, not 3"),
    (pool, "state", (5, 1, 16, 6), "(P, HV, K, V) = (5, 8, 16, 6); HV is fixed by v"),
    (pool, "state", (8, 16, 6), "(P, HV, K, V): 4 dimensions, not 3"),
    (draft, "q", (2, 4, 16), "(B, T, H, K): 4 dimensions, not 3"),
    (draft, "k", (2, 7, 4, 16), "(B, T, H, K) = (2, 8, 4, 16); T is fixed by q"),
    (draft, "state", (2, 8, 8, 16, 6), "(B, HV, K, V): 4 dimensions, not 5"),
]

BAD_DTYPES = [
    (sequence, "q", torch.int64, f"one of {FLOATS}"),
    (sequence, "alpha", torch.bool, f"one of {FLOATS}"),
    (sequence, "beta", torch.complex64, f"one of {FLOATS}"),
    (sequence, "k", torch.bfloat16, "float32, the dtype of q"),
    (sequence, "v", torch.float64, "float32, the dtype of q"),
    (sequence, "alpha", torch.float64, "float32: q is float32"),
    (token, "q", torch.int32, f"one of {FLOATS}"),
    (token, "k", torch.float16, "float32, the dtype of q"),
    (token, "beta", torch.float64, "float32: q is float32"),
    (token, "state", torch.float64, "float32: q is float32"),
    (pool, "state_indices", torch.float32, "one of int64, int32"),
]

LOG_SPACE = "[0, 1]; log-space gates go in log_alpha="
BAD_VALUES = [
    (sequence, "alpha", (-3.1, -0.2), LOG_SPACE),
    (sequence, "alpha", (0, 1.5), "[0, 1]"),
    (sequence, "alpha", (0.5, 1 + 2**-23), "[0, 1]"),
    (sequence, "beta", (-0.5, 2.5), "[0, 2]"),
    (token, "alpha", (-0.5, -0.5), LOG_SPACE),
    (token, "beta", (3, 3), "[0, 2]"),
    (draft, "alpha", (2, 2), "[0, 1]"),
]

ON_ANOTHER_DEVICE = [(sequence, "v"), (sequence, "beta"), (token, "state"), (pool, "state_indices")]

BAD_SEQUENCES = {
    "cu_seqlens has shape (1, 2), should be (N+1,): 1 dimension, not 2": packed(ints(0, T)[None]),
    "initial_state has shape (1, 8, 16, 6), should be (N, HV, K, V) = (2, 8, 16, 6); "
    "N is fixed by cu_seqlens": packed(ints(0, 3, T), initial_state=zeros(1, 8, 16, 6)),
    "v has HV=6 value heads, should be a multiple of H=4": sequence(hv=6),
    "v has HV=2 value heads, should be a multiple of H=4": sequence(hv=2),
    "q has H=0, should be at least 1": sequence(h=0),
    "v has HV=0, should be at least 1": sequence(hv=0),
    "q has K=0, should be at least 1": sequence(q=zeros(2, 8, 4, 0), k=zeros(2, 8, 4, 0)),
    "v has V=0, should be at least 1": sequence(v=zeros(2, 8, 8, 0)),
    "initial_state has dtype float64, should be float32: q is float32": sequence(
        initial_state=zeros(2, 8, 16, 6, dtype=torch.float64)
    ),
    "cu_seqlens has dtype float32, should be one of int64, int32": packed(torch.tensor([0.0, T])),
    "k is on cpu, should be on meta, the device of q": sequence(
        q=zeros(2, 8, 4, 16, device="meta")
    ),
    "cu_seqlens is on meta, should be on cpu, the device of q": packed(ints(0, T).to("meta")),
    "q has layout sparse_coo, should be strided": sequence(q=zeros(2, 8, 4, 16).to_sparse()),
    "cu_seqlens starts with 1, should start with 0": packed(ints(1, T)),
    "cu_seqlens ends with 7, should end with T = 8": packed(ints(0, 3, 7)),
    "cu_seqlens ends with 9, should end with T = 8": packed(ints(0, 3, 9)),
    "cu_seqlens ends with 0, should end with T = 8": packed(ints(0)),
    "cu_seqlens decreases at index 2 (5 to 3), should be non-decreasing": packed(ints(0, 5, 3, T)),
    "cu_seqlens is empty, should be 0, ..., T": packed(ints()),
    "q has B=2 rows, should be 1 when cu_seqlens is given": packed(ints(0, T), b=2),
    "scale is nan, should be a finite number": sequence(scale=math.nan),
    "scale is -inf, should be a finite number": sequence(scale=-math.inf),
    "chunk_size is 0, should be a positive integer": sequence(chunk_size=0),
    "chunk_size is -64, should be a positive integer": sequence(chunk_size=-64),
    "rule is 'gated_detla', should be one of gated_delta, delta, gated, linear": sequence(
        rule="gated_detla"
    ),
    "log_alpha has values in [-inf, 0.25], should be in [-inf, 0]": sequence(
        alpha=None, log_alpha=torch.tensor([-math.inf, 0.25]).repeat(B, T, HV // 2)
    ),
    "log_alpha has values in [0.1, 0.9], should be in [-inf, 0]; gates in [0, 1] go in alpha=": (
        sequence(alpha=None, log_alpha=torch.tensor([0.1, 0.9]).repeat(B, T, HV // 2))
    ),
}

BAD_STEPS = {
    "v has HV=6 value heads, should be a multiple of H=4": token(hv=6),
    "scale is inf, should be a finite number": token(scale=math.inf),
    "rule is 'Delta', should be one of gated_delta, delta, gated, linear": token(rule="Delta"),
    "log_alpha has values in [0.5, 0.5], should be in [-inf, 0]; gates in [0, 1] go in alpha=": (
        token(alpha=None, log_alpha=torch.full((B, HV), 0.5))
    ),
    "state is None, should be a torch.Tensor: inplace updates it": token(state=None, inplace=True),
    "inplace is True, should be False: gradients are needed": token(
        inplace=True, v=zeros(2, 8, 6, requires_grad=True)
    ),
}

BAD_POOLS = {
    "state is None, should be a torch.Tensor: state_indices are slots of it": pool(state=None),
    "state_indices has values in [-2, 4], should be in [-1, 4]: state has 5 slots, and -1 skips "
    "a row": pooled(-2, 4),
    "state_indices has values in [0, 5], should be in [-1, 4]: state has 5 slots, and -1 skips "
    "a row": pooled(0, 5),
    "state_indices has values in [-1, 0], should be in [-1, -1]: state has 0 slots, and -1 skips "
    "a row": pooled(-1, 0, p=0),
    "state_indices names slot 3 twice, in rows 0 and 1, should name a slot once": pooled(3, 3),
    "state_indices has shape (3,), should be (B,) = (2,); B is fixed by q": pooled(0, 1, 2),
    "state_indices has shape (1, 2), should be (B,): 1 dimension, not 2": pool(
        state_indices=ints(0, 1)[None]
    ),
    "state has shape (5, 8, 16, 6), should be (B, HV, K, V) = (2, 8, 16, 6); B is fixed by q": (
        pool(state_indices=None)
    ),
    "state_indices is for decoding: it is given, should be None where gradients are needed; "
    "decode under torch.no_grad()": pool(v=zeros(2, 8, 6, requires_grad=True)),
    "inplace is True, should be False: gradients are needed": pool(
        inplace=True, v=zeros(2, 8, 6, requires_grad=True)
    ),
}

BAD_DRAFTS = {
    "state is None, should be a torch.Tensor: inplace updates it": draft(state=None, inplace=True),
    "state_indices names slot 1 twice, in rows 0 and 1, should name a slot once": draft(
        state_indices=ints(1, 1)
    ),
    **{
        f"{name} requires a gradient, should not: gated_delta_steps is for decoding, under "
        "torch.no_grad(); gated_delta has gradients": draft(**{name: value})
        for name, value in {
            "beta": zeros(2, 8, 8, requires_grad=True),
            "state": zeros(2, 8, 16, 6, requires_grad=True),
        }.items()
    },
}


OF_A_SEQUENCE_AND_A_STEP = {
    "q has type list, should be a torch.Tensor": [[1.0]],
    "q is None, should be a torch.Tensor": None,
    "k has type ndarray, should be a torch.Tensor": np.zeros((2, 8, 4, 16)),
    "v is None, should be a torch.Tensor": None,
    "alpha is 0.9, should be a torch.Tensor": 0.9,
    "beta is 1, should be a torch.Tensor": 1,
    "scale is '1', should be a finite number": "1",
    "scale is True, should be a finite number": True,
    "scale has type Tensor, should be a finite number": torch.tensor(1.0),
    "qk_l2norm is 1, should be True or False": 1,
    "qk_l2norm is None, should be True or False": None,
    "rule is None, should be one of gated_delta, delta, gated, linear": None,
    "rule has type list, should be one of gated_delta, delta, gated, linear": ["delta"],
    "backend is None, should be a string": None,
    "backend has type type, should be a string": gdn_ops.Backend,
}

WRONG_TYPES: dict[Callable[..., Any], dict[str, Any]] = {
    sequence: {
        **OF_A_SEQUENCE_AND_A_STEP,
        "initial_state is True, should be a torch.Tensor": True,
        "cu_seqlens has type list, should be a torch.Tensor": [0, 8],
        "chunk_size is True, should be a positive integer": True,
        "chunk_size is 64.0, should be a positive integer": 64.0,
        "chunk_size is '64', should be a positive integer": "64",
        "return_state is 'yes', should be True or False": "yes",
    },
    token: {
        **OF_A_SEQUENCE_AND_A_STEP,
        "state has type tuple, should be a torch.Tensor": (),
        "inplace is 1, should be True or False": 1,
        "state_indices is 3, should be a torch.Tensor": 3,
        "state_indices has type list, should be a torch.Tensor": [0, 1],
    },
    draft: {
        "return_states is 1, should be True or False": 1,
        "state has type list, should be a torch.Tensor": [],
    },
}


def bad_calls() -> Iterator[tuple[Callable[..., Any], str, dict[str, Any]]]:
    """Yield the maker of a good call, what is wrong with a bad one, and the bad one."""
    for make, name, shape, should in BAD_SHAPES:
        text = f"{name} has shape {shape}, should be {should}"
        yield make, text, make(**{name: torch.zeros(shape)})
    for make, name, dtype, should in BAD_DTYPES:
        text = f"{name} has dtype {str(dtype).removeprefix('torch.')}, should be {should}"
        yield make, text, make(**{name: make()[name].to(dtype)})
    for make, name, (low, high), should in BAD_VALUES:
        good = make()[name]
        text = f"{name} has values in [{low:.9g}, {high:.9g}], should be in {should}"
        yield make, text, make(**{name: torch.linspace(low, high, good.numel()).view_as(good)})
    for make, name in ON_ANOTHER_DEVICE:
        text = f"{name} is on meta, should be on cpu, the device of q"
        yield make, text, make(**{name: make()[name].to("meta")})
    others = {
        sequence: BAD_SEQUENCES,
        token: BAD_STEPS,
        pool: BAD_POOLS,
        draft: BAD_DRAFTS,
    }
    for make, calls in others.items():
        yield from ((make, text, call) for text, call in calls.items())


def several(call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `gated_delta_steps` that are those of a step, for one token."""
    tokens = ("q", "k", "v", "alpha", "beta")
    return {name: x.unsqueeze(1) if name in tokens else x for name, x in call.items()}


OPS = {
    sequence: "gated_delta",
    token: "gated_delta_step",
    pool: "gated_delta_step",
    draft: "gated_delta_steps",
}
BAD_CALLS = [
    *((OPS[make], text, call, False) for make, text, call in bad_calls()),
    # A few steps say the same of their pool.
    *(
        ("gated_delta_steps", text, several(call), False)
        for make, text, call in bad_calls()
        if make is pool
    ),
    *(
        (OPS[make], text, make(**{text.split()[0]: value}), True)
        for make, values in WRONG_TYPES.items()
        for text, value in values.items()
    ),
]


@pytest.mark.parametrize(("op", "message", "call", "is_of_type"), BAD_CALLS)
def test_a_bad_call_says_what_is_wrong(
    op: str, message: str, call: dict[str, Any], is_of_type: bool
) -> None:
    with pytest.raises(SpecTypeError if is_of_type else SpecError) as caught:
        getattr(gdn_ops, op)(**call)
    assert str(caught.value) == f"{op}: {message}"
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError) == is_of_type


def test_what_needs_a_gradient_decodes_without_one_under_no_grad() -> None:
    with torch.no_grad():
        o, _ = gated_delta_step(**pooled(0, 1, v=zeros(2, 8, 6, requires_grad=True)))
        several, _ = gated_delta_steps(**draft(beta=zeros(2, 8, 8, requires_grad=True)))
    assert not o.requires_grad and not several.requires_grad


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (gated_delta, sequence()),
        (gated_delta, packed(ints(0, 3, T))),
        (gated_delta_step, token()),
        (gated_delta_step, pooled(4, -1)),
        (gated_delta_step, pooled(-1, -1)),
        (gated_delta_step, pooled(-1, -1, p=0)),
        (gated_delta_steps, draft()),
        (gated_delta_steps, draft(state_indices=ints(1, 0))),
    ],
)
def test_the_calls_that_the_bad_ones_are_made_from_are_good(
    function: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    result = function(**arguments)
    assert (result[0] if isinstance(result, tuple) else result).isfinite().all()


def gate_error(rule: str, has_alpha: bool, has_log_alpha: bool) -> str | None:
    """Return what should be said of gates under a rule, or None where they are right."""
    if rule in ("delta", "linear"):
        if not has_alpha and not has_log_alpha:
            return None
        given = "alpha" if has_alpha else "log_alpha"
        return f"{given} is given, should be None: rule {rule!r} has no decay"
    if has_alpha and has_log_alpha:
        return "alpha and log_alpha are both given, should be exactly one of them"
    if has_alpha or has_log_alpha:
        return None
    missing = "alpha and log_alpha are both missing, should be exactly one of them"
    return f"{missing}: rule {rule!r} has a decay"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("has_log_alpha", [False, True])
@pytest.mark.parametrize("has_beta", [False, True])
@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_gates_must_fit_the_rule(
    op: str, rule: str, has_alpha: bool, has_log_alpha: bool, has_beta: bool
) -> None:
    function = getattr(gdn_ops, op)
    arguments = token() if op == "gated_delta_step" else sequence()
    alpha = arguments.pop("alpha")
    arguments["rule"] = rule
    if has_alpha:
        arguments["alpha"] = alpha
    if has_log_alpha:
        arguments["log_alpha"] = alpha.log()
    if not has_beta:
        del arguments["beta"]
    message = gate_error(rule, has_alpha, has_log_alpha)
    if message is None:
        result = function(**arguments)
        o = result[0] if isinstance(result, tuple) else result
        assert o.isfinite().all() and o.shape == arguments["v"].shape
    else:
        assert message_of(SpecError, function, **arguments) == f"{op}: {message}"


@pytest.mark.parametrize("function", [gated_delta, gated_delta_step])
def test_an_unknown_backend_lists_the_known_ones(function: Callable[..., Any]) -> None:
    arguments = sequence() if function is gated_delta else token()
    known = ", ".join(info.name for info in gdn_ops.list_backends())
    message = message_of(SpecError, function, **arguments, backend="tirton")
    assert message == f"unknown backend 'tirton', known: {known}; did you mean 'triton'?"


def test_explain_checks_the_call_like_the_call_itself() -> None:
    assert message_of(SpecError, gdn_ops.explain, **sequence(k=zeros(2, 7, 4, 16))) == (
        "gated_delta: k has shape (2, 7, 4, 16), should be (B, T, H, K) = (2, 8, 4, 16); T is "
        "fixed by q"
    )
    with pytest.raises(SpecError, match=r"^gated_delta_step: beta has values in \[3, 3\]"):
        gdn_ops.explain(op="gated_delta_step", **token(beta=torch.full((B, HV), 3.0)))


# Warnings.


@pytest.mark.parametrize(("name", "step"), [("bfloat16", 8), ("float16", 11)])
def test_a_16_bit_alpha_warns_and_names_log_alpha(name: str, step: int) -> None:
    dtype, arguments = getattr(torch, name), sequence()
    below = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert 1 - below.item() == 2.0**-step, "the warning should tell the truth"
    rounded = arguments["alpha"].to(dtype)
    with pytest.warns(UserWarning) as caught:
        o = gated_delta(**{**arguments, "alpha": rounded})
    (warning,) = caught
    assert str(warning.message) == (
        f"gated_delta: alpha is {name}, which has no value between 1 - 2**-{step} and 1; "
        "pass it as float32, or pass log_alpha="
    )
    assert warning.filename == __file__, "the warning should point at the caller"
    torch.testing.assert_close(o, gated_delta(**{**arguments, "alpha": rounded.float()}))


def test_16_bit_beta_and_log_alpha_do_not_warn() -> None:
    arguments = sequence()
    log_alpha = arguments.pop("alpha").log().bfloat16()
    arguments["beta"] = arguments["beta"].bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = gated_delta(**arguments, log_alpha=log_alpha)
    assert o.isfinite().all()


def test_values_are_checked_on_every_device_only_when_asked_for() -> None:
    code = "from gdn_ops.call.values import CHECK_VALUES_EVERYWHERE; print(CHECK_VALUES_EVERYWHERE)"
    settings = [printed(code, GDN_OPS_CHECK=setting) for setting in ("", "values")]
    assert settings == ["False", "True"]


@pytest.mark.parametrize(
    ("variable", "value"), [("GDN_OPS_CHECK", "values"), ("GDN_OPS_REQUIRE_CERTIFIED", "1")]
)
def test_a_switch_of_the_environment_that_does_nothing_is_warned_of(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, is_set in (("", False), ("0", False), (value, True)):
        monkeypatch.setenv(variable, given)
        assert is_on(variable, value) is is_set
    text = f"{variable} is 'yes', should be {value!r} or not be set: it does nothing"
    monkeypatch.setenv(variable, "yes")
    with pytest.warns(UserWarning, match=f"^{text}$"):
        assert not is_on(variable, value)
    assert text in python("-c", "import gdn_ops.cli", **{variable: "yes"}).stderr
