"""Provide layers built on the op: the token mixer of the paper, its hybrids and their parts."""

from __future__ import annotations

from gdn_ops.nn.attention import KeyValueRing, SlidingWindowAttention
from gdn_ops.nn.convolution import ShortConvolution
from gdn_ops.nn.decay_groups import optimizer_groups, parameters_without_weight_decay
from gdn_ops.nn.drafts import PromptLookup
from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.gates import DecayGate, gate
from gdn_ops.nn.hybrid import PAPER, HybridLM
from gdn_ops.nn.kimi_delta_attention import KimiDeltaAttention
from gdn_ops.nn.norm import GatedRMSNorm
from gdn_ops.nn.rollback import MemoryStates, RingStates, TokenStates, fork_state
from gdn_ops.nn.state import State
from gdn_ops.nn.weights import from_fla, from_transformers

__all__ = [
    "PAPER",
    "DecayGate",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HybridLM",
    "KeyValueRing",
    "KimiDeltaAttention",
    "MemoryStates",
    "PromptLookup",
    "RingStates",
    "ShortConvolution",
    "SlidingWindowAttention",
    "State",
    "TokenStates",
    "fork_state",
    "from_fla",
    "from_transformers",
    "gate",
    "optimizer_groups",
    "parameters_without_weight_decay",
]
