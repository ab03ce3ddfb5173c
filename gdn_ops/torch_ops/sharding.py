"""Decide how a call is split over a mesh of devices, from the axes that its spec names.

Batch rows, heads and columns of values never meet in the recurrence, so each of them can be split:

    batch    B, and N where every row is a sequence
    heads    H and HV together, whole key heads with their value heads
    columns  V: gradients of q, k and the gates are then sums over the devices

On a mesh of several dimensions every dimension has a split of its own. Tokens follow each other:
what is sharded along T is refused, since a redistribution would undo the caller's plan unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from gdn_ops.call.bind import Arguments
from gdn_ops.call.structure import axes_of, fail
from gdn_ops.spec.language import OpSpec, Output, Sizes
from gdn_ops.spec.ops import GATED_DELTA

Axes = tuple[str, ...]

SPLITS: dict[str, Axes] = {
    "batch": ("B", "N"),
    "heads": ("H", "HV"),
    "columns": ("V",),
}
"""The axes that each split shards."""


@dataclass(frozen=True)
class Plan:
    """Hold how a call is split over a mesh.

    Attributes:
        mesh: the devices.
        splits: per dimension of the mesh, a key of SPLITS, or None where every device computes all.
    """

    mesh: DeviceMesh
    splits: tuple[str | None, ...]

    def placements(self, axes: Axes) -> tuple[Placement, ...]:
        """Return where a tensor with these axes lies: it is an argument, or a result."""
        return tuple(_placement(split, axes) for split in self.splits)

    def gradient_placements(self, axes: Axes) -> tuple[Placement, ...]:
        """Return where the gradient of an argument lies: shares of a sum where that is whole."""
        return tuple(
            Partial() if split is not None and isinstance(placement, Replicate) else placement
            for split, placement in zip(self.splits, self.placements(axes), strict=True)
        )

    def local_shape(
        self, axes: Axes, shape: Iterable[int], coordinate: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the shape of the part of a tensor that the device at a coordinate has."""
        sizes = list(shape)
        for i, placement in enumerate(self.placements(axes)):
            if isinstance(placement, Shard):
                size, dim = sizes[placement.dim], placement.dim
                each = -(-size // self.mesh.size(i))
                sizes[dim] = max(0, min(each, size - each * coordinate[i]))
        return tuple(sizes)


def _placement(split: str | None, axes: Axes) -> Placement:
    """Return where a tensor lies along one dimension of a mesh."""
    sharded = () if split is None else SPLITS[split]
    found = [dim for dim, axis in enumerate(axes) if axis in sharded]
    return Shard(found[0]) if found else Replicate()


@dataclass(frozen=True)
class _Operand:
    """Hold one argument of a call with its axes."""

    name: str
    value: DTensor
    axes: Axes
    is_updated: bool

    def axis(self, dim: int) -> str | None:
        """Return the axis that is sharded along a dimension of the mesh."""
        sharded = getattr(self.value.placements[dim], "dim", None)
        return None if sharded is None else self.axes[sharded]

    def cost(self, dim: int, split: str | None) -> float:
        """Return about how many bytes move until a split's placement is reached."""
        source, target = self.value.placements[dim], _placement(split, self.axes)
        devices = self.value.device_mesh.size(dim)
        if source == target or devices == 1:
            return 0.0
        if self.is_updated:
            return math.inf
        if isinstance(source, Replicate):
            return 0.0
        size = float(self.value.numel() * self.value.element_size())
        if isinstance(target, Shard):
            return size / devices
        return 2 * size if isinstance(source, Partial) else size


def plan_of(spec: OpSpec, arguments: Arguments, sizes: Sizes) -> Plan:
    """Return how a call is split: as its arguments lie, with the least to move.

    Args:
        spec: the op.
        arguments: those of the call, DTensors on one mesh, whose structure is right.
        sizes: its axes.

    Raises:
        SpecError: an argument is sharded along T, heads cannot be split so, or a state that is
            updated in place lies as no split has it.
    """
    operands = [
        _Operand(
            arg.name,
            arguments.value(arg.field),
            axes_of(spec, arg, arguments),
            arguments.inplace and arg.field == "state",
        )
        for arg in spec.tensors
        if arguments.value(arg.field) is not None
    ]
    mesh = operands[0].value.device_mesh
    _check_tokens(spec, operands, mesh)
    has_rows = arguments.cu_seqlens is None and arguments.state_indices is None
    allowed = [split for split in SPLITS if has_rows or split != "batch"]
    splits = tuple(_split(operands, dim, allowed) for dim in range(mesh.ndim))
    _check_heads(spec, mesh, splits, sizes)
    for operand in operands:
        _check_updated(spec, operand, splits)
    return Plan(mesh, splits)


def _split(operands: list[_Operand], dim: int, allowed: list[str]) -> str | None:
    """Return the split of one dimension of a mesh that moves the least; the finer one if equal."""
    axes = {operand.axis(dim) for operand in operands}
    asked = [split for split in allowed if axes.intersection(SPLITS[split])]
    choices = (*asked, None)
    return min(choices, key=lambda split: sum(x.cost(dim, split) for x in operands))


def _where(mesh: DeviceMesh, dim: int) -> str:
    """Return a dimension of a mesh as text."""
    names = mesh.mesh_dim_names
    return f"mesh dimension {dim}" + (f" ({names[dim]!r})" if names else "")


def _check_tokens(spec: OpSpec, operands: list[_Operand], mesh: DeviceMesh) -> None:
    """Check that no argument is sharded along its tokens."""
    for operand in operands:
        for dim in range(mesh.ndim):
            if operand.axis(dim) == "T" and mesh.size(dim) > 1:
                cure = "redistribute it first"
                if spec is GATED_DELTA:
                    cure = (
                        "gdn_ops.parallel.gated_delta, and gdn_ops.parallel.sequence_parallel for "
                        "modules, run sequences that are cut over devices"
                    )
                fail(
                    spec,
                    f"{operand.name} is sharded along T, its tokens, over {_where(mesh, dim)}, "
                    f"should be sharded along the batch, heads or V, or not at all: {cure}",
                )


def _check_heads(
    spec: OpSpec, mesh: DeviceMesh, splits: tuple[str | None, ...], sizes: Sizes
) -> None:
    """Check that heads are split into whole key heads with their value heads."""
    dims = [dim for dim, split in enumerate(splits) if split == "heads"]
    shards = math.prod(mesh.size(dim) for dim in dims)
    # As many key heads as value heads are cut alike, even where shards are of different sizes.
    if sizes.H % shards and sizes.H != sizes.HV:
        where = ", ".join(_where(mesh, dim) for dim in dims)
        fail(
            spec,
            f"HV={sizes.HV} value heads of H={sizes.H} key heads are sharded over {where}, which "
            f"would cut key heads from their value heads: H should be a multiple of the "
            f"{shards} shards; shard V, or repeat the key heads",
        )


def _check_updated(spec: OpSpec, operand: _Operand, splits: tuple[str | None, ...]) -> None:
    """Check that a state that is updated in place stays where it lies."""
    for dim, split in enumerate(splits):
        if operand.cost(dim, split) == math.inf:
            axis = operand.axis(dim)
            lies = "a sum of shares" if axis is None else f"sharded along {axis}"
            fail(
                spec,
                f"{operand.name} is {lies} over {_where(operand.value.device_mesh, dim)}, where "
                f"inplace=True cannot update it, should be sharded along the batch, heads or V, "
                f"or replicated; pools and their slots are not split",
            )


def output_shapes(
    spec: OpSpec, arguments: Arguments, sizes: Sizes
) -> Mapping[str, tuple[Axes, tuple[int, ...]]]:
    """Return the axes and the whole shape of every result, by name."""
    values: dict[str, int] = {name: getattr(sizes, name) for name in ("B", "H", "HV", "K", "V")}
    values |= {"T": sizes.T, "N": sizes.N}
    shapes = {}
    for output in spec.outputs:
        axes = _output_axes(output, arguments)
        shape = [values[axis] if axis != "P" else _slots(arguments.state) for axis in axes]
        if output.name == "states" and not arguments.return_states:
            shape[axes.index("T")] = 0
        shapes[output.name] = axes, tuple(shape)
    return shapes


def _output_axes(output: Output, arguments: Arguments) -> Axes:
    """Return the axes of a result: a pool is returned as a pool."""
    if output.name == "new_state" and arguments.state_indices is not None:
        return ("P", *output.axes[1:])
    return output.axes


def _slots(pool: Tensor | None) -> int:
    assert pool is not None
    return pool.shape[0]


def held(plan: Plan, value: Any, axes: Axes) -> Tensor:
    """Return this device's part of a DTensor as a plan wants it, redistributed if need be."""
    placements, mesh = plan.placements(axes), plan.mesh
    if not value.numel():
        part = plan.local_shape(axes, value.shape, mesh.get_coordinate() or ())
        return torch.zeros(part, dtype=value.dtype, device=value.device)
    pairs = zip(value.placements, placements, strict=True)
    # Along one device everything lies whole, and a state to be updated is not to be copied.
    if any(a != b and mesh.size(i) > 1 for i, (a, b) in enumerate(pairs)):
        # Below autograd, where torch 2.8 to 2.11 do not take a result off its graph.
        value = value.detach().redistribute(placements=placements)
    local: Tensor = value.to_local()
    return local
