"""Count the work of the op on a device: flops, bytes and launches of a direction, and what is kept.

Sums of products are those of docs/math.md §3 and §5; tensors of the triton backend are those that
its launches touch (docs/backends.md), each once per launch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from gdn_ops.parallel.machines import Machine
from gdn_ops.spec.cases import forward_bytes, forward_flops
from gdn_ops.spec.language import Sizes

ELEMENTS: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number, by dtype."""

KEPT_PART: Final = 256
"""The part of a device's memory up to which the triton backend keeps U and all states of a call."""

LEAST_SEGMENT: Final = 8
"""Chunks of a segment that the triton backend makes at least."""

WALKING: Final = ("cpp",)
"""Backends that have walks (`Backend.has_walks`)."""

CPP_CHUNK: Final = 32
CPP_KEPT: Final = 128
"""Tokens per chunk of the cpp backend, and per state that it keeps for a backward."""


@dataclass(frozen=True)
class Work:
    """Hold what a device does.

    Attributes:
        flops: of matrix products, a multiply-add counted as two.
        bytes: of device memory, read and written.
        launches: of kernels.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches
        )

    def seconds(self, machine: Machine, dtype: str) -> float:
        """Return the time: the larger of flops and bytes over their rates, and the launches."""
        roofline = max(self.flops / machine.products[dtype], self.bytes / machine.bandwidth)
        return self.launches * machine.launch + roofline / machine.reached


def chunk_of(machine: Machine, dtype: str) -> int:
    """Return the tokens per chunk of a machine's backend at K = V = 128."""
    return 64 if machine.backend == "triton" and dtype == "bfloat16" else CPP_CHUNK


def backward_flops(s: Sizes, chunk: int) -> float:
    """Return the flops of the chunkwise backward (docs/math.md §5), a multiply-add counted as two.

    Per token and value head: K S, Kᵀ U and six products with S and dS cost 16 K V; U, Pᵀ dO, dP,
    dRHS and dA are triangles of width V, 5 C V; those with D in dQ and dK are triangles of width K,
    4 C K. Per token and key head: K Kᵀ and Q Kᵀ, 2 C K. The solve costs C² / 3 a row.
    """
    per_value_head = 16 * s.K * s.V + 5 * chunk * s.V + 4 * chunk * s.K + chunk * chunk / 3
    return float(s.B * s.T * (s.HV * per_value_head + s.H * 2 * chunk * s.K))


