"""Find what uses a product that nothing has waited for, which a serial run on a CPU cannot show.

On Hopper a product that is issued without a wait runs beside the statements that follow it, until a
later product is waited for: then all that were issued before are done. Until then nothing may read
or write its result, or write to shared memory: TileLang gives the memory of a tile to another one
after the last statement that names it, so that any tile may lie where an operand does. In a
pipelined loop the copy engine writes a tile again after that statement, which may not be such a
product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tilelang  # noqa: F401, it is what brings tvm
from tvm import tirx


@dataclass(frozen=True, eq=False)
class _Running:
    """Describe a product that was issued and not waited for.

    Attributes:
        result: the fragment that it adds to.
    """

    result: Any


class Products:
    """Record the products that run beside the statement that a pass visits."""

    def __init__(self) -> None:
        self._running: tuple[_Running, ...] = ()
        self._loaded: set[Any] = set()
        self._given_back: set[Any] = set()

    def product(self, result: Any, operands: tuple[Any, ...], *, is_awaited: bool) -> None:
        """Record a product; one that is awaited ends all that were issued before it.

        Raises:
            ValueError: an operand is the result of a product that runs.
        """
        for operand in operands:
            self.load(operand)
        if is_awaited:
            self._running = ()
        else:
            self._running += (_Running(result),)
            self._given_back.update(operands)

    def load(self, buffer: Any) -> None:
        """Check that what is read is not the result of a product that runs.

        Raises:
            ValueError: it is.
        """
        if any(buffer.same_as(product.result) for product in self._running):
            raise ValueError(f"{_named(buffer)} is read before its product has been waited for")
        self._given_back.discard(buffer)

    def store(self, buffer: Any, value: Any) -> None:
        """Check that what is written is no result of a product that runs, and not shared.

        Args:
            buffer: the tensor or tile.
            value: the expression that is stored.

        Raises:
            ValueError: it is.
        """
        name = str(buffer.name) or "a tile"
        if any(buffer.same_as(product.result) for product in self._running):
            raise ValueError(f"{name} is written before its product has been waited for")
        if self._running and str(buffer.scope()).startswith("shared"):
            raise ValueError(f"{name} is written while a product runs that may read there")
        self._given_back.discard(buffer)
        if _reads_tensor(value):
            self._loaded.add(buffer)

    @contextlib.contextmanager
    def loop(self) -> Iterator[None]:
        """Enter a loop; the grid of programs is one, too.

        Raises:
            ValueError: a product of the loop runs where it ends, or is the last statement that
                names a tile which the loop loads.
        """
        before, outside = self._running, self._loaded
        self._loaded = set()
        yield
        if any(product not in before for product in self._running):
            raise ValueError("a product has not been waited for where a loop, or the kernel, ends")
        for tile in self._loaded & self._given_back:
            raise ValueError(f"{_named(tile)} is loaded again while a product of it may run")
        self._running, self._loaded = before, outside | self._loaded

    @contextlib.contextmanager
    def branches(self) -> Iterator[None]:
        """Enter the branches of a condition; what runs before them may run after them."""
        before = self._running
        yield
        self._running = (*before, *(x for x in self._running if x not in before))


def _named(buffer: Any) -> str:
    return str(buffer.name) or "a tile"


def _reads_tensor(value: Any) -> bool:
    """Return whether an expression has an element of a tensor, which is in global memory."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.BufferLoad) and node.buffer.scope() == "global":
            found.append(node)

    tirx.stmt_functor.post_order_visit(value, visit)
    return bool(found)
