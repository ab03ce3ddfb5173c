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
}
"""The ablations of the paper's Table S.1, and what models vary besides."""


def make(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(WIDTH, 2, **{"head_dim": 4, "expand_v": 1.5, **options})
