"""Run the models of transformers on gdn_ops.

    from gdn_ops.compat.transformers import accelerate

    accelerate()

While it is active, gdn_ops computes the gated delta rule of every model of transformers that has
it (Qwen3-Next, Qwen3.5, OLMo-Hybrid; with a decay of every key channel Kimi Linear, GLM-5.3-Flash
and Ling-3.0; and whatever the installed release adds), in models that are loaded already and in
those that are loaded later.
"""

from __future__ import annotations

from gdn_ops.compat.transformers.acceleration import Acceleration, accelerate
from gdn_ops.compat.transformers.discovery import known_architectures
from gdn_ops.compat.transformers.speculation import speculative_generate

__all__ = ["Acceleration", "accelerate", "known_architectures", "speculative_generate"]
