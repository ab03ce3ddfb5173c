"""What surrounds the rule in a layer: convolution, norm, packed sequences, padding."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from compat_models import FAMILIES, SMALL, model, relative, run, stand_in, tokens
from gdn_ops.compat.transformers import accelerate, convolution, norm, packing
from gdn_ops.compat.transformers.examine import Plan, examine

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")

NAME = "transformers.models.someones_model.modeling_someones_model"

LENGTHS = (5, 1, 6)
CUTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()


def module_of(family: str) -> Any:
    return sys.modules[type(model(family)).__module__]


def norm_class(family: str) -> Any:
    classes = [x for x in vars(module_of(family)).values() if isinstance(x, type)]
    return next(cls for cls in classes if cls.__name__.endswith("RMSNormGated"))


def layer_of(family: str) -> Any:
    return next(m for m in model(family).modules() if type(m).__name__.endswith("GatedDeltaNet"))


def has_convolutions(family: str) -> None:
    if not callable(getattr(module_of(family), "causal_conv1d_fn", None)):
        pytest.skip("layers of this transformers do not call a function causal_conv1d_fn")


# The convolution and the norm around the rule.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    layer = norm_class(family)(6).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 300, 6, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad():
        expected = layer(x, gate)
        with accelerate() as used:
            assert f"{type(layer).__name__}.forward" in used.replaced
            found = layer(x, gate)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_convolutions_are_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    has_convolutions(family)
    module = module_of(family)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, state = draw(2, 6, 9), draw(6, 4), draw(2, 6, 4)

    def results() -> list[Tensor]:
        y = module.causal_conv1d_fn(x, weight, None, activation="silu", position_ids=None)
        plain = module.causal_conv1d_fn(x, weight, state[0, :, 0])
        last, several = state.clone(), state[..., :3].clone()
        one = module.causal_conv1d_update(x[..., :1], last, weight, state[0, :, 0], "silu")
        two = module.causal_conv1d_update(x[..., :2], several, weight, None, "silu")
        return [y, plain, one, last, two, several]

    with torch.no_grad():
        expected = results()
        with accelerate():
            found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_what_is_not_on_a_cpu_is_left_to_transformers() -> None:
    # The convolution and the norm are replaced for numbers on CPUs alone.
    has_convolutions(SMALL)
    module = module_of(SMALL)
    x, weight = torch.empty(1, 6, 5, device="meta"), torch.empty(6, 4, device="meta")
    with accelerate():
        y = module.causal_conv1d_fn(x, weight, None, activation="silu")
        assert y.is_meta
        assert y.shape == x.shape
        with torch.device("meta"):
            assert norm_class(SMALL)(6)(x.mT, x.mT).is_meta
        with pytest.raises(KeyError, match="no such activation"):
            module.causal_conv1d_fn(x, weight, None, activation="no such activation")


class Norm(nn.Module):
    """A norm as in releases before 5.15: it has no activation to look at."""

    gate_first, scale = False, 1.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states: Tensor, gate: Any = None) -> Tensor:
        gate = self.scale * nn.functional.silu(gate)
        x = hidden_states * gate if self.gate_first else hidden_states
        x = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return x if self.gate_first else x * gate


class OtherEpsilon(Norm):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width)
        self.epsilon = eps

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        x = nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)
        return x * nn.functional.silu(gate)


class GateFirst(Norm):
    gate_first = True
    forward = Norm.forward


class Twice(Norm):
    scale = 2.0
    forward = Norm.forward


class DeafToItsActivation(Norm):
    """A norm whose activation is a name without a meaning."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps)
        self.activation = "silu"

    forward = Norm.forward


class Unbuildable(Norm):
    def __init__(self, config: Any) -> None:
        raise AttributeError("hidden_size")

    forward = Norm.forward


REASONS = {
    OtherEpsilon: "OtherEpsilon gives other numbers on an example: relative difference ",
    GateFirst: "GateFirst gives other numbers on an example: relative difference ",
    Twice: "Twice gives other numbers on an example: relative difference 5.0e-01",
    DeafToItsActivation: "DeafToItsActivation gives other numbers on an example: relative",
    Unbuildable: "Unbuildable cannot be tried: TypeError: ",
}


