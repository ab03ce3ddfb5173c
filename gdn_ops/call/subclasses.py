"""Recognise subclasses of tensors that backends would compute with wrongly, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor

MASKED = (
    "is a MaskedTensor, should be a plain tensor: its mask would be lost; pass x.to_tensor(value) "
    "with a value for what is masked"
)


def is_masked(x: Any) -> bool:
    """Return whether a tensor is of torch.masked."""
    return isinstance(x, MaskedTensor)


def distributed_type() -> type[Tensor] | None:
    """Return the class of tensors that lie on several devices, or None where it is not loaded."""
    # Nobody has such a tensor without the module, whose import takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


# Do what torch.compiler.assume_constant_result does, see `registry.traceable_step`.
distributed_type._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_distributed(x: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    kind = distributed_type()
    return kind is not None and isinstance(x, kind)


def fault_of_subclasses(tensors: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the subclasses of a call's tensors, or None.

    Args:
        tensors: those that are there, by name.
    """
    fake: dict[str, FakeTensor] = {}
    for name, x in tensors.items():
        if isinstance(x, MaskedTensor):
            return f"{name} {MASKED}"
        if isinstance(x, FakeTensor):
            fake[name] = x
    fault = _fault_of_distributed(tensors)
    if fault is not None or not fake:
        return fault
    first, mode = next((name, x.fake_mode) for name, x in fake.items())
    for name, x in fake.items():
        if x.fake_mode is not mode:
            return f"{name} is a FakeTensor of another mode than {first}, should be of the same one"
    if mode.allow_non_fake_inputs:
        return None
    for name, x in tensors.items():
        if name not in fake and isinstance(x, Tensor):
            return (
                f"{first} is a FakeTensor and {name} is none, should be all or none of them: "
                f"mode.from_tensor({name}) makes one"
            )
    return None


def _fault_of_distributed(tensors: Mapping[str, Any]) -> str | None:
    """Return what is wrong if only some tensors are DTensors, or they lie on different meshes."""
    distributed = {name: x for name, x in tensors.items() if is_distributed(x)}
    if not distributed:
        return None
    first, mesh = next((name, x.device_mesh) for name, x in distributed.items())
    for name, x in tensors.items():
        if isinstance(x, Tensor) and name not in distributed:
            return (
                f"{first} is a DTensor and {name} is none, should be all or none of them: "
                f"distribute_tensor({name}, {first}.device_mesh, placements) makes one"
            )
        if name in distributed and x.device_mesh != mesh:
            return f"{name} is a DTensor on another mesh than {first}, should be on the same one"
    return None
