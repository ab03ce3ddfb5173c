"""Make backends that are wrong on purpose, to prove that the testing kit can fail.

Each plants one classic mistake in a backend. The mistake is made outside the backend, in the
call it gets or the result it gives, so that the same mutants test the kit on every backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gdn_ops.call import memory
from gdn_ops.call.bind import Call
from gdn_ops.call.memory import overlaps_itself
from gdn_ops.call.numerics import inverse_norm
from gdn_ops.dispatch.registry import Backend, Forward
from gdn_ops.spec.ops import GATED_DELTA_STEP
from gdn_ops.spec.rules import Limits
from gdn_ops.testing.compiled import COMPILED
from gdn_ops.testing.runs import installed
from gdn_ops.torch_ops import eager

__all__ = ["MUTATIONS", "can_show", "mutant", "unguarded"]

Mutation = Callable[[Backend, Call], tuple[Tensor, Tensor]]
"""A function from a backend and a call of `gated_delta` to wrong (o, final_state)."""

DecodeMutation = Callable[[Backend, Call], tuple[Tensor, Tensor, Tensor | None]]
"""A function from a backend and a call of a decode op to wrong (o, new_state, states or None)."""

CallMutation = Callable[[Call], Call]
"""A function from a call of any op to the one that is run in its place."""


def dropped_scale(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Leave out the scale of q."""
    return eager.run_sequence(backend, replace(call, scale=1.0))


