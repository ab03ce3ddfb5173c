"""Make layers that hold the weights of another library's Kimi Delta Attention or Gated DeltaNet-2.

| here | Kimi Linear, GLM-5.3-Flash | Ling-3.0 | FLA, KDA and GDN-2 |
|---|---|---|---|
| `q_proj` `k_proj` `v_proj` `o_proj` `o_norm` | same names | same names | same names |
| `b_proj` | same name | same name | same name |
| `w_proj` | | | same name, of GDN-2 |
| `a_proj.0` `a_proj.1` | `forget_gate.f_a_proj` `.f_b_proj` | | `f_proj.0` `f_proj.1` |
| `a_proj` | | `forget_gate.f_proj` | |
| `g_proj.0` `g_proj.1` | `g_a_proj` `g_b_proj` | | same names |
| `g_proj` | | same name | |
| `conv.weight` | `conv1d.weight` | `conv1d.weight` | `q_conv1d` `k_conv1d` `v_conv1d` |
| `decay.A_log` `decay.dt_bias` | `forget_gate.A_log` `.dt_bias` | the same | `A_log` `dt_bias` |

GDN-2 of FLA has the decay and the erase gate of key heads; here they are of value heads, each with
a copy of the rows of its key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops.nn.kimi_delta_attention import KimiDeltaAttention
from gdn_ops.nn.sources import Source, named, with_biases


def from_transformers(source: Any, read: Source) -> KimiDeltaAttention:
    """Return the layer of a KDA layer of transformers, whose parts were recognised.

    Args:
        source: the layer.
        read: what reads it.

    Raises:
        SpecError: weights cannot be read, or would be lost.
    """
    gate = source.forget_gate
    weights = _linears(read, {f"{n}_proj": f"{n}_proj" for n in "qkvbo"})
    is_low_rank = hasattr(gate, "f_a_proj")
    of_gates = {"a_proj": "forget_gate.f_proj", "g_proj": "g_proj"}
    if is_low_rank:
        of_gates = {"a_proj.0": "forget_gate.f_a_proj", "a_proj.1": "forget_gate.f_b_proj"}
        of_gates |= {"g_proj.0": "g_a_proj", "g_proj.1": "g_b_proj"}
    weights |= _linears(read, of_gates)
    weights |= named("conv", read.convolution("conv1d"))
    weights["decay.A_log"] = read.tensor("forget_gate.A_log").reshape(-1)
    weights["decay.dt_bias"] = read.tensor("forget_gate.dt_bias")
    bound = getattr(gate, "safe_gate_lower_bound", None)
    if getattr(gate, "safe_gate", False):
        bound = gate.lower_bound
    heads, width = source.num_heads, source.head_dim
    return _filled(source, read, weights, (heads, heads, width, width), lower_bound=bound)


def from_fla(source: Any, read: Source) -> KimiDeltaAttention:
    """Return the layer of FLA's KimiDeltaAttention or GatedDeltaNet2, whose parts were recognised.

    Args:
        source: the layer.
        read: what reads it.

    Raises:
        SpecError: weights cannot be read, or would be lost.
    """
    is_apart = hasattr(source, "w_proj")
    of_gates = {f"{ours}.{i}": f"{n}.{i}" for ours, n in _FLA_GATES.items() for i in (0, 1)}
    names = {f"{n}_proj": f"{n}_proj" for n in ("qkvbow" if is_apart else "qkvbo")}
    weights = _linears(read, names | of_gates) | convolutions(source, read)
    weights["decay.A_log"] = read.tensor("A_log")
    weights["decay.dt_bias"] = read.tensor("dt_bias")
    heads, group = source.num_heads, source.num_v_heads // source.num_heads
    sizes = (heads, source.num_v_heads, source.head_k_dim, source.head_v_dim)
    if is_apart and group > 1:
        for name in ("a_proj.1.weight", "b_proj.weight", "decay.A_log", "decay.dt_bias"):
            rows = weights[name].unflatten(0, (heads, -1))
            weights[name] = rows.repeat_interleave(group, 0).flatten(0, 1)
    options = {"lower_bound": getattr(source, "lower_bound", None), "erase_write": is_apart}
    options["allow_neg_eigval"] = bool(source.allow_neg_eigval)
    return _filled(source, read, weights, sizes, **options)


_FLA_GATES = {"a_proj": "f_proj", "g_proj": "g_proj"}


def convolutions(source: Any, read: Source) -> dict[str, Tensor]:
    """Return the three convolutions of a layer of FLA as one over the channels of q, k and v."""
    if not source.use_short_conv:
        return {}
    names = [f"{n}_conv1d" for n in "qkv"]
    parts = {"conv.weight": torch.cat([read.tensor(f"{n}.weight").squeeze(1) for n in names])}
    if getattr(source, names[0]).bias is not None:
        parts["conv.bias"] = torch.cat([read.tensor(f"{n}.bias") for n in names])
    return parts


def _linears(read: Source, names: dict[str, str]) -> dict[str, Tensor]:
    """Return linear layers by the names that they have here; `names` leads to theirs."""
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        weights |= named(ours, read.linear(theirs))
    return weights


def _filled(
    source: Any,
    read: Source,
    weights: dict[str, Tensor],
    sizes: tuple[int, int, int, int],
    **options: Any,
) -> KimiDeltaAttention:
    """Return a layer of the sizes (H, HV, K, V), which holds copies of the weights."""
    weights["o_norm.weight"] = read.tensor("o_norm.weight")
    inner = weights.get("a_proj.0.weight")
    eps, gate = read.norm_eps("o_norm"), read.output_gate("o_norm")
    read.check_all_read()
    heads, value_heads, key_width, value_width = sizes
    layer = KimiDeltaAttention(
        source.hidden_size,
        heads,
        value_heads,
        key_width,
        value_width / key_width,
        short_conv=weights["conv.weight"].shape[1] if "conv.weight" in weights else 0,
        conv_bias="conv.bias" in weights,
        output_gate=gate,
        norm_eps=eps,
        gate_rank=None if inner is None else inner.shape[0],
        device="meta",
        **options,
    )
    with_biases(layer, weights)
    read.check_sizes(layer, weights)
    copies = {name: weight.clone() for name, weight in weights.items()}
    layer.load_state_dict(copies, strict=True, assign=True)
    return layer
