"""List the rows and the tasks of the ablation table, with the paper's own figures.

The rows are those of Table S.1 of arXiv 2412.06464, and more for what it leaves out: the delta
term, both terms, the normalisation of q and k, and no feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FULL = "full"
"""The row that every other one differs from in one part."""

WIDTH = 64

BASE: dict[str, Any] = {"num_heads": 4, "head_dim": 16}
"""Arguments of GatedDeltaNet in the full row, beside its width; all others have their defaults."""


@dataclass(frozen=True)
class Variant:
    """Hold one row of the table.

    Attributes:
        differs: what the layer does otherwise than in the full row.
        options: arguments of GatedDeltaNet that differ from `BASE`.
        perplexity, accuracy: in the paper's table, in percent the second; None where it has no
            such row.
    """

    differs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    accuracy: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of GatedDeltaNet beside its width."""
        return {**BASE, **self.options}


_L1 = {"qk_norm": "l1"}

VARIANTS: dict[str, Variant] = {
    FULL: Variant("nothing: 4 heads of 16, L2 and SiLU", {}, 27.35, 47.26),
    "no-decay": Variant("rule delta, α = 1", {"rule": "delta"}, 30.87, 45.12),
    "no-delta": Variant("rule gated, Mamba2's recurrence", {"rule": "gated"}),
    "linear": Variant("rule linear, neither decay nor delta", {"rule": "linear"}),
    "no-output-norm": Variant("no norm of the output", {"output_norm": False}, 27.55, 47.07),
    "no-output-gate": Variant("no gate of the output", {"output_gate": None}, 29.12, 45.46),
    "no-convolution": Variant("no short convolution", {"short_conv": 0}, 28.95, 46.16),
    "l2-relu": Variant("ReLU for SiLU on q and k", {"feature_map": "relu"}, 27.67, 46.94),
    "l2-elu": Variant("1 + ELU for SiLU on q and k", {"feature_map": "elu"}, 27.58, 47.17),
    "l2-none": Variant("no feature map on q and k", {"feature_map": "none"}),
    "l1-silu": Variant("L1 for L2 on q and k", _L1, 30.18, 46.09),
    "l1-relu": Variant("L1 and ReLU on q and k", {**_L1, "feature_map": "relu"}, 30.79, 45.92),
    "l1-elu": Variant("L1 and 1 + ELU on q and k", {**_L1, "feature_map": "elu"}, 30.34, 46.05),
    "no-qk-norm": Variant("no norm of q and k", {"qk_norm": None}),
    "head-8": Variant("8 heads of 8", {"num_heads": 8, "head_dim": 8}, 28.31, 46.35),
    "head-32": Variant("2 heads of 32", {"num_heads": 2, "head_dim": 32}, 27.13, 47.38),
}
"""The rows by name. The paper's heads are 128 wide in its full row, 64 and 256 in the last two."""

ABSENT = {
    "order of layers in hybrids (Table S.2)": "needs three kinds of layers, these models have one "
    "layer",
}
"""Name what the paper ablates and this table does not, with the reason."""


@dataclass(frozen=True)
class Task:
    """Hold one column of the table.

    Attributes:
        what: what is asked.
        unit: "share" of right answers, or "bits" per byte, of which fewer are better.
    """

    what: str
    unit: str = "share"

    @property
    def sign(self) -> int:
        """Return 1 where more is better, else -1."""
        return 1 if self.unit == "share" else -1


TEXT = "text"

TASKS: dict[str, Task] = {
    "recall": Task("24 pairs are written, then each key is asked for"),
    "overwrite": Task("12 keys are written twice, then asked for: the second value is right"),
    "switch": Task("12 pairs, a separator, 12 pairs; a key from before it is answered 'none'"),
    TEXT: Task(
        "the next byte of the demo's text, of which the last tenth is not trained on", "bits"
    ),
}
"""The columns by name."""


@dataclass(frozen=True)
class Settings:
    """Hold the sizes of the experiment.

    Attributes:
        steps: of every task. The tasks of keys and values begin with a copy of a model that was
            taught to recall 8 pairs, for twice the steps with twice the sequences.
        seeds: trainings of each row, with seeds 0, 1, ...
        batch: sequences of a step.
        length: bytes of a sequence of text.
        evaluated: sequences of a task that are answered at the end, the same for every row.
        rate: the highest learning rate, of all rows.
    """

    steps: int = 150
    seeds: int = 3
    batch: int = 32
    length: int = 64
    evaluated: int = 256
    rate: float = 1e-2

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


QUICK = Settings(steps=4, seeds=2, batch=8, evaluated=16)
"""Sizes at which everything runs in seconds and nothing is learnt."""
