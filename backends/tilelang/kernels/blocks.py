"""Define the kernels' shared macros: where a chunk lies, its decay, products of split operands.

The tokens of a sequence are cut into chunks of C. Chunk c of sequence n has the *slot*

    slot(n, c) = begin_n // C + n + c        begin_n: first token of sequence n in the pack

which no other chunk has: a sequence of L tokens has at most (begin + L) // C + 1 - begin // C
chunks, and `+ n` gives it one more. So what is kept per chunk needs no table of chunk indices and
no look at cu_seqlens from the host. A slot may be empty. Segments of several chunks have
slots too, by the same formula with C times their length.

An operand of a product is a list of bfloat16 tiles that add up to it. For bfloat16 it is one. For
float32 there are three, and a product is the sum of the six products that matter (to 2**-24 of it):
tensor cores then multiply in float32, and no TF32 is involved. For float16 there are two, which
hold its 11 bits, and three products: a state, an inverse or a gradient may be far beyond 65504
where the results are not, so that a tile of float16 could not hold it.

Rows of q and k that are normalised are scaled in their tiles by a power of two, exactly, to norms
below 2; what is left of 1 / norm is a factor of at most 1. Otherwise a zero key would have the
factor 1000 multiplied into values, which it is a zero for.

The factories of kernels and of macros take the language T, and constants:

    K, BK       width of a key, and of the tile that holds it, a multiple of 64
    V, BV       width of a value, and of the block of columns that a program, or a turn of it, has
    C           tokens per chunk: 32 or 64
    dtype       of q, k, v and dO; `kept_of` it is that of what is kept per chunk
    erase       whether the rule has an error term
    mode        which results are written, one of the kernel's MODES
    threads     per program, at most
    stages      of the software pipeline; 0 for none
    bulk        whether tiles are copied whole (by the copy engine that Hopper and later GPUs have)
                and cleared where a sequence ends, or read element by element as far as it goes
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

F32, I32 = "float32", "int32"

L2NORM_EPSILON = 1e-6
LOG_FLOOR = -1000.0
"""The conventions of `gdn_ops.call.numerics`, for float32."""

LIFTED = -1
LIFT, EXP_OF_LIFT = 60.0, 1.1420073898156842e26
"""Stand in place of a count of zeros for decays that are e**60 times as large, and 1 at most.

With α_t below e**-60 that is what its gradient is formed of, so that neither a product with α_t
nor a quotient by it leaves the range of float32 (docs/math.md §5).
"""

NO_DECAY, ALPHA, LOG_ALPHA = 0, 1, 2
"""Forms in which a call may give the decay."""

PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
"""Tiles of an operand, by the dtype of a call."""

PENDING = {"wg_wait": -1}
"""Options of a product that is not waited for: on Hopper, the next product without them waits for
all that were issued before it. Elsewhere every product is done when the next statement runs."""

PAIRS = {
    1: ((0, 0),),
    2: ((0, 1), (1, 0), (0, 0)),
    3: ((0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0)),
}
"""Pairs of parts that are multiplied, small products first, by the number of parts."""


def parts_of(dtype: str) -> int:
    """Return how many tiles an operand of a product consists of."""
    return PARTS[dtype]


def kept_of(dtype: str) -> str:
    """Return the dtype of what is kept per chunk, which has the range of float32."""
    return dtype if dtype == "bfloat16" else F32


def named(allocate: Callable[..., Any], dtype: str, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Allocate a tile, or an operand, for every name."""
    return {name: allocate(shape, dtype) for name, shape in shapes.items()}


def macros(*members: Any) -> SimpleNamespace:
    """Return macros as attributes, by their names."""
    return SimpleNamespace(**{macro.name: macro for macro in members})


