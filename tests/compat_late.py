"""Load a model of transformers while sequences are split, in a process that has not yet."""

from __future__ import annotations

import sys
from typing import Any

import torch

from gdn_ops import SpecError
from gdn_ops.parallel import SequenceSplit, sequence_parallel


def refusal_of_a_late_model(group: Any) -> str:
    """Return why a model is refused whose classes are loaded inside of the context."""
    assert "transformers.modeling_utils" not in sys.modules
    with sequence_parallel(SequenceSplit.contiguous(4, group)):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )  # fmt: skip
        tiny, ids = LlamaForCausalLM(config), torch.ones(1, 4, dtype=torch.int64)
        try:
            tiny(ids)
        except SpecError as error:
            reason = str(error)
    # Outside it is a model like any other.
    assert tiny(ids).logits.shape == (1, 4, 7)
    return reason
