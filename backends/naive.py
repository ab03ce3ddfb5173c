"""The definition: the recurrence of MATH §2, token by token, in plain torch.

Any float dtype, any device, any sizes; gradients of every order come from autograd. Slow by
design: every other backend is judged against this one run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.bind import Call
from gdn_ops.numerics import l2norm
from gdn_ops.registry import Backend, Forward, Grads
from gdn_ops.spec import Limits


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    erase: Tensor | None,
    write: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over axis 1.

    Args:
        q, k: (B, T, HV, K), already repeated for the value heads.
        v: (B, T, HV, V).
        alpha: (B, T, HV) decay, or None for 1.
        erase: (B, T, HV) erase strength e, or None for 0.
        write: (B, T, HV) write strength w.
        state: (B, HV, K, V).
        scale: factor on q.

    Returns:
        o (B, T, HV, V) and the final state.
    """
    outputs = []
    for t in range(q.shape[1]):
        k_t, q_t = k[:, t].unsqueeze(-1), q[:, t].unsqueeze(-1)
        # §2 S' = α_t S_{t-1}                     [K, V]
        if alpha is not None:
            state = alpha[:, t, :, None, None] * state
        # §2 u_t = w_t v_t − e_t S'ᵀ k_t          [V]
        u_t = write[:, t, :, None] * v[:, t]
        if erase is not None:
            u_t = u_t - erase[:, t, :, None] * (state * k_t).sum(-2)
        # §2 S_t = S' + k_t u_tᵀ                  [K, V]
        state = state + k_t * u_t.unsqueeze(-2)
        # §2 o_t = s S_tᵀ q_t                     [V]
        outputs.append(scale * (state * q_t).sum(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


def _lowered(call: Call) -> tuple[Tensor, ...]:
    """Return q, k, v, alpha, beta with a token axis, in the compute dtype, heads repeated."""
    dtype = call.compute_dtype
    step = call.q.dim() == 3
    q, k, v = (x.unsqueeze(1) if step else x for x in (call.q, call.k, call.v))
    q, k = (l2norm(x) if call.qk_l2norm else x.to(dtype) for x in (q, k))
    q, k = (x.repeat_interleave(call.sizes.R, 2) for x in (q, k))
    gate_shape = v.shape[:-1]

    def gate(x: Tensor | None) -> Tensor:
        if x is None:
            return torch.ones(gate_shape, dtype=dtype, device=v.device)
        return x.to(dtype).reshape(gate_shape)

    alpha = gate(call.alpha if call.log_alpha is None else call.log_alpha.to(dtype).exp())
    return q, k, v.to(dtype), alpha, gate(call.beta)


def _initial_state(call: Call) -> Tensor:
    sizes = call.sizes
    if call.state is not None:
        return call.state.to(call.compute_dtype)
    return torch.zeros(
        sizes.N, sizes.HV, sizes.K, sizes.V, dtype=call.compute_dtype, device=call.device
    )


def _run(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, alpha, beta = _lowered(call)
    state = _initial_state(call)
    erase = beta if call.rule.has_erase else None
    decay = alpha if call.rule.has_decay else None

    def run(rows: slice, tokens: slice, start: Tensor) -> tuple[Tensor, Tensor]:
        parts = (None if x is None else x[rows, tokens] for x in (q, k, v, decay, erase, beta))
        return recurrence(*parts, start, call.scale)  # type: ignore[arg-type]

    everything = slice(None)
    if call.cu_seqlens is None:
        return run(everything, everything, state)
    # §6 each sequence starts from its own state
    bounds = call.cu_seqlens.tolist()
    spans = zip(bounds[:-1], bounds[1:], strict=True)
    parts = [run(everything, slice(a, b), state[n : n + 1]) for n, (a, b) in enumerate(spans)]
    if not parts:
        return torch.zeros_like(v), state
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])


class Naive(Backend):
    """The recurrence, line by line."""

    name = "naive"
    limits = Limits(devices=("*",), second_grad=True)
    differentiable = True

    def forward(self, call: Call) -> Forward:
        o, state = _run(call)
        # A result never aliases an argument: with T = 0 the state is the given one.
        state = state.clone() if state is call.state else state
        return Forward(o.to(call.v.dtype), state)

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        second = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [
                None if x is None else x if second else x.detach().requires_grad_()
                for x in call.tensors()
            ]
            out = self.forward(call.with_tensors(*inputs))
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            found = iter(
                torch.autograd.grad(
                    (out.o, out.final_state),
                    wanted,
                    (d_o, d_state.to(out.final_state.dtype)),
                    allow_unused=True,
                    materialize_grads=True,
                    create_graph=second,
                )
            )
        return Grads(*(next(found) if x is not None and x.requires_grad else None for x in inputs))

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        o, state = _run(call)
        o = o.squeeze(1).to(call.v.dtype)
        if call.state is None:
            return o, state
        if call.inplace:
            return o, call.state.copy_(state)
        return o, state.to(call.state.dtype)


BACKEND = Naive
