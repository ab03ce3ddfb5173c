"""Look through decorators, and check the parameters of functions that are to be replaced."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_BY_NAME = (_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


def modules_of(module: types.ModuleType) -> list[type[nn.Module]]:
    """Return the classes that a module defines and that have a forward of their own."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls.__module__ == module.__name__
        and "forward" in vars(cls)
    ]


def layers_of(function: Any) -> Iterator[Any]:
    """Yield a function and every function inside its decorators, the outermost first.

    A decorator that says so by `__wrapped__` is followed first; one that does not keeps the
    function in its closure. A function that the package `kernels` wrapped is a module.
    """
    waiting, seen = [function], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += _inside(current)


def _inside(function: Any) -> list[Any]:
    """Return the functions that one decorator holds."""
    if isinstance(function, nn.Module):
        return [type(function).forward]
    if isinstance(function, functools.partial):
        return [function.func]
    wrapped = getattr(function, "__wrapped__", None)
    inner = [] if wrapped is None else [wrapped]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
        if isinstance(content, (types.FunctionType, functools.partial)):
            inner.append(content)
    return inner


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    """Return a function's own parameters, without `self`; none if they cannot be seen."""
    try:
        parameters = dict(inspect.signature(function, follow_wrapped=False).parameters)
    except (TypeError, ValueError):
        return {}
    parameters.pop("self", None)
    return parameters


def definition(function: Any, leading: tuple[str, ...]) -> Callable[..., Any] | None:
    """Return the function inside decorators whose parameters begin with `leading`, or None."""
    return next((f for f in layers_of(function) if _begins_with(f, leading)), None)


def _begins_with(function: Any, leading: tuple[str, ...]) -> bool:
    if isinstance(function, nn.Module):
        return False
    first = list(parameters_of(function).values())[: len(leading)]
    return tuple(p.name for p in first if p.kind is _POSITIONAL) == leading


def parameter_names(function: Any) -> tuple[str, ...]:
    """Return the names of a function's parameters, the most that it has inside its decorators."""
    signatures = [
        tuple(p.name for p in parameters_of(candidate).values() if p.kind in _BY_NAME)
        for candidate in layers_of(function)
    ]
    return max(signatures, key=len)


def mismatch_of_parameters(name: str, function: Any, leading: tuple[str, ...]) -> str:
    """Return a text that says how a function's parameters begin, and how they should."""
    shown = ", ".join(parameter_names(function))
    return f"{name} takes ({shown}), should begin with ({', '.join(leading)})"


def further_defaults(function: Callable[..., Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Return the named parameters of a function beyond the known ones, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in parameters_of(function).items()
        if name not in known and parameter.kind in _BY_NAME
    }


def mentions(function: Any, names: tuple[str, ...]) -> bool:
    """Return whether the code of a function, looking through decorators, uses all the names."""
    return any(set(names) <= _names_in(getattr(f, "__code__", None)) for f in layers_of(function))


def _names_in(code: types.CodeType | None) -> set[str]:
    if code is None:
        return set()
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names_in(c) for c in nested))
