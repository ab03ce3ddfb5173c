"""Check the options of layers, and the tensors that they are given, in words that name them."""

from __future__ import annotations

import numbers
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gdn_ops.call.scalars import as_python
from gdn_ops.call.structure import dtype_name
from gdn_ops.call.tensors import check_device as check_device
from gdn_ops.call.tensors import check_floats as check_floats
from gdn_ops.call.tensors import check_tensor as check_tensor
from gdn_ops.call.values import CHECK_VALUES_EVERYWHERE
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
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
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
        # In numpy's narrow dtypes the largest float overflows.
        if not 0 <= as_python(value) <= sys.float_info.max:
            _refuse(owner, text)


def check_flags(owner: str, **values: Any) -> None:
    """Check options that are True or False.

    Raises:
        SpecError: one of them is something else.
    """
    for name, value in values.items():
        if not isinstance(as_python(value), bool):
            _refuse_type(owner, f"{name} is {value!r}, should be True or False")


def check_made(owner: str, device: Any, dtype: Any) -> None:
    """Check the device and the dtype that parameters are made with.

    Raises:
        SpecError: the device is neither None nor one that torch has here, or the dtype is neither
            None nor a float that the ops know.
    """
    _check_place(owner, device)
    if dtype is None or dtype in [getattr(torch, name) for name in FLOAT_DTYPES]:
        return
    known = ", ".join(f"torch.{name}" for name in FLOAT_DTYPES)
    _refuse(owner, f"dtype is {dtype!r}, should be one of {known}")


def _check_place(owner: str, device: Any) -> None:
    """Check that torch can make a tensor on a device; None is the default one."""
    should = "should be one that torch has here, such as 'cpu' or 'cuda:0'"
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        _refuse_type(owner, f"device has type {type(device).__name__}, {should}")
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    # Torch without CUDA asserts that it is with CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{owner}: device is {str(device)!r}, {should}: {reason}") from error


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


def check_token_ids(owner: str, tokens: Any, embedding: nn.Module) -> None:
    """Check tokens that a language model is given.

    Args:
        owner: what the message starts with.
        tokens: should be (B, T) integers in the vocabulary, which is looked at on a CPU only.
        embedding: of the model.

    Raises:
        SpecError: they are something else.
    """
    check_tensor(owner, "tokens", tokens)
    if tokens.dim() != 2:
        _refuse(owner, f"tokens has shape {tuple(tokens.shape)}, should be (B, T)")
    if tokens.dtype not in (torch.int64, torch.int32):
        _refuse(owner, f"tokens has dtype {dtype_name(tokens.dtype)}, should be int64 or int32")
    check_weights(owner, "tokens", tokens, embedding=embedding)
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and has_values(tokens) and tokens.numel():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= size:
            _refuse(
                owner,
                f"tokens has values in [{low}, {high}], should be in [0, vocab_size - 1] = "
                f"[0, {size - 1}]",
            )


def check_module(owner: str, model: Any) -> None:
    """Check that a model is a module.

    Raises:
        SpecTypeError: it is something else.
    """
    if not isinstance(model, nn.Module):
        text = f"model has type {type(model).__name__}, should be a torch.nn.Module"
        _refuse_type(owner, text)


def check_weights(owner: str, name: str, x: Tensor, **modules: nn.Module) -> None:
    """Check that a tensor has the device and the dtype of the weights that it meets.

    Only plain layers are looked at: others, and what hooks do, may convert what they are given.

    Args:
        owner: what the message starts with.
        name: of the tensor.
        x: the tensor; of integers the device alone is checked.
        modules: what is applied to it, by name.

    Raises:
        SpecError: they differ, and autocast does not make them equal.
    """
    for part, module in modules.items():
        if type(module) not in (nn.Linear, nn.Embedding) or module._forward_pre_hooks:
            continue
        weight: Any = module.weight
        if type(weight) not in (Tensor, nn.Parameter) or "forward" in module.__dict__:
            continue
        check_device(owner, name, x, weight.device, f"{part}.weight")
        if x.is_floating_point() and x.dtype != weight.dtype and not _casts(x, weight):
            dtype = dtype_name(weight.dtype)
            _refuse(
                owner,
                f"{name} has dtype {dtype_name(x.dtype)}, should be {dtype}, the dtype of "
                f"{part}.weight: bring both to one dtype, for example with .to(torch.{dtype})",
            )


def _casts(*tensors: Tensor) -> bool:
    """Return whether autocast brings tensors of one device to one dtype; it leaves float64."""
    kind = tensors[0].device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return is_on and all(x.dtype != torch.float64 for x in tensors)


def check_logits(owner: str, logits: Tensor) -> None:
    """Check that a token can be drawn from every row of logits, on a CPU, where a look is cheap.

    Args:
        owner: what the message starts with.
        logits: (B, vocab_size); minus infinity excludes a token, but not all of a row.

    Raises:
        SpecError: the largest of a row is no finite number.
    """
    largest = logits.amax(-1)
    if not has_values(largest) or bool(largest.isfinite().all()):
        return
    row = int(largest.isfinite().logical_not().nonzero()[0])
    _refuse(
        owner,
        f"the logits of row {row} have the maximum {largest[row].item()}, should have a finite "
        f"one: look for NaN and infinity in the parameters, and whether {dtype_name(logits.dtype)} "
        f"holds what the layers compute",
    )


def has_values(x: Tensor) -> bool:
    """Return whether values may be looked at: outside of graphs, and without waiting for a GPU."""
    return (
        type(x) is Tensor
        and (x.device.type == "cpu" or (CHECK_VALUES_EVERYWHERE and not x.is_meta))
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


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
        check_device(owner, name, value, x.device, "x")


def _refuse(owner: str, text: str) -> NoReturn:
    raise SpecError(f"{owner}: {text}")


def _refuse_type(owner: str, text: str) -> NoReturn:
    raise SpecTypeError(f"{owner}: {text}")