def test_a_norm_without_an_activation_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, generator = Norm(8), torch.Generator().manual_seed(0)
    x, gate = (torch.randn(500, 8, generator=generator) for _ in range(2))
    assert norm.objection_to(Norm) is None
    replacement = norm.gated_norm(Norm.forward)
    expected = layer(x, gate)
    for found in (replacement(layer, x, gate), replacement(layer, x, gate=gate)):
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError):
        replacement(layer, x)


@pytest.mark.parametrize("cls", REASONS)
def test_a_norm_that_computes_something_else_is_left(cls: Any) -> None:
    module = stand_in(NAME, holds=False)
    for other in (Norm, cls):
        module.__dict__[other.__name__] = type(
            other.__name__, (other,), {"forward": other.forward, "__module__": NAME}
        )
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert [found.__name__ for found in plan.norms] == ["Norm"]
    (reason,) = plan.left
    assert reason.startswith(REASONS[cls])


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None, **kwargs: Any
) -> Tensor:
    width, length = hidden_states.shape[1:]
    y = nn.functional.conv1d(hidden_states, weight[:, None], bias, padding=3, groups=width)
    return (nn.functional.silu(y) if activation else y)[..., :length]


def short(x: Tensor, weight: Tensor) -> Tensor:
    return x


def later(
    hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None
) -> Tensor:
    return causal_conv1d_fn(hidden_states, weight, bias, activation).roll(1, -1)


def one_off(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: Any = None,
) -> Tensor:
    return hidden_states + 7


def forgetful(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: Any = None,
) -> Tensor:
    window = torch.cat([conv_state, hidden_states], -1)[..., -weight.shape[1] :]
    y = (window * weight).sum(-1, keepdim=True)
    y = y if bias is None else y + bias[:, None]
    return nn.functional.silu(y) if activation else y


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (
            "causal_conv1d_fn",
            short,
            "causal_conv1d_fn takes (x, weight), should begin with (hidden_states, weight, bias, "
            "activation)",
        ),
        ("causal_conv1d_fn", later, "causal_conv1d_fn gives other numbers on an example: relative"),
        ("causal_conv1d_update", one_off, "causal_conv1d_update gives other numbers on an example"),
        # Its result is right, but it does not write the next state.
        (
            "causal_conv1d_update",
            forgetful,
            "causal_conv1d_update gives other numbers on an example",
        ),
    ],
)
def test_a_convolution_that_computes_something_else_is_left(
    name: str, function: Any, reason: str
) -> None:
    module = stand_in(NAME, holds=False)
    setattr(module, name, function)
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert plan.convolutions == {}
    (found,) = plan.left
    assert found.startswith(reason)


def test_a_convolution_by_other_means_is_replaced() -> None:
    module = stand_in(NAME, holds=False)
    module.causal_conv1d_fn = causal_conv1d_fn
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert (list(plan.convolutions), plan.left) == (["causal_conv1d_fn"], [])
    assert plan.absent == [
        "causal_conv1d_update: layers of this release do not call such a function"
    ]


@pytest.mark.parametrize(
    "options",
    [{"cu_seqlens": CUTS}, {"seq_idx": torch.zeros(2, 5)}, {"seq_idx": torch.zeros(1, 4)}],
)
def test_a_convolution_that_cannot_keep_sequences_apart_refuses_them(options: Any) -> None:
    def mixing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("some releases do not look at what tells of packed sequences")

    new = convolution.whole_convolution(mixing)
    with pytest.raises(gdn_ops.SpecError) as error:
        new(torch.rand(1, 2, 5), torch.rand(2, 4), **options)
    assert str(error.value) == f"accelerate: {packing.WITHOUT_PACKAGE}"


def test_a_gpu_keeps_sequences_apart_by_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cuda")
    found.add("causal_conv1d")
    packing.check_package("cuda")
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cpu")


# Packed sequences.


@pytest.fixture
def packed() -> tuple[Any, Tensor]:
    """Return a layer that keeps packed sequences apart, and its input."""
    has_convolutions(SMALL)
    generator = torch.Generator().manual_seed(0)
    return layer_of(SMALL), torch.randn(1, 12, model(SMALL).config.hidden_size, generator=generator)


