"""Plan how layers are split over devices by their heads: tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gdn_ops.spec.errors import SpecError, SpecTypeError

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def tensor_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """Return how the layers of a model are split over the devices of a mesh of one dimension.

    The plan is for `torch.distributed.tensor.parallel.parallelize_module`. Projections, gates,
    channels of the convolution and states are split by whole key heads with their value heads; the
    output projections sum over the devices, once a layer. Weights become DTensors under the names
    that they have. Inputs, outputs and states stay plain tensors: inputs and outputs are whole on
    every device, a state holds the heads of its device.

    Args:
        module: a GatedDeltaNet, SlidingWindowAttention or HybridLM of `gdn_ops.nn`, or a model with
            such layers anywhere. Any other layer with a method `tensor_plan` takes part: it returns
            the styles of its parts by name.

    Returns:
        A style for the name of every part that is split.

    Raises:
        SpecTypeError: `module` is no module.
        SpecError: no layer can be split; later, by `parallelize_module`, that heads are no multiple
            of the devices.

    Example:
        >>> from gdn_ops.nn import GatedDeltaNet
        >>> from gdn_ops.parallel import tensor_plan
        >>> plan = tensor_plan(GatedDeltaNet(64, num_heads=4))
        >>> sorted(plan)[:4]
        ['a_proj', 'b_proj', 'conv', 'decay']
    """
    if not isinstance(module, nn.Module):
        raise SpecTypeError(
            f"tensor_plan: module has type {type(module).__name__}, should be a torch.nn.Module"
        )
    plan: dict[str, ParallelStyle] = {}
    for name, part in module.named_modules():
        # Asked of the class: what wraps a layer passes on the names that the layer has.
        if hasattr(type(part), "tensor_plan"):
            prefix = f"{name}." if name else ""
            plan |= {prefix + own: style for own, style in type(part).tensor_plan(part).items()}
    if not plan:
        raise SpecError(
            f"tensor_plan: {type(module).__name__} has no layer that can be split, should have a "
            f"GatedDeltaNet, a SlidingWindowAttention or another layer with a method tensor_plan"
        )
    return plan
