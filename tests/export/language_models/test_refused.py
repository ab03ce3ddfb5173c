"""Name what has no ONNX form, and write nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compat_models
import exported_models
from errors import message_of, refusal
from exported_models import exported
from gdn_ops import SpecTypeError, export
from gdn_ops.export.language_models import reading

FAMILY = "qwen3_5-3:1"

OF_CHANNELS = (
    "a whole model of transformers with it has no ONNX form; gdn_ops.nn.HybridLM has one, and "
    "export_decode takes a module that passes such a decay to gated_delta_step"
)


@pytest.fixture
def tiny() -> Any:
    """Return a model that a test may change."""
    return copy.deepcopy(exported_models.model(FAMILY))


def test_a_family_with_parts_of_its_own_is_refused(tmp_path: Path) -> None:
    other = compat_models.model("qwen4_exp-2:1")
    assert refusal(export.export_model, other, tmp_path / "new") == (
        "export_model: Qwen4ExpForCausalLM has no model.norm: it has no ONNX form"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_a_family_of_kimi_delta_attention_is_refused(name: str, tmp_path: Path) -> None:
    transformers = compat_models.transformers
    if name not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "linear_num_heads": 2}
    widths = dict.fromkeys(
        ("intermediate_size", "linear_head_dim", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"),
        16,
    )
    config = transformers.AutoConfig.for_model(
        name, **sizes, **widths, qk_rope_head_dim=8, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, mlp_layer_types=["dense", "dense"], first_k_dense_replace=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    kind = type(model.model.layers[0].self_attn).__name__
    assert refusal(export.export_model, model, tmp_path / "new") == (
        f"export_model: model.layers.0.self_attn ({kind}) has forget_gate, a decay of every key "
        f"channel: {OF_CHANNELS}"
    )
    assert list(tmp_path.iterdir()) == []


def gelu(tiny: Any) -> None:
    tiny.model.layers[1].mlp.act_fn = torch.nn.GELU()


def relu_in_the_rule(tiny: Any) -> None:
    tiny.model.layers[0].linear_attn.activation = "relu"


def layer_norm(tiny: Any) -> None:
    tiny.model.layers[0].input_layernorm = torch.nn.LayerNorm(32)


def no_norm(tiny: Any) -> None:
    tiny.model.norm = torch.nn.Identity()


def own_parameter(tiny: Any) -> None:
    tiny.model.layers[3].self_attn.sinks = torch.nn.Parameter(torch.zeros(2))


def dynamic(tiny: Any) -> None:
    tiny.model.rotary_emb.rope_type = "dynamic"


def biased_head(tiny: Any) -> None:
    tiny.lm_head.bias = torch.nn.Parameter(torch.zeros(97))


def adapted(tiny: Any) -> None:
    tiny.model.layers[0].linear_attn.out_proj = torch.nn.Sequential(torch.nn.Linear(48, 32))


def no_mixer(tiny: Any) -> None:
    del tiny.model.layers[2].linear_attn


def no_keys(tiny: Any) -> None:
    del tiny.model.layers[3].self_attn.k_proj


def no_layers(tiny: Any) -> None:
    del tiny.model.layers


def no_scale(tiny: Any) -> None:
    del tiny.model.layers[3].self_attn.scaling


def decay_of_channels(tiny: Any) -> None:
    tiny.model.layers[1].linear_attn.f_proj = torch.nn.Linear(32, 32)


CHANGED: dict[str, Callable[[Any], None]] = {
    "model.layers.1.mlp (Qwen3_5MLP) has the activation GELU(approximate='none'), should have "
    "silu": gelu,
    "model.layers.0.linear_attn (Qwen3_5GatedDeltaNet) has the activation relu, should have "
    "silu": relu_in_the_rule,
    "model.layers.0.input_layernorm (LayerNorm) is no RMS norm: it has no ONNX form": layer_norm,
    "model.norm (Identity) is no RMS norm with a weight: it has no ONNX form": no_norm,
    "nothing in the graph would read model.layers.3.self_attn.sinks of Qwen3_5ForCausalLM: the "
    "part that it belongs to has no ONNX form": own_parameter,
    "model.rotary_emb (Qwen3_5TextRotaryEmbedding) has rope_type 'dynamic', should be one of "
    "default, linear, llama3, yarn: others depend on the length of the text": dynamic,
    "lm_head has a bias, should have none": biased_head,
    "model.layers.0.linear_attn.out_proj (Sequential) should be a torch.nn.Linear: it has no ONNX "
    "form": adapted,
    "model.layers.2 (Qwen3_5DecoderLayer) has no linear_attn and no self_attn: it has no ONNX "
    "form": no_mixer,
    "model.layers.3.self_attn (Qwen3_5Attention) has no k_proj: it has no ONNX form": no_keys,
    "model.layers.3.self_attn (Qwen3_5Attention) has no scaling: it has no ONNX form": no_scale,
    "model.layers.1.linear_attn (Qwen3_5GatedDeltaNet) has f_proj, a decay of every key "
    f"channel: {OF_CHANNELS}": decay_of_channels,
    "Qwen3_5ForCausalLM has no model.layers and lm_head, should be a causal language model of "
    "transformers": no_layers,
}


@pytest.mark.parametrize("text", CHANGED)
def test_a_part_without_onnx_form_is_named(
    text: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGED[text](tiny)
    # Some of these models do not run any more; which parts are rotated is known here.
    rotated = {id(x) for x in tiny.modules() if type(x).__name__ == "Qwen3_5Attention"}
    monkeypatch.setattr(reading, "_given_positions", lambda _: rotated)
    assert refusal(export.export_model, tiny, tmp_path / "new") == f"export_model: {text}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "kind"), [(None, "NoneType"), ("Qwen3.5-0.8B", "str"), ({}, "dict")]
)
def test_what_is_no_model_is_refused_by_its_type(model: Any, kind: str, tmp_path: Path) -> None:
    assert message_of(SpecTypeError, export.export_model, model, tmp_path / "new") == (
        f"export_model: model has type {kind}, should be a causal language model of transformers"
    )


def test_a_model_that_computes_more_than_its_parts_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.lm_head.register_forward_hook(lambda module, inputs, logits: 5 * torch.tanh(logits / 5))
    text = refusal(export.export_model, tiny, tmp_path / "new")
    found = re.fullmatch(
        r"export_model: the graph of Qwen3_5ForCausalLM computes other logits than the model, off "
        r"by (\S+) of the largest, should be within 0\.001: one of its parts is not what it looks "
        r"like",
        text,
    )
    assert found, text
    assert float(found[1]) > 1e-3
    assert list(tmp_path.iterdir()) == []


def test_a_refused_model_leaves_the_one_that_was_there(tiny: Any, tmp_path: Path) -> None:
    folder = export.export_model(tiny, tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    gelu(tiny)
    refusal(export.export_model, tiny, tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"flavour": "ort"}, "flavour is 'ort', should be one of portable, onnxruntime"),
        ({"flavour": None}, "flavour is None, should be one of portable, onnxruntime"),
        ({"weights": "int3"}, "weights is 'int3', should be one of float32, int8, int4"),
        ({"logits": "none"}, "logits is 'none', should be one of last, all"),
        ({"opset": 17}, "opset is 17, should be at least 18"),
        ({"opset": "21"}, "opset has type str, should be an integer"),
    ],
)
def test_an_option_that_is_not_there_is_refused(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    tiny = exported_models.model(FAMILY)
    assert refusal(export.export_model, tiny, tmp_path / "new", **options) == (
        f"export_model: {text}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    assert refusal(export.export_model, exported_models.model(FAMILY), path) == (
        f"export_model: folder is {str(path)!r}, which is a file"
    )
    assert path.read_text() == "mine"


def test_what_an_earlier_export_left_does_not_stay(tmp_path: Path) -> None:
    tiny = exported_models.model(FAMILY)
    export.export_model(tiny, tmp_path, flavour="onnxruntime")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    export.export_model(tiny, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gdn_ops.json", "model.onnx", "model.onnx.data", "notes.txt",
    ]  # fmt: skip
    assert export.ModelSession(tmp_path).tokenizer is None


def test_a_model_in_training_goes_on_training(tiny: Any, tmp_path: Path) -> None:
    tiny.train()
    export.export_model(tiny, tmp_path)
    assert tiny.training
    written = (tmp_path / "model.onnx.data").read_bytes()
    assert written == (exported(FAMILY) / "model.onnx.data").read_bytes()