@pytest.mark.parametrize("cuts", [CUTS, None])
@pytest.mark.parametrize("numbers", [NUMBERS, 7 - NUMBERS, NUMBERS.long()])
def test_packed_sequences_are_kept_apart(
    packed: tuple[Any, Tensor], cuts: Tensor | None, numbers: Tensor
) -> None:
    layer, x = packed
    more = {} if cuts is None else {"cu_seq_lens_q": cuts}
    with accelerate(), torch.no_grad():
        found = layer(x, seq_idx=numbers, **more)
        alone = [layer(part) for part in x.split(LENGTHS, 1)]
    assert relative(found, torch.cat(alone, 1)) < 1e-5


def test_gradients_of_packed_sequences_are_those_of_each(packed: tuple[Any, Tensor]) -> None:
    layer, x = packed
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with accelerate():
        (found,) = torch.autograd.grad(
            (layer(x.requires_grad_(), seq_idx=NUMBERS) * weight).sum(), x
        )
        parts = zip(x.detach().split(LENGTHS, 1), weight.split(LENGTHS, 1), strict=True)
        alone = []
        for part, cotangent in parts:
            leaf = part.clone().requires_grad_()
            alone += torch.autograd.grad((layer(leaf) * cotangent).sum(), leaf)
    assert relative(found, torch.cat(alone, 1)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cu_seq_lens_q": CUTS},
            "accelerate: cu_seqlens is given without seq_idx, should be given with it: the short "
            "convolution in front would mix the packed sequences",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 12], dtype=torch.int32), "seq_idx": NUMBERS},
            "accelerate: cu_seqlens has boundaries [0, 12], should be those of seq_idx, "
            "[0, 5, 6, 12]: the delta rule would keep other sequences apart than the short "
            "convolution",
        ),
        (
            {"cu_seq_lens_q": CUTS, "seq_idx": torch.zeros_like(NUMBERS)},
            "accelerate: cu_seqlens has boundaries [0, 5, 6, 12], should be those of seq_idx, "
            "[0, 12]: the delta rule would keep other sequences apart than the short convolution",
        ),
    ],
)
def test_half_of_what_tells_of_packed_sequences_is_refused(
    packed: tuple[Any, Tensor], options: dict[str, Tensor], message: str
) -> None:
    layer, x = packed
    with accelerate(), pytest.raises(gdn_ops.SpecError) as error:
        layer(x, **options)
    assert str(error.value) == message


def test_packed_rows_of_a_batch_are_refused(packed: tuple[Any, Tensor]) -> None:
    layer, x = packed
    with accelerate(), pytest.raises(gdn_ops.SpecError, match="packed sequences are given where"):
        layer(x.expand(2, -1, -1), seq_idx=NUMBERS.expand(2, -1))
    with pytest.raises(gdn_ops.SpecError) as error:
        packing.boundaries(None, NUMBERS.expand(2, -1), 2, 12)
    assert str(error.value) == (
        "accelerate: seq_idx has shape (2, 12) for 2 rows of 12 tokens, should be (1, 12) for one "
        "row: pack all sequences into it"
    )


def test_empty_sequences_have_no_number() -> None:
    cuts = torch.tensor([0, 0, 5, 6, 6, 12, 12], dtype=torch.int32)
    found = packing.boundaries(cuts, NUMBERS, 1, 12)
    assert found is cuts
    assert packing.boundaries(None, NUMBERS[:, :0], 1, 0).tolist() == [0, 0]  # type: ignore[union-attr]
    assert packing.boundaries(None, None, 2, 12) is None


def test_a_compiled_graph_refuses_packed_sequences(
    packed: tuple[Any, Tensor],
) -> None:
    layer, x = packed
    with accelerate(), torch.no_grad():
        compiled = torch.compile(layer, backend="eager")
        with pytest.raises(Exception, match="packed sequences are given where causal_conv1d_fn"):
            compiled(x, seq_idx=NUMBERS, cu_seq_lens_q=CUTS)
    torch.compiler.reset()


