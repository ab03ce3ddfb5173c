"""Support the tables of kernel backends: print a row as source text, run with another row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar, runtime_checkable

from gdn_ops.call.bind import Call

Config = TypeVar("Config")


@runtime_checkable
class Tunable(Protocol):
    """Describe a backend that `gdn-ops bench --tune` can try configurations of."""

    def tunables(self, call: Call) -> Sequence[object]:
        """Return the configurations to try on a call; none where there is nothing to tune.

        str() of one is the row to paste into the backend's table.
        """

    def using(self, config: object) -> AbstractContextManager[object]:
        """Return a context in which every call, on any thread, runs with one of `tunables`.

        Any thread: autograd runs a backward on a thread of its own.
        """


@dataclass(frozen=True)
class Row:
    """Hold a row of a table: its key and its configuration. str() is the row as source text.

    Attributes:
        key: the class of calls that the row is for, in the backend's terms.
        config: a frozen dataclass; the source text leaves out fields at their default.
    """

    key: tuple[Any, ...]
    config: Any

    def __str__(self) -> str:
        found = [(f, getattr(self.config, f.name)) for f in fields(self.config)]
        text = ", ".join(f"{f.name}={value!r}" for f, value in found if value != f.default)
        return f"{self.key!r}: {type(self.config).__name__}({text}),"


class Override:
    """Hold the row that a backend runs with instead of its table's, if there is one."""

    def __init__(self) -> None:
        self._row: Row | None = None

    def choose(self, table: Mapping[Any, Config], key: tuple[Any, ...]) -> Config:
        """Return the configuration for a key: of the override if it matches, else of the table."""
        if self._row is not None and self._row.key == key:
            config: Config = self._row.config
            return config
        return table[key]

    @contextlib.contextmanager
    def using(self, row: Row) -> Iterator[None]:
        """Run with a row instead of the table's, on every thread."""
        previous, self._row = self._row, row
        try:
            yield
        finally:
            self._row = previous
