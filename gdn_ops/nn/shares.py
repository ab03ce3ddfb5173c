"""Compute with the share of a layer that one of several devices has, under tensor parallelism.

A layer that was split over a mesh keeps its weights as DTensors and mixes plain tensors of its own
heads; only projections see DTensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.call.subclasses import is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle


class Splittable(nn.Module):
    """Tell how a layer is split over devices, and know the mesh over which it was.

    Attributes:
        columns: names of projections whose results are split.
        rows: name of the projection that sums over the devices, or none.
        whole: names of parts that every device has, applied to what every device has.
        vocabulary: name of the embedding, split by tokens, or none.
        tensor_mesh: the mesh of one dimension, or None.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[str] = ""
    whole: ClassVar[tuple[str, ...]] = ()
    vocabulary: ClassVar[str] = ""
    tensor_mesh: DeviceMesh | None = None

    def split_sizes(self) -> dict[str, int]:
        """Return what should be a multiple of the devices, by name."""
        return {}

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Return how its own parts are split over devices, for `gdn_ops.parallel.tensor_plan`."""
        from gdn_ops.nn import tensor_styles  # imports torch.distributed.tensor

        return tensor_styles.plan_of(self)

    @property
    def shards(self) -> int:
        """Return over how many devices the heads are split."""
        return 1 if self.tensor_mesh is None else self.tensor_mesh.size()


def entering(layer: Splittable, x: Tensor) -> Tensor:
    """Return an input that every device has, as the projections of a layer take it.

    It enters once, so that its gradient is summed over the devices once.
    """
    if layer.tensor_mesh is None or is_distributed(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, layer.tensor_mesh, [Replicate()], run_check=False)


def share(parameter: Any, x: Tensor) -> Any:
    """Return a parameter as a device applies it to its own heads.

    The gradient of a parameter that every device has whole is summed over them.

    Args:
        parameter: a plain one, which is returned, a DTensor, or None.
        x: what it is applied to.
    """
    if not is_distributed(parameter) or is_distributed(x):
        return parameter
    from torch.distributed.tensor import Partial, Replicate

    lies = parameter.placements
    shares = [Partial() if isinstance(place, Replicate) else place for place in lies]
    return parameter.redistribute(placements=lies).to_local(grad_placements=shares)


def over_vocabulary(x: Tensor, weight: Any) -> Tensor:
    """Return the logits of hidden vectors that every device has, also where the weight is split.

    Args:
        x: (..., hidden_size).
        weight: (vocab_size, hidden_size), plain or a DTensor.

    Returns:
        (..., vocab_size), whole on every device.
    """
    if not is_distributed(weight) or is_distributed(x):
        return functional.linear(x, weight)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    whole = [Replicate()] * mesh.ndim
    x = DTensor.from_local(x, mesh, whole, run_check=False)
    logits: Any = functional.linear(x, weight)
    y: Tensor = logits.redistribute(placements=whole).to_local()
    return y
