"""Run the definition: the recurrence of docs/math.md §2, token by token, in plain torch.

Any float dtype, any device, any sizes; gradients of every order come from autograd. Slow by
design: every other backend is judged against this one run in float64.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import l2norm, l2norm_backward
from gdn_ops.call.transforms import integers
from gdn_ops.dispatch.registry import Backend, Forward, Grads
from gdn_ops.spec.rules import Limits, Width


class Operands(NamedTuple):
    """Hold the operands of the recurrence, in the compute dtype, heads repeated.

    Attributes:
        q, k: (B, T, HV, K).
        v: (B, T, HV, V).
        alpha: (B, T, HV, 1) decay, or (B, T, HV, K) of each channel, or None for 1.
        erase: (B, T, HV, 1) erase strength e, or (B, T, HV, K) of each channel, or None for 0.
        write: (B, T, HV, 1) write strength w, or (B, T, HV, V) of each channel.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    erase: Tensor | None
    write: Tensor

    def tokens(self, which: slice) -> Operands:
        """Return the operands of some of the tokens."""
        return Operands(*(None if x is None else x[:, which] for x in self))  # type: ignore[arg-type]


def recurrence(x: Operands, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run the recurrence over the tokens.

    Args:
        x: the operands.
        state: (B, HV, K, V).
        scale: factor on q.

    Returns:
        o (B, T, HV, V) and the final state.
    """
    q, k, v, alpha, erase, write = x
    outputs = []
    for t in range(q.shape[1]):
        k_t, q_t = k[:, t].unsqueeze(-1), q[:, t].unsqueeze(-1)
        # §2, §9 S' = diag(α_t) S_{t-1}           [K, V]
        if alpha is not None:
            state = alpha[:, t, :, :, None] * state
        # §2, §9 u_t = w_t ⊙ v_t − S'ᵀ (e_t ⊙ k_t)    [V]
        u_t = write[:, t] * v[:, t]
        if erase is not None:
            u_t = u_t - (state * (erase[:, t].unsqueeze(-1) * k_t)).sum(-2)
        # §2 S_t = S' + k_t u_tᵀ                  [K, V]
        state = state + k_t * u_t.unsqueeze(-2)
        # §2 o_t = s S_tᵀ q_t                     [V]
        outputs.append(scale * (state * q_t).sum(-2))
    return torch.stack(outputs, 1) if outputs else v.clone(), state


def reverse_scan(
    x: Operands, state: Tensor, scale: float, d_o: Tensor, d_state: Tensor
) -> tuple[Tensor, ...]:
    """Compute the gradients of docs/math.md §5, token form, from the last token to the first.

    Args:
        x, state, scale: as in `recurrence`.
        d_o: (B, T, HV, V).
        d_state: (B, HV, K, V), of the final state.

    Returns:
        Gradients of q, k, v, alpha, erase, write and of the initial state.
    """
    q, k, v, write = x.q, x.k, x.v, x.write
    alpha = torch.ones_like(write[..., :1]) if x.alpha is None else x.alpha
    erase = torch.zeros_like(write[..., :1]) if x.erase is None else x.erase
    states = [state]
    tokens = range(q.shape[1])
    for t in tokens:
        states.append(recurrence(x.tokens(slice(t, t + 1)), states[t], scale)[1])
    grads = [torch.zeros_like(operand) for operand in (q, k, v, alpha, erase, write)]
    d_q, d_k, d_v, d_alpha, d_erase, d_write = grads
    for t in reversed(tokens):
        k_t, q_t, d_o_t = (y[:, t].unsqueeze(-1) for y in (k, q, d_o))
        a_t = alpha[:, t, :, :, None]
        e_t, w_t = erase[:, t].unsqueeze(-1), write[:, t]
        S_prime = a_t * states[t]
        ek_t = e_t * k_t
        u_t = w_t * v[:, t] - (S_prime * ek_t).sum(-2)
        # §5 dS ← dS + s q_t do_tᵀ,  dq_t = s S_t do_t
        d_state = d_state + scale * q_t * d_o_t.mT
        d_q[:, t] = scale * (states[t + 1] @ d_o_t).squeeze(-1)
        # §5 du_t = dSᵀ k_t
        d_u = (d_state * k_t).sum(-2)
        # §9 dw_t = du_t ⊙ v_t,  de_t = −k_t ⊙ (S' du_t),  summed over channels for scalars
        read = S_prime @ d_u.unsqueeze(-1)
        d_write[:, t] = (d_u * v[:, t]).sum_to_size(w_t.shape)
        d_erase[:, t] = -(k_t * read).squeeze(-1).sum_to_size(e_t.shape[:-1])
        # §9 dv_t = w_t ⊙ du_t,  dk_t = dS u_t − e_t ⊙ (S' du_t)
        d_v[:, t] = w_t * d_u
        d_k[:, t] = (d_state @ u_t.unsqueeze(-1) - e_t * read).squeeze(-1)
        # §9 dS' = dS − (e_t ⊙ k_t) du_tᵀ,  dS_{t-1} = α_t dS'
        d_prime = d_state - ek_t * d_u.unsqueeze(-2)
        # §9 dα_tc = Σ_v dS'_cv S_{t-1,cv}, summed over c for a scalar
        d_alpha[:, t] = (d_prime * states[t]).sum(-1).sum_to_size(a_t.shape[:-1])
        d_state = a_t * d_prime
    return (*grads, d_state)


def _lowered(call: Call) -> Operands:
    """Return the operands of a call (docs/math.md §2: the rule as erase and write strengths)."""
    dtype = call.compute_dtype
    step = call.tokens.q.dim() == 3
    q, k, v = (x.unsqueeze(1) if step else x for x in call.tokens[:3])
    q, k = (l2norm(x) if call.qk_l2norm else x.to(dtype) for x in (q, k))
    q, k = (x.repeat_interleave(call.sizes.R, 2) for x in (q, k))

    sizes, widths, tokens = call.sizes, call.widths, call.tokens
    one = torch.ones(*v.shape[:-1], 1, dtype=dtype, device=v.device)

    def gate(x: Tensor | None, width: Width, channels: int) -> Tensor:
        if x is None:
            return one
        return x.to(dtype).reshape(*v.shape[:-1], channels if width == "channel" else 1)

    alpha = None if tokens.alpha is None else gate(tokens.alpha, widths.decay, sizes.K)
    if tokens.log_alpha is not None:
        alpha = gate(tokens.log_alpha, widths.decay, sizes.K).exp()
    if widths.apart:
        erase = gate(tokens.erase, widths.erase, sizes.K)
        write = gate(tokens.write, widths.write, sizes.V)
        return Operands(q, k, v.to(dtype), alpha, erase, write)
    beta = gate(tokens.beta, "scalar", 1)
    return Operands(q, k, v.to(dtype), alpha, beta if call.rule.has_erase else None, beta)


def _initial_state(call: Call) -> Tensor:
    sizes = call.sizes
    if call.state is not None:
        return call.state.to(call.compute_dtype)
    return torch.zeros(
        sizes.N, sizes.HV, sizes.K, sizes.V, dtype=call.compute_dtype, device=call.device
    )


def _run(call: Call) -> tuple[Tensor, Tensor]:
    operands, state = _lowered(call), _initial_state(call)
    results = [
        recurrence(operands.tokens(tokens), state[states], call.scale)
        for states, tokens in _spans(call)
    ]
    if not results:
        return operands.v.clone(), state
    if len(results) == 1:
        return results[0]
    return torch.cat([o for o, _ in results], 1), torch.cat([s for _, s in results])


def _spans(call: Call) -> list[tuple[slice, slice]]:
    """Return the slices (states, tokens) of every run of the recurrence; a batch is one run."""
    if call.cu_seqlens is None:
        return [(slice(None), slice(None))]
    # §6 each sequence starts from its own state
    bounds = itertools.pairwise(integers(call.cu_seqlens))
    return [(slice(n, n + 1), slice(a, b)) for n, (a, b) in enumerate(bounds)]


def _raised(call: Call, x: Operands, grads: tuple[Tensor, ...], d_start: Tensor) -> Grads:
    """Return the gradients of a call's arguments, given those of its lowered operands."""
    d_q, d_k, d_v, d_alpha, d_erase, d_write = grads
    heads = (call.sizes.H, call.sizes.R)
    d_q, d_k = d_q.unflatten(2, heads).sum(3), d_k.unflatten(2, heads).sum(3)
    if call.qk_l2norm:
        d_q, d_k = l2norm_backward(call.tokens.q, d_q), l2norm_backward(call.tokens.k, d_k)
    d_log_alpha = d_alpha if x.alpha is None else x.alpha * d_alpha
    d_beta = d_write
    if call.rule.has_erase and not call.widths.apart:
        d_beta = d_write + d_erase
    gradients = (d_q, d_k, d_v, d_alpha, d_log_alpha, d_beta, d_erase, d_write, d_start)
    return Grads(
        *(
            None if argument is None else grad.to(argument.dtype).reshape(argument.shape)
            for argument, grad in zip((*call.tokens, call.state), gradients, strict=True)
        )
    )


class Naive(Backend):
    """Run the recurrence as docs/math.md §2 writes it, line by line."""

    name = "naive"
    limits = Limits(
        devices=("*",),
        decays=("none", "scalar", "channel"),
        erases=("none", "scalar", "channel"),
        writes=("scalar", "channel"),
        apart=True,
        second_grad=True,
        forward_mode=True,
    )
    differentiable = True

    def forward(self, call: Call) -> Forward:
        o, state = _run(call)
        # A result never aliases an argument: with T = 0 the state is the given one.
        state = state if call.sizes.T else state.clone()
        return Forward(o.to(call.tokens.v.dtype), state)

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        # Only the opaque operator comes here; eager mode differentiates `forward` itself.
        x, start = _lowered(call), _initial_state(call)
        d_o, d_state = d_o.to(x.v.dtype), d_state.to(x.v.dtype)
        parts = [
            reverse_scan(
                x.tokens(tokens), start[states], call.scale, d_o[:, tokens], d_state[states]
            )
            for states, tokens in _spans(call)
        ]
        if not parts:
            return Grads(
                *(None if y is None else torch.zeros_like(y) for y in (*call.tokens, call.state))
            )
        *tokens_, _ = zip(*parts, strict=True)
        *operands, d_start = (
            *(torch.cat(pieces, 1) for pieces in tokens_),
            torch.cat([part[-1] for part in parts]),
        )
        return _raised(call, x, tuple(operands), d_start)

    def pure(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.forward(call)[:2]

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        o, state = _run(call)
        o = o.squeeze(1).to(call.tokens.v.dtype)
        if call.state is None:
            return o, state
        if call.inplace:
            return o, call.state.copy_(state)
        return o, state.to(call.state.dtype)


BACKEND = Naive
