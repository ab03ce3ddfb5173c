"""FLA's functions of GDN-2, of products of several factors, and of GLA."""

from __future__ import annotations

import importlib
import inspect
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import gdn_ops.compat.fla as fla_ops
from errors import message_of
from gdn_ops import SpecError, gated_delta, gated_delta_product
from gdn_ops.compat.fla import (
    chunk_gated_delta_product,
    chunk_gdn2,
    chunk_gla,
    chunk_kda,
    fused_recurrent_gdn2,
    fused_recurrent_gla,
)

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, H, HV, K, V, N = 2, 9, 2, 4, 8, 6, 3
NAMES = [
    "chunk_gdn2",
    "fused_recurrent_gdn2",
    "chunk_gated_delta_product",
    "chunk_gla",
    "fused_recurrent_gla",
]
PRODUCT = "chunk_gated_delta_product"
V_FIRST = [name for name in NAMES if name != "chunk_gated_delta_product"]


def call_of(name: str, rows: int = B, tokens: int = T, heads: int = HV) -> dict[str, Any]:
    """Return arguments of a function, by FLA's names."""
    torch.manual_seed(0)
    n = N if name == "chunk_gated_delta_product" else 1
    x: dict[str, Any] = {
        "q": torch.randn(rows, tokens, H, K),
        "k": functional.normalize(torch.randn(rows, n * tokens, H, K), dim=-1),
        "v": torch.randn(rows, n * tokens, heads, V),
    }
    if n > 1:
        x |= {"g": -torch.rand(rows, tokens, heads), "num_householder": n}
        return x | {"beta": 2 * torch.rand(rows, n * tokens, heads)}
    gate = "gk" if name == "fused_recurrent_gla" else "g"
    x[gate] = -3 * torch.rand(rows, tokens, heads, K)
    if name.endswith("gdn2"):
        x |= {"b": 2 * torch.rand(rows, tokens, heads, K), "w": torch.rand(rows, tokens, heads, V)}
    return x


