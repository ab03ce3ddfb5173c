"""Check single tensors outside of the ops: what they are, of which dtype and on which device."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.call.subclasses import MASKED, is_masked
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.rules import FLOAT_DTYPES


def check_floats(owner: str, **tensors: Any) -> None:
    """Check that all are tensors of floats that layers compute with.

    Raises:
        SpecError: one of them is something else.
    """
    for name, x in tensors.items():
        check_tensor(owner, name, x)
        if not x.is_floating_point():
            _refuse(owner, f"{name} has dtype {dtype_name(x.dtype)}, should be a float")
        if dtype_name(x.dtype) not in FLOAT_DTYPES:
            known = ", ".join(FLOAT_DTYPES)
            _refuse(owner, f"{name} has dtype {dtype_name(x.dtype)}, should be one of {known}")


def check_tensor(owner: str, name: str, value: Any) -> None:
    """Check that a value is a dense tensor.

    Raises:
        SpecError: it is something else.
    """
    if not isinstance(value, Tensor):
        is_result = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)
        hint = "; layers return (y, state): pass y on" if is_result else ""
        kind = type(value).__name__
        _refuse_type(owner, f"{name} has type {kind}, should be a torch.Tensor{hint}")
    if is_masked(value):
        _refuse(owner, f"{name} {MASKED}")
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        _refuse(owner, f"{name} has layout {layout}, should be strided")


def check_device(owner: str, name: str, value: Tensor, device: torch.device, of: str) -> None:
    """Check that a tensor is on the device of something that is called `of`.

    Raises:
        SpecError: it is on another one.
    """
    if value.device != device:
        _refuse(owner, f"{name} is on {value.device}, should be on {device}, the device of {of}")


def _refuse(owner: str, text: str) -> NoReturn:
    raise SpecError(f"{owner}: {text}")


def _refuse_type(owner: str, text: str) -> NoReturn:
    raise SpecTypeError(f"{owner}: {text}")
