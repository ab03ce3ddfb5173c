"""A decoded token of a layer is one call between its projections, where that is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat_models import FAMILIES, KDA_FAMILIES, SMALL, model, relative, tokens
from cpp_libraries import note_calls
from gdn_ops.backends.cpp import library
from gdn_ops.compat.transformers import accelerate, token
from gdn_ops.compat.transformers.layer_projections import SINGLE, parameters_of, sizes_of
from gdn_ops.nn import kernels

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_blocks"),
    # Some releases of transformers warn of what they call themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


def layer_of(family: str) -> Any:
    """Return the first layer of linear attention of a tiny model; skip a test without."""
    for layer in model(family).modules():
        if hasattr(layer, "conv1d"):
            return layer
    assert any(hasattr(layer, "q_conv1d") for layer in model(family).modules())
    pytest.skip("layers of this transformers convolve q, k and v apart")


def fits(family: str) -> None:
    """Skip where layers of this release do not fit."""
    reason = token.incompatibility_of(type(layer_of(family)))
    if reason is not None:
        pytest.skip(reason)


def decoded(family: str, count: int, rows: int = 2) -> tuple[list[Tensor], Any]:
    """Return the logits of decoded tokens, and the cache behind them."""
    tiny, ids = model(family), tokens(rows, 9 + count)
    with torch.no_grad():
        out = tiny(ids[:, :9], use_cache=True)
        cache, logits = getattr(out, "cache", None) or out.past_key_values, []
        for t in range(9, 9 + count):
            out = tiny(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    return logits, cache


@pytest.mark.parametrize("family", [*FAMILIES, *KDA_FAMILIES])
def test_decoded_tokens_are_those_of_transformers(family: str) -> None:
    fits(family)
    expected, _ = decoded(family, 4)
    with accelerate(strict=True) as used:
        own, _ = decoded(family, 4)
    for a, b in zip(own, expected, strict=True):
        assert relative(a, b) < 4e-6
    steps = {key[1:]: count for key, count in used.calls.items() if "step" in key[1]}
    assert set(steps) == {("gated_delta_step", "cpp")}


@pytest.mark.parametrize("family", [SMALL, *KDA_FAMILIES])
def test_a_token_is_one_call(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fits(family)
    names = note_calls(monkeypatch, "layers", "layer_token", "backend")
    with accelerate():
        decoded(family, 0)
        names.clear()
        decoded(family, 1)
    assert names.count("gdn_token") == names.count("gdn_forward") > 0
    assert "gdn_decode" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_tokens_in_16_bits_are_those_of_float32(family: str, dtype: torch.dtype) -> None:
    fits(family)
    layer = copy.deepcopy(layer_of(family)).to(dtype)
    H, _, K, _ = sizes_of(layer)
    inputs, state = torch.randn(2, 3 * H * K, 4).to(dtype), torch.randn(2, H, K, K)
    x = torch.randn(2, 1, layer.hidden_size).to(dtype)
    wide = copy.deepcopy(layer).float()
    with torch.no_grad():
        own, theirs = (token._Cache(y.clone(), state.clone()) for y in (inputs, inputs.float()))
        y = token.advance(layer, {"hidden_states": x, "cache": own}, "cpp")
        expected = wide(x.float(), theirs)
    assert y is not None and y.dtype == dtype
    assert relative(y.float(), expected) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert relative(own.state, theirs.state) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert own.inputs.dtype == dtype


@pytest.mark.parametrize("family", KDA_FAMILIES)
@pytest.mark.parametrize("part", ["forget_gate", "o_norm", "forget_gate.f_b_proj", "g_proj"])
def test_a_hook_of_a_part_of_a_layer_is_called(family: str, part: str) -> None:
    fits(family)
    seen: list[str] = []
    module = dict(layer_of(family).named_modules()).get(part)
    if module is None:
        pytest.skip("layers of this family have no such part")
    handle = module.register_forward_hook(lambda *_: seen.append(part))
    with accelerate():
        decoded(family, 0)
        seen.clear()
        decoded(family, 1)
    handle.remove()
    assert seen == 2 * [part]  # of the prompt and of the token


@pytest.mark.parametrize("why", ["backend", "library", "hook", "gradients"])
def test_another_call_runs_as_the_parts_do(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fits(SMALL)
    expected, _ = decoded(SMALL, 2)
    seen: list[int] = []
    handles: list[Any] = []
    with accelerate("torch" if why == "backend" else "auto"):
        # Only now: what is replaced was tried before.
        monkeypatch.setattr(token.kernel, "token", lambda *_: seen.append(1))
        if why == "library":
            monkeypatch.setattr(kernels, "missing", lambda: "not built")
        if why == "hook":
            layers = [x for x in model(SMALL).modules() if hasattr(x, "A_log")]
            norms = [getattr(x, "norm", None) or x.o_norm for x in layers]
            handles = [x.register_forward_hook(lambda *_: None) for x in norms]
        if why == "gradients":
            monkeypatch.setattr(kernels, "needs_grad", lambda *_: True)
        own, _ = decoded(SMALL, 2)
    for handle in handles:
        handle.remove()
    assert seen == []
    for a, b in zip(own, expected, strict=True):
        assert relative(a, b) < 4e-6


class Recording(token._Cache):
    def is_recording_past(self, layer_idx: int) -> bool:
        return True


def test_calls_of_other_kinds_are_left() -> None:
    fits(SMALL)
    layer: Any = next(x for x in model(SMALL).modules() if hasattr(x, "A_log"))
    inputs = torch.randn(2, *layer.conv1d.weight.shape[::2])
    state = torch.randn(2, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    x = torch.randn(2, 1, layer.hidden_size)
    named: dict[str, Any] = {"hidden_states": x, "cache": token._Cache(inputs, state)}
    with torch.no_grad():
        assert token.advance(layer, named, "cpp") is not None
        whole = named | {"attention_mask": torch.ones(2, 1, dtype=torch.bool)}
        assert token.advance(layer, whole, "cpp") is not None
        for other in (
            {"attention_mask": torch.tensor([[1], [0]])},
            {"attention_mask": torch.ones(2, 3)},
            {"attention_mask": [[1], [1]]},
            {"seq_idx": torch.zeros(1, 2)},
            {"hidden_states": x.expand(2, 3, -1)},
            {"hidden_states": x.double()},
            {"cache": None},
            {"cache": object()},
            {"cache": Recording(inputs, state)},
            {"cache": token._Cache(inputs, state.mT.contiguous().mT)},
            {"cache": token._Cache(inputs[:1], state)},
        ):
            before = inputs.clone(), state.clone()
            assert token.advance(layer, named | other, "cpp") is None, other
            assert torch.equal(inputs, before[0]) and torch.equal(state, before[1])
    assert token.advance(layer, named, "cpp") is None  # autograd records it


class Strange(nn.Module):
    """A layer with projections of known names that is something else."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        for name in SINGLE:
            setattr(self, name, nn.Linear(8, 8, bias=False))
        self.num_k_heads = self.num_v_heads = self.head_k_dim = self.head_v_dim = 2
        self.conv1d = nn.Conv1d(8, 8, 3, groups=8)
        self.activation, self.layer_idx = "silu", layer_idx

    def forward(self, hidden_states: Tensor, cache: Any = None) -> Tensor:
        return hidden_states


