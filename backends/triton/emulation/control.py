"""Rewrite the source of kernels: what Triton's compiler reads otherwise than Python, or refuses.

`x = value` assigns a tensor, `if x` looks at one, a loop keeps the types of what it carries.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import Any

from gdn_ops.backends.triton.emulation.binding import loop_range, to_tensor
from gdn_ops.backends.triton.emulation.language import tl


def truth(value: Any) -> Any:
    """Return the truth value that a kernel branches on."""
    if not isinstance(value, tl.tensor):
        return value
    data = value.handle.data
    if data.size != 1:
        raise ValueError(
            f"a block of shape {data.shape} has no truth value: combine blocks with & | ~"
        )
    return bool(data.item())


def types_of(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the types of those names that hold tensors before a loop."""
    pairs = ((name, values.get(name)) for name in names)
    return {name: value.type for name, value in pairs if isinstance(value, tl.tensor)}


def check_types(before: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse a loop that changes the type of a name that it carries: it does not compile."""
    for name, type_ in before.items():
        value = values.get(name)
        if isinstance(value, tl.tensor) and value.type is not type_ and value.type != type_:
            raise TypeError(
                f"{name} is {_words(type_)} before a loop and {_words(value.type)} after a turn "
                f"of it; a loop keeps types"
            )


def _words(type_: Any) -> str:
    shape = tuple(type_.shape) if type_.is_block() else ()
    return f"{type_.scalar} of shape {shape}" if shape else str(type_)


HELPERS = {
    "range": loop_range,
    "__to_tensor": to_tensor,
    "__truth": truth,
    "__types_of": types_of,
    "__check_types": check_types,
}
"""Globals that the rewritten source of every kernel uses."""


def rewritten(fn: FunctionType) -> CodeType:
    """Return the code of a kernel, rewritten by `_Rewriter`, with the same line numbers.

    The caller holds `sources.reading`.
    """
    lines, first = inspect.getsourcelines(fn)
    tree = _Rewriter(fn.__name__).visit(ast.parse(textwrap.dedent("".join(lines))))
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, first - 1)
    # Only the body is used: decorators, annotations and defaults are never evaluated.
    module = compile(tree, inspect.getsourcefile(fn) or "<unknown>", "exec", dont_inherit=True)
    return next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == fn.__name__)


class _Rewriter(ast.NodeTransformer):
    """Make assignments, branches and loops call `HELPERS`; refuse what some Triton refuses."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def generic_visit(self, node: Any) -> Any:
        super().generic_visit(node)
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            node.test = _call("__truth", node.test)
        elif isinstance(node, ast.BoolOp):
            node.values = [_call("__truth", value) for value in node.values]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = _call("__truth", node.operand)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if len(node.targets) > 1:
            raise self._error(node, "an assignment to several names does not compile")
        self.generic_visit(node)
        node.value = _call("__to_tensor", node.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> Any:
        if len(node.ops) > 1:
            raise self._error(node, "a chained comparison does not compile before Triton 3.9")
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        # An unrolled loop carries nothing.
        is_unrolled = "static_range" in ast.unparse(node.iter)
        self.generic_visit(node)
        return [node] if is_unrolled else self._with_carried_types(node)

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        self.generic_visit(node)
        return self._with_carried_types(node)

    def _with_carried_types(self, node: ast.For | ast.While) -> list[ast.stmt]:
        """Add a check to a loop that the names it assigns keep their types."""
        parts = (n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name))
        names = sorted({n.id for n in parts if isinstance(n.ctx, ast.Store)})
        types = f"__types_{node.lineno}_{node.col_offset}"
        before, after = ast.parse(
            f"{types} = __types_of(locals(), {names})\n__check_types({types}, locals())"
        ).body
        for part in (*ast.walk(before), *ast.walk(after)):
            ast.copy_location(part, node)
        node.body.append(after)
        return [before, node]

    def _error(self, node: ast.stmt | ast.expr, what: str) -> SyntaxError:
        return SyntaxError(f"{self.kernel}: {what}: {ast.unparse(node)}")


def _call(name: str, value: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [value], [])
