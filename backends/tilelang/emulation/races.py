"""Find the parallel loops of a kernel that race, which a serial run on a CPU cannot show.

In a parallel loop, an element is written by one iteration and read by no other. A store is taken
to be of one iteration if its indices, or the conditions above it, have every variable of the loop.
A load of what the loop stores is taken to be of the same iteration if the axes whose indices agree
have every variable, and of another place altogether if an axis has no index in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tilelang  # noqa: F401, it is what brings tvm
from tvm import arith, ir, tirx


class _Access(NamedTuple):
    """Describe one load or store.

    Attributes:
        buffer: the tensor or tile.
        indices: those of the element.
        loops: the loops around it.
        conditions: of the branches around it.
    """

    buffer: Any
    indices: list[Any]
    loops: list[Any]
    conditions: list[Any]


class Accesses:
    """Record the loads and stores of the parallel loop that a pass visits."""

    def __init__(self) -> None:
        self._loops: list[Any] = []
        self._conditions: list[Any] = []
        self._values: dict[Any, Any] = {}
        self._loads: list[_Access] = []
        self._stores: list[_Access] = []

    @contextlib.contextmanager
    def loop(self, op: Any) -> Iterator[None]:
        """Enter a loop; at the end of the outermost parallel one, check it for races.

        Raises:
            ValueError: iterations that write, or read, what another one writes.
        """
        outside = not any(map(_is_parallel, self._loops))
        self._loops.append(op)
        yield
        self._loops.pop()
        if outside:
            for store in self._stores:
                self._judge(store)
            self._loads, self._stores = [], []

    @contextlib.contextmanager
    def condition(self, condition: Any) -> Iterator[None]:
        """Enter the branches of a condition."""
        self._conditions.append(condition)
        yield
        self._conditions.pop()

    def bind(self, variable: Any, value: Any) -> None:
        """Record the value that a variable stands for."""
        self._values[variable] = value

    def load(self, op: Any) -> None:
        """Record a load."""
        self._remember(self._loads, op)

    def store(self, op: Any) -> None:
        """Record a store."""
        self._remember(self._stores, op)

    def call(self) -> None:
        """Refuse a tile operation inside a parallel loop, where a GPU cannot run one.

        Raises:
            ValueError: inside a parallel loop.
        """
        if any(map(_is_parallel, self._loops)):
            raise ValueError("a tile operation is inside of T.Parallel, should be outside")

    def _remember(self, accesses: list[_Access], op: Any) -> None:
        # Pass over what alloc_var and alloc_local give: it belongs to its thread.
        is_own = op.buffer.scope() in ("local", "local.var")
        if any(map(_is_parallel, self._loops)) and not is_own:
            conditions = list(self._conditions)
            accesses.append(_Access(op.buffer, list(op.indices), list(self._loops), conditions))

    def _judge(self, store: _Access) -> None:
        shared = {loop.loop_var for loop in store.loops if _is_parallel(loop)}
        missing = shared - self._variables([*store.indices, *store.conditions])
        if missing:
            names = ", ".join(sorted(str(variable.name) for variable in missing))
            raise ValueError(
                f"iterations of T.Parallel race: those over {names} write the same element of "
                f"{store.buffer.name}"
            )
        for load in self._loads:
            if load.buffer.same_as(store.buffer) and not self._is_safe(store, load, shared):
                raise ValueError(
                    f"iterations of T.Parallel race: one writes {_text(store)}, another reads "
                    f"{_text(load)}"
                )

    def _is_safe(self, store: _Access, load: _Access, shared: set[Any]) -> bool:
        """Return whether a load is in the iteration of a store, or reads other elements."""
        pairs = list(zip(store.indices, load.indices, strict=True))
        agreeing = [a for a, b in pairs if ir.structural_equal(a, b, map_free_vars=False)]
        return shared <= self._variables(agreeing) or self._are_apart(store, load)

    def _are_apart(self, store: _Access, load: _Access) -> bool:
        """Return whether the indices of two accesses never meet in some axis, in any iteration."""
        analyzer = arith.Analyzer()
        for loop in (*store.loops, *load.loops):
            extent = ir.Range.from_min_extent(loop.min, loop.extent)
            analyzer.bind(loop.loop_var, extent, True)
        used = self._variables([*store.indices, *load.indices])
        for variable, value in self._values.items():
            if variable in used:
                analyzer.bind(variable, value, True)
        bounds = [map(analyzer.const_int_bound, access.indices) for access in (store, load)]
        return any(
            a.max_value < b.min_value or b.max_value < a.min_value
            for a, b in zip(*bounds, strict=True)
        )

    def _variables(self, expressions: Iterable[Any]) -> set[Any]:
        """Return the variables of expressions, including those in the values of bound variables."""
        variables: set[Any] = set()

        def visit(node: Any) -> None:
            if isinstance(node, tirx.Var) and node not in variables:
                variables.add(node)
                if node in self._values:
                    tirx.stmt_functor.post_order_visit(self._values[node], visit)

        for expression in expressions:
            tirx.stmt_functor.post_order_visit(expression, visit)
        return variables


def _is_parallel(loop: Any) -> bool:
    """Return whether a loop is parallel, and runs more than once."""
    once = isinstance(loop.extent, tirx.IntImm) and loop.extent.value <= 1
    return bool(loop.kind == tirx.ForKind.PARALLEL) and not once


def _text(access: _Access) -> str:
    return f"{access.buffer.name}[{', '.join(map(str, access.indices))}]"
