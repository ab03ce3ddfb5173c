"""Take a module out of what wraps it for training or speed, or refuse the wrapper by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from gdn_ops.spec.errors import SpecError

_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
"""Classes of torch that compute what a module inside them does, and where that is."""

_CURES = {
    "DistributedDataParallel": "take its .module",
    "FullyShardedDataParallel": "load its full state_dict into the plain module and pass that",
    "FSDPModule": "load its full state_dict into a module that was never sharded and pass that",
    "ScriptModule": "pass the module that it was made from",
}
"""Advice for modules that torch.export cannot trace, by the name of a class of theirs."""


def unwrapped(label: str, module: nn.Module) -> nn.Module:
    """Return the module that those of torch.compile, DataParallel and averaging wrap.

    A wrapper with hooks of its own stays: they may change what it computes.

    Raises:
        SpecError: the module, or a part of it, is of a kind that torch.export cannot trace.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    for name, part in module.named_modules():
        kinds = [kind for kind in _classes(part) if kind in _CURES]
        if kinds:
            which = f"its part {name!r}" if name else "the module"
            raise SpecError(
                f"{label}: {which} has type {kinds[0]}, which torch.export cannot trace: "
                f"{_CURES[kinds[0]]}"
            )
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper that adds nothing to it, None for another module."""
    where = _INNER.get(type(module).__name__) if _is_torch(type(module)) else None
    if where is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    return getattr(module, where)  # type: ignore[no-any-return]


def _classes(module: nn.Module) -> list[str]:
    """Return the names of torch's own classes that a module is of."""
    return [cls.__name__ for cls in type(module).__mro__ if _is_torch(cls)]


def _is_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.")


def sizes_as_gathered(module: nn.Module, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return dynamic sizes of arguments, in a tuple those that `*args` of the module gathers."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return sizes
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*sizes[:first], sizes[first:])
