"""Point from the names of other libraries' layers to those of the layers here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import NoReturn

from gdn_ops.call.pointers import unknown_option
from gdn_ops.spec.errors import SpecTypeError

_BOUNDARIES = "cu_seqlens, the boundaries of sequences packed along T: 0, ..., T"
_NOT_HERE = "left out: a layer here"

OPTIONS: dict[str, str] = {
    # flash-linear-attention
    "num_v_heads": "num_value_heads",
    "safe_gate": "lower_bound, a number in [-5, 0) for the bounded gate; None for softplus",
    "use_gate": "output_gate, 'silu' or None",
    "use_short_conv": "short_conv, the kernel size; 0 for none",
    "conv_size": "short_conv",
    "mode": f"{_NOT_HERE} takes sequences and tokens alike",
    "layer_idx": f"{_NOT_HERE} has no cache; its state is an argument and a result",
    "expand_k": "head_dim",
    # transformers
    "num_attention_heads": "num_heads",
    "linear_num_key_heads": "num_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "head_dim",
    "linear_value_head_dim": "expand_v, the width of a value head over that of a key head",
    "linear_conv_kernel_dim": "short_conv",
    "linear_allow_neg_eigval": "allow_neg_eigval",
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_lower_bound": "lower_bound",
    "kda_lower_bound": "lower_bound",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "feature_map",
    "config": "hidden_size, num_heads, ...; gdn_ops.nn.from_transformers converts a layer",
    # Mamba
    "d_model": "hidden_size",
    "d_state": "head_dim",
    "d_conv": "short_conv",
    "expand": "expand_v",
    "headdim": "head_dim",
}
OPTIONS |= {
    "num_k_heads": "num_heads",
    "head_k_dim": "head_dim",
    "head_v_dim": OPTIONS["linear_value_head_dim"],
    "conv_kernel_size": "short_conv",
    "use_qk_l2norm": "qk_norm, 'l2', 'l1' or None",
    "bias": f"{_NOT_HERE} has projections without a bias; conv_bias is that of the convolution",
}
"""Explain options of other layers."""

INPUTS: dict[str, str] = {
    "attention_mask": "mask, (B, T), 0 where a token is padding",
    "past_key_values": "state",
    "cache_params": "state",
    "cache": "state",
    "use_cache": f"{_NOT_HERE} always returns its state",
    "cu_seq_lens_q": _BOUNDARIES,
    "cu_seq_lens": _BOUNDARIES,
    "seq_idx": _BOUNDARIES,
    "position_ids": _BOUNDARIES,
    "cache_position": f"{_NOT_HERE} has no positions",
    "output_attentions": f"{_NOT_HERE} has no attention weights",
}
"""Explain inputs of other layers."""


_ROWS = f"{_NOT_HERE} with attention takes whole rows of one length, without padding"
UNPADDED: dict[str, str] = INPUTS | {
    name: _ROWS
    for name in (
        *("mask", "attention_mask", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q"),
        *("seq_idx", "position_ids"),
    )
}
"""The same for layers and models that know neither padding nor packed sequences."""


MODEL_OPTIONS: dict[str, str] = OPTIONS | {
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "intermediate_size": "mlp_size",
    "hidden_ratio": "mlp_size",
    "sliding_window": "window",
    "window_size": "window",
    "num_attention_heads": "attention_heads",
    "tie_word_embeddings": "left out: the embedding is always the output matrix too",
    "layer_types": "pattern, a letter for each kind of layer",
    "config": "pattern, vocab_size, hidden_size, ...",
}
MODEL_INPUTS: dict[str, str] = UNPADDED | {
    "input_ids": "tokens",
    "inputs_embeds": "tokens; the embedding is the output matrix too",
    "labels": "left out: the loss is a function of the logits",
    "logits_to_keep": "is_last_only",
    "max_new_tokens": "count",
    "max_length": "count, how many tokens are added",
    "do_sample": "temperature, 0 for the most likely token",
    "assistant_model": "draft",
    "num_assistant_tokens": "draft_tokens",
    "prompt_lookup_num_tokens": "draft_tokens, without a draft",
}
"""The same for models."""


def own_options(kind: type) -> tuple[str, ...]:
    """Return the names of the arguments of a class."""
    parameters = inspect.signature(kind).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(p.name for p in parameters if p.kind not in variadic)


def refuse_option(
    owner: str,
    unknown: Iterable[str],
    known: Iterable[str],
    meant: Mapping[str, str] = OPTIONS,
) -> NoReturn:
    """Refuse options that a layer does not have, saying what is meant by the first of them."""
    name = next(iter(unknown))
    raise SpecTypeError(unknown_option(owner, name, known, meant))


def refuse_input(
    owner: str,
    unknown: Iterable[str],
    known: Iterable[str],
    meant: Mapping[str, str] = INPUTS,
) -> NoReturn:
    """Refuse inputs that a layer does not have, saying what is meant by the first of them."""
    name = next(iter(unknown))
    raise SpecTypeError(unknown_option(owner, name, known, meant))
