"""Make tiny random models of every family."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def heads(keys: int, values: int, key_width: int, value_width: int) -> dict[str, int]:
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": key_width,
        "linear_value_head_dim": value_width,
    }


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: configuration, what is not common
    "qwen3_next-2:1": ("Qwen3NextConfig", {"head_dim": 16, **EXPERTS, **heads(2, 4, 16, 16)}),
    "qwen3_next-3:1": ("Qwen3NextConfig", {"head_dim": 16, **EXPERTS, **heads(2, 6, 16, 8)}),
    "qwen3_5-3:1": ("Qwen3_5TextConfig", {"head_dim": 16, **heads(1, 3, 16, 16)}),
    "qwen3_5_moe-2:1": (
        "Qwen3_5MoeTextConfig",
        {"head_dim": 16, **EXPERTS, **heads(2, 4, 16, 16)},
    ),
    "qwen4_exp-2:1": (
        "Qwen4ExpTextConfig",
        {
            "head_dim": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 64,
            "heads_per_ngram": 2,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 4,
            "ple_layer_ids": [1, 3],
            "eos_token_id": 1,
            **EXPERTS,
            **heads(2, 4, 16, 16),
        },
    ),
    "lara_mini-2:1": ("LaraMiniConfig", {"head_dim": 16, **EXPERTS, **heads(2, 4, 16, 8)}),
    # Heads as in the 7B model, 96 and 192, by four; β in (0, 2).
    "olmo_hybrid-1:1": (
        "OlmoHybridConfig",
        {"linear_allow_neg_eigval": True, "eos_token_id": 1, **heads(3, 3, 24, 48)},
    ),
}


LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "eos_token_id": 1,
}
"""Sizes of latent attention and of the experts beside it."""

KDA_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # A decay of every key channel; the softplus gate, and twice the bounded one.
    "kimi_linear-softplus": (
        "KimiLinearConfig",
        {
            "linear_head_dim": 12,
            "linear_num_heads": 3,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            **LATENT,
            "num_hidden_layers": 6,
        },
    ),
    "glm5_next-bounded": (
        "Glm5NextTextConfig",
        {
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "n_routed_experts": 4,
            "q_lora_rank": 16,
            "index_topk": 64,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_kpool": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 5,
            **LATENT,
            "qk_rope_head_dim": 0,
        },
    ),
    "bailing_hybrid-bounded": (
        "BailingHybridConfig",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "layer_group_size": 3,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
            **LATENT,
        },
    ),
}

WITH_IMAGES: dict[str, dict[str, int]] = {
    "glm5_next-bounded": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": COMMON["hidden_size"],
        "projection_intermediate_size": 16,
    }
}
"""Families that are there as models of text and images alone, and their vision model."""

SMALL = "qwen3_5-3:1" if hasattr(transformers, "Qwen3_5ForCausalLM") else "qwen3_next-2:1"
"""A family that the installed transformers has, for tests that need only one."""


def architecture(family: str) -> str:
    return family.partition("-")[0]


@functools.cache
def model(family: str) -> Any:
    """Return the model of a family, random, in float32, in eval mode."""
    config_name, more = (FAMILIES | KDA_FAMILIES)[family]
    model_name = re.sub("(Text)?Config$", "ForCausalLM", config_name)
    if family in WITH_IMAGES:
        model_name = model_name.replace("ForCausalLM", "ForConditionalGeneration")
    if not hasattr(transformers, model_name):
        pytest.skip(f"this transformers has no {model_name}")
    torch.manual_seed(0)
    config = text = getattr(transformers, config_name)(**(COMMON | more))
    if family in WITH_IMAGES:
        whole = getattr(transformers, config_name.replace("Text", ""))
        config = whole(text_config=text, vision_config=WITH_IMAGES[family])
    tiny = getattr(transformers, model_name)(config).eval()
    # The default one has no float64.
    text_config(tiny)._experts_implementation = "eager"
    with torch.no_grad():
        # As built, logits are 0.02 wide and most greedy tokens are ties in all but name.
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return tiny


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text layers."""
    return getattr(model.config, "text_config", model.config)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, COMMON["vocab_size"], (rows, length), generator=generator)


def gradients(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return the gradient of the loss with respect to every parameter that has one."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **options).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@contextlib.contextmanager
def no_float32() -> Iterator[None]:
    """Give a model float64 wherever it asks for float32."""

    def widened(convert: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wide(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            if arguments[:1] == (torch.float32,):
                arguments = (torch.float64, *arguments[1:])
            return convert(x, *arguments, **options)

        return wide

    with pytest.MonkeyPatch.context() as patch:
        for name in ("to", "type"):
            patch.setattr(Tensor, name, widened(getattr(Tensor, name)))
        patch.setattr(Tensor, "float", Tensor.double)
        yield


@functools.cache
def exact_gradients(family: str, rows: int, length: int) -> dict[str, Tensor]:
    """Return the gradients that transformers itself computes in float64."""
    with no_float32():
        wide = copy.deepcopy(model(family)).double()
        return gradients(wide, tokens(rows, length))


def relative(computed: Tensor, expected: Tensor) -> float:
    computed, expected = computed.detach(), expected.detach()
    norm = float(expected.norm())
    # An absolute difference from zero: what is not used has no gradient.
    return float((computed - expected).norm()) / (norm or 1.0)


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return the logits of a model."""
    with torch.no_grad():
        return model(ids, **options).logits


def module_of(family: str) -> types.ModuleType:
    """Return the modeling module of a family."""
    return sys.modules[type(model(family)).__module__]


def originals(family: str) -> dict[str, Any]:
    """Return every object of a family's module and of its classes that a patch may replace."""
    module = module_of(family)
    classes = [x for x in vars(module).values() if isinstance(x, type)]
    own = [cls for cls in classes if cls.__module__ == module.__name__]
    methods = {
        f"{cls.__name__}.{n}": x for cls in own for n, x in vars(cls).items() if n[:2] != "__"
    }
    functions = {"ALL_ATTENTION_FUNCTIONS": vars(module).get("ALL_ATTENTION_FUNCTIONS")}
    return methods | functions | {name: x for name, x in vars(module).items() if callable(x)}


def calls_convolutions(family: str) -> bool:
    """Return whether layers call a function for their convolution, as from 5.15 on."""
    return callable(getattr(module_of(family), "causal_conv1d_fn", None))


def has_convolutions(family: str) -> None:
    """Skip where layers do not call a function for their convolution."""
    if not calls_convolutions(family):
        pytest.skip("layers of this transformers do not call a function causal_conv1d_fn")
