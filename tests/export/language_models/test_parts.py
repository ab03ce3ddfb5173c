"""Export models without the rule too: the parts of a layer tell what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compat_models
import exported_models
from compat_models import transformers
from exported_models import COUNT, prompts
from gdn_ops import export
from onnx_needs import needs_ort_body

SIZES = {**compat_models.COMMON, "head_dim": 16, "eos_token_id": None}
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def windows() -> Any:
    """Return a model half of whose layers see four tokens."""
    config = transformers.Qwen3Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2
    )
    return transformers.Qwen3ForCausalLM(config)


def experts() -> Any:
    """Return a model with experts alone, whose weights are not divided by their sum."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        norm_topk_prob=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def llama(**rope: Any) -> Any:
    """Return a model with biases, and frequencies that depend on no length."""
    config = transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_parameters={**ROPE, **rope}
    )
    tiny = transformers.LlamaForCausalLM(config)
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return tiny


MODELS: dict[str, Callable[[], Any]] = {
    "windows": windows,
    "experts": experts,
    "linear": lambda: llama(rope_type="linear"),
    "yarn": lambda: llama(rope_type="yarn"),
    "llama3": lambda: llama(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("flavour", ["portable", pytest.param("onnxruntime", marks=needs_ort_body)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_long_texts_are_those_of_a_model_without_the_rule(
    name: str, flavour: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tiny = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    export.export_model(tiny, tmp_path, flavour=flavour, logits="all")
    session = export.ModelSession(tmp_path, threads=1)
    assert session.body is None
    # A text behind each prompt, and so positions far apart.
    rows = [
        [*row, *compat_models.tokens(1, COUNT, i)[0].tolist()] for i, row in enumerate(prompts())
    ]
    ids, mask = exported_models.padded(rows)
    expected = compat_models.run(tiny, ids, attention_mask=mask).numpy()
    found, _ = session.read(rows)
    is_token = mask.numpy() == 1
    assert np.abs(found - expected)[is_token].max() <= 2e-5 * np.abs(expected).max()
