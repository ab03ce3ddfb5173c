"""Say what the launches of two cases may cost: a line for each, to be tightened.

`gdn-ops compile` fails where code is over its budget (`gdn_ops.aot.budgets`). The numbers are those
of the kernels when they were last changed, by one version of Triton; others make other code.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton

from gdn_ops.aot.budgets import Budget, Budgets
from gdn_ops.aot.sampling import REFERENCE as SCALAR

CHANNELS = "kimi-32-8192"
"""The case of a decay of every key channel."""

# fmt: off
BUDGETS: Mapping[str, Budgets] = {
    # (case, kernel, direction and place, target): instructions, barriers, HGMMA with A in
    # registers, programs, spills. The walk for the output of the first case has 642 instructions in
    # inference, where nothing is kept.
    "3.9": {
        (SCALAR, "prepare", "forward", "sm_90"): Budget(4382, 18, 0, 2),
        (SCALAR, "walk", "forward 1", "sm_90"): Budget(498, 7, 16, 2),
        (SCALAR, "compose", "forward", "sm_90"): Budget(1948, 12, 0, 4),
        (SCALAR, "walk", "forward 3", "sm_90"): Budget(780, 19, 28, 2),
        (SCALAR, "walk_back", "backward 0", "sm_90"): Budget(634, 11, 20, 2),
        (SCALAR, "compose", "backward", "sm_90"): Budget(1768, 11, 0, 3),
        (SCALAR, "walk_back", "backward 2", "sm_90"): Budget(728, 17, 20, 2),
        (SCALAR, "token_gradients", "backward", "sm_90"): Budget(1671, 27, 0, 2),
        (CHANNELS, "prepare_channels", "forward", "sm_90"): Budget(63819, 1059, 384, 2, 5),
        (CHANNELS, "walk", "forward 1", "sm_90"): Budget(483, 10, 16, 2),
        (CHANNELS, "compose", "forward", "sm_90"): Budget(180, 4, 0, 4),
        (CHANNELS, "walk", "forward 3", "sm_90"): Budget(767, 22, 28, 1, 15),
        (CHANNELS, "walk_back", "backward 0", "sm_90"): Budget(624, 14, 20, 1),
        (CHANNELS, "compose", "backward", "sm_90"): Budget(144, 3, 0, 3),
        (CHANNELS, "walk_back", "backward 2", "sm_90"): Budget(724, 20, 20, 1),
        (CHANNELS, "square_gradients", "backward", "sm_90"): Budget(310, 3, 0, 2),
        (CHANNELS, "channel_gradients", "backward", "sm_90"): Budget(31949, 912, 576, 1),
    },
    "3.6": {
        (SCALAR, "prepare", "forward", "sm_90"): Budget(4420, 22, 0, 2),
        (SCALAR, "walk", "forward 1", "sm_90"): Budget(532, 4, 16, 2),
        (SCALAR, "compose", "forward", "sm_90"): Budget(1928, 12, 0, 4),
        (SCALAR, "walk", "forward 3", "sm_90"): Budget(811, 14, 28, 2),
        (SCALAR, "walk_back", "backward 0", "sm_90"): Budget(652, 7, 20, 2),
        (SCALAR, "compose", "backward", "sm_90"): Budget(1768, 11, 0, 3),
        (SCALAR, "walk_back", "backward 2", "sm_90"): Budget(711, 12, 20, 2),
        (SCALAR, "token_gradients", "backward", "sm_90"): Budget(1379, 25, 0, 2),
        (CHANNELS, "prepare_channels", "forward", "sm_90"): Budget(63163, 1018, 384, 2, 15),
        (CHANNELS, "walk", "forward 1", "sm_90"): Budget(508, 6, 16, 2),
        (CHANNELS, "compose", "forward", "sm_90"): Budget(180, 4, 0, 4),
        (CHANNELS, "walk", "forward 3", "sm_90"): Budget(723, 16, 28, 1),
        (CHANNELS, "walk_back", "backward 0", "sm_90"): Budget(624, 8, 20, 1),
        (CHANNELS, "compose", "backward", "sm_90"): Budget(144, 3, 0, 3),
        (CHANNELS, "walk_back", "backward 2", "sm_90"): Budget(758, 14, 20, 1),
        (CHANNELS, "square_gradients", "backward", "sm_90"): Budget(230, 2, 0, 2),
        (CHANNELS, "channel_gradients", "backward", "sm_90"): Budget(30143, 884, 576, 1, 47),
    },
}
"""By the version of Triton: that of constraints.txt, and the oldest one."""
# fmt: on


def current() -> Budgets:
    """Return the budgets for the Triton that is installed; none where it has none."""
    return BUDGETS.get(".".join(triton.__version__.split(".")[:2]), {})
