"""Define the launch configurations of the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Describe how one kernel is launched.

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
    """Describe how the kernels of the sequence op are launched.

    Attributes:
        C: tokens per chunk.
        solve, states: of the forward; `solve` has no columns of V.
        state_gradients, token_gradients: of the backward.
        segment: chunks per segment; None leaves it to the rule of `config.segment_chunks`.
        measured: where and when, or that it was not.
    """

    C: int
    solve: Tiles
    states: Tiles
    state_gradients: Tiles
    token_gradients: Tiles
    measured: str
    segment: int | None = None


@dataclass(frozen=True)
class StepConfig:
    """Describe how the kernel of the decode ops is launched.

    Attributes:
        BV: columns of V per program.
        threads: per program.
        measured: where and when, or that it was not.
    """

    BV: int
    threads: int
    measured: str
