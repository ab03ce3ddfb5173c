"""Check the options of layers, and the tensors that they are given, in words that name them."""

from __future__ import annotations

import math
import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.rules import FLOAT_DTYPES


def check_counts(owner: str, *, least: int = 1, **values: Any) -> None:
    """Check options that are integers.

    Args:
        owner: what the message starts with.
        least: smallest value, 0 or 1.
        values: the options by name.

    Raises:
        SpecError: one of them is no integer, or too small.
    """
    should = "a positive integer" if least else "an integer of at least 0"
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _refuse_type(owner, f"{name} is {value!r}, should be {should}")
        if value < least:
            _refuse(owner, f"{name} is {value}, should be {should}")


def check_numbers(owner: str, **values: Any) -> None:
    """Check options that are finite numbers of at least 0.

    Raises:
        SpecError: one of them is something else.
    """
    for name, value in values.items():
        text = f"{name} is {value!r}, should be a finite number of at least 0"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _refuse_type(owner, text)
        if not (math.isfinite(value) and float(value) >= 0):
            _refuse(owner, text)


def check_flags(owner: str, **values: Any) -> None:
    """Check options that are True or False.

    Raises:
        SpecError: one of them is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            _refuse_type(owner, f"{name} is {value!r}, should be True or False")


def check_dtype(owner: str, dtype: Any) -> None:
    """Check the dtype of parameters.

    Raises:
        SpecError: it is neither None nor a float that the ops know.
    """
    if dtype is None or dtype in [getattr(torch, name) for name in FLOAT_DTYPES]:
        return
    known = ", ".join(f"torch.{name}" for name in FLOAT_DTYPES)
    _refuse(owner, f"dtype is {dtype!r}, should be one of {known}")


def check_sequences(owner: str, x: Any, width: int, name: str) -> None:
    """Check hidden vectors.

    Args:
        owner: what the message starts with.
        x: should be (B, T, width), a float.
        width: of the last axis.
        name: of the width.

    Raises:
        SpecError: x is something else.
    """
    check_floats(owner, x=x)
    if x.dim() != 3 or x.shape[2] != width:
        _refuse(
            owner,
            f"x has shape {tuple(x.shape)}, should be (B, T, {name}) with {name} = {width}",
        )


def check_floats(owner: str, **tensors: Any) -> None:
    """Check that all are tensors of floats.

    Raises:
        SpecError: one of them is something else.
    """
    for name, x in tensors.items():
        check_tensor(owner, name, x)
        if not x.is_floating_point():
            _refuse(owner, f"{name} has dtype {dtype_name(x.dtype)}, should be a float")


def check_tensor(owner: str, name: str, value: Any) -> None:
    """Check that a value is a tensor.

    Raises:
        SpecTypeError: it is something else.
    """
    if not isinstance(value, Tensor):
        _refuse_type(owner, f"{name} has type {type(value).__name__}, should be a torch.Tensor")


def check_kept(owner: str, x: Tensor, kept: dict[str, Any]) -> None:
    """Check tensors that a layer kept between calls: floats on the device of its input.

    Args:
        owner: what the message starts with.
        x: the input of the layer.
        kept: the tensors by name.

    Raises:
        SpecError: one of them is something else.
    """
    check_floats(owner, **kept)
    for name, value in kept.items():
        if value.device != x.device:
            _refuse(owner, f"{name} is on {value.device}, should be on {x.device}, the device of x")


def _refuse(owner: str, text: str) -> NoReturn:
    raise SpecError(f"{owner}: {text}")


def _refuse_type(owner: str, text: str) -> NoReturn:
    raise SpecTypeError(f"{owner}: {text}")