def defined(name: str, x: dict[str, Any], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the definition of gdn_ops on the arguments of a function, in float64."""
    x = {key: y.double() if isinstance(y, Tensor) else y for key, y in x.items()}
    gate = x.pop("gk", None) if name == "fused_recurrent_gla" else x.pop("g")
    qkv = [x.pop(key) for key in ("q", "k", "v")]
    common: dict[str, Any] = {"log_alpha": gate, "backend": "naive", "return_state": True}
    common["initial_state"] = None if state is None else state.double()
    if name == "chunk_gated_delta_product":
        return gated_delta_product(*qkv, **common, **x)
    if name.endswith("gdn2"):
        return gated_delta(*qkv, **common, erase=x["b"], write=x["w"])
    return gated_delta(*qkv, **common, rule="gated")


def close(computed: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)


def function_of(name: str) -> Any:
    return getattr(fla_ops, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, T])
def test_output_and_state_are_those_of_the_definition(name: str, tokens: int) -> None:
    x, state = call_of(name, tokens=tokens), torch.randn(B, HV, K, V)
    expected, final = defined(name, x, state)
    o, computed = function_of(name)(**x, initial_state=state, output_final_state=True)
    close(o, expected)
    close(computed, final)
    assert (o.dtype, computed.dtype) == (torch.float32, torch.float32)
    o, none = function_of(name)(**x)
    close(o, defined(name, x)[0])
    assert none is None


@pytest.mark.parametrize("name", V_FIRST)
def test_states_may_be_v_first(name: str) -> None:
    x, state = call_of(name), torch.randn(B, HV, K, V)
    expected, final = defined(name, x, state)
    options = {"initial_state": state.mT, "output_final_state": True, "state_v_first": True}
    o, computed = function_of(name)(**x, **options)
    close(o, expected)
    close(computed, final.mT)
    assert computed.is_contiguous()


@pytest.mark.parametrize("name", [name for name in V_FIRST if name != "chunk_gla"])
def test_an_older_name_of_the_layout_works_and_warns(name: str) -> None:
    x, state = call_of(name), torch.randn(B, HV, K, V)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is the older name"):
        o, _ = function_of(name)(**x, initial_state=state.mT, transpose_state_layout=True)
    close(o, defined(name, x, state)[0])


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_have_a_state_each(name: str) -> None:
    x, state = call_of(name, rows=1), torch.randn(3, HV, K, V)
    cuts = torch.tensor([0, 4, 4, T])
    options: dict[str, Any] = {"initial_state": state, "output_final_state": True}
    if name.startswith("chunk"):
        options["cu_seqlens_cpu"] = cuts.clone()
    o, final = function_of(name)(**x, **options, cu_seqlens=cuts)
    for n, (start, stop) in enumerate([(0, 4), (4, T)]):
        ends = {T: slice(start, stop), N * T: slice(N * start, N * stop)}
        part = {key: y[:, ends[y.shape[1]]] if isinstance(y, Tensor) else y for key, y in x.items()}
        which = slice(2 * n, 2 * n + 1)
        expected, last = defined(name, part, state[which])
        close(o[:, start:stop], expected)
        close(final[which], last)
    assert torch.equal(final[1], state[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_decay_of_zero_clears(name: str) -> None:
    x = call_of(name)
    gate = x["gk" if "gk" in x else "g"]
    gate[:, 4, :, ...] = -torch.inf
    expected, last = defined(name, x)
    o, final = function_of(name)(**x, output_final_state=True)
    assert bool(o.isfinite().all())
    close(o, expected)
    close(final, last)


def test_without_a_gate_nothing_decays() -> None:
    x = call_of("chunk_gated_delta_product")
    still = x | {"g": torch.zeros_like(x["g"])}
    close(chunk_gated_delta_product(**x | {"g": None})[0], defined(PRODUCT, still)[0])
    x = call_of("fused_recurrent_gla")
    still = x | {"gk": torch.zeros_like(x["gk"])}
    close(fused_recurrent_gla(x["q"], x["k"], x["v"])[0], defined("fused_recurrent_gla", still)[0])


@pytest.mark.parametrize("name", ["chunk_gdn2", "fused_recurrent_gdn2"])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_the_decay_of_gdn2_may_be_computed_inside(name: str, bound: float | None) -> None:
    x = call_of(name)
    A_log, bias = torch.randn(HV), torch.randn(HV, K)
    options = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "lower_bound": bound}
    if name == "chunk_gdn2":
        options["safe_gate"] = bound is not None
    raw = x["g"] + 2
    o, _ = function_of(name)(**x | {"g": raw}, A_log=A_log, dt_bias=bias.flatten(), **options)
    rate, step = A_log.exp()[:, None], raw + bias
    g = -rate * functional.softplus(step) if bound is None else bound * (rate * step).sigmoid()
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (x["q"], x["k"]))
    close(o, defined(name, x | {"g": g, "q": q, "k": k})[0])


def test_one_strength_for_erase_and_write_is_kimi_delta_attention() -> None:
    x = call_of("chunk_gdn2")
    beta = torch.rand(B, T, HV)
    b, w = (beta.unsqueeze(-1).expand(B, T, HV, n) for n in (K, V))
    o, _ = chunk_gdn2(**x | {"b": b, "w": w})
    expected, _ = chunk_kda(x["q"], x["k"], x["v"], x["g"], beta)
    close(o, expected.double())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_tensor(name: str) -> None:
    x = call_of(name, rows=1, tokens=2)
    state = torch.randn(1, HV, K, V)
    tensors = {key: y for key, y in x.items() if isinstance(y, Tensor)} | {"initial_state": state}
    given = [y.double().requires_grad_() for y in tensors.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        return function_of(name)(**x | named, output_final_state=True)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("narrow", ["q", "v"])
def test_tokens_of_several_dtypes_are_promoted(name: str, narrow: str) -> None:
    x = call_of(name)
    x = x | {narrow: x[narrow].bfloat16()}
    o, _ = function_of(name)(**x)
    # As in FLA: these two have the dtype of v, the others that of q.
    like = "v" if name in ("fused_recurrent_gdn2", "chunk_gla") else "q"
    assert o.dtype == x[like].dtype
    expected = defined(name, x)[0].to(o.dtype).double()
    tolerance = 1e-5 if o.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


def test_scale_and_chunk_size_are_passed_on() -> None:
    for name in NAMES:
        x = call_of(name)
        close(function_of(name)(**x, scale=1.0)[0], defined(name, x)[0] * K**0.5)
    x = call_of("chunk_gdn2")
    close(chunk_gdn2(**x, chunk_size=16, disable_recompute=True)[0], defined("chunk_gdn2", x)[0])
    with pytest.raises(SpecError, match="chunk_size is 0, should be a positive integer"):
        chunk_gdn2(**x, chunk_size=0)


def test_the_signatures_are_those_of_fla() -> None:
    # fla-core 0.6.0
    signatures = {
        "chunk_gdn2": "q k v g b w scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel cu_seqlens cu_seqlens_cpu safe_gate lower_bound disable_recompute "
        "return_intermediate_states state_v_first cp_context kwargs",
        "fused_recurrent_gdn2": "q k v g b w A_log dt_bias scale initial_state output_final_state "
        "use_qk_l2norm_in_kernel use_gate_in_kernel lower_bound state_v_first cu_seqlens kwargs",
        "chunk_gated_delta_product": "q k v g beta num_householder scale initial_state "
        "output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu cp_context",
        "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens "
        "cu_seqlens_cpu",
        "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse "
        "state_v_first cu_seqlens kwargs",
    }
    required = {name: 6 for name in ("chunk_gdn2", "fused_recurrent_gdn2", PRODUCT)}
    required |= {"chunk_gla": 4, "fused_recurrent_gla": 3}
    for name, names in signatures.items():
        parameters = inspect.signature(function_of(name)).parameters
        assert list(parameters) == names.split()
        needed = [p for p in parameters.values() if p.default is p.empty and p.name != "kwargs"]
        assert len(needed) == required[name]
        assert {p.default for p in parameters.values()} - {inspect.Parameter.empty} <= {None, False}


# A second oracle: the definitions of FLA, in torch alone.


def of_fla(module: str) -> ModuleType:
    """Return a module of FLA, or skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLA warns where there is no GPU
        pytest.importorskip("fla.ops", reason="package 'fla' is not installed")
        return importlib.import_module(module)


@pytest.mark.parametrize("definition", ["naive_recurrent_gdn2", "naive_chunk_gdn2"])
def test_gdn2_is_that_of_fla(definition: str) -> None:
    naive = getattr(of_fla("fla.ops.gdn2.naive"), definition)
    x, state = call_of("chunk_gdn2", heads=H), torch.randn(B, H, K, V)
    options = {"initial_state": state, "output_final_state": True}
    expected = naive(**x, **options)
    for function in (chunk_gdn2, fused_recurrent_gdn2):
        torch.testing.assert_close(function(**x, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_product_is_that_of_fla(gated: bool) -> None:
    module = of_fla("fla.ops.gated_delta_product.naive")
    x, state = call_of(PRODUCT, rows=1, heads=H), torch.randn(2, H, K, V)
    x |= {} if gated else {"g": None}
    options = {"initial_state": state, "output_final_state": True}
    options["cu_seqlens"] = torch.tensor([0, 4, T])
    expected = module.naive_recurrent_gated_delta_product(**x, **options, scale=K**-0.5)
    computed = chunk_gated_delta_product(**x, **options)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)


def test_gla_is_that_of_fla() -> None:
    module = of_fla("fla.ops.gla.naive")
    x, state = call_of("fused_recurrent_gla", heads=H), torch.randn(B, H, K, V)
    options = {"initial_state": state, "output_final_state": True}
    expected = module.naive_recurrent_gla(**x, **options)
    computed = fused_recurrent_gla(**x, **options)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)
    computed = chunk_gla(x["q"], x["k"], x["v"], x["gk"], **options)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "chunk_gdn2: cp_context is given, should be None: context parallelism over devices is not "
    "supported": {"cp_context": object()},
    "chunk_gdn2: return_intermediate_states is True, should be False: it is not supported": {
        "return_intermediate_states": True
    },
    "chunk_gdn2: g is None, should be a torch.Tensor": {"g": None},
    "chunk_gdn2: b is None, should be a torch.Tensor": {"b": None},
    "fused_recurrent_gdn2: w is None, should be a torch.Tensor": {"w": None},
    "fused_recurrent_gdn2: w has type float, should be a torch.Tensor": {"w": 1.0},
    "chunk_gdn2: b has dtype int64, should be one of float64, float32, bfloat16, float16": {
        "b": torch.ones(B, T, HV, K, dtype=torch.int64)
    },
    "chunk_gdn2: g has shape (2, 9, 4), should be (B, T, HV, K) = (2, 9, 4, 8): "
    "gdn_ops.gated_delta takes one decay per head": {"g": torch.zeros(B, T, HV)},
    "chunk_gdn2: b has shape (2, 9, 4), should be (B, T, HV, K) = (2, 9, 4, 8)": {
        "b": torch.ones(B, T, HV)
    },
    "fused_recurrent_gdn2: w has shape (2, 9, 4, 8), should be (B, T, HV, V) = (2, 9, 4, 6)": {
        "w": torch.ones(B, T, HV, K)
    },
    "chunk_gdn2: b has values in [2.5, 2.5], should be in [0, 2]": {
        "b": torch.full((B, T, HV, K), 2.5)
    },
    "fused_recurrent_gdn2: w has values in [-0.5, -0.5], should be in [0, 2]": {
        "w": torch.full((B, T, HV, V), -0.5)
    },
    "chunk_gdn2: g has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; from α, "
    "g = alpha.log()": {"g": torch.full((B, T, HV, K), 0.5)},
    "chunk_gdn2: lower_bound is None, should be a number in [-5, 0): safe_gate is True": {
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(HV),
        "safe_gate": True,
    },
    "fused_recurrent_gdn2: A_log is given, should be None: it takes effect with "
    "use_gate_in_kernel=True only": {"A_log": torch.zeros(HV)},
    "chunk_gdn2: got an unknown argument 'beta', should be b and w of chunk_gdn2": {"beta": None},
    "chunk_gdn2: got an unknown argument 'lower_bnd', should be 'lower_bound'?": {"lower_bnd": 0},
    "chunk_gdn2: cu_seqlens_cpu is given without cu_seqlens, should be given with it: packed "
    "sequences would run into each other": {"cu_seqlens_cpu": torch.tensor([0, T])},
    "chunk_gdn2: initial_state has shape (2, 4, 6, 8), should be (N, HV, K, V) = (2, 4, 8, 6); "
    "gdn_ops.compat.states.state_from('fla_v_first', initial_state) turns a V-first state": {
        "initial_state": torch.zeros(B, HV, V, K)
    },
    "chunk_gated_delta_product: cp_context is given, should be None: context parallelism over "
    "devices is not supported": {"cp_context": object()},
    "chunk_gated_delta_product: k has 27 tokens, should have 18: 2 factors for each of the 9 "
    "tokens of q": {"num_householder": 2},
    "chunk_gated_delta_product: num_householder is 0, should be a positive integer": {
        "num_householder": 0
    },
    "chunk_gated_delta_product: num_householder has type float, should be a positive integer": {
        "num_householder": 3.0
    },
    "chunk_gated_delta_product: v has shape (2, 9, 4, 6), should be (B, n T, HV, V) = "
    "(2, 27, 4, 6)": {"v": torch.zeros(B, T, HV, V)},
    "chunk_gated_delta_product: beta has shape (2, 9, 4), should be (B, n T, HV) = (2, 27, 4)": {
        "beta": torch.ones(B, T, HV)
    },
    "chunk_gated_delta_product: beta is None, should be a torch.Tensor": {"beta": None},
    "chunk_gated_delta_product: g has shape (2, 27, 4), should be (B, T, HV) = (2, 9, 4)": {
        "g": torch.zeros(B, N * T, HV)
    },
    "chunk_gated_delta_product: g has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; "
    "from α, g = alpha.log()": {"g": torch.full((B, T, HV), 0.5)},
    "chunk_gla: g is None, should be a torch.Tensor": {"g": None},
    "chunk_gla: g has shape (2, 9, 4), should be (B, T, HV, K) = (2, 9, 4, 8): "
    "gdn_ops.gated_delta takes one decay per head": {"g": torch.zeros(B, T, HV)},
    "chunk_gla: state_v_first has type str, should be True or False": {"state_v_first": "yes"},
    "fused_recurrent_gla: gv is given, should be None: a decay of every value channel is not "
    "supported": {"gv": torch.zeros(1)},
    "fused_recurrent_gla: reverse is True, should be False: it is not supported": {"reverse": True},
    "fused_recurrent_gla: gk has values in [0.5, 0.5], should be in [-inf, 0]: it is log α; from "
    "α, gk = alpha.log()": {"gk": torch.full((B, T, HV, K), 0.5)},
    "fused_recurrent_gla: gk is on meta, should be on cpu, the device of q": {
        "gk": torch.zeros(B, T, HV, K, device="meta")
    },
    "fused_recurrent_gla: got an unknown argument 'g_gamma', should be one of q, k, v, gk, gv, "
    "scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens": {
        "g_gamma": None
    },
}
"""Options that are refused, by the error, which begins with the name of the function."""


@pytest.mark.parametrize(("message", "options"), REFUSED.items())
def test_what_is_not_supported_raises_by_name(message: str, options: dict[str, Any]) -> None:
    name = message.partition(":")[0]
    assert message_of(SpecError, function_of(name), **{**call_of(name), **options}) == message
