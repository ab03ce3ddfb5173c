"""Define the launch configurations of the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Describe how one kernel is launched.

    Attributes:
        BV: columns of V per program, or per turn of its loop.
        warps: per program.
        stages: of the software pipeline.
    """

    BV: int
    warps: int
    stages: int

    def __repr__(self) -> str:
        return f"Tiles({self.BV}, {self.warps}, {self.stages})"


@dataclass(frozen=True)
class Config:
    """Describe how the kernels of the sequence op are launched.

    Attributes:
        C: tokens per chunk.
        solve, states, output: of the forward; `solve` has no columns of V.
        local_gradients, state_gradients, pair_gradients, token_gradients: of the backward.
        pair_rows: rows of the squares that a program of `pair_gradients` has.
        reload: whether `token_gradients` reads k again instead of holding it in registers.
        measured: where and when, or that it was not.
        chunks_per_state: chunks per kept state in the forward.
    """

    C: int
    solve: Tiles
    states: Tiles
    output: Tiles
    local_gradients: Tiles
    state_gradients: Tiles
    pair_gradients: Tiles
    token_gradients: Tiles
    pair_rows: int
    reload: bool
    measured: str
    chunks_per_state: int = 1


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
