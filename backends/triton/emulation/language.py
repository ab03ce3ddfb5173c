"""Copy Triton's language and its interpreter, for the emulation alone.

The interpreter works by patching `triton.language`, which breaks whatever compiles a kernel in the
same process at that time. So it gets modules of its own to patch, made once from the same sources:
`tl` and `interpreter` here. A kernel of the user is made to look names up in them (`functions`);
the modules that everything else imports stay as they are.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from triton.runtime import jit

_LANGUAGE = ("core", "math", "random", "semantic", "standard", "target_info")
COPIED = frozenset(
    (
        "triton.language",
        *(f"triton.language.{name}" for name in _LANGUAGE),
        "triton.runtime.interpreter",
    )
)
"""Names of the modules that have a copy."""

_copies: dict[str, ModuleType] = {}


def copied(name: str) -> Any:
    """Return the copy of a module, made when it is first asked for."""
    if name not in _copies:
        # The original is imported too: a dataclass looks its module up by name.
        spec = importlib.import_module(name).__spec__
        assert spec is not None and spec.loader is not None
        module = _copies[name] = importlib.util.module_from_spec(spec)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        spec.loader.exec_module(module)
        package, _, leaf = name.rpartition(".")
        if package in _copies:
            setattr(_copies[package], leaf, module)
    return _copies[name]


def _import(
    name: str,
    globals: Any = None,
    locals: Any = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """Import for a copied module: from a copy where there is one."""
    module = __import__(name, globals, locals, fromlist or (), level)
    if module is jit:
        # Triton's own functions are interpreted, not compiled.
        return SimpleNamespace(**{**vars(jit), "jit": _interpreted})
    if not fromlist or module.__name__ not in COPIED:
        return module
    for part in fromlist:
        if f"{module.__name__}.{part}" in COPIED:
            copied(f"{module.__name__}.{part}")
    return copied(module.__name__)


def _interpreted(function: Any) -> Any:
    return copied("triton.runtime.interpreter").InterpretedFunction(function)


tl = copied("triton.language")
interpreter = copied("triton.runtime.interpreter")
# It imports the language by `import triton.language as tl`, which names no copy.
interpreter.tl = tl
