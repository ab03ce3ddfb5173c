"""Compute the chunkwise form of docs/math.md §3 over one segment of a few chunks.

A segment is n chunks of C tokens for G = rows x H key heads, each with R value heads. What
does not depend on the state is formed for all chunks of the segment at once; only K S, the
correction and the state update run in sequence. Value heads of one key head are packed along
V for every product with the state, so that q and k are never repeated.

    qk     (n, G, 2 C, K)      D, A, T, P   (n, G, R, C, C)
    v, U   (n, G, R, C, V)     b, d, beta   (n, G, R, C)
    S, dS  (G, K, R V)         G_cum, z     (n, G, R, C)

Everything is in the compute dtype except G_cum. All functions are plain torch: autograd sees
through them, which is what second derivatives use, and torch.compile can fuse them. In eager
mode without gradients they write into `Scratch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Hold the operands of a segment; see the module docstring for shapes.

    Attributes:
        qk: q above k, in one tensor, because one product with S is faster than two.
        v, beta: operands in the compute dtype.
        log_decay_cumsum: G of §4, inclusive within each chunk; None where nothing decays.
        zeros: z of §4; None where no gate is 0.
    """

    qk: Tensor
    v: Tensor
    beta: Tensor
    log_decay_cumsum: Tensor | None
    zeros: Tensor | None

    # Methods: not every Dynamo traces a property of a named tuple.

    def tokens(self) -> int:
        """Return C, tokens per chunk."""
        return self.v.shape[3]

    def q(self) -> Tensor:
        """Return q, (n, G, C, K)."""
        return self.qk[..., : self.tokens(), :]

    def k(self) -> Tensor:
        """Return k, (n, G, C, K)."""
        return self.qk[..., self.tokens() :, :]


class Decay(NamedTuple):
    """Hold the decays of §3: D within a chunk, b from its start, d to its end, b_C across it."""

    D: Tensor
    b: Tensor
    d: Tensor
    total: Tensor


class Prepared(NamedTuple):
    """Hold the terms of a segment that do not depend on the state.

    Attributes:
        decay: None where nothing decays.
        causal: (C, C) ones on and below the diagonal.
        qk: s Q Kᵀ, (n, G, 1, C, C).
        kk: K Kᵀ, or None without erase.
        P: s lower(Q Kᵀ ⊙ D), (n, G R, C, C).
        T: (I + A)⁻¹, (n, G R, C, C), or None without erase.
        T_beta: T diag(β), or None without erase.
    """

    decay: Decay | None
    causal: Tensor
    qk: Tensor
    kk: Tensor | None
    P: Tensor
    T: Tensor | None
    T_beta: Tensor | None


class Scratch:
    """Hold buffers by name, which one walk reuses from segment to segment.

    Fresh memory costs a page fault per 4 KiB, more than the arithmetic done on it. A
    disabled scratch hands out None, and `out=None` makes torch allocate as usual: that is
    what autograd and torch.compile need.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Return the buffer of that name, in the dtype of `like`, or None if disabled."""
        if not self.enabled:
            return None
        found = self._buffers.get(name)
        if found is None or found.shape != shape:
            found = self._buffers[name] = like.new_empty(shape)
        return found

    def slots(self, name: str, count: int, shape: tuple[int, ...], like: Tensor) -> _Slots:
        """Return `count` slots of one buffer."""
        return _Slots(count, self.get(name, (count, *shape), like))


class _Slots:
    """Collect tensors to be stacked, in slots of one buffer, or in a list where there is none."""

    def __init__(self, count: int, buffer: Tensor | None) -> None:
        self.buffer = buffer
        self.parts: list[Tensor | None] = [None] * count

    def out(self, i: int) -> Tensor | None:
        return None if self.buffer is None else self.buffer[i]

    def put(self, i: int, x: Tensor) -> Tensor:
        self.parts[i] = x
        return x

    def stacked(self) -> Tensor:
        if self.buffer is not None:
            return self.buffer
        return torch.stack([part for part in self.parts if part is not None])


NO_SCRATCH = Scratch(enabled=False)


def packed(x: Tensor) -> Tensor:
    """Reshape (..., G, R, C, V) to (..., G, C, R V)."""
    return x.transpose(-3, -2).flatten(-2)


def per_head(x: Tensor, heads: int) -> Tensor:
    """Reshape (..., G, C, R V) to a view (..., G, R, C, V)."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(-3, -2)


def scaled_packed(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """Multiply (..., G, R, C, V) by (..., G, R, C) into (..., G, C, R V)."""
    if out is None:
        return packed(x * weight.unsqueeze(-1))
    torch.mul(x, weight.unsqueeze(-1), out=per_head(out, x.shape[-3]))
    return out


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply a by b over equal leading axes, as one flat batch."""
    flat = None if out is None else out.flatten(0, -3)
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=flat)
    return product.view(*a.shape[:-2], *product.shape[1:])


