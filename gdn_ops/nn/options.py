"""Check the options of the layer, and compute the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor
from torch.nn import functional

from gdn_ops.gates import check_lower_bound
from gdn_ops.nn.values import check_counts, check_flags
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.ops import GATED_DELTA

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "elu": lambda x: 1 + functional.elu(x),
    "none": lambda x: x,
}

QK_NORMS = ("l2", "l1", None)

WIDTH_OF_KEYS = 0.75
"""Width of all key heads over the hidden width: a mixer has 6 hidden² parameters, with values twice
as wide."""


def fail(message: str) -> NoReturn:
    """Raise a SpecError that says what is wrong with a layer's arguments."""
    raise SpecError(f"GatedDeltaNet: {message}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        fail(f"{name} is {value!r}, should be one of {', '.join(map(str, choices))}")


def check_member(
    rule: str,
    channel_decay: bool,
    lower_bound: float | None,
    erase_write: bool,
    gate_rank: int | None,
) -> None:
    """Check the options that make another member of the family of the layer.

    Args:
        rule: a known rule.
        channel_decay, lower_bound, erase_write, gate_rank: of the layer.

    Raises:
        SpecError: one of them has a wrong value, or the rule has nothing that it is about.
    """
    check_flags("GatedDeltaNet", channel_decay=channel_decay, erase_write=erase_write)
    if gate_rank is not None:
        check_counts("GatedDeltaNet", gate_rank=gate_rank)
    if lower_bound is not None:
        check_lower_bound("GatedDeltaNet", lower_bound)
    known = GATED_DELTA.rule[rule]
    if not known.has_decay and channel_decay:
        fail(f"channel_decay is True, should be False: rule {rule!r} has no decay")
    if not known.has_decay and lower_bound is not None:
        fail(f"lower_bound is {lower_bound}, should be None: rule {rule!r} has no decay")
    if not known.has_erase and erase_write:
        fail(
            f"erase_write is True, should be False: rule {rule!r} has no error term, and β is its "
            f"write strength"
        )


def key_width(hidden_size: int, heads: int) -> int:
    """Return the published width of a key head."""
    width = WIDTH_OF_KEYS * hidden_size / heads
    if width != int(width):
        fail(
            f"head_dim is not given and 0.75 hidden_size / num_heads = {width:.6g} is no integer; "
            f"pass head_dim="
        )
    return int(width)


def value_width(head_dim: int, expand_v: float) -> int:
    """Return the width of a value head, expand_v * head_dim."""
    width = expand_v * head_dim
    if round(width) < 1 or abs(width - round(width)) > 1e-6:
        fail(f"expand_v is {expand_v}, should make expand_v * head_dim = {width:.6g} an integer")
    return round(width)
