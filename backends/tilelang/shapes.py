"""What a configuration of the kernels consists of."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Tiles:
    """How one kernel is launched.

    Attributes:
        BV: columns of V per program, or per turn of its loop; 0 where a kernel has none.
        threads: per program.
        stages: of the software pipeline.
    """

    BV: int
    threads: int
    stages: int

    def __repr__(self) -> str:
        return f"Tiles({self.BV}, {self.threads}, {self.stages})"


@dataclass(frozen=True)
class Config:
    """How the kernels of the sequence op are launched.

    Attributes:
        C: tokens per chunk.
        solve, walk: of the forward; `solve` has no columns of V.
        reverse, gradients: of the backward.
        segment: chunks per segment; None leaves it to the rule of `config.segment_chunks`.
        measured: where and when, or that it was not.
    """

    C: int
    solve: Tiles
    walk: Tiles
    reverse: Tiles
    gradients: Tiles
    measured: str
    segment: int | None = None


@dataclass(frozen=True)
class StepConfig:
    """How the kernel of the decode ops is launched.

    Attributes:
        BV: columns of V per program.
        threads: per program.
        measured: where and when, or that it was not.
    """

    BV: int
    threads: int
    measured: str


Key = tuple[str, int, str] | tuple[str, int]


@dataclass(frozen=True)
class Row:
    """A row of the table: its key and what it says. str() is the row as source text."""

    key: Key
    config: Config | StepConfig

    def __str__(self) -> str:
        found = [(f, getattr(self.config, f.name)) for f in fields(self.config)]
        # What is left at its default stands in no row of the table.
        values = [(f.name, value) for f, value in found if value != f.default]
        text = ", ".join(f"{name}={value!r}" for name, value in values)
        return f"{self.key!r}: {type(self.config).__name__}({text}),"