def is_cut(s: Sizes, machine: Machine) -> bool:
    """Return whether the triton backend cuts sequences: their heads leave half the device idle."""
    return 2 * s.N * s.HV * -(-s.V // machine.columns) <= machine.wave


def keeps_states(s: Sizes, machine: Machine, dtype: str) -> bool:
    """Return whether the triton backend keeps U and the states of all chunks for the backward."""
    return _tensors(s, machine, dtype).states * KEPT_PART <= machine.memory


@dataclass(frozen=True)
class _Tensors:
    """Hold the bytes of what the launches of the triton backend touch.

    Attributes:
        keys: q and k.
        values: v and o.
        squares: T and P.
        states: U and the states of all chunks.
        gates: alpha or its logarithm, and beta.
    """

    keys: int
    values: int
    squares: int
    states: int
    gates: int

    @property
    def prepared(self) -> int:
        """Return the bytes of `prepare`: q, k, gates, T and P."""
        return self.keys + self.gates + self.squares

    @property
    def starts(self) -> float:
        """Return the bytes of a walk for the starts of segments: k, v and T."""
        return (self.keys + self.values + self.squares) / 2

    @property
    def shifts(self) -> float:
        """Return the bytes of a walk back for what segments add: q, k, dO, T and P."""
        return self.keys + self.values / 2 + self.squares


def _tensors(s: Sizes, machine: Machine, dtype: str) -> _Tensors:
    tokens, e, C = s.B * s.T, ELEMENTS[dtype], chunk_of(machine, dtype)
    # Count what is kept of float16 as float32: it may leave the range of float16.
    kept = 4 if dtype == "float16" else e
    return _Tensors(
        keys=2 * tokens * s.H * s.K * e,
        values=2 * tokens * s.HV * s.V * e,
        squares=2 * tokens * s.HV * C * kept,
        states=tokens * s.HV * kept * s.V * (C + s.K) // C,
        gates=8 * tokens * s.HV,
    )


def _fill(s: Sizes, machine: Machine, dtype: str) -> float:
    """Return the part of a device that a walk of the triton backend fills, sequences cut."""
    segments = max(1, -(-s.T // (chunk_of(machine, dtype) * LEAST_SEGMENT)))
    return min(1.0, max(1, s.N) * s.HV * -(-s.V // machine.columns) * segments / machine.wave)


def forward(
    s: Sizes, machine: Machine, dtype: str, *, trains: bool = True, resumes: bool = False
) -> Work:
    """Return the work of a forward.

    Args:
        s: of the call.
        machine: whose backend runs it.
        dtype: of q, k and v.
        trains: whether a backward follows, for which something may be kept.
        resumes: whether this is its second stage, behind `summarise`; with triton only.
    """
    flops = forward_flops(s, chunk_of(machine, dtype))
    if machine.backend != "triton":
        return Work(flops, forward_bytes(s, ELEMENTS[dtype]), 1)
    x, fill = _tensors(s, machine, dtype), _fill(s, machine, dtype)
    walk: float = x.keys + x.values + x.squares + x.gates
    if trains and keeps_states(s, machine, dtype):
        walk += x.states
    is_composed = is_cut(s, machine)
    if resumes:
        flops -= _prepare_flops(s, chunk_of(machine, dtype))
        return Work(flops, walk / fill, 1 + is_composed)
    if is_composed:
        walk += x.starts
    return Work(flops, x.prepared + walk / fill, 4 if is_composed else 2)


def backward(s: Sizes, machine: Machine, dtype: str, *, resumes: bool = False) -> Work:
    """Return the work of a backward, which forms again what was not kept.

    Args:
        s: of the call.
        machine: whose backend runs it.
        dtype: of q, k and v.
        resumes: whether this is its second stage, behind `summarise_gradients`; with triton only.
    """
    flops = backward_flops(s, chunk_of(machine, dtype))
    if machine.backend != "triton":
        return Work(flops, 3 * forward_bytes(s, ELEMENTS[dtype]), 1)
    x = _tensors(s, machine, dtype)
    # dO is read, dU and the gradients of states are written.
    walks, launches = x.shifts + x.states, 2
    if is_cut(s, machine):
        launches += 1
        if not resumes:
            walks, launches = walks + x.shifts, launches + 1
    if not keeps_states(s, machine, dtype):
        walks, launches = walks + x.starts + x.states, launches + 1
    # Read are q, k, v, dO and what both walks have written; dq, dk and dv are written.
    token_gradients = 2 * x.keys + x.squares + 1.5 * x.values + 2 * x.states
    return Work(flops, walks / _fill(s, machine, dtype) + token_gradients, launches)


def walk(s: Sizes, machine: Machine, dtype: str) -> Work:
    """Return the work of the final state alone, by a backend that has walks.

    Per token and value head: K S and Kᵀ U cost 4 K V, T (.) costs C V, the solve C² / 3; per key
    head K Kᵀ costs C K.
    """
    C = chunk_of(machine, dtype)
    flops = s.HV * (4 * s.K * s.V + C * s.V + C * C / 3) + s.H * C * s.K
    numbers = s.H * s.K + s.HV * s.V
    return Work(s.B * s.T * flops, s.B * s.T * numbers * ELEMENTS[dtype], 1)


def walk_back(s: Sizes, machine: Machine, dtype: str) -> Work:
    """Return the work of the gradient of the initial state alone, by a backend that has walks.

    K dS, Qᵀ dO and Kᵀ dR stand for the three products of a forward with K V, Pᵀ dO and Tᵀ (.) for
    its two with C V.
    """
    return Work(forward_flops(s, chunk_of(machine, dtype)), forward_bytes(s, ELEMENTS[dtype]), 1)


def summary(s: Sizes, machine: Machine, dtype: str) -> Work:
    """Return the work of M and R of a run of tokens: K columns of values more."""
    wider = dataclasses.replace(s, V=s.V + s.K)
    if machine.backend in WALKING:
        return walk(wider, machine, dtype)
    return forward(wider, machine, dtype, trains=False)


def summarise(s: Sizes, machine: Machine, dtype: str) -> Work:
    """Return the work of the first stage of a forward: M and R, and what the second one reads.

    The K columns of M are walked as the V columns of R are, for K S, T (.) and Kᵀ U.
    """
    x, C = _tensors(s, machine, dtype), chunk_of(machine, dtype)
    per_value_head = (4 * s.K + C) * (s.V + s.K)
    flops = _prepare_flops(s, C) + s.B * s.T * s.HV * per_value_head
    walk = x.starts * (s.V + s.K) / max(s.V, 1)
    launches = 3 if is_cut(s, machine) else 2
    return Work(flops, x.prepared + walk / _fill(s, machine, dtype), launches)


def summarise_gradients(s: Sizes, machine: Machine, dtype: str) -> Work:
    """Return the work of the first stage of a backward: the gradient of the initial state.

    It walks back for K dS, Qᵀ dO and Kᵀ dRHS, Pᵀ dO and Tᵀ (.).
    """
    flops = float(s.B * s.T * s.HV * (6 * s.K + 2 * chunk_of(machine, dtype)) * s.V)
    shifts = _tensors(s, machine, dtype).shifts
    return Work(flops, shifts / _fill(s, machine, dtype), 2 if is_cut(s, machine) else 1)


def _prepare_flops(s: Sizes, chunk: int) -> float:
    """Return the flops of T and P: K Kᵀ, Q Kᵀ and the solve, as `forward_flops` counts them."""
    return float(s.B * s.T * (s.HV * chunk * chunk / 3 + s.H * 2 * chunk * s.K))


def saved_bytes(s: Sizes, machine: Machine, dtype: str) -> int:
    """Return the bytes that a forward keeps for its backward, beside its arguments."""
    if machine.backend != "triton":
        return 4 * s.HV * s.K * s.V * s.N * -(-s.T // CPP_KEPT)
    x = _tensors(s, machine, dtype)
    gates = 28 * s.B * s.T * s.HV
    return x.squares + gates + (x.states if keeps_states(s, machine, dtype) else 0)
