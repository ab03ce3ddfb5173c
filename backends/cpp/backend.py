"""Run the kernels: allocate results, hand over pointers, and say why the kernels cannot run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gdn_ops.backends.cpp import calls
from gdn_ops.backends.cpp.library import check_status, level, library, missing, threads
from gdn_ops.backends.cpp.prepared import as_rows, is_short, prepared_decode, prepared_raw
from gdn_ops.backends.torch.pure import pure
from gdn_ops.call.bind import Call, Targets, Tokens
from gdn_ops.dispatch.backend import (
    Backend,
    Forward,
    Grads,
    Prepared,
    PreparedRaw,
    RawGates,
    gradients_without_tokens,
    without_tokens,
)
from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.spec.rules import Limits


class Cpp(Backend):
    """Run the chunkwise form of docs/math.md §3 in C++ on CPUs.

    Gates, solve and state are float32. Derivatives of derivatives and forward mode run in plain
    torch ops, those of the backend `torch`.
    """

    name = "cpp"
    has_walks = True
    limits = Limits(
        devices=("cpu",),
        decays=("none", "scalar", "channel"),
        erases=("none", "scalar", "channel"),
        writes=("scalar", "channel"),
        apart=True,
        dtypes=("float32", "bfloat16", "float16"),
        state_dtypes=("float32", "bfloat16", "float16"),
        second_grad=True,
        forward_mode=True,
        chunk_sizes=(calls.CHUNK,),
        pools=True,
    )

    @classmethod
    def tools(cls, device: str) -> dict[str, str]:
        return {} if missing() else {"level": level()}

    def absence(self) -> str | None:
        return missing()

    def reasons(self, call: Call) -> list[str]:
        reason = missing()
        return [] if reason is None else [reason]

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        return (torch.empty(_shape_of_states(call), dtype=torch.float32, device=call.device),)

    def forward(self, call: Call) -> Forward:
        """Run `gated_delta`; keep the states that the backward starts from."""
        s, targets = call.sizes, call.targets or Targets()
        saved: tuple[Tensor, ...] = ()
        if call.needs_grad:
            shape = _shape_of_states(call)
            saved = targets.saved or (empty(shape, torch.float32, call.device),)
        states = saved[0] if saved else None
        if not call.has_tokens:
            return without_tokens(call, saved)
        rows = call if call.cu_seqlens is None else as_rows(call)
        if rows is not None and is_short(rows):
            # A final state is float32, where decode ops keep the dtype of the given one.
            state = None if call.state is None else call.state.to(torch.float32)
            short, final, _ = self.decode_many(rows.with_tensors(rows.tokens, state))
            return Forward(short.view(s.B, s.T, s.HV, s.V), final)
        o = targets.o
        if o is None:
            o = empty((s.B, s.T, s.HV, s.V), call.tokens.v.dtype, call.device)
        final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=call.device)
        call, initial = _prepared(call)
        arrays = calls.of_tokens(call.tokens, calls.array)
        packed = calls.pack_sequences(call, arrays, o, final, states, initial, threads())
        check_status(library().gdn_forward(packed))
        return Forward(o, final, saved)

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        """Return the gradients of `gated_delta`."""
        if not call.has_tokens:
            return gradients_without_tokens(call, d_state)
        if saved is None:
            saved = self.forward(call).saved
        given, s = call, call.sizes
        call, initial = _prepared(call)
        q, k, v, alpha, log_alpha, beta, erase, write = given.tokens
        decay = log_alpha if alpha is None else alpha
        targets = given.targets or Targets()
        to_q, to_k, to_v, *to_decays, to_beta, to_erase, to_write = targets.of_tokens
        to_decay = to_decays[alpha is None]
        d_q = empty((s.B, s.T, s.H, s.K), q.dtype, call.device) if to_q is None else to_q
        d_k = empty((s.B, s.T, s.H, s.K), k.dtype, call.device) if to_k is None else to_k
        d_v = empty((s.B, s.T, s.HV, s.V), v.dtype, call.device) if to_v is None else to_v
        d_decay, d_beta = _of_gate(decay, to_decay), _of_gate(beta, to_beta)
        d_erase, d_write = _of_gate(erase, to_erase), _of_gate(write, to_write)
        d_initial = None if given.state is None else torch.empty_like(d_state).contiguous()
        d_o, d_final = calls.readable(d_o), calls.whole(d_state)
        assert d_final is not None
        arrays = calls.of_tokens(call.tokens, calls.array)
        packed = calls.pack_sequences(call, arrays, None, None, saved[0], initial, threads())
        grads = (d_q, d_k, d_v, d_decay, d_beta, d_erase, d_write)
        to = calls.pack_gradients(d_o, d_final, grads, d_initial)
        check_status(library().gdn_backward(packed, to))
        d_decay = _as_gate(d_decay, decay)
        return Grads(
            d_q,
            d_k,
            d_v,
            None if alpha is None else d_decay,
            None if log_alpha is None else d_decay,
            _as_gate(d_beta, beta),
            _as_gate(d_erase, erase),
            _as_gate(d_write, write),
            state=d_initial
            if given.state is None or d_initial is None
            else d_initial.to(given.state.dtype),
        )

    def walk(self, call: Call) -> Tensor:
        """Return the final state alone, the bits of `forward`."""
        s, rows = call.sizes, None
        if call.has_tokens:
            rows = call if call.cu_seqlens is None else as_rows(call)
        if not call.has_tokens or (rows is not None and is_short(rows)):
            return self.forward(replace(call, needs_grad=False, targets=None)).final_state
        final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=call.device)
        call, initial = _prepared(call)
        arrays = calls.of_tokens(call.tokens, calls.array)
        packed = calls.pack_sequences(call, arrays, None, final, None, initial, threads())
        check_status(library().gdn_forward(packed))
        return final

    def walk_back(self, call: Call, d_o: Tensor, d_state: Tensor) -> Tensor:
        """Return the gradient of the initial state alone."""
        d_o, d_final = calls.readable(d_o), calls.whole(d_state)
        assert d_final is not None
        d_initial = torch.empty_like(d_final)
        if not call.has_tokens:
            return d_initial.copy_(d_final)
        call, _ = _prepared(call)
        arrays = calls.of_tokens(call.tokens, calls.array)
        packed = calls.pack_sequences(call, arrays, None, None, None, None, threads())
        to = calls.pack_gradients(d_o, d_final, (None,) * 7, d_initial)
        check_status(library().gdn_backward(packed, to))
        return d_initial

    def pure(self, call: Call) -> tuple[Tensor, Tensor]:
        return pure(call)

    def prepared(self, call: Call) -> Prepared | None:
        return prepared_decode(call)

    def prepared_raw(self, call: Call, gates: RawGates) -> PreparedRaw | None:
        return prepared_raw(call, gates)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run `gated_delta_step`."""
        s = call.sizes
        o = torch.empty((s.B, s.HV, s.V), dtype=call.tokens.v.dtype, device=call.device)
        return o, _decode(call, o, None, calls.token)

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run `gated_delta_steps`."""
        s, states = call.sizes, None
        o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.v.dtype, device=call.device)
        if call.return_states:
            stored = torch.float32 if call.state is None else call.state.dtype
            states = empty((s.B, s.T, s.HV, s.K, s.V), stored, call.device)
        return o, _decode(call, o, states, calls.array), states


def _of_gate(gate: Tensor | None, target: Tensor | None) -> Tensor | None:
    """Return where the gradient of a gate is written in float32, or None without a gate."""
    if gate is None:
        return None
    if target is not None and target.dtype == torch.float32:
        return target
    return torch.empty(gate.shape, dtype=torch.float32, device=gate.device)


def _as_gate(gradient: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """Return the gradient of a gate in the dtype of the gate."""
    return gradient if gate is None or gradient is None else gradient.to(gate.dtype)


def _shape_of_states(call: Call) -> tuple[int, ...]:
    """Return the shape (B, slots, HV, K, V) of the states between runs of chunks."""
    s = call.sizes
    return (s.B, s.T // (calls.CHUNK * calls.CHUNKS_PER_STATE), s.HV, s.K, s.V)


def _prepared(call: Call) -> tuple[Call, Tensor | None]:
    """Return a call on tensors that the kernels read, and its initial state."""
    boundaries = call.cu_seqlens
    if boundaries is not None and (boundaries.dtype != torch.int64 or boundaries.stride(0) != 1):
        boundaries = boundaries.to(torch.int64).contiguous()
    prepared = replace(call, tokens=_readable(call.tokens), state=None, cu_seqlens=boundaries)
    return prepared, calls.whole(call.state)


def _readable(tokens: Tokens) -> Tokens:
    """Return tokens that the kernels read."""
    q, k, v = (calls.readable(x) for x in tokens[:3])
    return Tokens(q, k, v, *[calls.gate(x, q) for x in tokens[3:]])


def _decode(call: Call, o: Tensor, states: Tensor | None, array: calls.Reader) -> Tensor:
    """Run the tokens of a decode call; write o and `states`, and return the new state."""
    s, given = call.sizes, call.state
    if given is None:
        shape = (s.B, s.HV, s.K, s.V)
        held = state = torch.zeros(shape, dtype=torch.float32, device=call.device)
    elif call.inplace:
        held = state = given
    else:
        held, state = given, torch.empty(given.shape, dtype=given.dtype, device=call.device)
    # Rows of a head lie behind one another.
    if state.stride()[2:] != (s.V, 1):
        state = held = state.contiguous()
    elif held.stride()[2:] != (s.V, 1):
        held = held.contiguous()
    if o.numel():
        tokens = _readable(call.tokens)  # copies are needed until the kernels are done
        arrays = (*calls.of_tokens(tokens, array), array(o))
        slots = call.state_indices
        if slots is not None:
            slots = slots.to(torch.int64).contiguous()
        packed = calls.pack_steps(call, arrays, held, state, states, slots, threads())
        check_status(library().gdn_decode(packed))
    elif state is not held:
        state.copy_(held)
    if call.inplace and given is not None and state is not given:
        return given.copy_(state)
    return state
