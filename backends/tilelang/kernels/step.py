"""Decode one token per row, or a few, in one launch.

One program per row, value head and block of BV columns of V: a row alone fills a GPU. The state
block, (K, BV) float32, stays in registers over the tokens; all arithmetic is float32.

    reads   q, k (B, T, H, K), v (B, T, HV, V), any strides; gate, β (B T, HV) float32, with
            channels the gate (B T, HV, K); apart from β, erase and, as β, write (B T, HV), or where
            they are of channels (B T, HV, K) and (B T, HV, V); the state (B, HV, K, V), or a pool
            (P, HV, K, V) and the slot of every row, -1 to skip it
    writes  o (B T, HV, V); the state, in place or not; on request the state after every token

A tensor with strides comes as its memory, from its first element to its last, and its strides: a
pool is never copied. Memory of states is counted in units of UNIT elements: of 16 where every
stride is a multiple of 16, so that reads are provably aligned and wide, else of 1. In place, the
state and the new state are the same memory: a thread reads each of its elements once, before it
writes it.
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    F32,
    I32,
    L2NORM_EPSILON,
    LOG_ALPHA,
    NO_DECAY,
    macros,
    named,
)

I64 = "int64"


def tokens(
    T: Any, *, K: int, V: int, BV: int, low: str, stored: str, erase: bool, UNIT: int,
    channels: bool, erases: str, writes: str, threads: int,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (B ceil(V / BV), HV).

    Args:
        T, K, V, erase, threads: as in `blocks`.
        BV: columns of V per program, a divisor of V.
        low: dtype of q, k, v and o.
        stored: dtype of the states.
        UNIT: elements that a stride of a state counts.
        channels: whether every key channel has a decay of its own.
        erases, writes: the widths of erase and write, "none" where they are not given.
    """
    n_q, n_k, n_v, n_gate, n_beta, M, HV = T.dynamic("n_q, n_k, n_v, n_gate, n_beta, M, HV", I64)
    n_erase, n_state, n_new, n_states = T.dynamic("n_erase, n_state, n_new, n_states", I64)
    n_indices = T.dynamic("n_indices", I64)
    blocks_of_V = V // BV
    padded = -(-K // threads) * threads
    is_apart = erases != "none" or writes != "none"
    recurrence = _recurrence(T, K, BV, padded, erase, erases)

    @T.prim_func
    def tokens(
        q: T.Tensor((n_q,), low), k: T.Tensor((n_k,), low), v: T.Tensor((n_v,), low),
        gate: T.Tensor((n_gate,), F32), beta: T.Tensor((n_beta,), F32),
        erase_by: T.Tensor((n_erase,), F32),
        state: T.Tensor((n_state, UNIT), stored), new_state: T.Tensor((n_new, UNIT), stored),
        states: T.Tensor((n_states, UNIT), stored), indices: T.Tensor((n_indices,), I32),
        o: T.Tensor((M, HV, V), low),
        B: T.int32, length: T.int32, R: T.int32, scale: T.float32, gate_kind: T.int32,
        has_beta: T.int32, is_normed: T.int32, has_state: T.int32, keep: T.int32,
        index_step: T.int32,
        q_row: T.int64, q_token: T.int64, q_head: T.int64, q_d: T.int64,
        k_row: T.int64, k_token: T.int64, k_head: T.int64, k_d: T.int64,
        v_row: T.int64, v_token: T.int64, v_head: T.int64, v_d: T.int64,
        state_row: T.int64, state_head: T.int64, state_k: T.int64, state_v: T.int64,
        new_row: T.int64, new_head: T.int64, new_k: T.int64, new_v: T.int64,
    ):  # fmt: skip
        with T.Kernel(B * blocks_of_V, HV, threads=threads) as (program, hv):
            m = _tiles(T, K, BV, padded, channels, erases == "channel")
            # Variables, since an expression would be repeated wherever it is used.
            first = program % blocks_of_V * BV
            row = T.alloc_var(I64, T.cast(program // blocks_of_V, I64))
            place = T.alloc_var(I64, row)
            from_q = T.alloc_var(I64, row * q_row + hv // R * q_head)
            from_k = T.alloc_var(I64, row * k_row + hv // R * k_head)
            from_v = T.alloc_var(I64, row * v_row + hv * v_head + first * v_d)
            cell = T.alloc_var(I64)
            at = T.alloc_var(I64)
            alpha = T.alloc_var(F32)
            strength = T.alloc_var(F32)
            if index_step > 0:
                place = T.cast(indices[row * index_step], I64)
            T.clear(m.S)
            if has_state != 0 and place >= 0:
                cell = place * state_row + hv * state_head
                for i, j in T.Parallel(K, BV):
                    column = cell + i * state_k + (first + j) // UNIT * state_v
                    m.S[i, j] = T.cast(state[column, (first + j) % UNIT], F32)
            for t in T.serial(length):
                at = (row * length + t) * HV + hv
                for i in T.Parallel(padded):
                    m.q_frag[i] = T.if_then_else(
                        i < K, T.cast(q[from_q + t * q_token + i * q_d], F32), 0.0
                    )
                    m.k_frag[i] = T.if_then_else(
                        i < K, T.cast(k[from_k + t * k_token + i * k_d], F32), 0.0
                    )
                if is_normed != 0:
                    recurrence.normalise(m.q_frag, m.square, m.total)
                    recurrence.normalise(m.k_frag, m.square, m.total)
                T.copy(m.q_frag, m.q)
                T.copy(m.k_frag, m.k)

                # §2 S' = α_t S_{t-1}                                            [K, BV]
                if channels:
                    recurrence.fade(m, gate, at * K, gate_kind)
                else:
                    alpha = 1.0
                    if gate_kind != NO_DECAY:
                        alpha = gate[at]
                    if gate_kind == LOG_ALPHA:
                        alpha = T.exp(alpha)
                    for i, j in T.Parallel(K, BV):
                        m.S[i, j] = m.S[i, j] * alpha
                # §2 u_t = β_t (v_t − S'ᵀ k_t), or w_t ⊙ v_t − S'ᵀ (e_t ⊙ k_t)      [BV]
                recurrence.read_back(m, erase_by, at)
                strength = 1.0
                if has_beta != 0:
                    strength = beta[at]
                for j in T.Parallel(BV):
                    given = T.cast(v[from_v + t * v_token + j * v_d], F32)
                    if writes == "channel":
                        m.u[j] = beta[at * V + first + j] * given - m.u[j]
                    elif is_apart:
                        m.u[j] = strength * given - m.u[j]
                    else:
                        m.u[j] = strength * (given - m.u[j])
                # §2 S_t = S' + k_t u_tᵀ,  o_t = s S_tᵀ q_t                      [K, BV], [BV]
                recurrence.write_and_read(m)

                for j in T.Parallel(BV):
                    o[row * length + t, hv, first + j] = T.cast(
                        T.if_then_else(place >= 0, scale * m.u[j], 0.0), low
                    )
                if keep != 0:
                    cell = at * (K * V // UNIT)
                    for i, j in T.Parallel(K, BV):
                        states[cell + (i * V + first + j) // UNIT, (first + j) % UNIT] = T.cast(
                            T.if_then_else(place >= 0, m.S[i, j], 0.0), stored
                        )
            if place >= 0:
                cell = place * new_row + hv * new_head
                for i, j in T.Parallel(K, BV):
                    column = cell + i * new_k + (first + j) // UNIT * new_v
                    new_state[column, (first + j) % UNIT] = T.cast(m.S[i, j], stored)

    return tokens


def _tiles(
    T: Any, K: int, BV: int, padded: int, channels: bool, erases_channels: bool
) -> SimpleNamespace:
    """Allocate the tiles of a program; rows of K numbers have the length of a tile of threads.

    What is erased are the keys themselves, where they are not weighed channel by channel.
    """
    wide = {"alpha": channels, "erased": erases_channels}
    rows = {name: (padded,) for name, is_there in wide.items() if is_there}
    tiles = SimpleNamespace(
        **named(T.alloc_fragment, F32, S=(K, BV), x=(K, BV), u=(BV,), square=(padded,), total=(1,)),
        **named(T.alloc_fragment, F32, q_frag=(padded,), k_frag=(padded,)),
        **named(T.alloc_fragment, F32, **{f"{name}_frag": shape for name, shape in rows.items()}),
        **named(T.alloc_shared, F32, q=(padded,), k=(padded,), **rows),
    )
    if not erases_channels:
        tiles.erased = tiles.k
    return tiles


def _recurrence(T: Any, K: int, BV: int, padded: int, erase: bool, erases: str) -> SimpleNamespace:
    """Return the macros of the rows and the sums over K of a token."""

    @T.macro
    def normalise(x, square, total):
        """Divide x by sqrt(sum(x²) + 1e-6)."""
        for i in T.Parallel(padded):
            square[i] = x[i] * x[i]
        T.reduce_sum(square, total, dim=0)
        for i in T.Parallel(padded):
            x[i] = x[i] / T.sqrt(total[0] + L2NORM_EPSILON)

    @T.macro
    def fade(m, gate, first, gate_kind):
        """Multiply every row of S by its decay, which is read, and made of its log, only once."""
        for i in T.Parallel(padded):
            m.alpha_frag[i] = T.if_then_else(i < K, gate[first + i], 0.0)
        if gate_kind == LOG_ALPHA:
            for i in T.Parallel(padded):
                m.alpha_frag[i] = T.exp(m.alpha_frag[i])
        T.copy(m.alpha_frag, m.alpha)
        for i, j in T.Parallel(K, BV):
            m.S[i, j] = m.S[i, j] * m.alpha[i]

    @T.macro
    def read_back(m, erase_by, at):
        """Set u to S'ᵀ k, or S'ᵀ (e ⊙ k), or to 0 for rules without an error term."""
        T.clear(m.u)
        if erase:
            if erases == "channel":
                for i in T.Parallel(padded):
                    e = T.if_then_else(i < K, erase_by[at * K + i], 0.0)
                    m.erased_frag[i] = e * m.k_frag[i]
                T.copy(m.erased_frag, m.erased)
            for i, j in T.Parallel(K, BV):
                m.x[i, j] = m.S[i, j] * m.erased[i]
            T.reduce_sum(m.x, m.u, dim=0)
            if erases == "scalar":
                for j in T.Parallel(BV):
                    m.u[j] = erase_by[at] * m.u[j]

    @T.macro
    def write_and_read(m):
        """Add k uᵀ to S, then set u to Sᵀ q."""
        for i, j in T.Parallel(K, BV):
            m.S[i, j] = m.S[i, j] + m.k[i] * m.u[j]
        for i, j in T.Parallel(K, BV):
            m.x[i, j] = m.S[i, j] * m.q[i]
        T.reduce_sum(m.x, m.u, dim=0)

    return macros(normalise, fade, read_back, write_and_read)
