"""FLA's functions on gdn_ops: its names, defaults and returns, and what raises by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import gdn_ops.compat.fla as fla_ops
from errors import message_of
from gdn_ops import SpecError, gated_delta
from gdn_ops.compat import states
from gdn_ops.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn_ops.compat.states import LAYOUTS, gate_from, gate_to, state_from, state_to

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, H, HV, K, V = 2, 9, 2, 4, 8, 6
BOTH = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


def inputs(rows: int = B, tokens: int = T) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(rows, tokens, H, K),
        "k": functional.normalize(torch.randn(rows, tokens, H, K), dim=-1),
        "v": torch.randn(rows, tokens, HV, V),
        "g": -torch.rand(rows, tokens, HV),
        "beta": torch.rand(rows, tokens, HV),
    }


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run FLA's definition word by word, in float64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    repeats = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeats, 2) for x in (q, k))
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    S = torch.zeros(shape, dtype=torch.float64) if state is None else state.double()
    outputs = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        u = (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])) * beta[:, t, :, None]
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * q.shape[3] ** -0.5)
    return torch.stack(outputs, 1), S


def close(computed: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("v_first", [False, True])
def test_output_and_state_are_those_of_the_definition(
    function: Any, tokens: int, v_first: bool
) -> None:
    x, state = inputs(tokens=tokens), torch.randn(B, HV, K, V)
    expected, final = recurrence(**x, state=state)
    given, wanted = (state.mT, final.mT) if v_first else (state, final)
    o, final_state = function(
        **x, initial_state=given, output_final_state=True, state_v_first=v_first
    )
    close(o, expected)
    close(final_state, wanted)
    assert o.dtype == x["v"].dtype
    assert final_state.is_contiguous()


@pytest.mark.parametrize("function", BOTH)
def test_no_state_is_returned_unless_it_is_asked_for(function: Any) -> None:
    o, state = function(**inputs())
    close(o, recurrence(**inputs())[0])
    assert state is None


@pytest.mark.parametrize("function", BOTH)
def test_an_older_name_of_the_layout_works_and_warns(function: Any) -> None:
    x, state = inputs(), torch.randn(B, HV, K, V)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is the older name"):
        o, _ = function(**x, initial_state=state.mT.contiguous(), transpose_state_layout=True)
    close(o, recurrence(**x, state=state)[0])


@pytest.mark.parametrize("function", BOTH)
def test_packed_sequences_have_a_state_each(function: Any) -> None:
    x, state = inputs(rows=1), torch.randn(3, HV, K, V)
    cuts = torch.tensor([0, 4, 4, T], dtype=torch.int32)
    o, final = function(**x, initial_state=state, output_final_state=True, cu_seqlens=cuts)
    assert final is not None
    for n, (start, stop) in enumerate([(0, 4), (4, T)]):
        part = {name: tensor[:, start:stop] for name, tensor in x.items()}
        which = slice(2 * n, 2 * n + 1)
        expected, last = recurrence(**part, state=state[which])
        close(o[:, start:stop], expected)
        close(final[which], last)
    assert torch.equal(final[1], state[1])


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gates_may_be_computed_inside(function: Any, negative: bool, bias: bool) -> None:
    x = inputs()
    q, k, v = x["q"], x["k"], x["v"]
    raw, logits = torch.randn(B, T, HV), torch.randn(B, T, HV)
    A_log, dt_bias = torch.randn(HV), torch.randn(HV) if bias else None
    flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    options = {**dict.fromkeys(flags, True), "A_log": A_log, "dt_bias": dt_bias}
    o, _ = function(q, k, v, g=raw, beta=logits, allow_neg_eigval=negative, **options)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    step = raw if dt_bias is None else raw + dt_bias
    g = -A_log.exp() * functional.softplus(step)
    strength = logits.sigmoid() * (2 if negative else 1)
    close(o, recurrence(q, k, v, g, strength)[0])


def test_gradients_reach_every_argument_through_the_gates() -> None:
    x = {n: y.double().requires_grad_() for n, y in inputs(rows=1, tokens=3).items()}
    gates = [torch.randn(HV, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(*tensors: Tensor) -> Tensor:
        *five, A_log, dt_bias = tensors
        options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        return chunk_gated_delta_rule(*five, **options, A_log=A_log, dt_bias=dt_bias)[0]

    assert torch.autograd.gradcheck(run, (*x.values(), *gates))


def test_without_a_gate_nothing_decays_and_without_beta_it_is_one() -> None:
    x = inputs()
    o, _ = fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"])
    x |= {"g": torch.zeros(B, T, HV), "beta": torch.ones(B, T, HV)}
    close(o, recurrence(**x)[0])


def test_scale_and_chunk_size_are_passed_on() -> None:
    x = inputs()
    o, _ = chunk_gated_delta_rule(**x, scale=1.0, chunk_size=16)
    close(o, recurrence(**x)[0] * K**0.5)
    with pytest.raises(SpecError, match="chunk_size is 0, should be a positive integer"):
        chunk_gated_delta_rule(**x, chunk_size=0)


def test_the_signatures_are_those_of_fla() -> None:
    # fla-core 0.6.0
    chunk = (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu "
        "chunk_indices cp_context kwargs"
    )
    recurrent = (
        "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval "
        "state_v_first cu_seqlens kwargs"
    )
    for function, names in zip(BOTH, (chunk, recurrent), strict=True):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names.split()
        defaults = {p.default for p in parameters.values()} - {inspect.Parameter.empty}
        assert defaults <= {None, False}
    assert fla_ops.chunk_gdn is chunk_gated_delta_rule
    assert fla_ops.fused_recurrent_gdn is fused_recurrent_gated_delta_rule


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, T])
def test_tokens_of_several_dtypes_are_promoted(
    function: Any, narrow: torch.dtype, tokens: int
) -> None:
    x = inputs(tokens=tokens)
    state = torch.randn(B, HV, K, V).to(narrow)
    mixed = x | {"v": x["v"].to(narrow), "beta": x["beta"].to(narrow)}
    o, final = function(**mixed, initial_state=state, output_final_state=True, head_first=False)
    expected, last = recurrence(**mixed, state=state)
    assert (o.dtype, final.dtype) == (narrow, torch.float32)
    torch.testing.assert_close(o, expected.to(narrow), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(final.double(), last, rtol=1e-5, atol=1e-5)
    # The other way around, too: o is like v.
    wide = x | {"q": x["q"].to(narrow), "k": x["k"].to(narrow)}
    o, _ = function(**wide)
    assert o.dtype == torch.float32
    close(o, recurrence(**wide)[0])


@pytest.mark.parametrize("function", BOTH)
def test_gates_and_states_may_be_wider_than_the_tokens(function: Any) -> None:
    x, state = inputs(), torch.randn(B, HV, K, V, dtype=torch.float64)
    wide = x | {name: x[name].double() for name in ("g", "beta")}
    o, final = function(**wide, initial_state=state, output_final_state=True)
    expected, last = recurrence(**wide, state=state)
    assert (o.dtype, final.dtype) == (torch.float32, torch.float32)
    close(o, expected)
    close(final, last)
    # Nothing is narrowed where the tokens are as wide.
    doubles = {name: value.double() for name, value in x.items()}
    o, _ = function(**doubles, initial_state=state)
    torch.testing.assert_close(o, recurrence(**doubles, state=state)[0], rtol=1e-10, atol=1e-10)


REFUSED: dict[str, dict[str, Any]] = {
    "chunk_gated_delta_rule: cp_context is given, should be None: context parallelism over devices "
    "is not supported": {"cp_context": object()},
    "fused_recurrent_gated_delta_rule: gk has shape (1,), should be (B, T, HV, K) = (2, 9, 4, 8)": {
        "gk": torch.zeros(1)
    },
    "fused_recurrent_gated_delta_rule: gk has type float, should be a torch.Tensor": {"gk": 1.0},
    "fused_recurrent_gated_delta_rule: gk has values in [0.5, 0.5], should be in [-inf, 0]: it is "
    "log α; from α, gk = alpha.log()": {"gk": torch.full((B, T, HV, K), 0.5)},
    "fused_recurrent_gated_delta_rule: g has values in [0.5, 0.5], should be in [-inf, 0]: it is "
    "log α; from α, g = alpha.log()": {
        "g": torch.full((B, T, HV), 0.5),
        "gk": torch.full((B, T, HV, K), -1.0),
    },
    "fused_recurrent_gated_delta_rule: gv is given, should be None: a decay of every value channel "
    "is not supported": {"gv": torch.zeros(1)},
    "chunk_gated_delta_rule: g has shape (2, 9, 4, 8), should be (B, T, HV): chunk_kda and "
    "fused_recurrent_kda take a decay of every key channel": {"g": torch.zeros(B, T, HV, K)},
    "chunk_gated_delta_rule: got an unknown argument 'gk', should be g of chunk_kda, or gk of "
    "fused_recurrent_gated_delta_rule": {"gk": torch.zeros(B, T, HV, K)},
    "chunk_gated_delta_rule: allow_neg_eigval is True, should be False: it takes effect with "
    "use_beta_sigmoid_in_kernel=True only": {"allow_neg_eigval": True},
    "chunk_gated_delta_rule: A_log is None, should be a torch.Tensor: use_gate_in_kernel is True": {
        "use_gate_in_kernel": True
    },
    "fused_recurrent_gated_delta_rule: g is None, should be a torch.Tensor: use_gate_in_kernel is "
    "True": {"use_gate_in_kernel": True, "g": None},
    "fused_recurrent_gated_delta_rule: beta is None, should be a torch.Tensor: "
    "use_beta_sigmoid_in_kernel is True": {"use_beta_sigmoid_in_kernel": True, "beta": None},
    "fused_recurrent_gated_delta_rule: got an unknown argument 'lens', should be one of q, k, v, "
    "g, gk, gv, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, "
    "use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, "
    "state_v_first, cu_seqlens": {"lens": None},
    "chunk_gated_delta_rule: got an unknown argument 'offsets', should be cu_seqlens": {
        "offsets": torch.tensor([0, T])
    },
    "chunk_gated_delta_rule: got an unknown argument 'alpha', should be g, which is log α": {
        "alpha": None
    },
    "chunk_gated_delta_rule: got an unknown argument 'cu_seqlen', should be 'cu_seqlens'?": {
        "cu_seqlen": None
    },
    "chunk_gated_delta_rule: cu_seqlens_cpu is given without cu_seqlens, should be given with it: "
    "packed sequences would run into each other": {"cu_seqlens_cpu": torch.tensor([0, T])},
    "chunk_gated_delta_rule: chunk_indices is given without cu_seqlens, should be given with it: "
    "packed sequences would run into each other": {"chunk_indices": torch.zeros(1, 2)},
    "chunk_gated_delta_rule: cu_seqlens_cpu has boundaries [0, 4, 9], should be those of "
    "cu_seqlens, [0, 5, 9]": {
        "cu_seqlens": torch.tensor([0, 5, T]),
        "cu_seqlens_cpu": torch.tensor([0, 4, T]),
    },
    # Of the wrong kind.
    "chunk_gated_delta_rule: g has dtype complex64, should be one of float64, float32, bfloat16, "
    "float16": {"g": torch.zeros(B, T, HV, dtype=torch.complex64)},
    "fused_recurrent_gated_delta_rule: g has dtype float8_e5m2, should be one of float64, float32, "
    "bfloat16, float16": {"g": torch.zeros(B, T, HV).to(torch.float8_e5m2)},
    "chunk_gated_delta_rule: g has dtype int64, should be one of float64, float32, bfloat16, "
    "float16": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(HV),
        "g": torch.zeros(B, T, HV, dtype=torch.int64),
    },
    # Only the real part of its sigmoid was taken.
    "chunk_gated_delta_rule: beta has dtype complex64, should be one of float64, float32, "
    "bfloat16, float16": {
        "use_beta_sigmoid_in_kernel": True,
        "beta": torch.zeros(B, T, HV, dtype=torch.complex64),
    },
    "chunk_gated_delta_rule: initial_state has shape (2, 4, 8, 6), should be (N, HV, V, K) = "
    "(2, 4, 6, 8)": {"initial_state": torch.zeros(B, HV, K, V), "state_v_first": True},
    "chunk_gated_delta_rule: q has type list, should be a torch.Tensor": {"q": [1.0]},
    "fused_recurrent_gated_delta_rule: beta has type float, should be a torch.Tensor": {
        "beta": 1.0
    },
    "chunk_gated_delta_rule: initial_state has type list, should be a torch.Tensor": {
        "initial_state": [1.0],
        "state_v_first": True,
    },
    "chunk_gated_delta_rule: initial_state has shape (6,), should be (N, HV, V, K): 4 dimensions, "
    "not 1": {"initial_state": torch.zeros(6), "state_v_first": True},
    "chunk_gated_delta_rule: q has dtype int64, should be one of float64, float32, bfloat16, "
    "float16": {"q": torch.ones(B, T, H, K, dtype=torch.int64)},
    "chunk_gated_delta_rule: use_beta_sigmoid_in_kernel has type Tensor, should be True or False; "
    "older versions of FLA have cu_seqlens in this place: pass it by name": {
        "use_beta_sigmoid_in_kernel": torch.tensor([0, T])
    },
    "chunk_gated_delta_rule: output_final_state has type str, should be True or False": {
        "output_final_state": "no"
    },
    "fused_recurrent_gated_delta_rule: gk is given, should be None: it looks like beta, which "
    "older versions of FLA have in this place; pass it by name": {"gk": torch.ones(B, T, HV)},
    "chunk_gated_delta_rule: A_log is given, should be None: it takes effect with "
    "use_gate_in_kernel=True only": {"A_log": torch.zeros(HV)},
    "fused_recurrent_gated_delta_rule: dt_bias is given, should be None: it takes effect with "
    "use_gate_in_kernel=True only": {"dt_bias": torch.zeros(HV)},
    # Other shapes would be broadcast.
    "chunk_gated_delta_rule: A_log has shape (1,), should be (HV,) = (4,)": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(1),
    },
    "chunk_gated_delta_rule: dt_bias has shape (2, 9, 4), should be (HV,) = (4,)": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(HV),
        "dt_bias": torch.zeros(B, T, HV),
    },
    "chunk_gated_delta_rule: A_log has dtype int64, should be a float": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(HV, dtype=torch.int64),
    },
    "chunk_gated_delta_rule: A_log is on meta, should be on cpu, the device of g": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(HV, device="meta"),
    },
    "chunk_gated_delta_rule: head_first is True, should be False: tokens come before heads, "
    "(B, T, H, K); q.transpose(1, 2) turns (B, H, T, K)": {"head_first": True},
    "fused_recurrent_gated_delta_rule: beta has shape (2, 9, 4, 6), should be (B, T, HV) = "
    "(2, 9, 4): a beta per value channel, which erases each by its own strength, is not supported; "
    "w of chunk_gdn2 writes each by its own": {"beta": torch.ones(B, T, HV, V)},
    "chunk_gated_delta_rule: state_v_first and transpose_state_layout are both given, should be "
    "state_v_first: the other is its older name": {
        "state_v_first": True,
        "transpose_state_layout": True,
    },
    "chunk_gated_delta_rule: initial_state has shape (2, 4, 6, 8), should be (N, HV, K, V) = "
    "(2, 4, 8, 6); gdn_ops.compat.states.state_from('fla_v_first', initial_state) turns a V-first "
    "state": {"initial_state": torch.zeros(B, HV, V, K)},
    "chunk_gated_delta_rule: g has shape (2, 9, 3), should be (B, T, HV) = (2, 9, 4); HV is fixed "
    "by v": {"g": torch.zeros(B, T, 3)},
    "chunk_gated_delta_rule: g has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; from "
    "α, g = alpha.log()": {"g": torch.full((B, T, HV), 0.5)},
}
"""Options that are refused, by the error, which begins with the name of the function."""


@pytest.mark.parametrize(("message", "options"), REFUSED.items())
def test_what_is_not_supported_raises_by_name(message: str, options: dict[str, Any]) -> None:
    function = getattr(fla_ops, message.partition(":")[0])
    assert message_of(SpecError, function, **{**inputs(), **options}) == message


# Layouts of states and gates.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_goes_there_and_back(layout: str) -> None:
    state = torch.randn(B, HV, K, V)
    there = state_to(layout, state)
    v_first = LAYOUTS[layout].v_first
    assert there.shape == ((B, HV, V, K) if v_first else (B, HV, K, V))
    assert there[1, 2, 3, 5] == (state[1, 2, 5, 3] if v_first else state[1, 2, 3, 5])
    assert there.is_contiguous()
    assert torch.equal(state_from(layout, there), state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gate_of_any_layout_runs(layout: str) -> None:
    x = inputs()
    g = x.pop("g")
    theirs = gate_to(layout, log_alpha=g)
    torch.testing.assert_close(gate_to(layout, g.exp()), theirs)
    o = gated_delta(**x, **gate_from(layout, theirs))
    close(o, recurrence(**x, g=g)[0])


def test_a_gate_of_zero_is_minus_infinity_in_log_space() -> None:
    assert gate_to("fla", torch.zeros(1)).item() == -torch.inf


def test_the_names_mean_what_the_libraries_do() -> None:
    # FlashInfer: linear α, V-first. ONNX LinearAttention: log decay, K-first. The paper: V × K.
    assert {name: (x.v_first, x.log_gate) for name, x in LAYOUTS.items()} == {
        "fla": (False, True),
        "fla_v_first": (True, True),
        "flashinfer": (True, False),
        "onnx": (False, True),
        "ort_gated_delta_net": (True, True),
        "paper": (True, False),
    }


@pytest.mark.parametrize(
    ("message", "arguments"),
    {
        "state_from: unknown layout 'vllm', known: fla, fla_v_first, flashinfer, onnx, "
        "ort_gated_delta_net, paper": ("vllm", torch.zeros(1)),
        "state_to: state has shape (2, 3), should have 4 dimensions: sequences, heads, and K and V "
        "in the order of the layout": ("paper", torch.zeros(2, 3)),
        "gate_from: gate has values in [0.25, 0.5], should be in [-inf, 0]: the gate of layout "
        "'fla' is log α; α goes in alpha=": ("fla", torch.tensor([0.25, 0.5])),
        "gate_from: gate has values in [-0.25, 0], should be in [0, 1]: the gate of layout "
        "'flashinfer' is α; log α goes in log_alpha=": ("flashinfer", torch.tensor([-0.25, 0.0])),
        "gate_from: gate has type list, should be a torch.Tensor": ("fla", [0.5]),
        "gate_to: alpha has values in [-0.25, 0], should be in [0, 1]: log α goes in log_alpha=": (
            "fla",
            torch.tensor([-0.25, 0.0]),
        ),
        "state_from: state has layout sparse_coo, should be strided": (
            "fla",
            torch.zeros(1, 1, 2, 2).to_sparse(),
        ),
        "state_to: state has dtype int64, should be a float": (
            "paper",
            torch.zeros(1, 1, 2, 2, dtype=torch.int64),
        ),
        "gate_from: gate has dtype complex64, should be a float": (
            "fla",
            torch.zeros(2, dtype=torch.complex64),
        ),
        "gate_to: alpha has layout sparse_coo, should be strided": (
            "fla",
            torch.zeros(2).to_sparse(),
        ),
        "state_from: state has type list, should be a torch.Tensor": ("fla", [0.5]),
        "state_to: layout has type Tensor, should be one of fla, fla_v_first, flashinfer, onnx, "
        "ort_gated_delta_net, paper": (torch.zeros(1), "fla"),
    }.items(),
)
def test_a_wrong_layout_or_gate_is_refused(message: str, arguments: tuple[Any, Any]) -> None:
    function = getattr(states, message.partition(":")[0])
    assert message_of(SpecError, function, *arguments) == message


def test_exactly_one_gate_is_converted() -> None:
    expected = "gate_to: alpha and log_alpha are both {}, should be exactly one of them"
    assert message_of(SpecError, gate_to, "fla") == expected.format("missing")
    both = message_of(SpecError, gate_to, "fla", torch.ones(1), log_alpha=torch.zeros(1))
    assert both == expected.format("given")
    text = message_of(SpecError, gate_to, "flashinfer", log_alpha=torch.full((1,), 0.5))
    assert text == (
        "gate_to: log_alpha has values in [0.5, 0.5], should be in [-inf, 0]: α goes in alpha="
    )
