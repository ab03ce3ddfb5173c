"""Compare the models of `gdn-ops bench paper` with their definitions before they are timed.

Recurrent layers run on the backend that is timed and on "naive", the definition; full attention is
compared with attention in a window that is as long as the text. Logits, a gradient, and the logits
of a token that is decoded behind the others are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.bench.paper.attention import FullAttention
from gdn_ops.bench.paper.plan import Plan
from gdn_ops.bench.paper.skeletons import MIXERS, build, full_cache, state_behind
from gdn_ops.bench.verify import Check, RefusedError
from gdn_ops.nn import SlidingWindowAttention

TOKENS = 80
"""Tokens of the texts: more than a chunk."""

ALLOWED = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}
"""Largest relative difference, in Frobenius norms, to the model in float32."""


def check_model(name: str, plan: Plan) -> list[Check]:
    """Return how far a model, with one copy of its pattern, is from its definition.

    Args:
        name: of MIXERS.
        plan: has the shape, backend, dtype and device.

    Raises:
        RefusedError: it is farther than allowed.
    """
    device, dtype = plan.setting.device, plan.setting.dtype
    shape = replace(plan.shape, layers=len(MIXERS[name].pattern), window=TOKENS // 2)
    model = build(name, shape, backend=plan.backend, device=device, dtype=plan.setting.torch_dtype)
    exact = _exact(name, shape, model, device)
    generator, size = torch.Generator().manual_seed(2), (1, TOKENS + 1)
    tokens = torch.randint(shape.vocabulary, size, generator=generator, device="cpu").to(device)
    logits, gradient = _results(model, tokens)
    expected, d_expected = _results(exact, tokens)
    pairs = {
        "logits": (logits, expected),
        "gradient": (gradient, d_expected),
        "a decoded token": (_decoded(model, tokens), expected[:, -1]),
    }
    found = []
    for what, (x, wanted) in pairs.items():
        error = float((x.float() - wanted).norm() / wanted.norm())
        check = Check(name, f"T={TOKENS}", what, error, ALLOWED[dtype], dtype)
        if not check.passed:
            raise RefusedError(str(check))
        found.append(check)
    return found


def _exact(name: str, shape: Any, model: Any, device: str) -> Any:
    """Return the definition of a model, in float32 and with its weights."""
    exact = build(name, shape, backend="naive", device=device, dtype=torch.float32)
    for block in exact.blocks:
        if isinstance(block.mixer, FullAttention):
            heads = block.mixer.num_heads
            block.mixer = SlidingWindowAttention(shape.width, heads, TOKENS, device=device)
    exact.load_state_dict(model.state_dict())
    return exact


def _results(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a text, and the gradient of its loss for the embedding."""
    logits, _ = model(tokens[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    gradient: Tensor = model.embedding.weight.grad
    model.zero_grad(set_to_none=True)
    return logits.detach().float(), gradient.float()


@torch.no_grad()
def _decoded(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits behind the last token of a text, decoded with the state of the others."""
    _, state = model(tokens[:, :-2])
    cache = full_cache(model, TOKENS)
    if cache is not None:
        roomy = state_behind(model, TOKENS - 1, cache)
        for room, held in zip(roomy, state, strict=True):
            room.keys[:, :, : TOKENS - 1] = held.keys
            room.values[:, :, : TOKENS - 1] = held.values
        state = roomy
    logits, _ = model(tokens[:, -2:-1], state)
    return logits[:, -1].float()  # type: ignore[no-any-return]
