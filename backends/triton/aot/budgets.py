"""Say what the launches of the reference case may cost: a line for each, to be tightened.

`gdn-ops compile` fails where code is over its budget (`gdn_ops.aot.budgets`). The numbers are those
of the kernels when they were last changed, by one version of Triton; others make other code.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton

from gdn_ops.aot.budgets import Budget, Budgets

# fmt: off
BUDGETS: Mapping[str, Budgets] = {
    # (kernel, direction, target): instructions, barriers, HGMMA with A in registers, programs
    "3.9": {
        ("solve", "forward", "sm_90"): Budget(2763, 50, 0, 2),
        ("states", "forward", "sm_90"): Budget(750, 11, 0, 2),
        ("output", "forward", "sm_90"): Budget(893, 19, 4, 1),
        ("states", "backward", "sm_90"): Budget(750, 11, 0, 2),
        ("local_gradients", "backward", "sm_90"): Budget(639, 3, 4, 2),
        ("state_gradients", "backward", "sm_90"): Budget(835, 11, 0, 1),
        ("pair_gradients", "backward", "sm_90"): Budget(1864, 40, 0, 1),
        ("token_gradients", "backward", "sm_90"): Budget(2814, 70, 0, 1),
    },
    "3.6": {
        ("solve", "forward", "sm_90"): Budget(3112, 54, 0, 2),
        ("states", "forward", "sm_90"): Budget(741, 11, 0, 2),
        ("output", "forward", "sm_90"): Budget(990, 18, 4, 1),
        ("states", "backward", "sm_90"): Budget(741, 11, 0, 2),
        ("local_gradients", "backward", "sm_90"): Budget(845, 2, 4, 1),
        ("state_gradients", "backward", "sm_90"): Budget(861, 11, 0, 1),
        ("pair_gradients", "backward", "sm_90"): Budget(1803, 38, 0, 1),
        ("token_gradients", "backward", "sm_90"): Budget(2648, 63, 0, 1),
    },
}
"""By the version of Triton: that of constraints.txt, and the oldest one."""
# fmt: on


def current() -> Budgets:
    """Return the budgets for the Triton that is installed; none where it has none."""
    return BUDGETS.get(".".join(triton.__version__.split(".")[:2]), {})
