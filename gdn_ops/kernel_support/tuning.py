"""Describe the rows of a backend's tables, and what `gdn-ops bench --tune` asks of a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from gdn_ops.call.bind import Call


@runtime_checkable
class Tunable(Protocol):
    """Describe a backend that `gdn-ops bench --tune` can try configurations of."""

    def tunables(self, call: Call) -> Sequence[object]:
        """Return the configurations to try on a call; none where there is nothing to tune.

        str() of one is the row to paste into the backend's table.
        """

    def using(self, config: object) -> AbstractContextManager[object]:
        """Return a context in which the calls of this thread run with one of `tunables`.

        So do the backwards of these calls, on whichever thread autograd runs them. Calls of other
        threads do not.
        """


TRIED: ContextVar[Mapping[Hashable, Any]] = ContextVar("tried", default={})  # noqa: B039
"""Hold what this thread tries in place of the choice of an owner."""


@contextlib.contextmanager
def trying(owner: Hashable, choice: object) -> Iterator[None]:
    """Try a choice in place of that of `owner`, in this thread and in backwards of its calls."""
    token = TRIED.set({**TRIED.get(), owner: choice})
    try:
        yield
    finally:
        TRIED.reset(token)


@dataclass(frozen=True)
class Tiles:
    """Describe how one kernel of the sequence op is launched.

    Attributes:
        BV: columns of V per program, or per turn of its loop; 0 where a kernel has none.
        warps: per program.
        stages: of the software pipeline.
    """

    BV: int
    warps: int
    stages: int

    def __repr__(self) -> str:
        return f"Tiles({self.BV}, {self.warps}, {self.stages})"


@dataclass(frozen=True)
class StepConfig:
    """Describe how the kernel of the decode ops is launched.

    Attributes:
        BV: columns of V per program.
        warps: per program.
        measured: where and when, or that it was not.
    """

    BV: int
    warps: int
    measured: str


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
        values = [(f, getattr(self.config, f.name)) for f in fields(self.config)]
        text = ", ".join(f"{f.name}={value!r}" for f, value in values if value != f.default)
        return f"{self.key!r}: {type(self.config).__name__}({text}),"
