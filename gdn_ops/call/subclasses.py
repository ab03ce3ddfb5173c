"""Recognise subclasses of tensors that backends would compute with wrongly, or not at all."""

from __future__ import annotations

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
    if not fake:
        return None
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