def plus_product(total: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return total + a b over equal leading axes.

    The result is in `out` if that is given; else in `total`, which nobody else holds, if that is
    contiguous: torch multiplies matrix by matrix into a batch that is not.
    """
    if torch.compiler.is_compiling():
        # A sum that the compiler can fuse; it would make baddbmm_ a copy and a product.
        return total + bmm(a, b)
    operands = (total.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3))
    if out is None and total.is_contiguous():
        operands[0].baddbmm_(*operands[1:])
        return total
    flat = None if out is None else out.flatten(0, -3)
    return torch.baddbmm(*operands, out=flat).view(total.shape)


def across(total: Tensor | None, state: Tensor, out: Tensor | None = None) -> Tensor:
    """Return b_C S, (G, K, R V)."""
    if total is None:
        return state.clone() if out is None else out.copy_(state)
    heads = total.shape[-1]
    wide = None if out is None else out.unflatten(-1, (heads, -1))
    scaled = torch.mul(state.unflatten(-1, (heads, -1)), total[:, None, :, None], out=wide)
    return scaled.flatten(-2) if out is None else out


def decay_factors(
    x: Segment, causal: Tensor, crossings: int = 0, scratch: Scratch = NO_SCRATCH
) -> Decay | None:
    """Form D, b, d and b_C, keeping only pairs with `crossings` zeros of α between them.

    crossings=0 gives the factors of §3, crossings=1 the D¹ of §5.
    """
    G, z = x.log_decay_cumsum, x.zeros
    if G is None:
        return None
    dtype = x.qk.dtype
    # §4 D_ij = exp(G_i − G_j) [z_i = z_j],  i ≥ j      [C, C]
    wide = scratch.get("G_i - G_j", (*G.shape, G.shape[-1]), G)
    difference = torch.sub(G.unsqueeze(-1), G.unsqueeze(-2), out=wide)
    narrow = scratch.get(f"D{crossings}", difference.shape, x.qk)
    D = difference.to(dtype) if narrow is None else narrow.copy_(difference)
    b, d = G.to(dtype).exp(), (G[..., -1:] - G).to(dtype).exp()
    total = b[..., -1]
    drop = ~causal
    if z is not None:
        drop = drop | (z.unsqueeze(-1) - z.unsqueeze(-2) != crossings)
        b = b * (z == crossings)
        d = d * (z[..., -1:] - z == crossings)
        total = total * (z[..., -1] == crossings)
    D = D.masked_fill(drop, -torch.inf) if narrow is None else D.masked_fill_(drop, -torch.inf)
    return Decay(D.exp_(), b, d, total)


def prepare(x: Segment, scale: float, has_erase: bool, scratch: Scratch = NO_SCRATCH) -> Prepared:
    """Form the terms of §3 that do not depend on the state."""
    n, G, heads, tokens = x.v.shape[:4]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.qk.device).tril_()
    decay = decay_factors(x, causal, 0, scratch)
    D = causal.to(x.qk.dtype) if decay is None else decay.D
    wide = (n, G, heads, tokens, tokens)
    pairs = bmm(x.qk, x.k().mT, scratch.get("[Q; K] K'", (n, G, 2 * tokens, tokens), x.qk))
    # §3 P = s lower(Q Kᵀ ⊙ D)                          [C, C]
    qk = pairs[..., :tokens, :].unsqueeze(2)
    qk = qk.mul_(scale) if scratch.enabled else qk * scale
    P = torch.mul(qk, D.expand(wide), out=scratch.get("P", wide, x.qk)).flatten(1, 2)
    if not has_erase:
        return Prepared(decay, causal, qk, None, P, None, None)
    # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D)): the solve does not read the rest  [C, C]
    kk = pairs[..., tokens:, :].unsqueeze(2)
    buffer = scratch.get("A", wide, x.qk)
    A = torch.mul(kk, D.expand(wide), out=buffer)
    A = torch.mul(A, x.beta.unsqueeze(-1), out=buffer).flatten(1, 2)
    # §3 T = (I + A)⁻¹                                  [C, C]
    eye = torch.eye(tokens, dtype=A.dtype, device=A.device).expand_as(A)
    into, scaled = (scratch.get(name, A.shape, x.qk) for name in ("T", "T beta"))
    into, scaled = (None if y is None else y.mT for y in (into, scaled))
    T = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True, out=into)
    T_beta = torch.mul(T, x.beta.flatten(1, 2).unsqueeze(-2), out=scaled)
    return Prepared(decay, causal, qk, kk, P, T, T_beta)


class Read(NamedTuple):
    """Hold [Q; K] S, E and U of a chunk, or the buffers for them (None: allocate it).

    Attributes:
        qkS: [Q; K] S, (G, 2 C, R V); Q S alone without erase.
        E: V − diag(b) K S, (G, R, C, V).
        U: (G, R, C, V).
    """

    qkS: Tensor | None
    E: Tensor | None
    U: Tensor | None

    @staticmethod
    def buffers(x: Segment, has_erase: bool, scratch: Scratch) -> Read:
        """Return scratch buffers for one chunk."""
        _, G, R, C, V = x.v.shape
        return Read(
            scratch.get("[Q; K] S", (G, 2 * C if has_erase else C, R * V), x.qk),
            scratch.get("E", (G, R, C, V), x.qk),
            scratch.get("U", (G, R, C, V), x.qk),
        )


def read_state(
    x: Segment, p: Prepared, i: int, state: Tensor, out: Read
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [Q; K] S (Q S alone without erase), E and U of chunk i."""
    heads, tokens = x.v.shape[2], x.tokens()
    if p.T_beta is None:
        # §3 without erase, U = diag(β) V               [C, V]
        U = torch.mul(x.v[i], x.beta[i].unsqueeze(-1), out=out.U)
        return torch.bmm(x.q()[i], state, out=out.qkS), x.v[i], U
    qkS = torch.bmm(x.qk[i], state, out=out.qkS)
    kS = per_head(qkS[:, tokens:], heads)
    if p.decay is None:
        E = torch.sub(x.v[i], kS, out=out.E)
    else:
        E = torch.addcmul(x.v[i], kS, p.decay.b[i].unsqueeze(-1), value=-1, out=out.E)
    # §3 U = T diag(β) (V − diag(b) K S)                [C, V]
    flat = None if out.U is None else out.U.flatten(0, 1)
    U = torch.bmm(p.T_beta[i], E.flatten(0, 1), out=flat).view(E.shape)
    return qkS, E, U


def write_output(
    p: Prepared,
    i: int,
    qkS: Tensor,
    U: Tensor,
    scale: float,
    scratch: Scratch,
    out: Tensor | None,
) -> Tensor:
    """Form the output of chunk i; `out` may hold fewer tokens than the chunk.

    Args:
        p: of the segment.
        i: the chunk.
        qkS: Q S in its first C rows, (G, ..., R V).
        U: (G, R, C, V).
        scale: s.
        scratch: buffers to reuse.
        out: (rows, H, R, c, V) with rows H = G and c <= C, or None for a new (G, R, C, V).
    """
    G, R, C, V = U.shape
    flat = torch.bmm(p.P[i], U.flatten(0, 1), out=scratch.get("P U", (G * R, C, V), U))
    PU, qS = flat.view(G, R, C, V), per_head(qkS[:, :C], R)
    b = None if p.decay is None else p.decay.b[i].unsqueeze(-1)
    if out is not None:
        rows, tokens = out.shape[0], out.shape[3]
        PU, qS = (y.unflatten(0, (rows, -1))[..., :tokens, :] for y in (PU, qS))
        b = None if b is None else b.unflatten(0, (rows, -1))[..., :tokens, :]
    # §3 O = s (diag(b) Q S + (lower(Q Kᵀ ⊙ D)) U)      [C, V]
    if b is None:
        return torch.add(PU, qS, alpha=scale, out=out)
    return torch.addcmul(PU, qS, b, value=scale, out=out)


def advanced(
    x: Segment,
    p: Prepared,
    i: int,
    U: Tensor,
    state: Tensor,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """Return the state after chunk i."""
    # §3 S_C = b_C S + (diag(d) K)ᵀ U                  [K, R V]
    if p.decay is None:
        return plus_product(across(None, state, out), x.k()[i].mT, packed(U))
    G, R, C, V = U.shape
    dU = scaled_packed(U, p.decay.d[i], scratch.get("dU", (G, C, R * V), x.qk))
    return plus_product(across(p.decay.total[i], state, out), x.k()[i].mT, dU)


def forward_segment(
    x: Segment,
    state: Tensor,
    scale: float,
    has_erase: bool,
    scratch: Scratch = NO_SCRATCH,
    out: Sequence[Tensor] = (),
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of the chunks and the state after them.

    Args:
        x: the operands.
        state: (G, K, R V) at the start; updated itself where there is a scratch.
        scale: s.
        has_erase: whether the rule has an error term.
        scratch: buffers to reuse.
        out: where to write the outputs, see `write_output`; new tensors if empty.
    """
    p = prepare(x, scale, has_erase, scratch)
    into = Read.buffers(x, has_erase, scratch)
    reused = state if scratch.enabled else None
    outputs = []
    for i in range(x.v.shape[0]):
        qkS, _, U = read_state(x, p, i, state, into)
        outputs.append(write_output(p, i, qkS, U, scale, scratch, out[i] if out else None))
        state = advanced(x, p, i, U, state, scratch, reused)
    return outputs, state


def advance_segment(
    x: Segment, state: Tensor, scale: float, has_erase: bool, scratch: Scratch = NO_SCRATCH
) -> Tensor:
    """Return the state after a segment, in a new tensor, without the outputs."""
    p = prepare(x, scale, has_erase, scratch)
    into = Read.buffers(x, has_erase, scratch)
    for i in range(x.v.shape[0]):
        U = read_state(x, p, i, state, into)[2]
        state = advanced(x, p, i, U, state, scratch)
    return state
