"""Tell which parameters take no weight decay, by their names and modules, not by marks on them.

Whatever copies, wraps or shards a model makes new parameters, and keeps names and modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gdn_ops.nn.gates import DecayGate
from gdn_ops.nn.values import check_module, check_numbers


def parameters_without_weight_decay(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a model that take no weight decay.

    Args:
        model: any model; also a copy, or wrapped or sharded.

    Returns:
        Names out of `model.named_parameters()`: decay gates, embeddings, biases, norms, and
        whatever else has fewer than two dimensions or carries the mark `_no_weight_decay`.

    Raises:
        SpecError: the model is no module.
    """
    check_module("parameters_without_weight_decay", model)
    kept = set()
    for module in model.modules():
        if isinstance(module, DecayGate | nn.Embedding):
            kept |= {id(parameter) for parameter in module.parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in kept
        or parameter.dim() < 2
        or getattr(parameter, "_no_weight_decay", False)
    ]


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer: with weight decay, and without.

    Args:
        model: any model; also a copy, or wrapped or sharded.
        weight_decay: of the matrices; 0 of `parameters_without_weight_decay(model)`.

    Returns:
        Two groups, for example for `torch.optim.AdamW`; parameters that are frozen are in them too.

    Raises:
        SpecError: the model is no module, or the weight decay no finite number of at least 0.
    """
    check_module("optimizer_groups", model)
    check_numbers("optimizer_groups", weight_decay=weight_decay)
    kept = set(parameters_without_weight_decay(model))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name not in kept].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