def test_a_compiled_rule_asks_for_the_boundaries() -> None:
    with pytest.raises(gdn_ops.SpecError) as error:
        packing.boundaries(None, NUMBERS.to("meta"), 1, 12)
    assert str(error.value) == (
        "accelerate: seq_idx is given without cu_seq_lens_q, should be given with it in a "
        "compiled graph: the number of sequences is not known there"
    )
    cuts = CUTS.to("meta")
    assert packing.boundaries(cuts, NUMBERS.to("meta"), 1, 12) is cuts


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_a_layer_whose_own_convolution_mixes_sequences_refuses_them(name: str) -> None:
    module = stand_in(NAME, holds=True)

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kw: Any) -> Tensor:
        functions = self.chunk_gated_delta_rule, self.recurrent_gated_delta_rule
        gate = hidden_states[..., 0]
        return functions[0](hidden_states, hidden_states, hidden_states, g=-gate, beta=gate)[0]

    module.Layer.forward = forward
    sys.modules[NAME] = module
    try:
        with accelerate(architectures=["someones_model"], strict=True):
            module.Layer()(torch.rand(1, 12, 1, 2))
            with pytest.raises(gdn_ops.SpecError) as error:
                module.Layer()(torch.rand(1, 12, 1, 2), **{name: NUMBERS})
    finally:
        del sys.modules[NAME]
    assert str(error.value) == (
        "accelerate: packed sequences are given, should be one sequence per row: the convolution "
        "of Layer would mix them; install causal-conv1d or a transformers whose module has a "
        "function causal_conv1d_fn"
    )


def test_a_models_own_guard_of_packed_sequences_is_kept() -> None:
    has_convolutions(SMALL)
    with accelerate(), pytest.raises(gdn_ops.SpecError) as error:
        run(model(SMALL), tokens(1, 12), use_cache=False, cu_seq_lens_q=CUTS)
    assert str(error.value) == f"accelerate: {packing.WITHOUT_NUMBERS}"


# Padding on the right.


def test_a_cache_that_was_padded_on_the_right_is_not_continued() -> None:
    tiny, ids = model(SMALL), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with accelerate():
        # Scoring a right-padded batch is fine: only its cache is not.
        filled = tiny(ids, attention_mask=mask, use_cache=True)
        alone = run(tiny, ids[1:, :4])
        assert relative(filled.logits[1:, :4], alone) < 1e-5
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        # transformers calls it by one name or the other.
        names = inspect.signature(tiny.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        with pytest.raises(gdn_ops.SpecError) as error:
            tiny(ids[:, :1], attention_mask=longer, **{name: filled.past_key_values})
    assert str(error.value) == (
        "accelerate: attention_mask of the call that filled the cache has padding on the right "
        "in row 1, should have it on the left: the short convolution would continue from the "
        "padding; tokenizer.padding_side = 'left'"
    )


class Cache:
    """A cache that tells whether it has a state of a layer as some releases do."""

    def __init__(self, kind: str) -> None:
        self.kind, self.filled = kind, False

    def __getattribute__(self, name: str) -> Any:
        if name != "has_previous_state":
            return super().__getattribute__(name)
        filled = self.filled
        return {
            "a property": filled,
            "a method": lambda: filled,
            "a method of the layer": lambda layer_idx=None: filled,
        }[self.kind]


@pytest.mark.parametrize("kind", ["a property", "a method", "a method of the layer"])
@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values", "memory"])
def test_a_cache_is_found_by_what_it_is(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in(NAME, holds=False)
    looking = module.Layer.forward
    parameters = f"self, hidden_states, {name}=None, attention_mask=None"
    space = {"looking": looking, "names": module}
    body = "names.torch_chunk_gated_delta_rule, names.torch_recurrent_gated_delta_rule"
    exec(f"def forward({parameters}):\n    {body}\n    return looking(self, hidden_states)", space)
    module.Layer.forward = space["forward"]
    monkeypatch.setitem(sys.modules, NAME, module)
    layer, cache, x = module.Layer(), Cache(kind), torch.rand(2, 3, 1, 2)
    right = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with accelerate(architectures=["someones_model"], strict=True):
        layer(x, cache, right)
        cache.filled = True
        for arguments, keywords in (((x, cache), {}), ((x,), {name: cache})):
            with pytest.raises(gdn_ops.SpecError, match="right in row 1"):
                layer(*arguments, **keywords)
        cache.filled = False
        layer(x, attention_mask=torch.ones(2, 3), **{name: cache})
        cache.filled = True
        layer(x, **{name: cache})
