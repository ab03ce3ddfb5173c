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
        names = ("q_proj", "k_proj", "v_proj")
        projections = dict(zip(names, source.in_proj_qkv.weight.split(sizes), strict=True))
        for name in ("a", "b"):
            projections[f"{name}_proj"] = getattr(source, f"in_proj_{name}").weight
        projections["g_proj"] = source.in_proj_z.weight
    elif hasattr(layer, "g_proj"):
        projections = {f"{n}_proj": getattr(source, f"{n}_proj").weight for n in "qkvabg"}
    else:
        _refuse("from_transformers", layer, "Qwen3-Next, Qwen3.5 or OLMo-Hybrid")
    norm = source.norm if hasattr(layer, "norm") else source.o_norm
    output = source.out_proj if hasattr(layer, "out_proj") else source.o_proj
    weights = {f"{name}.weight": weight for name, weight in projections.items()}
    weights |= {
        "conv.weight": source.conv1d.weight.squeeze(1),
        "A_log": source.A_log,
        "dt_bias": source.dt_bias,
        "o_norm.weight": norm.weight,
        "o_proj.weight": output.weight,
    }
    if source.conv1d.bias is not None:
        weights["conv.bias"] = source.conv1d.bias
    return _filled(
        weights,
        source.hidden_size,
        source.num_k_heads,
        source.num_v_heads,
        source.head_k_dim,
        source.head_v_dim / source.head_k_dim,
        short_conv=source.conv1d.kernel_size[0],
        conv_bias=source.conv1d.bias is not None,
        norm_eps=_epsilon(norm),
        allow_neg_eigval=bool(getattr(source, "allow_neg_eigval", False)),
    )


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
    kernel, has_bias = 0, False
    if source.use_short_conv:
        convolutions = [getattr(source, f"{name}_conv1d") for name in "qkv"]
        weights["conv.weight"] = torch.cat([c.weight.squeeze(1) for c in convolutions])
        kernel, has_bias = weights["conv.weight"].shape[1], convolutions[0].bias is not None
        if has_bias:
            weights["conv.bias"] = torch.cat([c.bias for c in convolutions])
    activation = getattr(source.o_norm, "activation", "swish")
    return _filled(
        weights,
        source.hidden_size,
        source.num_heads,
        source.num_v_heads,
        source.head_k_dim,
        source.head_v_dim / source.head_k_dim,
        short_conv=kernel,
        conv_bias=has_bias,
        output_gate={"swish": "silu"}.get(activation, activation) if source.use_gate else None,
        norm_eps=_epsilon(source.o_norm),
        allow_neg_eigval=source.allow_neg_eigval,
    )


def _interleaved(source: Any) -> dict[str, Tensor]:
    """Split the interleaved projections of Qwen3-Next: per key head q, k, v and z; b and a."""
    heads, group = source.num_k_heads, source.num_v_heads // source.num_k_heads
    values = group * source.head_v_dim
    sizes = [source.head_k_dim, source.head_k_dim, values, values]
    found = dict(
        zip(
            "qkvg",
            source.in_proj_qkvz.weight.unflatten(0, (heads, -1)).split(sizes, 1),
            strict=True,
        )
    )
    gates = source.in_proj_ba.weight.unflatten(0, (heads, -1)).split([group, group], 1)
    found |= dict(zip("ba", gates, strict=True))
    return {f"{name}_proj": weight.flatten(0, 1) for name, weight in found.items()}


def _filled(weights: dict[str, Tensor], *sizes: Any, **options: Any) -> GatedDeltaNet:
    """Return a GatedDeltaNet that holds copies of the weights."""
    layer = GatedDeltaNet(*sizes, **options, device="meta")
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    layer.load_state_dict(copies, strict=True, assign=True)
    layer.mark_weight_decay()
    return layer


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _refuse(function: str, layer: nn.Module, known: str) -> None:
    raise SpecError(
        f"{function}: layer is a {type(layer).__name__}, should be the linear-attention layer of "
        f"{known}"
    )
