"""Draw calls with hypothesis, given a spec and limits; awkward calls come often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import FLOAT_DTYPES, Limits, Rule
from gdn_ops.testing.compiled import ShapeClass
from gdn_ops.testing.example import (
    BETAS,
    GATES,
    KEYS,
    MAGNITUDES,
    SHARED,
    STATE_LAYOUTS,
    STRENGTHS,
    Example,
)

TOKENS = (0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 127, 129, 150)
"""Lengths around the edges of chunks of 16, 32 and 64 and of segments of 128."""

DRAFTS = (1, 2, 3, 4, 8, 0, 5, 9, 17)
"""Tokens of one call of `gated_delta_steps`: few, and around 8 and 16."""

HEAD_DIMS = (1, 2, 3, 5, 8, 16, 17, 24, 32, 48)

BATCHES = (1, 2, 3, 1, 2, 0)
"""Numbers of rows; an empty batch proves little, and is rarer."""

REPEATS = (1, 2, 3, 4, 8)

SCALES = (None, 1.0, 0.3, -2.0, 0.0)

ANYWHERE = Limits(devices=("*",))


@st.composite
def calls(
    draw: st.DrawFn,
    spec: OpSpec = GATED_DELTA,
    limits: Limits = ANYWHERE,
    *,
    dtypes: Sequence[str] | None = None,
    shape_classes: Sequence[ShapeClass] | None = None,
    varlen: bool | None = None,
    max_tokens: int = max(TOKENS),
    decode: bool = False,
    device: str = "cpu",
) -> Example:
    """Draw a call that the spec allows and `limits` supports.

    Args:
        draw: given by hypothesis.
        spec: GATED_DELTA; its rules and attribute choices are drawn from it.
        limits: of the backend under test.
        dtypes: dtypes of q, k, v to draw from; those of the limits by default.
        shape_classes: draw one of these, and freely only what it leaves open.
        varlen: whether sequences are packed; drawn by default.
        max_tokens: the longest sequence.
        decode: draw few tokens, and also what only decode ops have.
        device: torch device of every tensor.
    """
    limits = limits.of(decode=decode)
    rule = spec.rule[draw(st.sampled_from([r.name for r in spec.rules if r.name in limits.rules]))]
    tokens = st.sampled_from([t for t in (DRAFTS if decode else TOKENS) if t <= max_tokens])
    packed = limits.varlen and not decode and (draw(st.booleans()) if varlen is None else varlen)
    lengths = tuple(draw(st.lists(tokens, min_size=0, max_size=3))) if packed else None
    fixed = draw(st.sampled_from(shape_classes)) if shape_classes is not None else {}
    drawn = {name: draw(own) for name, own in _sizes(limits, dtypes).items() if name not in fixed}
    drawn |= dict(fixed) if lengths is None else {**fixed, "B": 1}
    if "magnitude" not in drawn:
        # Most of them are about float16.
        rest = MAGNITUDES if drawn["dtype"] == "float16" else ("unit", "unit", *MAGNITUDES)
        drawn["magnitude"] = draw(st.sampled_from(("unit", *rest)))
    is_normed = drawn["magnitude"] == "tiny_keys" or draw(st.booleans())
    can_be_wide = "channel" in {*rule.decays} & {*limits.decays}
    drawn["channels"] = can_be_wide and drawn.get("channels", draw(st.booleans()))
    strengths = _strengths(rule, limits)
    apart = drawn.get("apart", draw(st.sampled_from(strengths)))
    drawn["apart"] = apart if apart in strengths else None
    example = Example(
        rule=rule.name,
        T=draw(tokens) if lengths is None else sum(lengths),
        lengths=lengths,
        gate=draw(st.sampled_from((*GATES, "extreme"))) if rule.has_decay else "uniform",
        beta=draw(st.sampled_from(BETAS)),
        keys=draw(st.sampled_from(KEYS)),
        log_gate=rule.has_decay and draw(st.booleans()),
        initial_state=draw(st.booleans()),
        # A normalised single number is its sign: its gradient is nothing but cancellation.
        qk_l2norm=drawn["K"] > 1 and is_normed,
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        device=device,
        **drawn,
    )
    return draw(_decoding(example, limits)) if decode else example


def _sizes(limits: Limits, dtypes: Sequence[str] | None) -> dict[str, st.SearchStrategy[Any]]:
    """Return strategies for the fields of an example that a shape class may fix."""
    dims = st.sampled_from(_head_dims(limits))
    chunk_sizes = limits.chunk_sizes or (16, 32, 64, 5)
    return {
        "B": st.sampled_from(BATCHES),
        "H": st.sampled_from((1, 2, 3)),
        "R": st.sampled_from(REPEATS),
        "K": dims,
        "V": dims,
        "dtype": st.sampled_from(list(dtypes or limits.dtypes)),
        "scale": st.sampled_from(SCALES),
        "chunk_size": st.sampled_from((None, *chunk_sizes)),
    }


def _strengths(rule: Rule, limits: Limits) -> tuple[str | None, ...]:
    """Return how erase and write may be given, None being beta; half of them are beta."""
    if not (limits.apart and rule.has_erase):
        return (None,)
    is_wide = "channel" in {*rule.erases} & {*limits.erases} & {*rule.writes} & {*limits.writes}
    kinds = STRENGTHS if is_wide else ("scalars",)
    return (*(None for _ in kinds), *kinds)


def _head_dims(limits: Limits) -> list[int]:
    """Return the head dims to draw from: those that limits allow up to 64, or the least one."""
    allowed = HEAD_DIMS if limits.head_dims is None else tuple(limits.head_dims)
    multiples = [d for d in allowed if d % limits.head_dim_multiple == 0]
    return [d for d in multiples if d <= 64] or [min(multiples)]


@st.composite
def _decoding(draw: st.DrawFn, example: Example, limits: Limits) -> Example:
    """Draw the state of a decode op: its dtype, where it lies, and maybe slots of a pool."""
    wide = ("float64",) if example.dtype == "float64" else ()
    stored = [d for d in FLOAT_DTYPES if d in limits.state_dtypes and (d != "float64" or wide)]
    if example.magnitude in ("half_range", "faint"):
        # A state beyond 65504 is the point of them.
        stored.remove("float16")
    shared = draw(st.sampled_from((None, None, None, *SHARED)))
    example = replace(
        example,
        state_dtype=draw(st.sampled_from([None, *stored])),
        state_layout=draw(st.sampled_from(("dense", *STATE_LAYOUTS))),
        shared=shared,
    )
    if shared is not None:
        # Only a state of the dtype of an argument can hold it, and only that of every row.
        own = example.dtype if shared in ("q", "k", "v") and example.dtype in stored else None
        example = replace(example, state_dtype=own, initial_state=True)
    if draw(st.booleans()):
        return example
    pool = example.B + draw(st.sampled_from((1, 0, 2, 5)))
    order = draw(st.permutations(range(pool)))[: example.B]
    skips = st.just(False) if shared is not None else st.booleans()
    skipped = draw(st.lists(skips, min_size=example.B, max_size=example.B))
    slots = tuple(-1 if skip else slot for slot, skip in zip(order, skipped, strict=True))
    return replace(example, slots=slots, pool=pool, initial_state=True)
