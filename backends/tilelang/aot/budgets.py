"""Say what the launches of the reference case may cost: a line for each, to be tightened.

`gdn-ops compile` fails where code is over its budget (`gdn_ops.aot.budgets`). The numbers are those
of the kernels when they were last changed, by one version of TileLang; others make other code.
"""

from __future__ import annotations

from collections.abc import Mapping

import tilelang

from gdn_ops.aot.budgets import Budget, Budgets
from gdn_ops.aot.sampling import REFERENCE

# fmt: off
BUDGETS: Mapping[str, Budgets] = {
    # (kernel, direction, target): instructions, barriers, HGMMA with A in registers, programs
    "0.1.15": {
        (REFERENCE, "solve", "forward", "sm_90a"): Budget(2177, 18, 0, 2),
        (REFERENCE, "states", "forward", "sm_90a"): Budget(1718, 14, 0, 1),
        (REFERENCE, "states", "backward", "sm_90a"): Budget(667, 7, 0, 2),
        (REFERENCE, "state_gradients", "backward", "sm_90a"): Budget(1575, 14, 0, 1),
        (REFERENCE, "token_gradients", "backward", "sm_90a"): Budget(3881, 45, 0, 1),
    },
}
"""By the version of TileLang."""
# fmt: on


def current() -> Budgets:
    """Return the budgets for the TileLang that is installed; none where it has none."""
    return BUDGETS.get(tilelang.__version__, {})
