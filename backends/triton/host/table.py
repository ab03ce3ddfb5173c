"""List the launch configurations of the kernels, by device class, head dims and dtype.

A row is pasted into the second part of a table as `gdn-ops bench --tune triton` prints it, and says
where it was measured. What no GPU has measured is the same for all that it suits, and was chosen
because it compiles without spilling at K = V = 128 in 16 bits; what was tried is in
docs/backends.md.

The head-dim class is K padded to a power of two, at least 64: columns of V are taken by blocks. The
dtype class is "low" for bfloat16. For float16, whose operands are TF32, it is "float16", with the
rows of float32 where it has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdn_ops.kernel_support.tuning import StepConfig, Tiles

UNMEASURED = "compiled ahead of time only, not measured"

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Device classes that have rows."""


_CHANNELS = Tiles(64, 8, 1)


@dataclass(frozen=True)
class Config:
    """Describe how the kernels of the sequence op are launched.

    Attributes:
        C: tokens per chunk.
        prepare, walk: of the forward; `prepare` has no columns of V.
        walk_back, token_gradients: of the backward.
        channel_gradients: of the backward of decays of channels, in the place of the last, and of
            what is formed for it.
        measured: where and when, or that it was not.
        descriptors: whether tiles are read by tensor descriptors where tensors allow it.
        together: programs of `walk` that a processor holds at a time, as compiled.
        segment: chunks of a segment of a sequence; None leaves it to `plan.segment_chunks`.
    """

    C: int
    prepare: Tiles
    walk: Tiles
    walk_back: Tiles
    token_gradients: Tiles
    measured: str
    descriptors: bool = False
    channel_gradients: Tiles = _CHANNELS
    together: int = 1
    segment: int | None = None


# fmt: off
_FLOAT32 = Config(
    C=32, prepare=Tiles(0, 4, 1), walk=Tiles(32, 4, 1), walk_back=Tiles(32, 4, 1),
    token_gradients=Tiles(32, 8, 1), measured=UNMEASURED,
    channel_gradients=Tiles(32, 8, 1),
)

_HOPPER = Config(
    C=64, prepare=Tiles(0, 4, 1), walk=Tiles(64, 4, 2), walk_back=Tiles(64, 4, 2),
    token_gradients=Tiles(64, 4, 2), measured=UNMEASURED,
)

_UNMEASURED: dict[tuple[int, str], Config] = {
    (64, "low"): _HOPPER,
    (64, "float32"): _FLOAT32,
    (128, "float32"): _FLOAT32,
    (256, "low"): Config(
        C=64, prepare=Tiles(0, 4, 1), walk=Tiles(32, 8, 1), walk_back=Tiles(32, 8, 1),
        token_gradients=Tiles(32, 8, 1), measured=UNMEASURED,
    ),
    (256, "float32"): Config(
        C=32, prepare=Tiles(0, 4, 1), walk=Tiles(16, 8, 1), walk_back=Tiles(16, 8, 1),
        token_gradients=Tiles(16, 8, 1), measured=UNMEASURED, channel_gradients=Tiles(32, 8, 1),
    ),
}

_ALIKE: dict[tuple[str, int, str], Config] = {
    **{(target, *key): config for target in TARGETS for key, config in _UNMEASURED.items()},
    # With 32 columns the walk spills over 100 registers, on sm_80 nearly all of them.
    **{
        (target, 128, "float32"): replace(_FLOAT32, walk=Tiles(16, 4, 1))
        for target in ("sm_80", "sm_90", "sm_100")
    },
    ("sm_80", 128, "low"): replace(
        _HOPPER, walk=Tiles(32, 8, 2), walk_back=Tiles(32, 8, 2),
        token_gradients=Tiles(32, 8, 2),
    ),
    ("sm_90", 128, "low"): replace(_HOPPER, together=2),
    ("sm_100", 128, "low"): replace(_HOPPER, walk=Tiles(64, 8, 2), walk_back=Tiles(64, 8, 2)),
    ("gfx942", 128, "low"): replace(
        _HOPPER, walk=Tiles(16, 4, 1), walk_back=Tiles(16, 4, 1),
        token_gradients=Tiles(64, 4, 1),
    ),
    ("gfx942", 256, "low"): replace(
        _UNMEASURED[256, "low"], walk=Tiles(16, 4, 1), walk_back=Tiles(16, 4, 1),
        token_gradients=Tiles(32, 4, 1),
    ),
}

_OWN: dict[tuple[str, int, str], Config] = {
    key: replace(row, descriptors=key[0] in ("sm_90", "sm_100")) for key, row in _ALIKE.items()
}

SEQUENCE: dict[tuple[str, int, str], Config] = {
    **{(*key[:2], "float16"): row for key, row in _OWN.items() if key[2] == "float32"},
    ("sm_80", 128, "float16"): _FLOAT32,
    **_OWN,
}
"""(device class, head-dim class, dtype class) -> how the sequence op is launched."""

STEP: dict[tuple[str, int], StepConfig] = {
    **{
        (target, width): StepConfig(BV=16, warps=width // 64, measured=UNMEASURED)
        for target in TARGETS for width in (64, 128, 256)
    },
}
"""(device class, head-dim class) -> how the decode ops are launched."""
# fmt: on
