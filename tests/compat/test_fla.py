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


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("tokens", [1, T])
def test_output_and_state_are_those_of_the_definition(function: Any, tokens: int) -> None:
    x, state = inputs(tokens=tokens), torch.randn(B, HV, K, V)
    expected, final = recurrence(**x, state=state)
    o, found = function(**x, initial_state=state, output_final_state=True)
    close(o, expected)
    close(found, final)
    assert o.dtype == x["v"].dtype


@pytest.mark.parametrize("function", BOTH)
def test_no_state_is_returned_unless_it_is_asked_for(function: Any) -> None:
    o, state = function(**inputs())
    close(o, recurrence(**inputs())[0])
    assert state is None


@pytest.mark.parametrize("function", BOTH)
def test_states_may_be_v_first(function: Any) -> None:
    x, state = inputs(), torch.randn(B, HV, K, V)
    expected, final = recurrence(**x, state=state)
    o, found = function(**x, initial_state=state.mT, output_final_state=True, state_v_first=True)
    close(o, expected)
    close(found, final.mT)
    assert found.is_contiguous()


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
    raw, logits = torch.randn(B, T, HV), torch.randn(B, T, HV)
    A_log, dt_bias = torch.randn(HV), torch.randn(HV) if bias else None
    o, _ = function(
        x["q"],
        x["k"],
        x["v"],
        g=raw,
        beta=logits,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=negative,
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (x["q"], x["k"]))
    step = raw if dt_bias is None else raw + dt_bias
    g = -A_log.exp() * functional.softplus(step)
    strength = logits.sigmoid() * (2 if negative else 1)
    close(o, recurrence(q, k, x["v"], g, strength)[0])


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


CHUNK, RECURRENT = (function.__name__ for function in BOTH)


@pytest.mark.parametrize(
    ("function", "more", "message"),
    [
        (
            chunk_gated_delta_rule,
            {"cp_context": object()},
            f"{CHUNK}: cp_context is given, should be None: context parallelism over devices is "
            f"not supported",
        ),
        (
            fused_recurrent_gated_delta_rule,
            {"gk": torch.zeros(1)},
            f"{RECURRENT}: gk is given, should be None: a decay per channel is not supported; g "
            f"is one decay per head",
        ),
        (
            fused_recurrent_gated_delta_rule,
            {"gv": torch.zeros(1)},
            f"{RECURRENT}: gv is given, should be None: a decay per channel is not supported; g "
            f"is one decay per head",
        ),
        (
            chunk_gated_delta_rule,
            {"allow_neg_eigval": True},
            f"{CHUNK}: allow_neg_eigval is True, should be False: it takes effect with "
            f"use_beta_sigmoid_in_kernel=True only",
        ),
        (
            chunk_gated_delta_rule,
            {"use_gate_in_kernel": True},
            f"{CHUNK}: A_log is None, should be a torch.Tensor: use_gate_in_kernel is True",
        ),
        (
            fused_recurrent_gated_delta_rule,
            {"use_gate_in_kernel": True, "g": None},
            f"{RECURRENT}: g is None, should be a torch.Tensor: use_gate_in_kernel is True",
        ),
        (
            fused_recurrent_gated_delta_rule,
            {"use_beta_sigmoid_in_kernel": True, "beta": None},
            f"{RECURRENT}: beta is None, should be a torch.Tensor: use_beta_sigmoid_in_kernel is "
            f"True",
        ),
        (
            chunk_gated_delta_rule,
            {"head_first": True},
            f"{CHUNK}: got an unknown keyword argument 'head_first'",
        ),
        (
            chunk_gated_delta_rule,
            {"state_v_first": True, "transpose_state_layout": True},
            f"{CHUNK}: state_v_first and transpose_state_layout are both given, should be "
            f"state_v_first: the other is its older name",
        ),
        (
            chunk_gated_delta_rule,
            {"initial_state": torch.zeros(B, HV, V, K)},
            f"{CHUNK}: initial_state has shape (2, 4, 6, 8), should be (N, HV, K, V) = "
            f"(2, 4, 8, 6); gdn_ops.compat.states.state_from('fla_v_first', initial_state) turns "
            f"a V-first state",
        ),
        (
            chunk_gated_delta_rule,
            {"g": torch.full((B, T, HV), 0.5)},
            f"{CHUNK}: g has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; from α, "
            f"g = alpha.log()",
        ),
    ],
)
def test_what_is_not_supported_raises_by_name(
    function: Any, more: dict[str, Any], message: str
) -> None:
    assert message_of(SpecError, function, **{**inputs(), **more}) == message


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
    ("call", "message"),
    [
        (
            lambda: state_from("vllm", torch.zeros(1)),
            "state_from: unknown layout 'vllm', known: fla, fla_v_first, flashinfer, onnx, "
            "ort_gated_delta_net, paper",
        ),
        (
            lambda: state_to("paper", torch.zeros(2, 3)),
            "state_to: state has shape (2, 3), should have 4 dimensions: sequences, heads, and K "
            "and V in the order of the layout",
        ),
        (
            lambda: gate_from("fla", torch.tensor([0.25, 0.5])),
            "gate_from: gate has values in [0.25, 0.5], should be in [-inf, 0]: the gate of "
            "layout 'fla' is log α; α goes in alpha=",
        ),
        (
            lambda: gate_from("flashinfer", torch.tensor([-0.25, 0.0])),
            "gate_from: gate has values in [-0.25, 0], should be in [0, 1]: the gate of layout "
            "'flashinfer' is α; log α goes in log_alpha=",
        ),
        (
            lambda: gate_to("fla"),
            "gate_to: alpha and log_alpha are both missing, should be exactly one of them",
        ),
        (
            lambda: gate_to("fla", torch.ones(1), log_alpha=torch.zeros(1)),
            "gate_to: alpha and log_alpha are both given, should be exactly one of them",
        ),
    ],
)
def test_a_wrong_layout_or_gate_is_refused(call: Any, message: str) -> None:
    assert message_of(SpecError, call) == message
