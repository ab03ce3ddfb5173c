"""List the launch configurations of the kernels, by device class, head dims and dtype.

A row is pasted here as `gdn-ops bench --tune tilelang` prints it, and says where it was measured.
A row that no GPU has measured was chosen because it compiles without spilling at K = V = 128 in 16
bits.

The width class is K padded to a multiple of 64; the dtype class is "low" for bfloat16 and float16.
"""

from __future__ import annotations

from gdn_ops.backends.tilelang.host.shapes import Config, StepConfig, Tiles

UNMEASURED = "compiled ahead of time only, not measured"

# fmt: off
SEQUENCE: dict[tuple[str, int, str], Config] = {
    ("sm_90a", 64, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 128, 2), reverse=Tiles(64, 128, 2),
        gradients=Tiles(64, 256, 2), measured=UNMEASURED,
    ),
    ("sm_90a", 64, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 0), reverse=Tiles(32, 128, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_90a", 128, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 128, 2), reverse=Tiles(64, 128, 2),
        gradients=Tiles(64, 256, 1), measured=UNMEASURED,
    ),
    ("sm_90a", 128, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 256, 0), reverse=Tiles(32, 128, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_90a", 192, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 2), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 1), measured=UNMEASURED,
    ),
    ("sm_90a", 192, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_90a", 256, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 1), measured=UNMEASURED,
    ),
    ("sm_90a", 256, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_80", 64, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 128, 1), reverse=Tiles(64, 128, 1),
        gradients=Tiles(64, 256, 0), measured=UNMEASURED,
    ),
    ("sm_80", 64, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 0), reverse=Tiles(32, 128, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_80", 128, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 256, 1), reverse=Tiles(64, 128, 1),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_80", 128, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 256, 0), reverse=Tiles(32, 256, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_80", 192, "low"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 128, 0), measured=UNMEASURED,
    ),
    ("sm_80", 192, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_80", 256, "low"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 128, 0), measured=UNMEASURED,
    ),
    ("sm_80", 256, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_100a", 64, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 128, 2), reverse=Tiles(64, 128, 2),
        gradients=Tiles(64, 256, 2), measured=UNMEASURED,
    ),
    ("sm_100a", 64, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 0), reverse=Tiles(32, 128, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_100a", 128, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(64, 128, 2), reverse=Tiles(64, 128, 2),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_100a", 128, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 256, 0), reverse=Tiles(32, 128, 0),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_100a", 192, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 2), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 1), measured=UNMEASURED,
    ),
    ("sm_100a", 192, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_100a", 256, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 1), measured=UNMEASURED,
    ),
    ("sm_100a", 256, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 64, "low"): Config(
        C=64, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 64, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 128, "low"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(32, 128, 1), reverse=Tiles(32, 128, 1),
        gradients=Tiles(32, 256, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 128, "float32"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 192, "low"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
    ("sm_120a", 256, "low"): Config(
        C=32, solve=Tiles(0, 128, 1), walk=Tiles(16, 128, 0), reverse=Tiles(16, 128, 0),
        gradients=Tiles(16, 128, 0), measured=UNMEASURED,
    ),
}
"""(device class, width class, dtype class) -> how the sequence op is launched."""

STEP: dict[tuple[str, int], StepConfig] = {
    ("sm_90a", 64): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_90a", 128): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_90a", 192): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_90a", 256): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_80", 64): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_80", 128): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_80", 192): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_80", 256): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_100a", 64): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_100a", 128): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_100a", 192): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_100a", 256): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_120a", 64): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_120a", 128): StepConfig(BV=16, threads=32, measured=UNMEASURED),
    ("sm_120a", 192): StepConfig(BV=8, threads=32, measured=UNMEASURED),
    ("sm_120a", 256): StepConfig(BV=8, threads=32, measured=UNMEASURED),
}
"""(device class, width class) -> how the decode ops are launched."""
# fmt: on

_FULL = (
    "dQ, dK and two squares of a key head, with what is multiplied, take all 255 registers; chunks "
    "of 32 would not spill and double the steps of the serial walk"
)

GRANTED: dict[tuple[str, str], tuple[int, str]] = {
    ("gradients", "sm_80"): (10, _FULL),
    ("gradients", "sm_100a"): (18, _FULL),
}
"""(kernel, target) -> the most spills that a reference may have there, and why."""