class Unbuildable(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.width = config.a_setting_that_no_layer_has


class Unknown(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Strange, "cannot be replaced on an example: ValueError: it is of another kind"),
        (Unknown, "its projections are not known"),
        (
            Unbuildable,
            "cannot be tried: AttributeError: 'types.SimpleNamespace' object has no attribute "
            "'a_setting_that_no_layer_has'",
        ),
    ],
)
def test_a_layer_of_another_kind_is_left(cls: type[nn.Module], reason: str) -> None:
    assert token.incompatibility_of(cls) == reason


def test_a_layer_that_computes_something_else_is_left() -> None:
    fits(SMALL)
    cls = type(layer_of(SMALL))

    class Doubled(cls):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
            return 2 * super().forward(*arguments, **keywords)

    reason = token.incompatibility_of(Doubled)
    assert reason is not None
    assert reason.startswith("gives other numbers on an example: relative difference ")


def test_without_a_library_a_layer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "missing", lambda: "not built")
    assert token.incompatibility_of(Unknown) == "not built"


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, None),
        ({"safe_gate": True, "lower_bound": -3.0}, -3.0),
        ({"safe_gate": False, "lower_bound": -3.0}, None),
        ({"safe_gate_lower_bound": -4.0}, -4.0),
        ({"safe_gate_lower_bound": None}, None),
    ],
)
def test_a_bound_is_read_by_the_names_of_the_models(
    bounds: dict[str, Any], expected: float | None
) -> None:
    layer = copy.deepcopy(layer_of("kimi_linear-softplus"))
    vars(layer.forget_gate).update(bounds)
    assert parameters_of(layer).lower_bound == expected


def test_a_bound_that_is_none_leaves_the_layer_as_it_is() -> None:
    layer = copy.deepcopy(layer_of("kimi_linear-softplus"))
    layer.forget_gate.safe_gate_lower_bound = 0.0
    assert parameters_of(layer) is None
