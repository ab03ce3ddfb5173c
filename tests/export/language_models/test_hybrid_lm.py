"""An exported HybridLM continues prompts as the model itself does, whatever its layers are."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from errors import refusal
from gdn_ops.export.language_models.layers import LayerWriter
from gdn_ops.export.language_models.plan import Decay
from gdn_ops.export.language_models.writing import export_model
from gdn_ops.export.model.folder import GRAPH
from gdn_ops.export.runtime.model_session import ModelSession
from gdn_ops.nn import HybridLM
from onnx_needs import needs_ort_body

FLAVOURS = ("portable", pytest.param("onnxruntime", marks=needs_ort_body))
VOCABULARY, HIDDEN = 97, 32
PROMPTS = ([11, 5, 60, 3, 88, 41, 7, 19, 2, 73, 30], [9], [54, 8, 71, 26])
"""Of different lengths, so that two of them are padded."""

OPTIONS: list[dict[str, Any]] = [
    {"rule": "delta"},
    {"rule": "gated"},
    {"rule": "linear"},
    {"qk_norm": "l1"},
    {"qk_norm": "l1", "feature_map": "elu"},
    {"qk_norm": "l1", "feature_map": "relu", "head_dim": 2},
    {"qk_norm": None, "feature_map": "relu", "rule": "linear"},
    {"feature_map": "none"},
    {"output_gate": "sigmoid"},
    {"output_gate": None},
    {"output_norm": False},
    {"output_norm": False, "output_gate": "sigmoid"},
    {"output_norm": False, "output_gate": None, "rule": "delta"},
    {"short_conv": 0},
    {"short_conv": 0, "feature_map": "elu"},
    {"short_conv": 1},
    {"short_conv": 1, "conv_bias": True},
    {"short_conv": 2, "conv_bias": True},
    {"short_conv": 7},
    {"conv_bias": True, "feature_map": "elu", "rule": "gated"},
    {"conv_bias": True, "feature_map": "none", "rule": "linear"},
    {"allow_neg_eigval": True},
    {"expand_v": 0.5},
    {"num_value_heads": 6},
    {"num_heads": 1, "head_dim": 20, "attention_heads": 4},
    {"mlp_size": 0},
    {"norm_eps": 0.1},
    {"lower_bound": -5.0},
    {"gate_rank": 4},
    {"gate_rank": 4, "rule": "delta", "output_norm": False},
    {"gate_rank": 3, "output_gate": None},
    {"channel_decay": True},
    {"channel_decay": True, "lower_bound": -2.0, "num_value_heads": 4},
    {"channel_decay": True, "rule": "gated", "conv_bias": True, "gate_rank": 5},
    {"channel_decay": True, "head_dim": 1, "expand_v": 4.0, "qk_norm": None},
]


def model(pattern: str, **options: Any) -> HybridLM:
    """Return a small random model whose logits are far from flat."""
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "window": 16, "mlp_size": 48} | options
    made = HybridLM(pattern, VOCABULARY, HIDDEN, **sizes)
    scale_up(made)
    return made


@torch.no_grad()
def scale_up(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
        else:
            parameter.add_(torch.randn_like(parameter) / 4)


def session(made: HybridLM, folder: Path, **options: Any) -> ModelSession:
    return ModelSession(export_model(made, folder / "model", **options))


@functools.cache
def continuations(pattern: str, count: int, **options: Any) -> list[list[int]]:
    """Return greedy tokens behind each of the prompts, by the model itself."""
    made = model(pattern, **options)
    return [greedy(made, prompt, count) for prompt in PROMPTS]


def greedy(made: HybridLM, prompt: list[int], count: int) -> list[int]:
    whole = made.generate(torch.tensor([prompt]), count, temperature=0)
    added: list[int] = whole[0, len(prompt) :].tolist()
    return added


@torch.no_grad()
def logits_of(made: HybridLM, tokens: list[int]) -> Tensor:
    logits: Tensor = made(torch.tensor([tokens]))[0][0]
    return logits


def error(found: Any, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    exact = expected.float().numpy()
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("pattern", ["G", "GA", "MGA", "A", "KKA", "GK"])
def test_greedy_tokens_are_those_of_the_model(pattern: str, flavour: str, tmp_path: Path) -> None:
    made = model(pattern, num_layers=4)
    expected = continuations(pattern, 48, num_layers=4)
    assert min(len(set(row)) for row in expected) > 8
    exported = session(made, tmp_path, flavour=flavour)
    assert exported.generate(PROMPTS[0], 48) == expected[0]
    assert exported.generate(PROMPTS, 48) == expected


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_computes_what_the_model_computes(
    options: dict[str, Any], flavour: str, tmp_path: Path
) -> None:
    made = model("GA", **options)
    exported = session(made, tmp_path, flavour=flavour)
    assert_computes(made, exported)
    assert exported.generate(PROMPTS, 16) == continuations("GA", 16, **options)


def assert_computes(made: HybridLM, exported: ModelSession) -> None:
    """Check logits of a padded batch and behind it, and its states."""
    logits, state = exported.read(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert error(logits[row], logits_of(made, prompt)[-1]) < 2e-5
        alone = exported.read(prompt)[1]
        for name, values in state.values.items():
            if name.endswith("_state"):
                np.testing.assert_allclose(values[row], alone.values[name][0], atol=1e-5)
    more = [[1, 2, 3]] * len(PROMPTS)
    logits, _ = exported.read(more, state)
    for row, prompt in enumerate(PROMPTS):
        assert error(logits[row], logits_of(made, [*prompt, 1, 2, 3])[-1]) < 2e-5


@pytest.mark.parametrize(
    "options", [{}, {"short_conv": 0}, {"short_conv": 1}, {"short_conv": 1, "conv_bias": True}]
)
def test_projections_with_a_bias_let_no_padding_in(options: Any, tmp_path: Path) -> None:
    made = model("GAK", **options)
    for block in made.blocks:
        for own in block.mixer.modules():
            if isinstance(own, nn.Linear):
                own.bias = nn.Parameter(torch.randn(own.out_features))
    assert_computes(made, session(made, tmp_path))


@pytest.mark.parametrize("window", [1, 5])
def test_attention_sees_no_more_than_its_window(window: int, tmp_path: Path) -> None:
    made, other = model("AGA", window=window), model("AGA", window=window + 1)
    text = torch.arange(0, 80, 2).tolist()
    expected = logits_of(made, text)
    exported = session(made, tmp_path, logits="all")
    at_once, _ = exported.read(text)
    assert error(at_once[0], expected) < 2e-5
    start, state = exported.read(text[:30])
    parts = [start]
    for token in text[30:]:
        found, state = exported.read([token], state)
        parts.append(found)
    assert error(np.concatenate(parts, 1)[0], expected) < 2e-5
    assert error(at_once[0], logits_of(other, text)) > 1e-2


def test_a_state_is_continued_in_two_ways_and_stays_what_it_was(tmp_path: Path) -> None:
    made = model("MGA", window=6)
    exported = session(made, tmp_path)
    beginning = list(PROMPTS[0])
    _, state = exported.read(beginning)
    kept = {name: values.copy() for name, values in state.values.items()}
    both = exported.generate([[4, 5], [70, 6]], 24, state=state.select([0, 0]))
    assert both == [greedy(made, [*beginning, *more], 24) for more in ([4, 5], [70, 6])]
    assert both[0] != both[1]
    assert exported.generate([4, 5], 24, state=state) == both[0]
    for name, values in state.values.items():
        assert np.array_equal(values, kept[name])


def test_layers_have_only_the_states_that_they_need(tmp_path: Path) -> None:
    states = session(model("MGA", short_conv=0), tmp_path).folder.states
    assert list(states) == [
        "past_key_values.0.recurrent_state",
        "past_key_values.1.recurrent_state",
        "past_key_values.2.key",
        "past_key_values.2.value",
    ]
    convolved = session(model("G", short_conv=3), tmp_path).folder.states
    assert convolved["past_key_values.0.conv_state"] == "present.0.conv_state"


def test_the_embedding_is_written_once(tmp_path: Path) -> None:
    folder = export_model(model("G"), tmp_path / "model")
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    sizes = [tuple(x.dims) for x in graph.initializer]
    assert sizes.count((VOCABULARY, HIDDEN)) == 1
    assert (HIDDEN, VOCABULARY) not in sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_is_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    made = model("GA").to(dtype)
    exported = session(made, tmp_path)
    assert error(exported.read(PROMPTS[0])[0], logits_of(made.float(), PROMPTS[0])[-1]) < 2e-5


def test_a_compiled_model_is_exported_as_the_model_inside(tmp_path: Path) -> None:
    made = model("GA")
    folder = export_model(torch.compile(made, backend="eager"), tmp_path / "model")
    assert ModelSession(folder).generate(PROMPTS[0], 8) == greedy(made, PROMPTS[0], 8)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_mixer(made: HybridLM) -> None:
    made.blocks[1].mixer = nn.Identity()


def with_block(made: HybridLM) -> None:
    made.blocks[0] = nn.Sequential(made.blocks[0])


def with_norm(made: HybridLM) -> None:
    made.norm = nn.LayerNorm(HIDDEN)


def with_head_norm(made: HybridLM) -> None:
    made.blocks[0].mixer.o_norm = nn.RMSNorm(24)


def with_norm_without_weight(made: HybridLM) -> None:
    made.blocks[0].mlp_norm = nn.RMSNorm(HIDDEN, 1e-5, elementwise_affine=False)


def with_adapter(made: HybridLM) -> None:
    made.blocks[0].mixer.v_proj = Doubled(HIDDEN, 48)


def with_mlp(made: HybridLM) -> None:
    made.blocks[1].mlp = nn.Sequential()


def with_activation(made: HybridLM) -> None:
    made.blocks[0].mixer.conv.activation = "silu"


def with_parameter(made: HybridLM) -> None:
    made.blocks[0].mixer.extra = nn.Parameter(torch.zeros(3))


def with_a_third_part(made: HybridLM) -> None:
    made.blocks[0].mixer.a_proj = nn.Sequential(*(nn.Linear(n, 2) for n in (HIDDEN, 2, 2)))


def without_weights(made: HybridLM) -> None:
    made.to("meta")


REFUSED: dict[Callable[[HybridLM], None], str] = {
    with_mixer: "blocks.1.mixer is a Identity, should be a GatedDeltaNet or "
    "SlidingWindowAttention: it has no ONNX form",
    with_block: "blocks.0 is a Sequential, should be a Block: it has no ONNX form",
    with_norm: "norm is a LayerNorm, should be a RMSNorm: it has no ONNX form",
    with_head_norm: "blocks.0.mixer.o_norm is a RMSNorm, should be a GatedRMSNorm: it has no ONNX "
    "form",
    with_norm_without_weight: "blocks.0.mlp_norm.weight is a NoneType, should be a parameter",
    with_adapter: "blocks.0.mixer.v_proj is a Doubled, should be a torch.nn.Linear: merge adapters "
    "into the model first, with peft model.merge_and_unload(), and dequantise it",
    with_mlp: "blocks.1.mlp is a Sequential, should be a SwiGLU: it has no ONNX form",
    with_activation: "blocks.0.mixer.conv.activation is 'silu', should be None: the feature map "
    "follows the convolution",
    with_parameter: "nothing in the graph would read blocks.0.mixer.extra of HybridLM: the part "
    "that it belongs to has no ONNX form",
    with_a_third_part: "blocks.0.mixer.a_proj has 3 parts, should have 2: it has no ONNX form",
    without_weights: "embedding.weight is on the device meta, should be loaded: weights that are "
    "offloaded or not loaded yet have no values",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_part_without_a_form_is_named(change: Callable[[HybridLM], None], tmp_path: Path) -> None:
    made = model("GA")
    change(made)
    folder = tmp_path / "model"
    assert refusal(export_model, made, folder) == f"export_model: {REFUSED[change]}"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"channel_decay": False}], ids=str)
def test_gates_that_erase_and_write_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    made = model("KE", **options)
    assert refusal(export_model, made, tmp_path / "model") == (
        "export_model: blocks.1.mixer has erase_write = True, should have False: "
        "gdn_ops::GatedDelta has one strength, beta, and no erase or write"
    )
    assert not any(tmp_path.iterdir())


def without_a_bound(decay: Decay) -> Decay:
    return dataclasses.replace(decay, lower_bound=None)


def with_a_decay_for_all_channels(decay: Decay) -> Decay:
    return dataclasses.replace(decay, bias=decay.bias.mean().expand_as(decay.bias))


@pytest.mark.parametrize("change", [without_a_bound, with_a_decay_for_all_channels])
def test_a_decay_that_is_written_wrong_is_refused(
    change: Callable[[Decay], Decay], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LayerWriter._log_alpha
    monkeypatch.setattr(LayerWriter, "_log_alpha", lambda self, d, a: right(self, change(d), a))
    text = refusal(export_model, model("K", lower_bound=-2.0), tmp_path / "model")
    assert text.startswith("export_model: the graph of HybridLM computes other logits than the")


@needs_ort_body
def test_the_narrow_projections_are_quantised_too(tmp_path: Path) -> None:
    made = model("K", gate_rank=4)
    quantised = session(made, tmp_path, flavour="onnxruntime", weights="int8")
    assert 0 < quantised.folder.error < 0.05
    assert error(quantised.read(PROMPTS[0])[0], logits_of(made, PROMPTS[0])[-1]) < 0.05


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    made = model("GA")
    made.blocks[0].register_forward_hook(lambda block, given, made: (1.1 * made[0], made[1]))
    text = refusal(export_model, made, tmp_path / "model")
    assert re.sub(r"off by [\d.]+ ", "off by X ", text) == (
        "export_model: the graph of HybridLM computes other logits than the model, off by X of the "
        "largest, should be within 0.001: one of its parts is not what it looks like"
    )
    assert not any(tmp_path.iterdir())
