"""Plan a call: its sizes and scratch memory, the constants and options of its launches."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.table import Config
from gdn_ops.backends.triton.kernels.blocks import ALPHA, LOG_ALPHA, NO_DECAY
from gdn_ops.call.bind import Call
from gdn_ops.kernel_support.backend import environment_choice
from gdn_ops.kernel_support.tuning import Tiles
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA

CHUNK: Final = 20
"""Time of a chunk in a walk that writes the output. This and the next three are in its twentieths,
by the model of `gdn-ops compile`, not measured."""

STARTS: Final = 13
"""The same in a walk for the starts of segments."""

COMPOSED: Final = 40
"""Time of a segment in `compose`."""

LAUNCHED: Final = 80
"""Time that two more launches take."""

CUTS: Final = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Numbers of segments that are looked at."""

KEPT: Final = 256
"""The part of the device's memory that U and the states of one call may take."""

LEAST_SEGMENT: Final = 8
"""Chunks that a segment has at least. By count of launches, not measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold what is planned for one call of the sequence op.

    Attributes:
        config: its configuration.
        C: tokens per chunk.
        L: chunks per segment.
        chunk_slots: how many chunks the tensors kept per chunk have room for.
        segment_slots: how many segments the tensors kept per segment have room for; 0 where every
            sequence is one.
        keep: whether the forward keeps U and the states of all chunks.
        kept: dtype of what is kept per chunk: that of q, but float32 for float16.
    """

    config: Config
    C: int
    L: int
    chunk_slots: int
    segment_slots: int
    keep: bool
    kept: torch.dtype


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what is kept per chunk, given that of q.

    The range of float16 may be left by a state, an inverse or a gradient where no result does.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def make_plan(call: Call, *, is_staged: bool = False) -> Plan:
    """Return the plan of a call, from its shapes and attributes alone.

    Args:
        call: the call.
        is_staged: whether it is run in stages (`stages`), all of which need this plan.
    """
    s = call.sizes
    dtype = call.tokens.q.dtype
    config: Config = configs.tables.choose(call.device, s.K, s.V, dtype)
    C = call.chunk_size or config.C
    if has_channels(call):
        # Rows of both k fill the shared memory of a processor.
        config = replace(config, together=1)
    L = segment_chunks(call.device, s, C, config, is_staged)

    def slots(tokens: int) -> int:
        return s.T // tokens + s.N if call.cu_seqlens is not None else s.N * -(-s.T // tokens)

    return Plan(
        config=config,
        C=C,
        L=L,
        chunk_slots=slots(C),
        segment_slots=slots(C * L) if L else 0,
        keep=keeps_states(call, slots(C), C),
        kept=kept_dtype(dtype),
    )


