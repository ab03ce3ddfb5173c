"""Lower calls with erase and write in place of beta onto the kernels of channels (docs/math.md §9).

The kernels scale the keys that the error is taken with by an erase strength of every channel, and
decay every channel; a strength or a decay of a head is that of all of its channels. What is written
is write ⊙ v, formed here in the dtype of what is kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gdn_ops.backends.triton.host.plan import kept_dtype
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Grads
from gdn_ops.spec.ops import GATED_DELTA


def lowered(call: Call) -> Call:
    """Return a call whose decay and erase have K channels each, on values that are scaled.

    Its erase and write stand apart.
    """
    q, _, v, alpha, log_alpha, _, erase, write = call.tokens
    shape = (*v.shape[:-1], q.shape[-1])
    if not call.rule.has_decay:
        alpha = v.new_ones(shape, dtype=torch.float32)
    decays = [x if x is None else _of_channels(x, shape) for x in (alpha, log_alpha)]
    strength = v.new_ones(shape, dtype=torch.float32)
    if erase is not None:
        strength = _of_channels(erase, shape)
    values = v.float() if write is None else v.float() * _beside(write, v)
    tokens = call.tokens._replace(
        v=values.to(kept_dtype(q.dtype)), alpha=decays[0], log_alpha=decays[1], erase=strength,
        write=None,
    )  # fmt: skip
    widths = call.widths._replace(decay="channel", erase="channel")
    return replace(call, tokens=tokens, rule=GATED_DELTA.rule["gated_delta"], widths=widths)


def raised(call: Call, grads: Grads) -> Grads:
    """Return the gradients of a call, given those of the one that it was lowered to.

    The gradient of the scaled values is float32.
    """
    _, _, v, alpha, log_alpha, _, erase, write = call.tokens
    assert grads.v is not None
    d_write = None if write is None else _of_gate(grads.v * v.float(), write)
    d_v = grads.v if write is None else grads.v * _beside(write, v)
    return grads._replace(
        v=d_v.to(v.dtype),
        alpha=_of_gate(grads.alpha, alpha),
        log_alpha=_of_gate(grads.log_alpha, log_alpha),
        erase=_of_gate(grads.erase, erase),
        write=d_write,
    )


def _beside(write: Tensor, v: Tensor) -> Tensor:
    """Return write as float32 with the axes of v."""
    return (write if write.dim() == v.dim() else write.unsqueeze(-1)).float()


def _of_channels(gate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a gate of heads or of channels as one of channels."""
    wide = gate if gate.dim() == len(shape) else gate.float().unsqueeze(-1).expand(shape)
    return wide.contiguous()


def _of_gate(gradient: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """Return the gradient of a gate, given that of its channels; None where there is no gate."""
    if gradient is None or gate is None:
        return None
    summed = gradient if gate.dim() == gradient.dim() else gradient.float().sum(-1)
    return summed.to(gate.dtype)
