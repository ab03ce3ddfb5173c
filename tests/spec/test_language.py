"""The language of the spec, the two specs written in it, their workloads and cost model."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from changed_specs import with_arg, with_output
from errors import message_of
from gdn_ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS, Limits, SpecError
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.registry import reasons
from gdn_ops.export.bodies.table import BODIES
from gdn_ops.spec import docs
from gdn_ops.spec.language import (
    Attr,
    Axis,
    Interval,
    Multiple,
    OpSpec,
    Shape,
    Sizes,
    TensorArg,
    shapes,
)
from gdn_ops.spec.rules import Rule
from gdn_ops.testing.laws import LAWS
from gdn_ops.testing.runs import installed

# A value that makes no sense cannot be built.

X = TensorArg("x", shapes("B"), "a tensor")


SENSELESS_VALUES = {
    "axis name '1B' is not an identifier": lambda: Axis("1B", "rows"),
    "axis B has no meaning": lambda: Axis("B", ""),
    "interval [1.0, 1.0] is empty": lambda: Interval(1.0, 1.0),
    "argument name 'x y' is not an identifier": lambda: replace(X, name="x y"),
    "x repeats an axis": lambda: replace(X, shapes=shapes("B B")),
    "x allows no shape": lambda: replace(X, shapes=()),
    "x has two shapes that look alike": lambda: replace(X, shapes=shapes("B", "P")),
    "r takes ('wide',)": lambda: Rule("r", "r", decays=("wide",)),
    "r takes ()": lambda: Rule("r", "r", writes=()),
    "x allows no dtype": lambda: replace(X, dtypes=()),
    "x has no meaning": lambda: replace(X, meaning=""),
    "attribute name 'a-b' is not an identifier": lambda: Attr("a-b", "str", "", "text"),
    "a has no meaning": lambda: Attr("a", "str", "", ""),
    "default of a is 'c', not one of ('d', 'e')": lambda: Attr(
        "a", "str", "c", "text", choices=("d", "e")
    ),
    "limits name no device": lambda: Limits(devices=()),
    "limits name unknown dtypes ('float8',)": lambda: Limits(("cpu",), dtypes=("float8",)),
    "head_dim_multiple is below 1": lambda: Limits(devices=("cpu",), head_dim_multiple=0),
    "devices is 'cpu', should be a tuple of strings": lambda: Limits("cpu"),
    "rules is ('linear', 3), should be a tuple of strings": lambda: Limits(
        ("cpu",), rules=("linear", 3)
    ),
    "head_dims is 64, should list integers": lambda: Limits(("cpu",), head_dims=64),
    "chunk_sizes is range(0, 0), should list integers": lambda: Limits(
        ("cpu",), chunk_sizes=range(0)
    ),
    "min_capability is 9, should list integers": lambda: Limits(("cpu",), min_capability=9),
}

SENSELESS_SPECS = {
    " names an argument twice: ['x', 'x']": lambda: replace(
        GATED_DELTA, args=(X, X), keyword_only_from="x"
    ),
    ": k uses unknown axes ['Y', 'Z']": lambda: with_arg("k", shapes=shapes("B Z Y")),
    ": final_state uses unknown axes ['Z']": lambda: with_output(axes=("Z",)),
    ": v takes its dtype from unknown w": lambda: with_arg("v", same_dtype_as="w"),
    ": initial_state is indexed by unknown slots": lambda: with_arg(
        "initial_state", shapes=shapes("N HV K V", "B HV K V with slots")
    ),
    ": initial_state uses unknown axes ['P']": lambda: with_arg(
        "initial_state", shapes=shapes("P HV K V with cu_seqlens")
    ),
    ": HV is a multiple of Z uses unknown axes ['Z']": lambda: replace(
        GATED_DELTA, constraints=(Multiple("HV", "Z", "v", "value heads"),)
    ),
    ": output final_state has unknown dtype 'float32'": lambda: with_output(dtype="float32"),
    ": output final_state has unknown dtype 'like:w'": lambda: with_output(dtype="like:w"),
    ": keyword_only_from='w' is no argument": lambda: replace(GATED_DELTA, keyword_only_from="w"),
    " has no rule": lambda: replace(GATED_DELTA, rules=()),
}


@pytest.mark.parametrize(
    ("message", "build"),
    [
        *SENSELESS_VALUES.items(),
        *((f"gated_delta{text}", build) for text, build in SENSELESS_SPECS.items()),
    ],
)
def test_a_senseless_value_is_refused(message: str, build: Callable[[], object]) -> None:
    assert message_of(ValueError, build) == message


# Values print themselves.


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "T": Axis("T", "tokens"),
        "[0, 1]": Interval(0.0, 1.0),
        "[-inf, 0.5]": Interval(float("-inf"), 0.5),
        "x (B,)": X,
        "q (B, T, H, K)": GATED_DELTA.tensor["q"],
        "beta (B, T, HV) in [0, 2] optional": GATED_DELTA.tensor["beta"],
        "log_alpha (B, T, HV) in [-inf, 0] optional": GATED_DELTA.tensor["log_alpha"],
        "cu_seqlens (N+1,) optional": GATED_DELTA.tensor["cu_seqlens"],
        "state (B, HV, K, V) optional": GATED_DELTA_STEP.tensor["state"],
        "state_indices (B,) optional": GATED_DELTA_STEP.tensor["state_indices"],
        "rule='gated_delta'": GATED_DELTA.attrs[0],
        "final_state (N, HV, K, V)": GATED_DELTA.outputs[1],
        "gated": GATED_DELTA.rule["gated"],
        "HV is a multiple of H": GATED_DELTA.constraints[0],
        "tiny: B=2 T=100 H/HV=2/4 K=32 V=48": GATED_DELTA.case["tiny"],
        "gated_delta(q, k, v, alpha=None, beta=None, *, log_alpha=None, erase=None, write=None, "
        "rule='gated_delta', scale=None, qk_l2norm=False, initial_state=None, "
        "has_initial_state=None, return_state=False, cu_seqlens=None, chunk_size=None, out=None, "
        "backend='auto') "
        "-> o (B, T, HV, V), final_state (N, HV, K, V)": GATED_DELTA,
        "gated_delta_step(q, k, v, alpha=None, beta=None, state=None, *, log_alpha=None, "
        "erase=None, write=None, rule='gated_delta', scale=None, qk_l2norm=False, "
        "state_indices=None, inplace=False, out=None, backend='auto') "
        "-> o (B, HV, V), new_state (B, HV, K, V)": GATED_DELTA_STEP,
        "gated_delta_steps(q, k, v, alpha=None, beta=None, state=None, *, log_alpha=None, "
        "erase=None, write=None, rule='gated_delta', scale=None, qk_l2norm=False, "
        "state_indices=None, inplace=False, return_states=False, out=None, "
        "backend='auto') -> o (B, T, HV, V), new_state (B, HV, K, V), "
        "states (B, T, HV, K, V)": GATED_DELTA_STEPS,
    }.items(),
)
def test_a_value_prints_itself(value: object, text: str) -> None:
    assert str(value) == text


@pytest.mark.parametrize(
    "value",
    [
        GATED_DELTA,
        GATED_DELTA_STEP,
        GATED_DELTA_STEPS,
        installed("triton").limits,
        LAWS,
        BODIES["standard"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_description_is_pickled_to_an_equal_one(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


def test_a_page_prints_the_signature_an_argument_a_line() -> None:
    signature = docs.page(GATED_DELTA_STEP).partition("```text\n")[2].partition("\n```")[0]
    assert signature.splitlines() == [
        "gated_delta_step(",
        *("    q,", "    k,", "    v,", "    alpha=None,", "    beta=None,", "    state=None,"),
        *("    *,", "    log_alpha=None,", "    erase=None,", "    write=None,"),
        *("    rule='gated_delta',", "    scale=None,"),
        *("    qk_l2norm=False,", "    state_indices=None,", "    inplace=False,"),
        "    out=None,",
        "    backend='auto',",
        ") -> o (B, HV, V), new_state (B, HV, K, V)",
    ]


def test_value_heads_per_key_head() -> None:
    assert Sizes(1, 1, 16, 48, 1, 1, 1).R == 3
    assert Sizes(1, 1, 0, 0, 1, 1, 1).R == 1


# Named workloads and what they cost.


@pytest.mark.parametrize(("H", "HV"), [(16, 32), (16, 48), (16, 64)])
def test_every_qwen_layer_has_cases_of_several_lengths(H: int, HV: int) -> None:
    sizes = [case.sizes for case in GATED_DELTA.cases if case.name.startswith(f"qwen-{H}-{HV}-")]
    assert {(s.B, s.H, s.HV, s.K, s.V, s.N) for s in sizes} == {(1, H, HV, 128, 128, 1)}
    assert len({s.T for s in sizes}) == len(sizes) >= 2
    assert {2048, 8192} <= {s.T for s in sizes}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tiny", (2, 100, 2, 4, 32, 48)),
        ("qwen-16-32-16384", (1, 16384, 16, 32, 128, 128)),
        ("qwen-16-64-32768", (1, 32768, 16, 64, 128, 128)),
        ("olmo-hybrid-2048", (1, 2048, 30, 30, 96, 192)),
        ("olmo-hybrid-8192", (1, 8192, 30, 30, 96, 192)),
        ("paper-400m-2048", (1, 2048, 9, 9, 128, 256)),
    ],
)
def test_a_named_case_has_the_sizes_of_its_model(name: str, shape: tuple[int, ...]) -> None:
    case = GATED_DELTA.case[name]
    assert case.sizes == Sizes(*shape, N=shape[0])
    assert case.dtype == ("float32" if name == "tiny" else "bfloat16")
    assert case.source


def test_step_cases_are_one_token_of_the_models() -> None:
    shapes = {(s.B, s.H, s.HV, s.K, s.V) for s in (c.sizes for c in GATED_DELTA_STEP.cases)}
    assert {(1, 16, 32, 128, 128), (8, 16, 32, 128, 128), (1, 30, 30, 96, 192)} <= shapes
    assert {case.sizes.T for case in GATED_DELTA_STEP.cases} == {1}


def test_flops_are_the_multiply_adds_of_the_chunkwise_form() -> None:
    """The floor counts triangles once and key heads once; whole products make 87 GFLOP of it."""
    s, C = GATED_DELTA.case["qwen-16-64-8192"].sizes, 64
    lower, diagonal = C * (C - 1) // 2, C
    solve = sum(i * (i - 1) for i in range(C + 1))
    value_head = 2 * (3 * C * s.K * s.V + 2 * (lower + diagonal) * s.V) + solve
    key_head = 2 * (2 * lower + diagonal) * s.K
    counted = s.T // C * (s.HV * value_head + s.H * key_head)
    assert GATED_DELTA.cost.flops(s, C) == pytest.approx(counted, rel=0.01)
    whole = s.T * s.HV * (6 * s.K * s.V + 4 * C * s.V + 4 * C * s.K + C * C / 3)
    assert whole == pytest.approx(87e9, rel=0.01)
    assert GATED_DELTA.cost.flops(s, C) == pytest.approx(63.0e9, rel=0.001)


def test_bytes_are_the_unavoidable_traffic() -> None:
    s = GATED_DELTA.case["qwen-16-64-8192"].sizes
    assert GATED_DELTA.cost.bytes(s, 2) == pytest.approx(348e6, rel=0.03)
    assert GATED_DELTA.cost.state_bytes(s) == 4 * 64 * 128 * 128


def test_a_step_costs_its_state_read_and_written() -> None:
    s = GATED_DELTA_STEP.case["qwen-16-32-step-b8"].sizes
    state = 4 * 8 * 32 * 128 * 128
    assert GATED_DELTA_STEP.cost.state_bytes(s) == state
    token = 2 * 8 * (2 * 16 * 128 + 2 * 32 * 128) + 2 * 4 * 8 * 32
    assert GATED_DELTA_STEP.cost.bytes(s, 2) == 2 * state + token
    assert GATED_DELTA_STEP.cost.flops(s, 64) == 7 * 8 * 32 * 128 * 128


def test_a_few_steps_read_and_write_their_state_once() -> None:
    case = GATED_DELTA_STEPS.case["qwen-16-32-steps4-b8"]
    one = replace(case.sizes, T=1)
    assert case.sizes == Sizes(8, 4, 16, 32, 128, 128, N=8)
    state = GATED_DELTA_STEPS.cost.state_bytes(case.sizes)
    bytes_of, flops_of = GATED_DELTA_STEPS.cost.bytes, GATED_DELTA_STEPS.cost.flops
    assert bytes_of(case.sizes, 2) - 2 * state == 4 * (bytes_of(one, 2) - 2 * state)
    assert flops_of(case.sizes, 64) == 4 * flops_of(one, 64)
    assert bytes_of(one, 2) == GATED_DELTA_STEP.cost.bytes(one, 2)


def test_a_pool_has_slots_for_its_first_axis() -> None:
    state = GATED_DELTA_STEPS.tensor["state"]
    assert state.shapes[1] == Shape(("P", "HV", "K", "V"), given="state_indices")
    text = "(B, HV, K, V), or (P, HV, K, V) with state_indices: memory before the first token"
    assert docs.argument_line(state).startswith(text)
    assert f"| `state` (optional) | {text.partition(':')[0]} |" in docs.page(GATED_DELTA_STEPS)


def test_no_argument_of_a_few_steps_has_a_gradient() -> None:
    assert not any(arg.differentiable for arg in GATED_DELTA_STEPS.tensors)
    rigid = [arg.name for arg in GATED_DELTA_STEP.tensors if not arg.differentiable]
    assert rigid == ["state_indices"]


# The family grows by values: a rule that takes a decay per channel, and an alpha that may be one.


def with_a_narrow_rule() -> OpSpec:
    """Return GATED_DELTA whose rule `gated` takes a decay per head only."""
    narrow = [replace(r, decays=("scalar",)) if r.name == "gated" else r for r in GATED_DELTA.rules]
    return replace(GATED_DELTA, rules=tuple(narrow))


def bound(alpha: torch.Tensor, rule: str = "gated_delta") -> Call:
    x = torch.zeros(1, 5, 2, 3)
    named = {"q": x, "k": x, "v": x, "alpha": alpha, "rule": rule}
    spec = with_a_narrow_rule()
    return bind(spec, arguments_of(spec, named))


def test_a_decay_per_channel_is_a_shape_of_alpha_and_a_reason_against_who_lacks_it() -> None:
    assert bound(torch.ones(1, 5, 2)).widths[:4] == ("scalar", "scalar", "scalar", False)
    assert bound(torch.ones(1, 5, 2), "gated").widths[:4] == ("scalar", "none", "scalar", False)
    call = bound(torch.ones(1, 5, 2, 3))
    assert call.widths == ("channel", "scalar", "scalar", False, True)
    backend = installed("torch")
    assert reasons(backend, call) == []
    narrow = replace(backend.limits, decays=("none", "scalar"))
    unable = type("Unable", (type(backend),), {"limits": narrow})
    assert reasons(unable(), call) == ["channel decay (supported: none, scalar)"]
    stepping = replace(narrow, decode_decays=("none", "scalar", "channel"))
    decoder = type("Decoder", (type(backend),), {"limits": stepping})
    against = ["channel decay in gated_delta (supported: none, scalar)"]
    assert reasons(decoder(), call) == against
    assert reasons(decoder(), replace(call, op=GATED_DELTA_STEPS)) == []


@pytest.mark.parametrize(
    ("given", "widths", "reasons_of_beta_alone"),
    [
        ({"beta": (1, 5, 2)}, ("scalar", "scalar", False), []),
        ({"write": (1, 5, 2)}, ("scalar", "scalar", True), []),
        (
            {"erase": (1, 5, 2, 3)},
            ("channel", "scalar", True),
            ["channel erase (supported: none, scalar)"],
        ),
        (
            {"erase": (1, 5, 2), "write": (1, 5, 2, 4)},
            ("scalar", "channel", True),
            ["channel write (supported: scalar)"],
        ),
    ],
)
def test_erase_and_write_have_widths_of_their_own_and_are_a_reason_against_who_takes_beta_alone(
    given: dict[str, tuple[int, ...]], widths: tuple[object, ...], reasons_of_beta_alone: list[str]
) -> None:
    x = torch.zeros(1, 5, 2, 3)
    gates = {name: torch.ones(shape) for name, shape in given.items()}
    named = {"q": x, "k": x, "v": torch.zeros(1, 5, 2, 4), "rule": "delta"} | gates
    call = bind(GATED_DELTA, arguments_of(GATED_DELTA, named))
    assert call.widths[:4] == ("none", *widths)
    assert call.widths.wide == call.widths.apart
    backend = installed("torch")
    assert reasons(backend, call) == []
    narrow = replace(backend.limits, erases=("none", "scalar"), writes=("scalar",), apart=False)
    unable = type("Unable", (type(backend),), {"limits": narrow})
    apart = ["erase and write (supported: beta)"] if call.widths.apart else []
    assert reasons(unable(), call) == reasons_of_beta_alone + apart


@pytest.mark.parametrize(
    ("shape", "rule", "text"),
    [
        ((1, 5, 2, 3), "gated", ", a channel decay; rule 'gated' takes scalar decays"),
        ((1, 5, 2, 4), "gated_delta", ", should be (B, T, HV, K) = (1, 5, 2, 3); K is fixed by q"),
        ((5, 2), "gated_delta", ", should be (B, T, HV) or (B, T, HV, K)"),
    ],
)
def test_a_wrong_decay_is_told_every_shape_that_fits(
    shape: tuple[int, ...], rule: str, text: str
) -> None:
    message = message_of(SpecError, bound, torch.ones(shape), rule)
    assert message == f"gated_delta: alpha has shape {shape}{text}"


def test_the_page_of_an_op_lists_every_shape() -> None:
    line = docs.argument_line(GATED_DELTA.tensor["alpha"])
    assert line.startswith("(B, T, HV), or (B, T, HV, K): decay of a head, or of each key channel;")
