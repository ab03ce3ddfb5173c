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
        ("prepare", "forward", "sm_90"): Budget(4382, 18, 0, 2),
        ("walk", "forward", "sm_90"): Budget(691, 13, 28, 2),
        ("walk", "backward", "sm_90"): Budget(662, 18, 16, 2),
        ("walk_back", "backward", "sm_90"): Budget(722, 16, 20, 1),
        ("pair_gradients", "backward", "sm_90"): Budget(1910, 40, 0, 1),
        ("token_gradients", "backward", "sm_90"): Budget(2871, 70, 0, 1),
    },
    "3.6": {
        ("prepare", "forward", "sm_90"): Budget(4420, 22, 0, 2),
        ("walk", "forward", "sm_90"): Budget(753, 8, 28, 2),
        ("walk", "backward", "sm_90"): Budget(671, 15, 16, 2),
        ("walk_back", "backward", "sm_90"): Budget(754, 11, 20, 1),
        ("pair_gradients", "backward", "sm_90"): Budget(1807, 38, 0, 1),
        ("token_gradients", "backward", "sm_90"): Budget(2695, 63, 0, 1),
    },
}
"""By the version of Triton: that of constraints.txt, and the oldest one."""
# fmt: on


def current() -> Budgets:
    """Return the budgets for the Triton that is installed; none where it has none."""
    return BUDGETS.get(".".join(triton.__version__.split(".")[:2]), {})
