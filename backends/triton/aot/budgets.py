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
    # (kernel, direction and place, target): instructions, barriers, HGMMA with A in registers,
    # programs. The walk for the output has 642 instructions in inference, where nothing is kept.
    "3.9": {
        ("prepare", "forward", "sm_90"): Budget(4382, 18, 0, 2),
        ("walk", "forward 1", "sm_90"): Budget(498, 7, 16, 2),
        ("compose", "forward", "sm_90"): Budget(1948, 12, 0, 4),
        ("walk", "forward 3", "sm_90"): Budget(780, 19, 28, 2),
        ("walk_back", "backward 0", "sm_90"): Budget(634, 11, 20, 2),
        ("compose", "backward", "sm_90"): Budget(1768, 11, 0, 3),
        ("walk_back", "backward 2", "sm_90"): Budget(728, 17, 20, 2),
        ("token_gradients", "backward", "sm_90"): Budget(1671, 27, 0, 2),
    },
    "3.6": {
        ("prepare", "forward", "sm_90"): Budget(4420, 22, 0, 2),
        ("walk", "forward 1", "sm_90"): Budget(532, 4, 16, 2),
        ("compose", "forward", "sm_90"): Budget(1928, 12, 0, 4),
        ("walk", "forward 3", "sm_90"): Budget(811, 14, 28, 2),
        ("walk_back", "backward 0", "sm_90"): Budget(652, 7, 20, 2),
        ("compose", "backward", "sm_90"): Budget(1768, 11, 0, 3),
        ("walk_back", "backward 2", "sm_90"): Budget(711, 12, 20, 2),
        ("token_gradients", "backward", "sm_90"): Budget(1379, 25, 0, 2),
    },
}
"""By the version of Triton: that of constraints.txt, and the oldest one."""
# fmt: on


def current() -> Budgets:
    """Return the budgets for the Triton that is installed; none where it has none."""
    return BUDGETS.get(".".join(triton.__version__.split(".")[:2]), {})
