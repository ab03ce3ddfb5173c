"""Decode one token per row, or a few, in one launch.

One program per row, value head and block of BV columns of V: a row alone fills a GPU. The state
block, (K, BV) float32, stays in registers over the tokens; all arithmetic is float32.

    reads   q, k (B, T, H, K), v (B, T, HV, V), any strides; gate, β (B T, HV) float32; the state
            (B, HV, K, V), or a pool (P, HV, K, V) and the slot of every row, -1 to skip it
    writes  o (B T, HV, V); the state, in place or not; on request the state after every token

A tensor with strides comes as its memory, from its first element to its last, and its strides: a
pool is never copied. Memory of states is counted in units of UNIT elements: of 16 where every
stride is a multiple of 16, so that reads are provably aligned and wide, else of 1. In place, the
state and the new state are the same memory: a thread reads each of its elements once, before it
writes it.
"""

from typing import Any

from gdn_ops.call.numerics import L2NORM_EPSILON


def tokens(
    T: Any,
    *,
    K: int,
    V: int,
    BV: int,
    low: str,
    stored: str,
    erase: bool,
    UNIT: int,
    threads: int,
) -> Any:
    """Make the kernel. Grid (B ceil(V / BV), HV).

    Args:
        T: the language.
        K, V: head dims.
        BV: columns of V per program, a divisor of V.
        low: dtype of q, k, v and o.
        stored: dtype of the states.
        erase: whether the rule has an error term.
        UNIT: elements that a stride of a state counts.
        threads: per program.
    """
    f32, i32, i64 = "float32", "int32", "int64"
    n_q, n_k, n_v, n_gate, n_beta = (T.dynamic(f"n_{i}", i64) for i in range(5))
    n_state, n_new, n_states, n_indices = (T.dynamic(f"n_{i}", i64) for i in range(5, 9))
    M, HV = T.dynamic("M", i64), T.dynamic("HV", i64)
    blocks = V // BV
    padded = -(-K // threads) * threads

    @T.prim_func
    def tokens(
        q: T.Tensor((n_q,), low),
        k: T.Tensor((n_k,), low),
        v: T.Tensor((n_v,), low),
        gate: T.Tensor((n_gate,), f32),
        beta: T.Tensor((n_beta,), f32),
        state: T.Tensor((n_state, UNIT), stored),
        new_state: T.Tensor((n_new, UNIT), stored),
        states: T.Tensor((n_states, UNIT), stored),
        indices: T.Tensor((n_indices,), i32),
        o: T.Tensor((M, HV, V), low),
        B: T.int32,
        length: T.int32,
        R: T.int32,
        scale: T.float32,
        gate_kind: T.int32,
        has_beta: T.int32,
        is_normed: T.int32,
        has_state: T.int32,
        keep: T.int32,
        index_step: T.int32,
        q_row: T.int64,
        q_token: T.int64,
        q_head: T.int64,
        q_d: T.int64,
        k_row: T.int64,
        k_token: T.int64,
        k_head: T.int64,
        k_d: T.int64,
        v_row: T.int64,
        v_token: T.int64,
        v_head: T.int64,
        v_d: T.int64,
        state_row: T.int64,
        state_head: T.int64,
        state_k: T.int64,
        state_v: T.int64,
        new_row: T.int64,
        new_head: T.int64,
        new_k: T.int64,
        new_v: T.int64,
    ):
        with T.Kernel(B * blocks, HV, threads=threads) as (program, hv):
            S = T.alloc_fragment((K, BV), f32)
            x = T.alloc_fragment((K, BV), f32)
            u = T.alloc_fragment((BV,), f32)
            q_frag = T.alloc_fragment((padded,), f32)
            k_frag = T.alloc_fragment((padded,), f32)
            square = T.alloc_fragment((padded,), f32)
            total = T.alloc_fragment((1,), f32)
            q_shared = T.alloc_shared((padded,), f32)
            k_shared = T.alloc_shared((padded,), f32)
            # Variables, since an expression would be repeated wherever it is used.
            row = T.alloc_var(i64)
            place = T.alloc_var(i64)
            from_q = T.alloc_var(i64)
            from_k = T.alloc_var(i64)
            from_v = T.alloc_var(i64)
            cell = T.alloc_var(i64)
            at = T.alloc_var(i64)
            alpha = T.alloc_var(f32)
            strength = T.alloc_var(f32)
            first = program % blocks * BV
            row = T.cast(program // blocks, i64)
            place = row
            if index_step > 0:
                place = T.cast(indices[row * index_step], i64)
            from_q = row * q_row + hv // R * q_head
            from_k = row * k_row + hv // R * k_head
            from_v = row * v_row + hv * v_head + first * v_d
            T.clear(S)
            if has_state != 0 and place >= 0:
                cell = place * state_row + hv * state_head
                for i, j in T.Parallel(K, BV):
                    S[i, j] = T.cast(
                        state[
                            cell + i * state_k + (first + j) // UNIT * state_v, (first + j) % UNIT
                        ],
                        f32,
                    )
            for t in T.serial(length):
                at = (row * length + t) * HV + hv
                for i in T.Parallel(padded):
                    q_frag[i] = T.if_then_else(
                        i < K, T.cast(q[from_q + t * q_token + i * q_d], f32), 0.0
                    )
                    k_frag[i] = T.if_then_else(
                        i < K, T.cast(k[from_k + t * k_token + i * k_d], f32), 0.0
                    )
                if is_normed != 0:
                    for i in T.Parallel(padded):
                        square[i] = q_frag[i] * q_frag[i]
                    T.reduce_sum(square, total, dim=0)
                    for i in T.Parallel(padded):
                        q_frag[i] = q_frag[i] / T.sqrt(total[0] + L2NORM_EPSILON)
                    for i in T.Parallel(padded):
                        square[i] = k_frag[i] * k_frag[i]
                    T.reduce_sum(square, total, dim=0)
                    for i in T.Parallel(padded):
                        k_frag[i] = k_frag[i] / T.sqrt(total[0] + L2NORM_EPSILON)
                T.copy(q_frag, q_shared)
                T.copy(k_frag, k_shared)

                # §2 S' = α_t S_{t-1}                                            [K, BV]
                alpha = 1.0
                if gate_kind != 0:
                    alpha = gate[at]
                if gate_kind == 2:
                    alpha = T.exp(alpha)
                for i, j in T.Parallel(K, BV):
                    S[i, j] = S[i, j] * alpha
                # §2 u_t = β_t (v_t − S'ᵀ k_t)                                   [BV]
                T.clear(u)
                if erase:
                    for i, j in T.Parallel(K, BV):
                        x[i, j] = S[i, j] * k_shared[i]
                    T.reduce_sum(x, u, dim=0)
                strength = 1.0
                if has_beta != 0:
                    strength = beta[at]
                for j in T.Parallel(BV):
                    u[j] = strength * (T.cast(v[from_v + t * v_token + j * v_d], f32) - u[j])
                # §2 S_t = S' + k_t u_tᵀ,  o_t = s S_tᵀ q_t                      [K, BV], [BV]
                for i, j in T.Parallel(K, BV):
                    S[i, j] = S[i, j] + k_shared[i] * u[j]
                for i, j in T.Parallel(K, BV):
                    x[i, j] = S[i, j] * q_shared[i]
                T.reduce_sum(x, u, dim=0)

                for j in T.Parallel(BV):
                    o[row * length + t, hv, first + j] = T.cast(
                        T.if_then_else(place >= 0, scale * u[j], 0.0), low
                    )
                if keep != 0:
                    cell = at * (K * V // UNIT)
                    for i, j in T.Parallel(K, BV):
                        states[cell + (i * V + first + j) // UNIT, (first + j) % UNIT] = T.cast(
                            T.if_then_else(place >= 0, S[i, j], 0.0), stored
                        )
            if place >= 0:
                cell = place * new_row + hv * new_head
                for i, j in T.Parallel(K, BV):
                    new_state[
                        cell + i * new_k + (first + j) // UNIT * new_v, (first + j) % UNIT
                    ] = T.cast(S[i, j], stored)

    return tokens
