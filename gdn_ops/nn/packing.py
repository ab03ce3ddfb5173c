"""Check what tells a layer of padding and of packed sequences, in the words of the op's checks."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.call.transforms import integers
from gdn_ops.call.values import fault_of_boundaries
from gdn_ops.nn.values import check_device, check_tensor, has_values
from gdn_ops.spec.errors import SpecError


def check_boundaries(owner: str, cu_seqlens: Any, x: Tensor) -> None:
    """Check the boundaries of sequences that are packed along T.

    Args:
        owner: what the message starts with.
        cu_seqlens: should be (N+1,) int64 or int32: 0, ..., T.
        x: (1, T, width), the packed sequences.

    Raises:
        SpecError: the boundaries are something else, or there are several rows. Values are looked
            at on the CPU only, or on every device under GDN_OPS_CHECK=values.
    """
    _check_tensor(owner, "cu_seqlens", cu_seqlens, x)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        dtype = dtype_name(cu_seqlens.dtype)
        _fail(owner, f"cu_seqlens has dtype {dtype}, should be one of int64, int32")
    if cu_seqlens.dim() != 1:
        shape = tuple(cu_seqlens.shape)
        _fail(
            owner, f"cu_seqlens has shape {shape}, should be (N+1,): 1 dimension, not {len(shape)}"
        )
    if cu_seqlens.shape[0] < 1:
        _fail(owner, "cu_seqlens is empty, should be 0, ..., T")
    if x.shape[0] != 1:
        _fail(owner, f"x has B={x.shape[0]} rows, should be 1 when cu_seqlens is given")
    if has_values(cu_seqlens):
        fault = fault_of_boundaries(integers(cu_seqlens), x.shape[1])
        if fault is not None:
            _fail(owner, fault)


def check_mask(owner: str, mask: Any, x: Tensor) -> None:
    """Check a padding mask.

    Args:
        owner: what the message starts with.
        mask: should be (B, T), of any dtype, 1 or True for a token and 0 or False for padding.
        x: (B, T, width).

    Raises:
        SpecError: the mask is something else. Values are looked at on the CPU only, or on every
            device under GDN_OPS_CHECK=values.
    """
    _check_tensor(owner, "mask", mask, x)
    if mask.shape != x.shape[:2]:
        _fail(
            owner,
            f"mask has shape {tuple(mask.shape)}, should be (B, T) = {tuple(x.shape[:2])}, 0 "
            f"where a token is padding",
        )
    check_mask_values(owner, "mask", mask)


def check_mask_values(owner: str, name: str, mask: Tensor) -> None:
    """Check that a padding mask has no values but 0 and 1, where values may be looked at.

    Raises:
        SpecError: it has others.
    """
    if mask.dtype != torch.bool and has_values(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if len(other):
            value = other[0].item()
            _fail(
                owner,
                f"{name} has the value {value:g}, should have 1 for a token and 0 for padding",
            )


def check_lengths(owner: str, lengths: Any, x: Tensor) -> None:
    """Check the numbers of tokens of rows (B, T, width).

    Raises:
        SpecError: `lengths` is not (B,) integers in [0, T].
    """
    _check_tensor(owner, "lengths", lengths, x)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        _fail(owner, f"lengths has dtype {dtype_name(lengths.dtype)}, should be int64 or int32")
    if tuple(lengths.shape) != (x.shape[0],):
        _fail(owner, f"lengths has shape {tuple(lengths.shape)}, should be (B,) = ({x.shape[0]},)")
    if lengths.numel() and has_values(lengths):
        low, high = (int(y) for y in lengths.aminmax())
        if low < 0 or high > x.shape[1]:
            _fail(
                owner,
                f"lengths has values in [{low}, {high}], should be in [0, T] = [0, {x.shape[1]}]",
            )


def _check_tensor(owner: str, name: str, value: Any, x: Tensor) -> None:
    check_tensor(owner, name, value)
    check_device(owner, name, value, x.device, "x")


def _fail(owner: str, message: str) -> NoReturn:
    raise SpecError(f"{owner}: {message}")
