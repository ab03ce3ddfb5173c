"""Make layers that hold the weights of other libraries' layers.

| here | Qwen3-Next | Qwen3.5 | OLMo-Hybrid | FLA |
|---|---|---|---|---|
| `q_proj` `k_proj` `v_proj` | `in_proj_qkvz`, interleaved by key head | `in_proj_qkv` | same names | same names |
| `g_proj` | `in_proj_qkvz` | `in_proj_z` | same name | same name |
| `b_proj` `a_proj` | `in_proj_ba`, interleaved by key head | `in_proj_b` `in_proj_a` | same names | same names |
| `conv.weight` | `conv1d.weight` | `conv1d.weight` | `conv1d.weight` | `q_conv1d`, `k_conv1d`, `v_conv1d` |
| `A_log` `dt_bias` | same names | same names | same names | same names |
| `o_norm.weight` | `norm.weight` | `norm.weight` | same name | same name |
| `o_proj` | `out_proj` | `out_proj` | same name | same name |

Those of Kimi Delta Attention and of Gated DeltaNet-2 are read in `kimi_weights`.

The layers are told apart by their attributes, so that none of those libraries is imported.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gdn_ops.nn import kimi_weights
from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.sources import Source, named, split, split_by_head, with_biases
from gdn_ops.spec.errors import SpecError

_OF_TRANSFORMERS = "Qwen3-Next, Qwen3.5, OLMo-Hybrid, Kimi Linear, GLM-5.3-Flash or Ling-3.0"
_OF_FLA = "fla.layers.GatedDeltaNet, KimiDeltaAttention or GatedDeltaNet2"


def from_transformers(layer: nn.Module) -> GatedDeltaNet:
    """Return a layer that computes what a linear-attention layer of transformers computes.

    Args:
        layer: `model.layers[i].linear_attn` of Qwen3-Next, Qwen3.5 (dense or MoE) or OLMo-Hybrid,
            or the layer of Kimi Delta Attention in Kimi Linear, GLM-5.3-Flash or Ling-3.0.

    Returns:
        A GatedDeltaNet, or KimiDeltaAttention, with copies of its weights, on its device and in its
        dtypes; projections have a bias where its own have one.

    Raises:
        SpecError: the layer is of another kind, has an activation other than SiLU, or has weights
            that cannot be read or would be lost: adapters, quantised, sharded or offloaded ones.
    """
    layer = _uncompiled(layer)
    is_kimi = hasattr(layer, "forget_gate") and hasattr(layer, "qkv_dim")
    if not hasattr(layer, "conv1d") or not (is_kimi or hasattr(layer, "num_k_heads")):
        _refuse("from_transformers", layer, _OF_TRANSFORMERS)
    source: Any = layer
    activation = getattr(layer, "activation", None)
    if activation not in ("silu", "swish"):
        raise SpecError(
            f"from_transformers: the layer's activation is {activation!r}, should be 'silu'"
        )
    read = Source("from_transformers", layer)
    if is_kimi:
        return kimi_weights.from_transformers(source, read)
    if hasattr(layer, "in_proj_qkvz"):
        projections = _interleaved(source, read)
    elif hasattr(layer, "in_proj_qkv"):
        sizes = [source.key_dim, source.key_dim, source.value_dim]
        projections = split(read.linear("in_proj_qkv"), sizes)
        projections += [read.linear(f"in_proj_{n}") for n in "zba"]
    elif hasattr(layer, "g_proj"):
        projections = [read.linear(f"{n}_proj") for n in "qkvgba"]
    else:
        _refuse("from_transformers", layer, _OF_TRANSFORMERS)
    norm = "norm" if hasattr(layer, "norm") else "o_norm"
    weights: dict[str, Tensor] = {}
    for n, pair in zip("qkvgba", projections, strict=True):
        weights |= named(f"{n}_proj", pair)
    weights |= named("conv", read.convolution("conv1d"))
    weights |= named("o_proj", read.linear("out_proj" if hasattr(layer, "out_proj") else "o_proj"))
    weights["o_norm.weight"] = read.tensor(f"{norm}.weight")
    eps, gate = read.norm_eps(norm), read.output_gate(norm)
    return _filled(source, read, source.num_k_heads, eps, weights, gate)


def from_fla(layer: nn.Module) -> GatedDeltaNet:
    """Return a layer that computes what a layer of flash-linear-attention computes.

    Args:
        layer: a GatedDeltaNet, KimiDeltaAttention or GatedDeltaNet2 of `fla.layers`.

    Returns:
        A GatedDeltaNet, or KimiDeltaAttention for the others, with copies of its weights, on its
        device and in its dtypes; projections have a bias where its own have one.

    Raises:
        SpecError: the layer is of another kind, or has weights that cannot be read or would be
            lost: adapters, quantised, sharded or offloaded ones.
    """
    layer = _uncompiled(layer)
    is_kimi = hasattr(layer, "f_proj")
    named_so = ("use_short_conv", "num_v_heads", *(() if is_kimi else ("use_gate",)))
    if not all(hasattr(layer, name) for name in named_so):
        _refuse("from_fla", layer, _OF_FLA)
    source: Any = layer
    read = Source("from_fla", layer)
    if is_kimi:
        return kimi_weights.from_fla(source, read)
    weights: dict[str, Tensor] = {}
    for n in "qkvabog" if source.use_gate else "qkvabo":
        weights |= named(f"{n}_proj", read.linear(f"{n}_proj"))
    weights["o_norm.weight"] = read.tensor("o_norm.weight")
    weights |= kimi_weights.convolutions(source, read)
    output_gate = read.output_gate("o_norm") if source.use_gate else None
    return _filled(source, read, source.num_heads, read.norm_eps("o_norm"), weights, output_gate)


def _uncompiled(layer: nn.Module) -> nn.Module:
    """Return the layer that torch.compile wrapped, or the layer itself."""
    original = getattr(layer, "_orig_mod", layer)
    return original if isinstance(original, nn.Module) else layer


def _interleaved(source: Any, read: Source) -> list[tuple[Tensor, ...]]:
    """Return the six projections of Qwen3-Next, interleaved by key head: q, k, v, z; b, a."""
    heads, group = source.num_k_heads, source.num_v_heads // source.num_k_heads
    values = group * source.head_v_dim
    sizes = [source.head_k_dim, source.head_k_dim, values, values]
    return [
        *split_by_head(read.linear("in_proj_qkvz"), heads, sizes),
        *split_by_head(read.linear("in_proj_ba"), heads, [group, group]),
    ]


def _filled(
    source: Any,
    read: Source,
    key_heads: int,
    norm_eps: float,
    weights: dict[str, Tensor],
    output_gate: str | None,
) -> GatedDeltaNet:
    """Return a GatedDeltaNet of the sizes of another layer, which holds copies of the weights."""
    weights |= {f"decay.{name}": read.tensor(name) for name in ("A_log", "dt_bias")}
    read.check_all_read()
    layer = GatedDeltaNet(
        source.hidden_size,
        key_heads,
        source.num_v_heads,
        source.head_k_dim,
        source.head_v_dim / source.head_k_dim,
        short_conv=weights["conv.weight"].shape[1] if "conv.weight" in weights else 0,
        conv_bias="conv.bias" in weights,
        output_gate=output_gate,
        norm_eps=norm_eps,
        allow_neg_eigval=bool(getattr(source, "allow_neg_eigval", False)),
        device="meta",
    )
    with_biases(layer, weights)
    read.check_sizes(layer, weights)
    copies = {name: weight.clone() for name, weight in weights.items()}
    layer.load_state_dict(copies, strict=True, assign=True)
    return layer


def _refuse(function: str, layer: nn.Module, known: str) -> None:
    raise SpecError(
        f"{function}: layer is a {type(layer).__name__}, should be the linear-attention layer of "
        f"{known}"
    )
