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

The layers are told apart by their attributes, so that none of those libraries is imported.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.spec.errors import SpecError


def from_transformers(layer: nn.Module) -> GatedDeltaNet:
    """Return a layer that computes what a linear-attention layer of transformers computes.

    Args:
        layer: `model.layers[i].linear_attn` of Qwen3-Next, Qwen3.5 (dense or MoE) or OLMo-Hybrid.

    Returns:
        A GatedDeltaNet with copies of its weights, on its device and in its dtypes.

    Raises:
        SpecError: the layer is of another kind, or has an activation other than SiLU.
    """
    if not hasattr(layer, "conv1d") or not hasattr(layer, "num_k_heads"):
        _refuse("from_transformers", layer, "Qwen3-Next, Qwen3.5 or OLMo-Hybrid")
    source: Any = layer
    if source.activation not in ("silu", "swish"):
        raise SpecError(
            f"from_transformers: the layer's activation is {source.activation!r}, should be 'silu'"
        )
    if hasattr(layer, "in_proj_qkvz"):
        projections = _interleaved(source)
    elif hasattr(layer, "in_proj_qkv"):
        sizes = [source.key_dim, source.key_dim, source.value_dim]
        others = (source.in_proj_z, source.in_proj_b, source.in_proj_a)
        projections = [*source.in_proj_qkv.weight.split(sizes), *(p.weight for p in others)]
    elif hasattr(layer, "g_proj"):
        projections = [getattr(source, f"{name}_proj").weight for name in "qkvgba"]
    else:
        _refuse("from_transformers", layer, "Qwen3-Next, Qwen3.5 or OLMo-Hybrid")
    norm = source.norm if hasattr(layer, "norm") else source.o_norm
    output = source.out_proj if hasattr(layer, "out_proj") else source.o_proj
    weights = {f"{n}_proj.weight": w for n, w in zip("qkvgba", projections, strict=True)}
    weights |= {
        "conv.weight": source.conv1d.weight.squeeze(1),
        "A_log": source.A_log,
        "dt_bias": source.dt_bias,
        "o_norm.weight": norm.weight,
        "o_proj.weight": output.weight,
    }
    if source.conv1d.bias is not None:
        weights["conv.bias"] = source.conv1d.bias
    return _filled(source, source.num_k_heads, norm, weights)


def from_fla(layer: nn.Module) -> GatedDeltaNet:
    """Return a layer that computes what `fla.layers.GatedDeltaNet` computes.

    Args:
        layer: the layer.

    Returns:
        A GatedDeltaNet with copies of its weights, on its device and in its dtypes.

    Raises:
        SpecError: the layer is of another kind.
    """
    if not all(hasattr(layer, name) for name in ("use_short_conv", "use_gate", "num_v_heads")):
        _refuse("from_fla", layer, "fla.layers.GatedDeltaNet")
    source: Any = layer
    names = ["q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "o_proj", "o_norm"]
    if source.use_gate:
        names.append("g_proj")
    weights = {f"{name}.weight": getattr(source, name).weight for name in names}
    weights |= {"A_log": source.A_log, "dt_bias": source.dt_bias}
    if source.use_short_conv:
        convolutions = [getattr(source, f"{name}_conv1d") for name in "qkv"]
        weights["conv.weight"] = torch.cat([c.weight.squeeze(1) for c in convolutions])
        if convolutions[0].bias is not None:
            weights["conv.bias"] = torch.cat([c.bias for c in convolutions])
    activation = getattr(source.o_norm, "activation", "swish")
    output_gate = {"swish": "silu"}.get(activation, activation) if source.use_gate else None
    return _filled(source, source.num_heads, source.o_norm, weights, output_gate)


def _interleaved(source: Any) -> list[Tensor]:
    """Return the six projections of Qwen3-Next, interleaved by key head: q, k, v, z; b, a."""
    heads, group = source.num_k_heads, source.num_v_heads // source.num_k_heads
    values = group * source.head_v_dim
    sizes = [source.head_k_dim, source.head_k_dim, values, values]
    weights = [
        *source.in_proj_qkvz.weight.unflatten(0, (heads, -1)).split(sizes, 1),
        *source.in_proj_ba.weight.unflatten(0, (heads, -1)).split([group, group], 1),
    ]
    return [weight.flatten(0, 1) for weight in weights]


def _filled(
    source: Any,
    key_heads: int,
    norm: Any,
    weights: dict[str, Tensor],
    output_gate: str | None = "silu",
) -> GatedDeltaNet:
    """Return a GatedDeltaNet of the sizes of another layer, which holds copies of the weights."""
    layer = GatedDeltaNet(
        source.hidden_size,
        key_heads,
        source.num_v_heads,
        source.head_k_dim,
        source.head_v_dim / source.head_k_dim,
        short_conv=weights["conv.weight"].shape[1] if "conv.weight" in weights else 0,
        conv_bias="conv.bias" in weights,
        output_gate=output_gate,
        norm_eps=float(getattr(norm, "variance_epsilon", None) or norm.eps),
        allow_neg_eigval=bool(getattr(source, "allow_neg_eigval", False)),
        device="meta",
    )
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    layer.load_state_dict(copies, strict=True, assign=True)
    return layer


def _refuse(function: str, layer: nn.Module, known: str) -> None:
    raise SpecError(
        f"{function}: layer is a {type(layer).__name__}, should be the linear-attention layer of "
        f"{known}"
    )