def segment_chunks(
    device: torch.device, s: Sizes, C: int, config: Config, is_staged: bool = False
) -> int:
    """Return how many chunks of a sequence are walked by one program, 0 for all of them.

    A sequence is cut (docs/math.md §6) where that should be faster, see `fastest_segment`. What a
    sequence computes so depends, in its rounding, on how many others are in the call;
    GDN_OPS_TRITON_SEGMENTS=off, read at import, never cuts.
    """
    if config.segment is not None:
        return config.segment
    if not _cuts:
        return 0
    BV = min(config.walk.BV, power_of_two(s.V))
    programs = configs.tables.processors(device) * config.together
    chunks = -(-s.B * s.T // (max(s.N, 1) * C))
    sizes = programs, s.N * s.HV, -(-s.V // BV), -(-s.K // BV), chunks
    # Sizes that are not known yet have no hash.
    known = all(type(n) is int for n in sizes)
    find = _known_segment if known else fastest_segment
    return find(*sizes, is_staged=is_staged)


def fastest_segment(
    programs: int, heads: int, of_v: int, of_k: int, chunks: int, *, is_staged: bool = False
) -> int:
    """Return the chunks of a segment with which the walks should end first, 0 for no cuts.

    Every segment but the last is walked for the state at its end, all at a time, by blocks of V and
    of K; the first one, whose start is known, by those of V. Then all are walked for the output. In
    stages no start is known: all segments are walked for maps, cut or not, and composed twice.

    Args:
        programs: that the GPU runs at a time.
        heads: value heads of all sequences.
        of_v, of_k: blocks of the columns of V and of K.
        chunks: of a sequence.
        is_staged: whether the call is run in stages.
    """
    maps, composed = heads * (of_v + of_k), 2 if is_staged else 1
    once = STARTS * -(-maps // programs) if is_staged else 0
    best, fastest = 0, (once + CHUNK * -(-heads * of_v // programs)) * chunks
    for cuts in CUTS:
        if cuts * LEAST_SEGMENT > chunks:
            break
        L = -(-chunks // cuts)
        first = cuts * maps if is_staged else heads * ((cuts - 1) * of_v + (cuts - 2) * of_k)
        walks = STARTS * -(-first // programs) + CHUNK * -(-heads * cuts * of_v // programs)
        time = walks * L + composed * COMPOSED * cuts + LAUNCHED
        if time < fastest:
            best, fastest = L, time
    return best


_known_segment = functools.lru_cache(maxsize=4096)(fastest_segment)

_cuts = environment_choice("GDN_OPS_TRITON_SEGMENTS", ("on", "off")) == "on"


def keeps_states(call: Call, slots: int, C: int) -> bool:
    """Return whether the forward keeps U and the states of all chunks for the backward.

    Otherwise the backward walks again. They are kept where those of one call take at most a
    KEPT-th of the device's memory; GDN_OPS_TRITON_KEEP, read at import, keeps or drops all.
    """
    if not call.needs_grad or _kept == "off":
        return False
    s = call.sizes
    rows = s.V * s.K + (C * s.V if call.rule.has_erase else 0)
    nbytes = s.HV * slots * rows * call.tokens.q.element_size()
    return _kept == "on" or nbytes * KEPT <= configs.tables.memory(call.device)


_kept = environment_choice("GDN_OPS_TRITON_KEEP", ("auto", "on", "off"))


class Saved(NamedTuple):
    """Hold the tensors that the first launch saves for the backward.

    Attributes:
        gates: (4, HV, chunk_slots, C) float32: G as hi and lo, z, β; of channels β alone.
        factors: (3, HV, chunk_slots, C) float32: of rows of K S, Q S and U; of channels (2, ...).
        ends: (HV, chunk_slots) float32: b_C; (HV, chunk_slots, K) of channels.
        inv_norms: (H, chunk_slots, C) float32: 1/‖k‖, empty without qk_l2norm and of channels.
        inverses: (HV, chunk_slots, C, C), empty without an error term.
        scores: (HV, chunk_slots, C, C): P.
        starts: (segment_slots, HV, K, V) float32: the states that segments start from.
        maps: (segment_slots, HV, V + K, K) float32: what segments make of states.
        scaled_q, scaled_k: (B, T, H, K): times powers of two, empty without qk_l2norm; of channels
            (B, T, HV, K): s b ⊙ Q, and β b ⊙ K, which is empty without an error term, both over
            their factors.
        written_k: (B, T, HV, K): d ⊙ K of channels, else empty.
        u: (HV, chunk_slots, C, V): U, empty without an error term or where it is not kept.
        states: (HV, chunk_slots, V, K): transposed, at the start of every chunk, empty if not kept.
    """

    gates: Tensor
    factors: Tensor
    ends: Tensor
    inv_norms: Tensor
    inverses: Tensor
    scores: Tensor
    starts: Tensor
    maps: Tensor
    scaled_q: Tensor
    scaled_k: Tensor
    written_k: Tensor
    u: Tensor
    states: Tensor


def empty_saved(call: Call, plan: Plan) -> Saved:
    """Allocate `Saved` for a call."""
    s, slots, C, device = call.sizes, plan.chunk_slots, plan.C, call.device
    channels, has_erase = has_channels(call), call.rule.has_erase
    norms = (s.H, slots, C) if call.qk_l2norm and not channels else (0,)
    rows = (s.B, s.T, s.HV if channels else s.H, s.K) if call.qk_l2norm or channels else (0,)
    squares = (s.HV, slots, C, C)
    written = (s.HV, slots, C, s.V) if has_erase else (0,)

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def kept(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=plan.kept, device=device)

    return Saved(
        gates=float32(4, s.HV, slots, C),
        factors=float32(2 if channels else 3, s.HV, slots, C),
        ends=float32(s.HV, slots, *((s.K,) if channels else ())),
        inv_norms=float32(*norms),
        inverses=kept(*(squares if has_erase else (0,))),
        scores=kept(*squares),
        starts=float32(plan.segment_slots, s.HV, s.K, s.V),
        maps=float32(plan.segment_slots, s.HV, s.V + s.K, s.K),
        scaled_q=kept(*rows),
        scaled_k=kept(*(rows if has_erase or not channels else (0,))),
        written_k=kept(*(rows if channels else (0,))),
        u=kept(*(written if plan.keep else (0,))),
        states=kept(*((s.HV, slots, s.V, s.K) if plan.keep else (0,))),
    )


def readable(x: Tensor) -> Tensor:
    """Return x (B, T, heads, D), or a copy where its last axis has gaps: tiles are read by rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, or None."""
    return None if x is None else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch row, token and head."""
    return x.stride(0), x.stride(1), x.stride(2)


def gate_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of batch row, token and head of a gate (B, T, HV), 0 where it is None."""
    return (0, 0, 0) if x is None else strides(x)


def operands(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q and k as the walks read them: scaled where they are normalised, or decayed.

    What is decayed has an axis of HV heads, and what U is multiplied by is not the same as k.
    """
    if has_channels(call):
        k = saved.scaled_k if call.rule.has_erase else saved.written_k
        return saved.scaled_q, k, saved.written_k
    if call.qk_l2norm:
        return saved.scaled_q, saved.scaled_k, None
    return readable(call.tokens.q), readable(call.tokens.k), None


def gate_kind(call: Call) -> int:
    """Return the kernels' constant for the form in which a call gives its decay."""
    if not call.rule.has_decay:
        return int(NO_DECAY.value)
    return int(LOG_ALPHA.value if call.tokens.alpha is None else ALPHA.value)


def has_channels(call: Call) -> bool:
    """Return whether a call is of the kernels of channels (docs/math.md §9).

    Every key channel has a decay of its own there, and a strength of its own that erases.
    """
    return call.widths.wide


def common(call: Call, plan: Plan) -> dict[str, Any]:
    """Return the compile-time constants that all kernels share."""
    return {
        "K": call.sizes.K,
        "C": plan.C,
        "BK": power_of_two(call.sizes.K),
        "VARLEN": call.cu_seqlens is not None,
        "PRECISION": precision(call),
    }


def precision(call: Call) -> str:
    """Return how products of float32 operands are formed in a call; beside float16, by TF32."""
    if configs.tables.target(call.device).startswith("gfx"):
        return "ieee"
    return "tf32" if call.tokens.q.dtype == torch.float16 else configs.float32_products


def solve_precision(call: Call) -> str:
    """Return how the products are formed that T is made of.

    For bfloat16, which T is rounded to, one pass of TF32 is enough: docs/backends.md has the study.
    """
    if configs.tables.target(call.device).startswith("gfx"):
        return "ieee"
    return "tf32" if call.tokens.q.dtype == torch.bfloat16 else configs.float32_products


def options(tiles: Tiles) -> dict[str, Any]:
    """Return the options of a launch; multiply and add are fused, the default of Triton 3.9."""
    return {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }


def width(tiles: Tiles, V: int) -> int:
    """Return how many columns of V a program takes."""
    return min(tiles.BV, power_of_two(V))


def gate_of(call: Call) -> Tensor | None:
    """Return the gate as given, contiguous, or None."""
    return dense(call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha)


def is_weighted(call: Call) -> bool:
    """Return whether T is multiplied by β where it is formed: a backward needs it without."""
    return call.rule.has_erase and not call.needs_grad and not has_channels(call)


HAS_DESCRIPTORS: Final = hasattr(tl, "make_tensor_descriptor")
"""Say whether the installed Triton has tensor descriptors."""


def by_descriptors(config: Config, tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a launch reads and writes tensors by descriptors."""
    given = (x for x in tensors if x is not None and x.numel())
    return config.descriptors and HAS_DESCRIPTORS and all(map(is_aligned, given))


def pointer_remarks(call: Call) -> list[str]:
    """Return why tiles of a call are read by pointers where its GPU could read them faster."""
    tokens = call.tokens
    if call.op is not GATED_DELTA:
        return []
    config = configs.tables.choose(call.device, call.sizes.K, call.sizes.V, tokens.q.dtype)
    if not config.descriptors:
        return []
    if not HAS_DESCRIPTORS:
        return [
            f"triton {triton.__version__} has no tensor descriptors: tiles are read by pointers"
        ]
    given = {"q": tokens.q, "k": tokens.k, "v": tokens.v}
    odd = [name for name, x in given.items() if not is_aligned(readable(x))]
    if not odd:
        return []
    return [f"{', '.join(odd)} not aligned to 16 bytes: tiles are read by pointers"]


def is_aligned(x: Tensor) -> bool:
    """Return whether tensor descriptors can read x (B, T, heads, D), by units of 16 bytes."""
    row, token, head = (n * x.element_size() % 16 == 0 for n in strides(x))
    # A descriptor has the stride of tokens even where there is one; the others move its start.
    at_start = (row or x.shape[0] == 1) and (head or x.shape[2] == 1)
    return x.data_ptr() % 16 == 0 and token and at_start
