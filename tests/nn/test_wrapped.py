"""What a framework copies, wraps, quantises or saves keeps working, or is refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import (
    GatedDeltaNet,
    HybridLM,
    KeyValueRing,
    State,
    optimizer_groups,
    parameters_without_weight_decay,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TOKENS = 16, 6
GATES = ["decay.A_log", "decay.dt_bias"]


def make_layer(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(WIDTH, 2, head_dim=4, **options)


def make_model(pattern: str = "GA", **options: Any) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(pattern, 20, WIDTH, num_heads=2, head_dim=4, window=4, **options)


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(20, (2, TOKENS), generator=torch.Generator().manual_seed(1))


# Projections that are no plain linear layer.


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as adapters wrap it; it has no `weight`."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return y


class Bytes(nn.Module):
    """A linear layer that keeps its weight in eight bits, in buffers, and no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        step = linear.weight.detach().abs().amax() / 127
        self.register_buffer("steps", (linear.weight.detach() / step).round().to(torch.int8))
        self.step = float(step)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.steps.to(x.dtype) * self.step)


def each_linear(wrap: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return what replaces every linear layer of a model."""

    def replace(model: nn.Module) -> nn.Module:
        for name, child in model.named_children():
            setattr(model, name, wrap(child) if isinstance(child, nn.Linear) else replace(child))
        return model

    return replace


def quantised_dynamically(model: nn.Module) -> nn.Module:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no engine for quantised layers")
    quantize = torch.ao.quantization.quantize_dynamic
    quantised: nn.Module = quantize(model, {nn.Linear}, dtype=torch.qint8)
    return quantised


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantised dynamically": quantised_dynamically,
    "in eight bits": each_linear(Bytes),
    "with an adapter": each_linear(Adapter),
    "parametrised": each_linear(parametrizations.weight_norm),
    "orthogonal": each_linear(parametrizations.orthogonal),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("wrap", WRAPS)
def test_decoding_goes_on_from_prefill_behind_any_projection(wrap: str) -> None:
    x = inputs()
    layer: Any = WRAPS[wrap](make_layer())
    with torch.no_grad():
        whole, _ = layer(x)
        _, state = layer(x[:, :4])
        y, _ = layer(x[:, 4:], state)
        zero = getattr(layer, "_orig_mod", layer).zero_state(2)
        first, _ = layer(x[:, :1], zero)
    # Dynamically quantised layers scale by what they are given, so that a part is not the whole.
    allowed = 0.05 if wrap == "quantised dynamically" else 1e-5
    torch.testing.assert_close(y, whole[:, 4:], rtol=allowed, atol=allowed)
    torch.testing.assert_close(first, whole[:, :1], rtol=allowed, atol=allowed)
    assert zero.memory.dtype == torch.float32
    assert type(zero.memory) is Tensor


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_model_generates_behind_any_projection(wrap: str) -> None:
    model: Any = WRAPS[wrap](make_model())
    model = getattr(model, "_orig_mod", model)
    longer = model.generate(tokens(), 3, temperature=0)
    with torch.no_grad():
        expected = model(longer[:, :-1])[0][:, -1].argmax(-1)
    assert torch.equal(longer[:, -1], expected)


def pruned(linear: nn.Linear) -> nn.Module:
    module: nn.Module = prune.l1_unstructured(linear, "weight", 0.3)
    return module


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, pruned])
def test_weights_that_cannot_be_drawn_anew_are_refused_by_name(wrap: Any) -> None:
    model = make_model()
    wrap(model.blocks[1].mixer.k_proj)
    before = copy.deepcopy(model.state_dict())
    assert message_of(SpecError, model.reset_weights) == (
        "HybridLM: blocks.1.mixer.k_proj.weight is no parameter of floats, should be one to be "
        "drawn anew: remove what computes it from others, or dequantise it, first"
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("wrap", ["compiled", "with an adapter"])
def test_weights_behind_a_wrapper_are_drawn_as_those_without(wrap: str) -> None:
    model, wrapped = make_model(), make_model()
    for block in wrapped.blocks:
        each = {"compiled": WRAPS["compiled"], "with an adapter": Adapter}[wrap]
        block.mixer.o_proj = each(block.mixer.o_proj)
    wrapped.reset_weights()
    for block, other in zip(model.blocks, wrapped.blocks, strict=True):
        inner = next(m for m in other.mixer.o_proj.modules() if isinstance(m, nn.Linear))
        ratio = inner.weight.std().item() / block.mixer.o_proj.weight.std().item()
        assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_an_embedding_in_a_wrapper_is_refused_by_name(wrap: Any) -> None:
    model = make_model()
    model.embedding = wrap(model.embedding)
    assert message_of(SpecError, model, tokens()) == (
        f"HybridLM: embedding is a {wrap.__name__} without a weight tensor, should be a "
        f"torch.nn.Embedding: it is the output matrix too"
    )
    model.reset_weights()


def test_an_embedding_without_a_weight_is_refused_by_name() -> None:
    model = make_model()

    class Quantised(nn.Embedding):
        weight = property(lambda self: len)  # type: ignore[assignment]

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(*x.shape, WIDTH)

    model.embedding = Quantised()
    message = message_of(SpecError, model, tokens())
    assert message == (
        "HybridLM: embedding is a Quantised without a weight tensor, should be a "
        "torch.nn.Embedding: it is the output matrix too"
    )


def test_states_are_on_the_device_and_in_the_dtype_of_a_layer() -> None:
    for dtype, memory in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        state = make_layer(dtype=dtype).zero_state(3)
        assert state.conv is not None
        assert (state.conv.dtype, state.memory.dtype) == (dtype, memory)
    meta = make_layer(device="meta").zero_state(3)
    assert meta.memory.is_meta
    ring = make_model(dtype=torch.bfloat16).blocks[1].mixer.zero_state(3)
    assert (ring.keys.dtype, ring.tokens.dtype) == (torch.bfloat16, torch.int64)


# Memory without values.


def test_what_was_made_on_meta_starts_as_if_it_had_been_made_on_its_device() -> None:
    with torch.device("meta"):
        model = make_model("GA")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.reset_weights()
    expected = make_model("GA")
    for (name, drawn), like in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert drawn.isfinite().all(), name
        if name.endswith("norm.weight"):
            assert torch.equal(drawn, like)
    assert 0 < model.blocks[0].mixer.A_log.exp().amax() <= 16
    dt = nn.functional.softplus(model.blocks[0].mixer.dt_bias)
    assert 1e-3 <= dt.amin() * 1.001 <= dt.amax() <= 0.1001
    # By torch's convention, too: what has parameters of its own can draw them.
    for module in expected.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(torch.nan)
            module.reset_parameters()
            assert parameter.isfinite().all()


# Weight decay.


def emptied(layer: nn.Module) -> nn.Module:
    return layer.to("meta").to_empty(device="cpu")


def assigned(layer: nn.Module) -> nn.Module:
    other = GatedDeltaNet(WIDTH, 2, head_dim=4, conv_bias=True, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "emptied": emptied,
    "assigned": assigned,
    "in another dtype": lambda layer: layer.double(),
    "moved": lambda layer: layer.to("cpu", torch.bfloat16),
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_knows_what_takes_no_weight_decay(name: str) -> None:
    layer = COPIES[name](make_layer(conv_bias=True))
    free = parameters_without_weight_decay(layer)
    endings = {*GATES, "conv.bias", "o_norm.weight"}
    assert {ending for ending in endings for n in free if n.endswith(ending)} == endings
    assert len(free) == len(endings)
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {n for n in free if n.endswith(tuple(GATES))} == marked
    with_decay, without = optimizer_groups(layer, 0.1)
    assert len(without["params"]) == len(free)
    assert all(p.dim() > 1 for p in with_decay["params"])


def test_names_do_not_depend_on_marks() -> None:
    model = make_model()
    for parameter in model.parameters():
        vars(parameter).pop("_no_weight_decay", None)
    free = model.parameters_without_weight_decay()
    expected = {"embedding.weight", "norm.weight", *(f"blocks.0.mixer.{n}" for n in GATES)}
    assert expected <= set(free)
    assert make_layer().parameters_without_weight_decay() == [*GATES, "o_norm.weight"]
    wrapped = nn.Sequential(model)
    assert parameters_without_weight_decay(wrapped) == [f"0.{name}" for name in free]
    groups = model.parameter_groups(0.1)
    assert [len(group["params"]) for group in groups] == [
        len(list(model.parameters())) - len(free),
        len(free),
    ]


# Saved weights and states.


def test_weights_saved_by_the_names_of_the_layer_are_loaded() -> None:
    layer, other = make_layer(), GatedDeltaNet(WIDTH, 2, head_dim=4)
    older = {name.removeprefix("decay."): x for name, x in layer.state_dict().items()}
    assert {"A_log", "dt_bias"} <= older.keys()
    other.load_state_dict(older)
    assert torch.equal(other.A_log, layer.A_log)
    assert torch.equal(other.dt_bias, layer.dt_bias)
    assert "A_log" in older, "the caller's weights stay as they are"
    model, again = make_model(), make_model()
    older = {name.replace("decay.", ""): x for name, x in model.state_dict().items()}
    again.load_state_dict(older)
    with pytest.raises(RuntimeError, match=r"Missing key.*decay\.A_log"):
        other.load_state_dict({n: x for n, x in older.items() if "A_log" not in n})
    # The order of parameters is the older one, by which optimizers save what they know.
    names = [name for name, _ in layer.named_parameters()]
    assert names[:3] == [*GATES, "q_proj.weight"]


def test_a_rule_without_a_decay_has_no_gate() -> None:
    layer = make_layer(rule="delta")
    assert not hasattr(layer, "A_log")
    assert layer.decay is None
    assert layer.parameters_without_weight_decay() == ["o_norm.weight"]


COPIERS: dict[str, Callable[[Any], Any]] = {
    "torch.load": lambda state: torch.load(saved(state), weights_only=True),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def saved(state: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("copier", COPIERS)
def test_saved_states_are_read_again(copier: str) -> None:
    model = make_model()
    with torch.no_grad():
        expected, state = model(tokens())
        again = COPIERS[copier](state)
        assert [type(part) for part in again] == [State, KeyValueRing]
        for part, own in zip(again, state, strict=True):
            for x, y in zip(part, own, strict=True):
                assert torch.equal(x, y)
        more = model(tokens()[:, :1], again)[0]
        torch.testing.assert_close(more, model(tokens()[:, :1], state)[0], rtol=0, atol=0)
    # A state without a convolution, too.
    plain = COPIERS[copier](State(None, torch.ones(1, 2, 3, 4)))
    assert plain.conv is None
    assert plain.memory.eq(1).all()
    assert expected.isfinite().all()
