"""Make a Python function of a jitted one that computes where it is called.

It has the rewritten source of the kernel (`control`) and globals of its own, in which Triton's
language is the emulation's copy (`language`), and jitted functions are made so too. The function
of the user and all modules stay as they are, so that the same function compiles for a GPU in the
same process, at the same time if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import triton.language as compiled
from triton.runtime.jit import JITFunction

from gdn_ops.backends.triton.emulation.control import HELPERS, rewritten
from gdn_ops.backends.triton.emulation.language import COPIED, copied, tl
from gdn_ops.kernel_support.sources import reading


class Namespace:
    """Represent a module of the user as an emulated kernel sees it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return translated(getattr(self._module, name))


class Globals(dict[str, Any]):
    """Look up what a kernel's module holds now, so that a change there is seen."""

    def __init__(self, source: dict[str, Any]) -> None:
        self._source = source
        super().__init__(HELPERS, __builtins__=source["__builtins__"])

    def __missing__(self, name: str) -> Any:
        value = translated(self._source[name])
        if isinstance(value, ModuleType):
            self[name] = value
        return value


def translated(value: Any) -> Any:
    """Return the emulated counterpart of a global of a kernel."""
    if isinstance(value, ModuleType):
        return copied(value.__name__) if value.__name__ in COPIED else Namespace(value)
    if getattr(value, "__module__", None) not in COPIED:
        return emulated(value) if isinstance(value, JITFunction) else value
    if isinstance(value, compiled.constexpr):
        # A number: functions take it where they take one that is known when they are compiled.
        return translated(value.value)
    if isinstance(value, compiled.dtype):
        return tl.dtype(value.name)
    return getattr(copied(value.__module__), getattr(value, "__name__", ""), value)


# By identity: hashing a JITFunction reads and hashes the source of all that it calls. A twin
# keeps its function alive, so that no identity is used twice.
_twins: dict[int, tuple[Any, Any]] = {}


def emulated(jitted: Any) -> Callable[..., Any]:
    """Return the Python function that emulates a jitted one; the same one every time."""
    if id(jitted) not in _twins:
        with reading:
            _twins.setdefault(id(jitted), (_twin(jitted), jitted))
    return _twins[id(jitted)][0]  # type: ignore[no-any-return]


def _twin(jitted: Any) -> Any:
    """Make the Python function that emulates a jitted one."""
    fn: FunctionType = jitted.fn
    names = Globals(fn.__globals__)
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        names[name] = translated(cell.cell_contents)
    defaults = tuple(map(translated, fn.__defaults__ or ()))
    function: Any = FunctionType(rewritten(fn), names, fn.__name__, defaults)
    function.__kwdefaults__ = fn.__kwdefaults__
    # A reduction calls the function of a combination by this name.
    function.fn = function
    return function
