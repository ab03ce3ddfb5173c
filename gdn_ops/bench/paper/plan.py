"""Plan a run of `gdn-ops bench paper`: which models, lengths and contexts, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.paper.skeletons import HEAD, MIXERS, Shape, check_mixers
from gdn_ops.dispatch import registry
from gdn_ops.environment.devices import check_device
from gdn_ops.spec.errors import SpecError

MINUTES = 25.0
"""Time after which no further round is started, by default."""

PARTS = {"decode": 0.08, "prefill": 0.14, "training": 0.46, "widths": 0.32}
"""List what is timed, with its share of the time."""

STAGES = ("models compared with their definitions", "memory", *PARTS)
"""List what `suite.run` logs, in this order."""


@dataclass(frozen=True)
class Plan:
    """Hold what is measured.

    Attributes:
        shape: of the models.
        tokens: in a batch of prefill and training, whatever the length.
        lengths: of sequences, which divide `tokens`.
        widths: of single layers.
        width_tokens, width_lengths: as of models, for single layers.
        contexts: tokens before the one that is decoded.
        mixers: names of MIXERS.
        setting: dtype and device.
        minutes: time for everything.
        backend: of the recurrent layers.
    """

    shape: Shape
    tokens: int
    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    width_tokens: int
    width_lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    mixers: tuple[str, ...] = tuple(MIXERS)
    setting: Setting = field(default_factory=Setting)
    minutes: float = MINUTES
    backend: str = "auto"

    def seconds(self, part: str) -> float:
        """Return the time of one of PARTS, in seconds."""
        return 60 * self.minutes * PARTS[part]


CPU = Plan(
    Shape(width=256, layers=6, window=2048, vocabulary=1024),
    tokens=16384,
    lengths=(1024, 2048, 4096, 8192, 16384),
    widths=(256, 512, 1024, 2048),
    width_tokens=8192,
    width_lengths=(256, 512, 1024, 2048, 4096, 8192),
    contexts=(1024, 4096, 16384, 65536, 131072),
)
"""Plan less than half an hour on two cores."""

GPU = replace(
    CPU,
    shape=Shape(width=1024, layers=12, window=2048, vocabulary=32000),
    widths=(512, 1024, 2048),
    width_tokens=16384,
    width_lengths=(512, 1024, 2048, 4096, 8192, 16384),
    setting=Setting("bfloat16", "cuda"),
)
"""Plan the run on a GPU."""

QUICK = replace(
    CPU,
    shape=Shape(width=128, layers=6, window=96, vocabulary=256),
    tokens=256,
    lengths=(64, 256),
    widths=(128, 256),
    width_tokens=128,
    width_lengths=(64, 128),
    contexts=(64, 512),
    minutes=0.0,
)
"""Plan one round of something small, which shows that all runs and nothing about speed."""


def make_plan(
    *,
    is_quick: bool = False,
    mixers: Sequence[str] = (),
    lengths: Sequence[int] = (),
    tokens: int | None = None,
    width: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    minutes: float | None = None,
    backend: str = "auto",
) -> Plan:
    """Return a plan with what is asked for in the place of its defaults.

    Args:
        is_quick: whether to start from QUICK.
        mixers: names of MIXERS; all when not given.
        lengths: of sequences, tokens.
        tokens: of a batch.
        width: of the models.
        device: a torch device.
        dtype: float32 on a CPU, bfloat16 on a GPU when not given.
        minutes: time for everything.
        backend: of the recurrent layers.

    Raises:
        SpecError: a name is unknown, the device is not there, or sizes do not fit.
    """
    check_device(device)
    check_mixers(tuple(mixers))
    if backend != "auto":
        registry.get_backend(backend)
    is_cpu = device == "cpu"
    plan = QUICK if is_quick else CPU if is_cpu else GPU
    default = "float32" if is_cpu else "bfloat16"
    plan = replace(plan, setting=Setting(dtype or default, device), backend=backend)
    if width is not None:
        plan = replace(plan, shape=replace(plan.shape, width=width))
    plan = replace(
        plan,
        mixers=tuple(dict.fromkeys(mixers)) or plan.mixers,
        lengths=tuple(sorted(set(lengths))) or plan.lengths,
        tokens=tokens or plan.tokens,
        minutes=plan.minutes if minutes is None else minutes,
    )
    _check_sizes(plan)
    return plan


def _check_sizes(plan: Plan) -> None:
    if plan.shape.width % HEAD:
        raise SpecError(
            f"bench paper: width is {plan.shape.width}, should be a multiple of {HEAD}, the width "
            f"for each head"
        )
    for length in plan.lengths:
        if plan.tokens % length:
            raise SpecError(
                f"bench paper: lengths has {length}, which does not divide tokens = {plan.tokens}; "
                f"every batch should have as many tokens as the others"
            )
