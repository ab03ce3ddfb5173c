"""Define the kernels of the Triton backend; §n in a comment is a section of docs/math.md."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from triton.runtime.jit import JITFunction


@functools.cache
def settle_keys() -> None:
    """Form the keys of all kernels for Triton's cache in one order, whichever is launched first.

    Triton takes into the key of a function which constants the functions that it calls use, as far
    as it has looked at these before: without this, a cache that another process has filled would
    not be found.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        for member in vars(module).values():
            # Functions in the order of their definition: what one calls stands before it.
            if isinstance(member, JITFunction) and member.fn.__module__ == module.__name__:
                _ = member.cache_key
