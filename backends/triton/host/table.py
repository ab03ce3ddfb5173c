"""List the launch configurations of the kernels, by device class, head dims and dtype.

A row is pasted here as `gdn-ops bench --tune triton` prints it, and says where it was measured.
A row that no GPU has measured was chosen because it compiles without spilling at K = V = 128 in 16
bits; what was tried is in docs/backends.md.

The head-dim class is the larger of K and V, padded to a power of two, at least 64; the dtype class
is "low" for bfloat16 and float16.
"""

from __future__ import annotations

from gdn_ops.backends.triton.host.shapes import Config, StepConfig, Tiles

UNMEASURED = "compiled ahead of time only, not measured"

# fmt: off
SEQUENCE: dict[tuple[str, int, str], Config] = {
    ("sm_80", 64, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(64, 4, 2),
        reads_back=Tiles(64, 4, 2), state_gradients=Tiles(64, 4, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("sm_80", 64, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_80", 128, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 8, 2), output=Tiles(128, 8, 2),
        reads_back=Tiles(128, 8, 2), state_gradients=Tiles(64, 8, 2),
        pair_gradients=Tiles(64, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_80", 128, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_80", 256, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 8, 1), states=Tiles(32, 8, 1), output=Tiles(64, 8, 1),
        reads_back=Tiles(64, 8, 1), state_gradients=Tiles(32, 8, 1),
        pair_gradients=Tiles(32, 8, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_80", 256, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 8, 1), states=Tiles(16, 8, 1), output=Tiles(16, 8, 1),
        reads_back=Tiles(16, 8, 1), state_gradients=Tiles(16, 8, 1),
        pair_gradients=Tiles(16, 8, 1), token_gradients=Tiles(16, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_90", 64, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(64, 4, 2),
        reads_back=Tiles(64, 4, 2), state_gradients=Tiles(64, 4, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("sm_90", 64, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_90", 128, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(128, 8, 2),
        reads_back=Tiles(128, 8, 2), state_gradients=Tiles(64, 8, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("sm_90", 128, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_90", 256, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 8, 1), states=Tiles(32, 8, 1), output=Tiles(64, 8, 1),
        reads_back=Tiles(64, 8, 1), state_gradients=Tiles(32, 8, 1),
        pair_gradients=Tiles(32, 8, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_90", 256, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 8, 1), states=Tiles(16, 8, 1), output=Tiles(16, 8, 1),
        reads_back=Tiles(16, 8, 1), state_gradients=Tiles(16, 8, 1),
        pair_gradients=Tiles(16, 8, 1), token_gradients=Tiles(16, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_100", 64, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(64, 4, 2),
        reads_back=Tiles(64, 4, 2), state_gradients=Tiles(64, 4, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("sm_100", 64, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_100", 128, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(128, 8, 2),
        reads_back=Tiles(128, 8, 2), state_gradients=Tiles(64, 8, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("sm_100", 128, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_100", 256, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 8, 1), states=Tiles(32, 8, 1), output=Tiles(64, 8, 1),
        reads_back=Tiles(64, 8, 1), state_gradients=Tiles(32, 8, 1),
        pair_gradients=Tiles(32, 8, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("sm_100", 256, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 8, 1), states=Tiles(16, 8, 1), output=Tiles(16, 8, 1),
        reads_back=Tiles(16, 8, 1), state_gradients=Tiles(16, 8, 1),
        pair_gradients=Tiles(16, 8, 1), token_gradients=Tiles(16, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("gfx942", 64, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(64, 4, 2),
        reads_back=Tiles(64, 4, 2), state_gradients=Tiles(64, 4, 2),
        pair_gradients=Tiles(64, 8, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("gfx942", 64, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("gfx942", 128, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 4, 1), states=Tiles(64, 4, 2), output=Tiles(128, 8, 1),
        reads_back=Tiles(128, 8, 2), state_gradients=Tiles(64, 4, 2),
        pair_gradients=Tiles(64, 4, 1), token_gradients=Tiles(64, 8, 1),
        pair_rows=64, reload=False, measured=UNMEASURED,
    ),
    ("gfx942", 128, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 4, 1), states=Tiles(32, 4, 1), output=Tiles(32, 4, 1),
        reads_back=Tiles(32, 4, 1), state_gradients=Tiles(32, 4, 1),
        pair_gradients=Tiles(32, 4, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("gfx942", 256, "low"): Config(
        C=64, every=1, prepare=Tiles(0, 8, 1), states=Tiles(32, 8, 1), output=Tiles(64, 8, 1),
        reads_back=Tiles(64, 8, 1), state_gradients=Tiles(32, 8, 1),
        pair_gradients=Tiles(32, 8, 1), token_gradients=Tiles(32, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
    ("gfx942", 256, "float32"): Config(
        C=32, every=1, prepare=Tiles(0, 8, 1), states=Tiles(16, 8, 1), output=Tiles(16, 8, 1),
        reads_back=Tiles(16, 8, 1), state_gradients=Tiles(16, 8, 1),
        pair_gradients=Tiles(16, 8, 1), token_gradients=Tiles(16, 8, 1),
        pair_rows=32, reload=True, measured=UNMEASURED,
    ),
}
"""(device class, head-dim class, dtype class) -> how the sequence op is launched."""

STEP: dict[tuple[str, int], StepConfig] = {
    ("sm_80", 64): StepConfig(BV=16, warps=1, measured=UNMEASURED),
    ("sm_80", 128): StepConfig(BV=16, warps=2, measured=UNMEASURED),
    ("sm_80", 256): StepConfig(BV=16, warps=4, measured=UNMEASURED),
    ("sm_90", 64): StepConfig(BV=16, warps=1, measured=UNMEASURED),
    ("sm_90", 128): StepConfig(BV=16, warps=2, measured=UNMEASURED),
    ("sm_90", 256): StepConfig(BV=16, warps=4, measured=UNMEASURED),
    ("sm_100", 64): StepConfig(BV=16, warps=1, measured=UNMEASURED),
    ("sm_100", 128): StepConfig(BV=16, warps=2, measured=UNMEASURED),
    ("sm_100", 256): StepConfig(BV=16, warps=4, measured=UNMEASURED),
    ("gfx942", 64): StepConfig(BV=16, warps=1, measured=UNMEASURED),
    ("gfx942", 128): StepConfig(BV=16, warps=2, measured=UNMEASURED),
    ("gfx942", 256): StepConfig(BV=16, warps=4, measured=UNMEASURED),
}
"""(device class, head-dim class) -> how the decode ops are launched."""
# fmt: on