def decay_after_the_error(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Read the state before its decay in the error term: u = beta (v - S^T k).

    With beta' = beta / alpha and v' = alpha v the right rule computes just that.
    """
    alpha = _decay(call)
    if alpha is None or not call.rule.has_erase or call.widths.decay == "channel":
        return eager.run_sequence(backend, call)
    alpha = alpha.clamp(min=0.05)
    beta = torch.ones_like(alpha) if call.tokens.beta is None else call.tokens.beta
    v = (call.tokens.v * alpha.unsqueeze(-1)).to(call.tokens.v.dtype)
    return eager.run_sequence(backend, _with(call, beta=beta / alpha, v=v))


def ungated_inverse(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Leave the decay out of T = (I + A)^-1, in chunks of 16 tokens.

    v' makes the right inverse give U of the wrong one: (I + A) U_wrong = beta (v' - b K S).
    """
    if not call.rule.has_erase or call.widths.decay != "scalar" or call.cu_seqlens is not None:
        return eager.run_sequence(backend, call)
    outputs, state = [], call.state
    for start in range(0, call.sizes.T, 16):
        part = _tokens(call, slice(start, min(start + 16, call.sizes.T)), state)
        o, state = eager.run_sequence(backend, _with(part, v=_values_of_ungated_inverse(part)))
        outputs.append(o)
    if state is None or not outputs:
        return eager.run_sequence(backend, call)
    return torch.cat(outputs, 1), state


def _values_of_ungated_inverse(call: Call) -> Tensor:
    keys = call.tokens.k.double()
    if call.qk_l2norm:
        keys = torch.nn.functional.normalize(keys, dim=-1)
    k = keys.repeat_interleave(call.sizes.R, 2).transpose(1, 2)
    v = call.tokens.v.double().transpose(1, 2)
    alpha, beta = _decay(call), call.tokens.beta
    assert alpha is not None
    log = alpha.double().clamp(min=1e-30).log().transpose(1, 2).cumsum(-1)
    beta = torch.ones_like(log) if beta is None else beta.double().transpose(1, 2)
    D = (log.unsqueeze(-1) - log.unsqueeze(-2)).tril().exp().tril()
    A = ((k @ k.mT) * beta.unsqueeze(-1)).tril(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right_hand = beta.unsqueeze(-1) * v
    if call.state is not None:
        right_hand = right_hand - (beta * log.exp()).unsqueeze(-1) * (k @ call.state.double())
    wrong = torch.linalg.solve_triangular(eye + A, right_hand, upper=False)
    shift = (eye + A * D) @ wrong - right_hand
    moved: Tensor = v + shift / beta.clamp(min=1e-2).unsqueeze(-1)
    return moved.transpose(1, 2).to(call.tokens.v.dtype)


def first_chunk_only(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Ignore the tokens after the first 16."""
    if call.cu_seqlens is not None or call.sizes.T <= 16:
        return eager.run_sequence(backend, call)
    o, state = eager.run_sequence(backend, _tokens(call, slice(0, 16), call.state))
    rest = torch.zeros_like(call.tokens.v[:, 16:])
    return torch.cat((o, rest), 1), state


def one_wrong_head_of_sixteen(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Make o of head 15, where there are 16 or more, wrong by one part in a hundred."""
    o, state = eager.run_sequence(backend, call)
    if call.sizes.HV < 16:
        return o, state
    factor = torch.ones(call.sizes.HV, 1, dtype=o.dtype, device=o.device)
    factor[15] = 1.01
    return o * factor, state


def no_gradient_at_zero(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Return 0 as the gradient of alpha where alpha is 0."""
    alpha = call.tokens.alpha
    if alpha is not None:
        call = _with(call, alpha=torch.where(alpha == 0, alpha.detach(), alpha))
    return eager.run_sequence(backend, call)


def tiled_heads(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Read key head h % H for value head h, instead of h // R."""
    q, k = (x.repeat(1, 1, call.sizes.R, 1) for x in call.tokens[:2])
    sizes = replace(call.sizes, H=call.sizes.HV)
    return eager.run_sequence(backend, _with(replace(call, sizes=sizes), q=q, k=k))


def state_of_the_padded_tail(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Decay the final state through the tokens that pad the last chunk."""
    o, state = eager.run_sequence(backend, call)
    missing, alpha = -call.sizes.T % 16, _decay(call)
    if alpha is None or call.cu_seqlens is not None or not call.sizes.T:
        return o, state
    last = alpha[:, -1] if call.widths.decay == "channel" else alpha[:, -1, :, None]
    return o, state * (last.unsqueeze(-1).to(state.dtype) ** missing)


def narrow_products(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Round float32 operands to the 10 mantissa bits of TF32."""
    if call.tokens.q.dtype == torch.float32:
        q, k, v = (x + (_ten_bits(x.detach()) - x.detach()) for x in call.tokens[:3])
        call = _with(call, q=q, k=k, v=v)
    return eager.run_sequence(backend, call)


def _ten_bits(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def half_states_of_chunks(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Keep the state in float16 between chunks of 16 tokens, in calls of float16."""
    if call.tokens.q.dtype != torch.float16 or call.cu_seqlens is not None or not call.has_tokens:
        return eager.run_sequence(backend, call)
    outputs, state = [], call.state
    for start in range(0, call.sizes.T, 16):
        part = _tokens(call, slice(start, min(start + 16, call.sizes.T)), state)
        o, state = eager.run_sequence(backend, part)
        outputs.append(o)
        state = state.to(torch.float16).to(state.dtype)
    assert state is not None
    return torch.cat(outputs, 1), state


def normalised_values(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Multiply 1 / norm of a key into the values instead, in their dtype, in calls of float16."""
    k, v = call.tokens.k, call.tokens.v
    if not call.qk_l2norm or v.dtype != torch.float16:
        return eager.run_sequence(backend, call)
    inverse = inverse_norm(k.float()).repeat_interleave(call.sizes.R, 2)
    scaled = (v * inverse).to(v.dtype)
    return eager.run_sequence(backend, _with(call, v=(scaled / inverse).to(v.dtype)))


def flushed_decays(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Let decays below 1e-37 act as 0."""
    alpha, log_alpha = call.tokens.alpha, call.tokens.log_alpha
    if alpha is not None:
        call = _with(call, alpha=torch.where(alpha < 1e-37, alpha * 0, alpha))
    if log_alpha is not None:
        exact_zero = torch.full_like(log_alpha, -torch.inf)
        call = _with(call, log_alpha=torch.where(log_alpha < -85.2, exact_zero, log_alpha))
    return eager.run_sequence(backend, call)


def one_decay_for_all_channels(call: Call) -> Call:
    """Let every channel decay by the mean of all."""
    alpha = _decay(call)
    if alpha is None or call.widths.decay != "channel":
        return call
    mean = alpha.mean(-1, keepdim=True).expand_as(alpha)
    return _with(call, alpha=mean, log_alpha=None)


def erase_and_write_swapped(call: Call) -> Call:
    """Erase by the write strength and write by the erase strength, where their shapes are alike."""
    erase, write = call.tokens.erase, call.tokens.write
    if erase is None or write is None or erase.shape != write.shape:
        return call
    return _with(call, erase=write, write=erase)


def skipped_rows_run(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Let a row that should be skipped, slot -1, read and write slot 0."""
    if call.state_indices is not None:
        call = replace(call, state_indices=call.state_indices.clamp(min=0))
    return _decoded(backend, call)


def states_before_each_token(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the states of `gated_delta_steps` off by one: before each token, not after."""
    o, new, states = _decoded(backend, call)
    return o, new, None if states is None else states.roll(1, 1)


def a_copied_pool(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Advance rows in a pool of fresh memory, without a copy of the slots that no row names."""
    o, new, states = _decoded(backend, call)
    if call.state_indices is None:
        return o, new, states
    fresh = torch.zeros_like(new)
    named = call.state_indices[call.state_indices >= 0].long()
    fresh[named] = new[named]
    return o, new.copy_(fresh), states


def states_in_order_of_memory(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write new states in place as if the given tensor lay in memory without other strides."""
    state = call.state
    if state is None or not call.inplace:
        return _decoded(backend, call)
    o, new, states = _decoded(backend, replace(call, state=state.clone(), inplace=False))
    in_memory = state.permute(sorted(range(state.dim()), key=state.stride, reverse=True))
    in_memory.copy_(new.reshape(in_memory.shape))
    return o, state, states


def inputs_read_late(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read q, k, v and the gates for o after the state, which may hold them, was written."""
    state = call.state
    if state is None or not call.inplace:
        return _decoded(backend, call)
    before = state.clone()
    _, new, states = _decoded(backend, replace(call, state=before.clone(), inplace=False))
    state.copy_(new)
    late = replace(call, tokens=call.tokens.map(Tensor.clone), state=before, inplace=False)
    return _decoded(backend, late)[0], state, states


def an_overlap_is_allowed(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take a state whose elements share memory, and leave it as it was."""
    state = call.state
    if state is None or not call.inplace or not overlaps_itself(state):
        return _decoded(backend, call)
    o, _, states = _decoded(backend, replace(call, state=state.clone()))
    return o, state, states


def _decoded(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    if call.op is GATED_DELTA_STEP:
        return *eager.decode_one(backend, call), None
    return eager.decode_many(backend, call)


def _with(call: Call, **tokens: Any) -> Call:
    return replace(call, tokens=call.tokens._replace(**tokens))


def _decay(call: Call) -> Tensor | None:
    """Return the decay of a call as it is, not as its logarithm; None where there is none."""
    log_alpha = call.tokens.log_alpha
    return call.tokens.alpha if log_alpha is None else log_alpha.exp()


SEQUENCE_MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        dropped_scale,
        decay_after_the_error,
        ungated_inverse,
        first_chunk_only,
        one_wrong_head_of_sixteen,
        no_gradient_at_zero,
        tiled_heads,
        state_of_the_padded_tail,
        narrow_products,
        half_states_of_chunks,
        normalised_values,
        flushed_decays,
    )
}
"""Mistakes in `gated_delta`, by name."""

DECODE_MUTATIONS: dict[str, DecodeMutation] = {
    mutation.__name__: mutation
    for mutation in (
        skipped_rows_run,
        states_before_each_token,
        a_copied_pool,
        states_in_order_of_memory,
        inputs_read_late,
        an_overlap_is_allowed,
    )
}
"""Mistakes in the decode ops, by name."""

CALL_MUTATIONS: dict[str, CallMutation] = {
    mutation.__name__: mutation
    for mutation in (one_decay_for_all_channels, erase_and_write_swapped)
}
"""Mistakes in what is read of a call, in all ops, by name."""

_GUARDS: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {
    "inputs_read_late": (eager, "apart", lambda call: call),
    "an_overlap_is_allowed": (memory, "overlaps_itself", lambda state: False),
}
"""Names, by the mistake, the function that hides it, with one that lets it through."""

MUTATIONS: dict[str, Mutation | DecodeMutation | CallMutation] = {
    **SEQUENCE_MUTATIONS,
    **DECODE_MUTATIONS,
    **CALL_MUTATIONS,
}
"""Every mistake by name."""


def can_show(mutation: str, limits: Limits) -> bool:
    """Return whether a backend with the given limits takes calls in which a mistake shows.

    It is enough that one of its ops takes them: `limits.of(decode=False)` asks about sequences.
    """
    taken = [limits.of(decode=decode) for decode in (False, True)]
    shows = {
        "one_decay_for_all_channels": any("channel" in of_ops.decays for of_ops in taken),
        "erase_and_write_swapped": any(of_ops.apart for of_ops in taken),
    }
    return shows.get(mutation, True)


@contextlib.contextmanager
def unguarded(mutation: str) -> Iterator[None]:
    """Take away, within a `with` statement, what would mend a mistake before a backend is asked.

    Inputs that lie in the memory of the state are copied, and a state that overlaps itself is
    refused, for all backends alike: only without that can a backend do it wrong.
    """
    if mutation not in _GUARDS:
        yield
        return
    module, name, replacement = _GUARDS[mutation]
    with mock.patch.object(module, name, replacement):
        yield


def mutant(mutation: str, base: str) -> type[Backend]:
    """Return a backend class that makes a mistake on top of an installed backend.

    Args:
        mutation: a key of MUTATIONS.
        base: name of the backend to plant it in.

    Raises:
        SpecError: the base backend is not installed.
    """
    instance = installed(base)
    sequence, decode = SEQUENCE_MUTATIONS.get(mutation), DECODE_MUTATIONS.get(mutation)
    read = CALL_MUTATIONS.get(mutation, _as_given)

    class Mutant(Backend):
        name = f"{mutation}_in_{base}"
        limits = replace(instance.limits, second_grad=False, forward_mode=False, pools=True)
        differentiable = True

        def forward(self, call: Call) -> Forward:
            return Forward(*(sequence or eager.run_sequence)(instance, read(call)))

        def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
            return (decode or _decoded)(instance, read(call))[:2]

        def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
            return (decode or _decoded)(instance, read(call))

    if base in COMPILED:
        COMPILED[Mutant.name] = COMPILED[base]
    return Mutant


def _as_given(call: Call) -> Call:
    return call


def _tokens(call: Call, which: slice, state: Tensor | None) -> Call:
    sizes = replace(call.sizes, T=which.stop - which.start)
    return replace(call, sizes=sizes, tokens=call.tokens.map(lambda x: x[:, which]), state=state)
