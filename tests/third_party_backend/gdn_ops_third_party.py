"""A backend that another distribution brings: forward only, one rule, written with einsum."""

from __future__ import annotations

import torch

from gdn_ops import Backend, Forward, Limits


class ThirdParty(Backend):
    """The recurrence of the gated delta rule, a token at a time."""

    name = "third_party"
    distribution = "gdn_ops_third_party"
    limits = Limits(
        devices=("cpu",),
        dtypes=("float32",),
        rules=("gated_delta",),
        ops=("gated_delta",),
        grad=False,
        varlen=False,
    )

    def reasons(self, call):
        """Say what limits cannot: only alpha, and q and k as they are."""
        against = []
        if call.tokens.log_alpha is not None:
            against.append("log_alpha is not supported")
        if call.qk_l2norm:
            against.append("qk_l2norm is not supported")
        return against

    def forward(self, call):
        """Run `gated_delta`."""
        s = call.sizes
        q, k = (x.repeat_interleave(s.R, 2) for x in (call.tokens.q, call.tokens.k))
        state = torch.zeros(s.B, s.HV, s.K, s.V) if call.state is None else call.state.float()
        beta = torch.ones(s.B, s.T, s.HV) if call.tokens.beta is None else call.tokens.beta.float()
        o = torch.empty_like(call.tokens.v)
        for t in range(s.T):
            state = call.tokens.alpha[:, t, :, None, None].float() * state
            error = call.tokens.v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            u = beta[:, t, :, None] * error
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
            o[:, t] = call.scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        return Forward(o, state)
