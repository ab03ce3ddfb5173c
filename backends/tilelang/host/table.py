"""List the launch configurations of the kernels, by device class, head dims and dtype.

A row is pasted into a table as `gdn-ops bench --tune tilelang` prints it, and says where it was
measured. What no GPU has measured was chosen because it compiles without spilling at K = V = 128 in
16 bits; without a row of its own, a device class has that of sm_90a.

The width class is K padded to a multiple of 64; the dtype class is "low" for bfloat16. For float16,
whose operands are two tiles where those of float32 are three, it is "float16", with the rows of
float32 where it has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdn_ops.aot.gpu_limits import AllowedSpills
from gdn_ops.kernel_support.tuning import StepConfig, Tiles

UNMEASURED = "compiled ahead of time only, not measured"


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


def _row(C: int, states: Tiles, state_gradients: Tiles, token_gradients: Tiles) -> Config:
    """Return a configuration that no GPU has measured."""
    return Config(C, Tiles(0, 4, 1), states, state_gradients, token_gradients, UNMEASURED)


# fmt: off
_HOPPER: dict[tuple[int, str], Config] = {
    (64, "low"): _row(64, Tiles(64, 4, 2), Tiles(64, 4, 2), Tiles(64, 8, 2)),
    (64, "float32"): _row(32, Tiles(32, 4, 0), Tiles(32, 4, 0), Tiles(32, 8, 0)),
    (128, "low"): _row(64, Tiles(64, 4, 2), Tiles(64, 4, 2), Tiles(64, 8, 1)),
    (128, "float32"): _row(32, Tiles(32, 8, 0), Tiles(32, 4, 0), Tiles(32, 8, 0)),
    (192, "low"): _row(64, Tiles(32, 4, 2), Tiles(32, 4, 1), Tiles(32, 8, 1)),
    (192, "float32"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
    (256, "low"): _row(64, Tiles(32, 4, 1), Tiles(32, 4, 1), Tiles(32, 8, 1)),
    (256, "float32"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
}

_OWN: dict[tuple[str, int, str], Config] = {
    **{
        (target, *key): config
        for target in ("sm_90a", "sm_80", "sm_100a") for key, config in _HOPPER.items()
    },
    ("sm_80", 64, "low"): _row(64, Tiles(64, 4, 1), Tiles(64, 4, 1), Tiles(64, 8, 0)),
    ("sm_80", 128, "low"): _row(64, Tiles(64, 8, 1), Tiles(64, 4, 1), Tiles(16, 8, 0)),
    ("sm_80", 128, "float32"): _row(32, Tiles(32, 8, 0), Tiles(32, 8, 0), Tiles(32, 8, 0)),
    ("sm_80", 192, "low"): _row(32, Tiles(32, 4, 1), Tiles(32, 4, 1), Tiles(32, 4, 0)),
    ("sm_80", 256, "low"): _row(32, Tiles(32, 4, 1), Tiles(32, 4, 1), Tiles(32, 4, 0)),
    ("sm_100a", 128, "low"): _row(64, Tiles(64, 8, 2), Tiles(32, 8, 2), Tiles(16, 8, 0)),
    ("sm_120a", 64, "low"): _row(64, Tiles(32, 4, 1), Tiles(32, 4, 1), Tiles(32, 8, 0)),
    ("sm_120a", 64, "float32"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
    ("sm_120a", 128, "low"): _row(32, Tiles(32, 4, 1), Tiles(32, 4, 1), Tiles(32, 8, 0)),
    ("sm_120a", 128, "float32"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
    ("sm_120a", 192, "low"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
    ("sm_120a", 192, "float16"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
    ("sm_120a", 256, "low"): _row(32, Tiles(16, 4, 0), Tiles(16, 4, 0), Tiles(16, 4, 0)),
}

SEQUENCE: dict[tuple[str, int, str], Config] = {
    **{(*key[:2], "float16"): row for key, row in _OWN.items() if key[2] == "float32"},
    **_OWN,
}
"""(device class, width class, dtype class) -> how the sequence op is launched."""

STEP: dict[tuple[str, int], StepConfig] = {
    **{
        (target, width): StepConfig(BV=16 if width <= 128 else 8, warps=1, measured=UNMEASURED)
        for target in ("sm_90a", "sm_80", "sm_100a", "sm_120a") for width in (64, 128, 192, 256)
    },
}
"""(device class, width class) -> how the decode ops are launched."""
# fmt: on

_FULL = (
    "dQ, dK and two squares of a key head, with what is multiplied, take all 255 registers; chunks "
    "of 32 would not spill and double the steps of the serial walk"
)

ALLOWED_SPILLS: AllowedSpills = {("token_gradients", "sm_80"): (6, _FULL)}
"""(kernel, target) -> the most spills that a reference may have there, and why.

TileLang places tiles of equal size in an order that changes from run to run: 5 or 6 are spilled.
"""
