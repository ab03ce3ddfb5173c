"""FLA's functions of Kimi Delta Attention: a decay of every key channel, given or made inside."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import gdn_ops.compat.fla as fla_ops
from errors import message_of
from gdn_ops import SpecError, gated_delta
from gdn_ops.compat.fla import (
    chunk_kda,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from gdn_ops.compat.states import LAYOUTS, gate_from, gate_to, state_from, state_to
from gdn_ops.compat.transformers.signatures import definition

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, H, HV, K, V = 2, 9, 2, 4, 8, 6
BOTH = [chunk_kda, fused_recurrent_kda]


def inputs(rows: int = B, tokens: int = T) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(rows, tokens, H, K),
        "k": functional.normalize(torch.randn(rows, tokens, H, K), dim=-1),
        "v": torch.randn(rows, tokens, HV, V),
        "g": -3 * torch.rand(rows, tokens, HV, K),
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
        S = S * g[:, t].exp()[..., None]
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
    assert final_state.is_contiguous()
    assert function(**x)[1] is None


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
    for n, (start, stop) in enumerate([(0, 4), (4, T)]):
        part = {name: tensor[:, start:stop] for name, tensor in x.items()}
        which = slice(2 * n, 2 * n + 1)
        expected, last = recurrence(**part, state=state[which])
        close(o[:, start:stop], expected)
        close(final[which], last)
    assert torch.equal(final[1], state[1])


@pytest.mark.parametrize("function", BOTH)
def test_a_channel_whose_decay_is_zero_is_cleared(function: Any) -> None:
    x = inputs()
    x["g"][:, 4, :, ::3] = -torch.inf
    o, final = function(**x, output_final_state=True)
    expected, last = recurrence(**x)
    close(o, expected)
    close(final, last)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("bound", "parameters"),
    # Only a bounded gate may have no rate.
    [
        *itertools.product((None, -5.0, -0.5), ("flat", "channels", "rate only")),
        (-5.0, "bias only"),
    ],
)
def test_gates_may_be_computed_inside(
    function: Any, bound: float | None, negative: bool, parameters: str
) -> None:
    x = inputs()
    q, k, v = x["q"], x["k"], x["v"]
    raw, logits = torch.randn(B, T, HV, K), torch.randn(B, T, HV)
    A_log, bias = torch.randn(HV), torch.randn(HV, K)
    has_rate, has_bias = parameters != "bias only", parameters != "rate only"
    flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    options = {**dict.fromkeys(flags, True), "lower_bound": bound, "allow_neg_eigval": negative}
    if function is chunk_kda:
        options["safe_gate"] = bound is not None
    given = {
        "A_log": A_log if has_rate else None,
        "dt_bias": None if not has_bias else bias.flatten() if parameters == "flat" else bias,
    }
    o, _ = function(q, k, v, g=raw, beta=logits, **options, **given)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rate = A_log.exp()[:, None] if has_rate else 1.0
    step = raw + bias if has_bias else raw
    g = -rate * functional.softplus(step) if bound is None else bound * (rate * step).sigmoid()
    close(o, recurrence(q, k, v, g, logits.sigmoid() * (2 if negative else 1))[0])


@pytest.mark.parametrize("bound", [None, -5.0])
def test_gradients_reach_every_argument_through_the_gates(bound: float | None) -> None:
    x = {n: y.double().requires_grad_() for n, y in inputs(rows=1, tokens=3).items()}
    gates = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (HV, HV * K)]

    def run(*tensors: Tensor) -> Tensor:
        *five, A_log, dt_bias = tensors
        options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        options |= {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": bound}
        return chunk_kda(*five, **options)[0]

    assert torch.autograd.gradcheck(run, (*x.values(), *gates), fast_mode=True)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_tokens_of_several_dtypes_are_promoted(function: Any, narrow: torch.dtype) -> None:
    x, state = inputs(), torch.randn(B, HV, K, V)
    mixed = x | {name: x[name].to(narrow) for name in ("v", "g", "beta")}
    o, final = function(**mixed, initial_state=state.to(narrow), output_final_state=True)
    expected, last = recurrence(**mixed, state=state.to(narrow))
    assert (o.dtype, final.dtype) == (narrow, torch.float32)
    torch.testing.assert_close(o, expected.to(narrow), rtol=1e-2, atol=1e-2)
    close(final, last)


def test_decays_per_head_and_per_channel_multiply() -> None:
    x, state = inputs(), torch.randn(B, HV, K, V)
    gk = x.pop("g")
    g = -torch.rand(B, T, HV)
    run = fused_recurrent_gated_delta_rule
    o, final = run(**x, g=g, gk=gk, initial_state=state, output_final_state=True)
    expected, last = recurrence(**x, g=g.unsqueeze(-1) + gk, state=state)
    close(o, expected)
    close(final, last)
    close(run(**x, gk=gk)[0], recurrence(**x, g=gk)[0])
    # A raw decay per head beside a decay per channel.
    A_log, dt_bias = torch.randn(HV), torch.randn(HV)
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    made = -A_log.exp() * functional.softplus(g + dt_bias)
    close(run(**x, g=g, gk=gk, **options)[0], recurrence(**x, g=made.unsqueeze(-1) + gk)[0])


def test_a_product_of_narrow_decays_is_wide() -> None:
    x = inputs()
    gk = x.pop("g").bfloat16()
    g = (-torch.rand(B, T, HV)).bfloat16()
    expected = recurrence(**x, g=g.double().unsqueeze(-1) + gk.double())[0]
    close(fused_recurrent_gated_delta_rule(**x, g=g, gk=gk)[0], expected)


def test_scale_and_chunk_size_are_passed_on() -> None:
    x = inputs()
    o, _ = chunk_kda(**x, scale=1.0, chunk_size=16, disable_recompute=True, safe_gate=True)
    close(o, recurrence(**x)[0] * K**0.5)
    with pytest.raises(SpecError, match="chunk_size is 0, should be a positive integer"):
        chunk_kda(**x, chunk_size=0)


def test_the_signatures_are_those_of_fla() -> None:
    # fla-core 0.6.0
    chunk = (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound "
        "disable_recompute return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu "
        "cp_context use_graph max_num_seqs kwargs"
    )
    recurrent = (
        "q k v g beta A_log dt_bias scale initial_state output_final_state "
        "use_qk_l2norm_in_kernel use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval "
        "lower_bound state_v_first cu_seqlens kwargs"
    )
    for function, names in zip(BOTH, (chunk, recurrent), strict=True):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names.split()
        defaults = {p.default for p in parameters.values()} - {inspect.Parameter.empty}
        assert defaults <= {None, False}


# Second oracles: the definitions of others.


def test_results_are_those_of_the_definition_of_fla() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLA warns where there is no GPU
        naive = pytest.importorskip("fla.ops.kda.naive", reason="package 'fla' is not installed")
    x, state = inputs(), torch.randn(B, HV, K, V)
    options = {"initial_state": state, "output_final_state": True}
    expected = naive.naive_recurrent_kda(**x, **options)
    for function in BOTH:
        torch.testing.assert_close(function(**x, **options), expected, rtol=1e-5, atol=1e-5)


def test_results_are_those_of_the_definition_of_transformers() -> None:
    name = "transformers.models.kimi_linear.modeling_kimi_linear"
    theirs = pytest.importorskip(name, reason="transformers has no kimi_linear")
    x, state = inputs(), torch.randn(B, HV, K, V)
    repeated = {name: x[name].repeat_interleave(HV // H, 2) for name in ("q", "k")}
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    # Inside of its decorators, which may take another implementation.
    run = definition(theirs.recurrent_kimi_delta_attention, ("query", "key", "value", "g", "beta"))
    assert run is not None
    expected = run(*(x | repeated).values(), **options)
    for function in BOTH:
        torch.testing.assert_close(function(**x, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_and_a_gate_of_any_layout_run(layout: str) -> None:
    x, state = inputs(), torch.randn(B, HV, K, V)
    g = x.pop("g")
    gate, memory = gate_to(layout, log_alpha=g), state_to(layout, state)
    given = state_from(layout, memory)
    o = gated_delta(**x, initial_state=given, **gate_from(layout, gate))
    close(o, recurrence(**x, g=g, state=state)[0])


RAW = {"use_gate_in_kernel": True, "A_log": torch.zeros(HV)}
REFUSED: dict[str, dict[str, Any]] = {
    "chunk_kda: cp_context is given, should be None: context parallelism over devices is not "
    "supported": {"cp_context": object()},
    "chunk_kda: use_graph is True, should be False: it is not supported": {"use_graph": True},
    "chunk_kda: return_intermediate_states is True, should be False: it is not supported": {
        "return_intermediate_states": True
    },
    "chunk_kda: max_num_seqs is given, should be None: it takes effect with use_graph=True only": {
        "max_num_seqs": 2
    },
    "chunk_kda: safe_gate has type str, should be True or False": {"safe_gate": "yes"},
    "chunk_kda: lower_bound is None, should be a number in [-5, 0): safe_gate is True": RAW
    | {"safe_gate": True},
    "chunk_kda: lower_bound is -5.5, should be a number in [-5, 0): log α of the bounded gate lies "
    "between it and 0": RAW | {"lower_bound": -5.5},
    "fused_recurrent_kda: lower_bound is 0, should be a number in [-5, 0): log α of the bounded "
    "gate lies between it and 0": RAW | {"lower_bound": 0},
    "fused_recurrent_kda: lower_bound is given, should be None: it takes effect with "
    "use_gate_in_kernel=True only": {"lower_bound": -5.0},
    "chunk_kda: A_log is given, should be None: it takes effect with use_gate_in_kernel=True "
    "only": {"A_log": torch.zeros(HV)},
    "chunk_kda: A_log is None, should be a torch.Tensor: use_gate_in_kernel is True and "
    "lower_bound is None": {"use_gate_in_kernel": True},
    "chunk_kda: g is None, should be a torch.Tensor": {"g": None},
    "fused_recurrent_kda: beta is None, should be a torch.Tensor": {"beta": None},
    "chunk_kda: g has shape (2, 9, 4), should be (B, T, HV, K) = (2, 9, 4, 8): "
    "chunk_gated_delta_rule takes one decay per head": {"g": torch.zeros(B, T, HV)},
    "chunk_kda: g has shape (2, 9, 4, 6), should be (B, T, HV, K) = (2, 9, 4, 8)": {
        "g": torch.zeros(B, T, HV, V)
    },
    "fused_recurrent_kda: g has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; from α, "
    "g = alpha.log()": {"g": torch.full((B, T, HV, K), 0.5)},
    "chunk_kda: dt_bias has shape (4,), should be (HV K,) = (32,) or (HV, K) = (4, 8)": RAW
    | {"dt_bias": torch.zeros(HV)},
    "chunk_kda: A_log has shape (4, 8), should be (HV,) = (4,)": RAW
    | {"A_log": torch.zeros(HV, K)},
    "fused_recurrent_kda: A_log is on meta, should be on cpu, the device of g": RAW
    | {"A_log": torch.zeros(HV, device="meta")},
    "fused_recurrent_kda: beta has shape (2, 9, 4, 6), should be (B, T, HV) = (2, 9, 4): a beta "
    "per value channel, which erases each by its own strength, is not supported; w of chunk_gdn2 "
    "writes each by its own": {"beta": torch.ones(B, T, HV, V)},
    "chunk_kda: initial_state has shape (2, 4, 6, 8), should be (N, HV, K, V) = (2, 4, 8, 6); "
    "gdn_ops.compat.states.state_from('fla_v_first', initial_state) turns a V-first state": {
        "initial_state": torch.zeros(B, HV, V, K)
    },
    "fused_recurrent_kda: got an unknown argument 'ssm_state_indices', should be left out: "
    "gdn_ops.gated_delta_step takes a pool of states": {"ssm_state_indices": None},
    "chunk_kda: got an unknown argument 'lower_bnd', should be 'lower_bound'?": {"lower_bnd": -5.0},
    "chunk_kda: allow_neg_eigval is True, should be False: it takes effect with "
    "use_beta_sigmoid_in_kernel=True only": {"allow_neg_eigval": True},
    "chunk_kda: cu_seqlens_cpu is given without cu_seqlens, should be given with it: packed "
    "sequences would run into each other": {"cu_seqlens_cpu": torch.tensor([0, T])},
}
"""Options that are refused, by the error, which begins with the name of the function."""


@pytest.mark.parametrize(("message", "options"), REFUSED.items())
def test_what_is_not_supported_raises_by_name(message: str, options: dict[str, Any]) -> None:
    function = getattr(fla_ops, message.partition(":")[0])
    assert message_of(SpecError, function, **{**inputs(), **options}) == message