def fitting(threads: int, stages: int, *sides: int) -> tuple[int, int]:
    """Return how many threads can share a product of these sides, and the stages of its pipeline.

    A warp multiplies 16 rows and 8 columns at least. Fewer than a warp group, 128 threads, are not
    split into those that load and those that multiply: then there is no pipeline.
    """
    side = min(sides)
    active = min(threads, 32 * (sides[0] // 16) * (side // 8))
    return active, stages if active >= 128 else 0


@functools.cache
def blocks(T: Any) -> SimpleNamespace:
    """Return the macros, for one language namespace."""

    def operand(shape: tuple[int, ...], dtype: str) -> list[Any]:
        """Allocate the tiles of an operand of products in shared memory."""
        return [T.alloc_shared(shape, "bfloat16") for _ in range(parts_of(dtype))]

    @T.macro
    def owner(cu, N, tokens, p):
        """Return the sequence that has slot p, a slot being `tokens` tokens."""
        n = T.alloc_var(I32, 0)
        above = T.alloc_var(I32, N)
        middle = T.alloc_var(I32)
        while n + 1 < above:
            middle = (n + above) // 2
            if cu[middle] // tokens + middle <= p:
                n = middle
            else:
                above = middle
        return n

    @T.macro
    def put(parts, i, j, x):
        """Set element (i, j) of an operand to the float32 value x."""
        if len(parts) == 1:
            parts[0][i, j] = T.cast(x, "bfloat16")
        else:
            high = T.cast(x, "bfloat16")
            rest = x - T.cast(high, "float32")
            middle = T.cast(rest, "bfloat16")
            parts[0][i, j] = high
            parts[1][i, j] = middle
            if len(parts) == 3:
                parts[2][i, j] = T.cast(rest - T.cast(middle, "float32"), "bfloat16")

    def value(parts: list[Any], i: Any, j: Any) -> Any:
        """Return element (i, j) of an operand, float32."""
        x = T.cast(parts[-1][i, j], "float32")
        for part in parts[-2::-1]:
            x = x + T.cast(part[i, j], "float32")
        return x

    def product(policy: Any, is_awaited: bool = True) -> Any:
        """Return the macro of a product that warps share by a policy."""

        @T.macro
        def multiply(a, b, c, transpose_A, transpose_B, clear):
            """Add the product of two operands to c, or set c to it."""
            for index, (x, y) in [*enumerate(PAIRS[len(a)])]:
                is_last = index == len(PAIRS[len(a)]) - 1
                T.gemm(
                    a[x], b[y], c, transpose_A=transpose_A, transpose_B=transpose_B,
                    policy=policy, clear_accum=clear and index == 0,
                    annotations=None if is_awaited and is_last else PENDING,
                )  # fmt: skip

        return multiply

    @T.macro
    def hold(parts):
        """Keep the tiles of an operand until here.

        In a pipelined loop a tile is given back to the copy engine after the last statement that
        names it, which is too early where that is a product that nothing has waited for yet.
        """
        for part in parts:
            T.evaluate(part[0, 0])

    @T.macro
    def store(x, to, outer, inner, column):
        """Store a tile in to[outer, inner] from a column on, rounded, as far as that goes."""
        for i, j in T.Parallel(*x.shape):
            if i < to.shape[2] and column + j < to.shape[3]:
                to[outer, inner, i, column + j] = T.cast(x[i, j], to.dtype)

    return SimpleNamespace(
        operand=operand,
        owner=owner,
        put=put,
        value=value,
        multiply=product(T.GemmWarpPolicy.Square),
        # Issue a product of several that do not depend on each other; the last one is `multiply`.
        issue=product(T.GemmWarpPolicy.Square, False),
        # Spread rows over as many warps as possible, for the sums over rows that follow.
        multiply_rows=product(T.GemmWarpPolicy.FullRow),
        issue_rows=product(T.GemmWarpPolicy.FullRow, False),
        hold=hold,
        store=store,
        **vars(_decays(T)),
    )


def _decays(T: Any) -> SimpleNamespace:
    """Return the macros of decays within a chunk."""

    @T.macro
    def decay(hi_i, lo_i, z_i, hi_j, lo_j, z_j, crossed, is_after):
        """Return D: exp(G_i - G_j) if i is after j and `crossed` zeros lie between, else 0.

        That is docs/math.md §4. G = hi + lo: equal parts cancel exactly, so a difference of large
        sums keeps its precision. It is at most 0 where i is after j.
        """
        # Every step has a name, and the last is a sum, so that no element has a branch of its own.
        log = (hi_i - hi_j) + (lo_i - lo_j)
        zeros = z_i - z_j
        if crossed == LIFTED:
            lifted = log + LIFT
            # A minimum would lose NaN.
            log = T.Select(lifted > 0.0, 0.0, lifted)
        is_kept = is_after and zeros == float(max(crossed, 0))
        return T.exp(log + T.Select(is_kept, 0.0, -T.infinity(F32)))

    @T.macro
    def pair_decay(g, i, j, crossed):
        """Return D_ij of a chunk with gates g (4, C), or D¹_ij; 0 for i < j."""
        return decay(g[0, i], g[1, i], g[2, i], g[0, j], g[1, j], g[2, j], crossed, i >= j)

    def branched_pair_decay(g: Any, i: Any, j: Any, crossed: int) -> Any:
        """Return the same, finite for i < j, with a branch for each element: in fewer registers."""
        log = (g[0, i] - g[0, j]) + (g[1, i] - g[1, j])
        if crossed == LIFTED:
            log, crossed = log + LIFT, 0
        factor = T.exp(T.if_then_else(log > 0.0, 0.0, log))
        return T.if_then_else(g[2, i] - g[2, j] == float(crossed), factor, 0.0)

    @T.macro
    def start_decay(g, i, crossed):
        """Return b_i of a chunk with gates g (4, C), or b¹_i; b_C is the last."""
        return decay(g[0, i], g[1, i], g[2, i], 0.0, 0.0, 0.0, crossed, True)

    return SimpleNamespace(
        decay=decay,
        pair_decay=pair_decay,
        branched_pair_decay=branched_pair_decay,
        start_decay=start_decay,
    )
