"""Translate a jitted function, its globals and its source, to a Python function that computes.

Nothing is patched. `emulated` makes a second Python function of the same source, whose globals
are a translated copy: jitted functions are their emulated twins, the modules of Triton's language
are namespaces bound to our builder. The function of the user, the modules and Triton's language
stay as they are, so that the same function compiles for a GPU in the same process, at the same
time if need be.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

from gdn_ops.backends.triton.emulation import reductions
from gdn_ops.backends.triton.emulation.tensors import (
    Tensor,
    bound,
    check_types,
    loop_range,
    static_range,
    to_tensor,
    truth,
    types_of,
    unwrap,
)

_ABSENT = object()


def _hint(value: Any, *_: Any, **__: Any) -> Any:
    """Return a value unchanged; the hint is for the compiler alone."""
    return value


def _static_assert(condition: Any, message: Any = "") -> None:
    if not unwrap(condition):
        raise AssertionError(unwrap(message))


_COMPILED: dict[str, Any] = {
    "reduce": reductions.reduce,
    "_reduce_with_indices": reductions.reduce_with_indices,
    "associative_scan": reductions.associative_scan,
    "range": loop_range,
    "static_range": static_range,
    "static_assert": _static_assert,
    "static_print": print,
    "condition": _hint,
    "multiple_of": _hint,
    "max_contiguous": _hint,
    "max_constancy": _hint,
    "tensor": Tensor,
}
"""Emulations of the names in `triton.language` that only its compiler implements."""


_HELPERS = {
    "range": loop_range,
    "__to_tensor": to_tensor,
    "__truth": truth,
    "__types_of": types_of,
    "__check_types": check_types,
}
"""Globals that every emulated function gets."""


class Namespace:
    """Represent a module as an emulated kernel sees it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        # Triton's language never changes; a module of the user may, between two launches.
        self._is_language = module.__name__.partition(".")[0] == "triton"

    def __getattr__(self, name: str) -> Any:
        if self._module in (tl, tl.core) and name in _COMPILED:
            value = _COMPILED[name]
        else:
            value = translated(getattr(self._module, name))
        if self._is_language:
            setattr(self, name, value)
        return value


@functools.cache
def _namespace(module: ModuleType) -> Namespace:
    return Namespace(module)


def translated(value: Any) -> Any:
    """Return the emulated counterpart of a global of a kernel."""
    if isinstance(value, JITFunction):
        return emulated(value)
    if isinstance(value, ModuleType):
        return _namespace(value)
    if isinstance(value, FunctionType) and tl.core.is_builtin(value):
        return _COMPILED.get(value.__name__) or bound(value)
    return value


class _Twin:
    """Hold an emulated function and the globals that it was made from.

    Attributes:
        jitted: the function of the user.
        function: the one that computes.
        watched: the globals that it reads, and what they were when they were translated.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        fn: FunctionType = jitted.fn
        code = _translated_code(fn)
        self.source_globals = fn.__globals__
        self.watched = dict.fromkeys(_names(code), _ABSENT)
        names = {**_HELPERS, "__builtins__": fn.__globals__["__builtins__"]}
        function: Any = FunctionType(code, names, fn.__name__, fn.__defaults__)
        function.__kwdefaults__ = fn.__kwdefaults__
        # By it a reduction knows the combinations of Triton's own.
        function.jitted = jitted
        self.function = function
        self.names = function.__globals__
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            self.watched.pop(name, None)
            self.names[name] = translated(cell.cell_contents)

    def refresh(self) -> None:
        """Translate again the globals that have changed in the module of the user."""
        for name, seen in self.watched.items():
            value = self.source_globals.get(name, _ABSENT)
            if value is not seen:
                self.watched[name] = value
                self.names.pop(name, None)
                if value is not _ABSENT:
                    self.names[name] = translated(value)


# By identity: hashing a JITFunction reads and hashes the source of all that it calls. A twin
# keeps its function alive, so that no identity is used twice.
_twins: dict[int, _Twin] = {}


def emulated(jitted: Any) -> Callable[..., Any]:
    """Return the Python function that emulates a jitted one; the same one every time."""
    twin = _twins.get(id(jitted))
    if twin is None:
        twin = _twins[id(jitted)] = _Twin(jitted)
        twin.refresh()
    return twin.function  # type: ignore[no-any-return]


def refresh() -> None:
    """Translate again the globals of the user's emulated functions that have changed."""
    for twin in list(_twins.values()):
        if not twin.jitted.fn.__module__.startswith("triton."):
            twin.refresh()


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code looks up outside of its locals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _translated_code(fn: FunctionType) -> CodeType:
    """Return the code of a kernel, rewritten by `_Translation`, with the same line numbers."""
    lines, first = inspect.getsourcelines(fn)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    _Translation(fn.__name__).visit(definition)
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, first - 1)
    filename = inspect.getsourcefile(fn) or "<unknown>"
    module = compile(tree, filename, "exec", dont_inherit=True)
    return next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == fn.__name__)


class _Translation(ast.NodeTransformer):
    """Make `x = value` assign a tensor and `if x` look at one, as Triton's compiler does.

    What no Triton compiles, or only newer ones do, is refused.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        self.generic_visit(node)
        if len(node.targets) > 1:
            raise self._error(node, "an assignment to several names does not compile")
        node.value = _call("__to_tensor", node.value)
        return node

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        self.generic_visit(node)
        # An unrolled loop carries nothing.
        is_unrolled = "static_range" in ast.unparse(node.iter)
        return [node] if is_unrolled else self._with_carried_types(node)

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        self.generic_visit(node)
        node.test = _call("__truth", node.test)
        return self._with_carried_types(node)

    def _with_carried_types(self, node: ast.For | ast.While) -> list[ast.stmt]:
        """Add a check to a loop that the names it assigns keep their types."""
        stored = (n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name))
        names = sorted({n.id for n in stored if isinstance(n.ctx, ast.Store)})
        types = f"__types_{node.lineno}_{node.col_offset}"
        (before,) = ast.parse(f"{types} = __types_of(locals(), {names})").body
        (after,) = ast.parse(f"__check_types({types}, locals())").body
        for new in (before, after):
            for part in ast.walk(new):
                ast.copy_location(part, node)
        node.body.append(after)
        return [before, node]

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        self.generic_visit(node)
        if len(node.ops) > 1:
            raise self._error(node, "a chained comparison does not compile before Triton 3.9")
        return node

    def _visit_branch(self, node: Any) -> Any:
        self.generic_visit(node)
        node.test = _call("__truth", node.test)
        return node

    visit_If = visit_IfExp = visit_Assert = _visit_branch

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.BoolOp:
        self.generic_visit(node)
        node.values = [_call("__truth", value) for value in node.values]
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.UnaryOp:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            node.operand = _call("__truth", node.operand)
        return node

    def _error(self, node: ast.stmt | ast.expr, what: str) -> SyntaxError:
        return SyntaxError(f"{self.kernel}: {what}: {ast.unparse(node)}")


def _call(name: str, value: ast.expr) -> ast.expr:
    """Return the call `name(value)`, at the source position of the value."""
    function = ast.copy_location(ast.Name(name, ast.Load()), value)
    return ast.copy_location(ast.Call(function, [value], []), value)


for _name in dir(tl.tensor):
    _member = inspect.getattr_static(tl.tensor, _name)
    if isinstance(_member, JITFunction):
        # x.sum(...) is tl.sum(x, ...).
        def _method(self: Tensor, *args: Any, _jitted: Any = _member, **kwargs: Any) -> Any:
            return emulated(_jitted)(self, *args, **kwargs)

        setattr(Tensor, _name, _method)
