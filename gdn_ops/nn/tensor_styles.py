"""Define how the parts of layers are split over devices, for `parallelize_module` of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from gdn_ops.nn.convolution import ShortConvolution
from gdn_ops.nn.gates import DecayGate
from gdn_ops.nn.shares import Splittable
from gdn_ops.spec.errors import SpecError


def distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make the own parameters of a module DTensors."""
    for name, x in module.named_parameters(recurse=False):
        whole = distribute_tensor(x.detach(), mesh, [placement])
        module.register_parameter(name, nn.Parameter(whole, requires_grad=x.requires_grad))


class Copies(ParallelStyle):
    """Keep a module whole on every device, applied to what every device has."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            return (x, *others)

        def leave(_: nn.Module, inputs: Any, y: Any) -> Tensor:
            local: Tensor = y.to_local()
            return local

        distribute(module, device_mesh, Replicate())
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class Gate(ParallelStyle):
    """Split the parameters of a decay gate by value heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, DecayGate)
        distribute(module, device_mesh, Shard(0))
        module.mark()
        return module


class HeadNorm(ParallelStyle):
    """Apply a norm per head to the heads of a device; its weight is whole on every one."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, Replicate())
        return module


class Channels(ParallelStyle):
    """Convolve the channels of a device's heads.

    The few numbers of the kernel are whole on every device, in the order in which they are saved.

    Args:
        widths: how many channels q, k and v have.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = widths

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ShortConvolution)
        distribute(module, device_mesh, Replicate())
        rank, shards = device_mesh.get_local_rank(), device_mesh.size()
        module.own_channels, start = [], 0
        for width in self.widths:
            each = width // shards
            first = start + rank * each
            module.own_channels.append(slice(first, first + each))
            start += width
        module.channels //= shards
        return module


def low_rank(name: str) -> dict[str, ParallelStyle]:
    """Return how a projection of two matrices is split: the first is whole, the second by rows.

    Args:
        name: of the projection, an `nn.Sequential`.
    """
    return {f"{name}.0": Copies(), f"{name}.1": ColwiseParallel()}


class Output(RowwiseParallel):
    """Sum the output projections of the devices, and tell the layer around that it is split.

    Args:
        layer: the layer around.
    """

    def __init__(self, layer: Splittable) -> None:
        super().__init__()
        self.layer = layer

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shards = device_mesh.size()
        for name, size in self.layer.split_sizes().items():
            if size % shards:
                raise SpecError(
                    f"tensor_plan: {type(self.layer).__name__} has {name} = {size}, should be a "
                    f"multiple of the {shards} devices of the mesh"
                )
        self.layer.tensor_mesh = device_mesh
        return super()._apply(module, device_mesh)


def plan_of(layer: Splittable) -> dict[str, ParallelStyle]:
    """Return the styles of the parts of a layer by name; what checks the sizes comes first."""
    plan: dict[str, ParallelStyle] = {layer.rows: Output(layer)} if layer.rows else {}
    plan |= {name: ColwiseParallel() for name in layer.columns}
    plan |= {name: Copies() for name in layer.whole}
    if layer.vocabulary:
        plan[layer.vocabulary] = RowwiseParallel(input_layouts=Replicate())
    return {name: style for name, style in plan.items() if hasattr(layer, name)}
