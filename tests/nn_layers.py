"""Make layers with every option."""

from __future__ import annotations

from typing import Any

import torch

from gdn_ops.nn import GatedDeltaNet

WIDTH = 16

OPTIONS: dict[str, dict[str, Any]] = {
    "the paper": {},
    "no gate": {"rule": "delta"},
    "no delta": {"rule": "gated"},
    "neither": {"rule": "linear"},
    "no short conv": {"short_conv": 0},
    "no output gate": {"output_gate": None},
    "no output norm": {"output_norm": False},
    "neither output gate nor norm": {"output_gate": None, "output_norm": False},
    "sigmoid output gate": {"output_gate": "sigmoid"},
    "L1 and ReLU": {"qk_norm": "l1", "feature_map": "relu"},
    "L1 and 1+ELU": {"qk_norm": "l1", "feature_map": "elu"},
    "L1 and SiLU": {"qk_norm": "l1"},
    "L2 and ReLU": {"feature_map": "relu"},
    "L2 and 1+ELU": {"feature_map": "elu"},
    "no feature map": {"feature_map": "none"},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "grouped values": {"num_value_heads": 4},
    "a biased convolution of 3": {"conv_bias": True, "short_conv": 3},
    "a decay of every key channel": {"channel_decay": True},
    "a bounded decay of low rank": {"channel_decay": True, "lower_bound": -5.0, "gate_rank": 3},
    "a bounded decay of heads": {"lower_bound": -2.0, "num_value_heads": 4},
    "erase and write gates": {
        "channel_decay": True,
        "erase_write": True,
        "allow_neg_eigval": True,
        "gate_rank": 3,
    },
    "erase and write gates without a decay": {"erase_write": True, "rule": "delta"},
}
"""The ablations of the paper's Table S.1, what models vary besides, and members of the family."""


def make(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(WIDTH, 2, **{"head_dim": 4, "expand_v": 1.5, **options})
