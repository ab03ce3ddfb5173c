"""See through the transforms of torch.func, and see forward-mode tangents, in a call's tensors.

Under `vmap`, `grad`, `vjp` and `jvp` a tensor is wrapped once per transform that concerns it. A
wrapped tensor has the shape that the transformed function sees; its values stand in the innermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


class Transforms(NamedTuple):
    """Say what concerns the tensors of a call.

    Attributes:
        maps: whether `vmap` maps over one of them.
        differentiates: whether reverse mode differentiates by one of them.
        has_tangent: whether forward mode does.
        wraps: whether a transform of torch.func is active at all.
    """

    maps: bool = False
    differentiates: bool = False
    has_tangent: bool = False
    wraps: bool = False

    def joined(self, other: Transforms) -> Transforms:
        """Return what concerns these tensors or others; NONE where nothing does."""
        both = Transforms(*(a or b for a, b in zip(self, other, strict=True)))
        return both if any(both[:3]) else NONE


NONE = Transforms()

# Functions of torch itself, which every call asks.
any_active = torch._C._are_functorch_transforms_active
modes = torch._C._len_torch_dispatch_stack


def are_active() -> bool:
    """Return whether a transform of torch.func or a level of forward mode is active."""
    return any_active() or forward_ad._current_level >= 0


def is_recording() -> bool:
    """Return whether `make_fx` records what is done to tensors, whose values it does not give."""
    if not modes():
        return False
    proxies = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(proxies) is not None


@contextmanager
def outside() -> Iterator[None]:
    """Leave every transform of torch.func for a block, for tensors that none of them wraps."""
    left = []
    try:
        while _functorch.peek_interpreter_stack() is not None:
            left.append(_functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while left:
            _functorch.push_dynamic_layer_stack(left.pop())


def integers(x: Tensor) -> list[int]:
    """Return the values of a tensor of integers, under any transform.

    In torch 2.8 `tolist` of a tensor that no transform concerns fails while `grad` is active.
    """
    if not any_active():
        return x.tolist()
    with outside():
        return innermost(x).tolist()


def is_wrapped(x: Tensor) -> bool:
    """Return whether a transform wraps a tensor."""
    return bool(_functorch.is_functorch_wrapped_tensor(x))


def innermost(x: Tensor) -> Tensor:
    """Return the tensor inside all wrappers, which has the values of every mapped row."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def is_grads_batched(*grads: Tensor) -> bool:
    """Return whether gradients come from `torch.autograd.grad(..., is_grads_batched=True)`."""
    return any(map(_functorch.is_legacy_batchedtensor, grads))


def is_mapped(x: Tensor) -> bool:
    """Return whether `vmap` maps over a tensor."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def transforms_of(tensors: Iterable[Tensor]) -> Transforms:
    """Return what concerns tensors; called where a transform or a level is active."""
    stack = _functorch.get_interpreter_stack() or []
    kinds = {interpreter.level(): interpreter.key() for interpreter in stack}
    found, is_dual, needs_grad = set(), False, False
    for x in tensors:
        while _functorch.is_functorch_wrapped_tensor(x):
            found.add(kinds.get(_functorch.maybe_get_level(x)))
            x = _functorch.get_unwrapped(x)
        needs_grad = needs_grad or x.requires_grad
        if not stack and forward_ad._current_level >= 0 and x.is_floating_point():
            is_dual = is_dual or forward_ad.unpack_dual(x).tangent is not None
    kind = _functorch.TransformType
    # A level of forward mode around transforms that are not `jvp`: nobody tells what is dual.
    is_hidden = bool(stack) and forward_ad._current_level >= 0 and kind.Jvp not in kinds.values()
    return Transforms(
        maps=kind.Vmap in found,
        differentiates=needs_grad or kind.Grad in found,
        has_tangent=is_dual or is_hidden or kind.Jvp in found,
        wraps=bool(stack),
    )
