"""Make small hybrid models that say more than one word, and compare their states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops.nn import HybridLM

PATTERNS = ("G", "GA", "MGA", "A")
VOCABULARY, WINDOW = 19, 5


def make(pattern: str, seed: int = 0, width: int = 16, **options: Any) -> HybridLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "window": WINDOW, "mlp_size": 24}
    model = HybridLM(pattern, VOCABULARY, width, **{**sizes, **options}).double()
    with torch.no_grad():
        # As built, most rows repeat one token for ever.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def tokens_of(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def greedy(model: HybridLM, prompt: Tensor, count: int, **options: Any) -> Tensor:
    return model.generate(prompt, count, temperature=0, **options)


def tensors(state: Any) -> list[Tensor]:
    return [x for layer in state for x in layer if x is not None]


def assert_states(computed: Any, expected: Any, atol: float = 1e-13) -> None:
    for ours, theirs in zip(computed, expected, strict=True):
        assert type(ours) is type(theirs)
        for x, y in zip(ours, theirs, strict=True):
            if x is None or y is None:
                assert x is y
                continue
            torch.testing.assert_close(x, y.expand_as(x), rtol=0, atol=atol)
