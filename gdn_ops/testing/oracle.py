"""Judge results against the definition in float64: their errors, and how large these may be.

The error of a result is taken per sequence and per head, and the worst head counts: an
average hides one wrong head of 64. The allowance is derived, never tuned:

    2 x (error of `naive` at working precision) + one rounding band x norm of the reference

`naive` at working precision is run on the inputs as they are and on slightly moved inputs,
and the largest error counts, so that a call whose result is sensitive to rounding is judged by
that sensitivity and not by luck. A gate is moved by one rounding of its dtype, the state by one of
the dtype of q, k, v, because it is an operand of matrix products. Everything but a gate is moved by
n u more, the a-priori bound of an inner product of length n = K + C in the arithmetic of the
backend: a triangular solve by inner products is the exact solve of operands
moved by that much, so this is what a chunkwise backend must be granted. In float64, where the
reference is no better than the backend, the error of `naive` is its float32 error scaled by
the ratio of the roundings. The band is one rounding of the dtype of q, k, v, in which
results are stored and the operands of matrix products may be, plus n u, plus |G| u for decays
formed from differences of log sums G over a chunk. What a state carries across is formed as a
difference too, b S - (d K)^T W S: an erased part leaves n u of what it was before. A decay that is
part of a product is right to 2**-133 (docs/math.md §4), which is granted of what would be there if
nothing decayed, were erased or cancelled. Operands of products are rounded to the dtype of q, k, v
on the way too, and terms that cancel leave those roundings: a state is granted two of them, one per
operand, of all that was written to it, any other result four of the root of the sum of squares of
its terms, if that is more than the rest (`gdn_ops.testing.operands`). Below the smallest normal
number roundings are absolute: what is stored is off by half of the smallest number of its dtype
(2**-25 in float16), and an inner product of length n by n halves of that of the arithmetic, which
has the range of float32 or more in every dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.numerics import compute_dtype
from gdn_ops.testing.example import Example, Results, run
from gdn_ops.testing.operands import operand_sizes

__all__ = ["Verdict", "judge"]

CHUNK = 64
"""The longest chunk that the band allows for, where the call does not ask for a longer one."""

PERTURBATIONS = 2
"""Runs on inputs moved by one rounding."""

FAINT_PERTURBATIONS = 8
"""Those of calls with a faint decay: the largest gradient of a gate is one number, which two runs
may both have right by luck."""

LEAST_DECAY = 2.0**-133
"""The smallest number of bfloat16, of which operands of products in float32 may be made."""


@dataclass(frozen=True)
class Verdict:
    """Hold how a set of results compares with the reference.

    Attributes:
        worst: largest error / allowance over results, sequences and heads; <= 1 passes.
        where: "result, sequence n, head h" of the worst.
        error: relative error there.
        allowed: relative error allowed there.
    """

    worst: float
    where: str
    error: float
    allowed: float

    @classmethod
    def exact(cls, holds: bool, where: str) -> Verdict:
        """Return the verdict on what holds to the last bit or not at all."""
        return cls(0.0 if holds else float("inf"), where, float(not holds), 0.0)

    @property
    def passed(self) -> bool:
        """Return whether every error is within its allowance. NaN does not pass."""
        return self.worst <= 1

    def __str__(self) -> str:
        sign = "ok" if self.passed else "WRONG"
        return f"{sign}: {self.where}: got {self.error:.3g}, but should be <= {self.allowed:.3g}"


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff u of a dtype, half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def norms(x: Tensor, name: str, example: Example) -> Tensor:
    """Return the norm of a result per (sequence, head), in float64.

    Args:
        x: (B, T, heads, ...) or (N, HV, K, V) for states.
        name: the result's name.
        example: the call, for its sequence boundaries.
    """
    squares = x.double().square()
    if name.endswith("state"):
        return squares.flatten(2).sum(-1).sqrt()
    squares = squares.flatten(3).sum(-1) if x.dim() > 3 else squares
    if example.lengths is None:
        return squares.sum(1).sqrt()
    parts = [part.sum(0) for part in squares[0].split(list(example.lengths))]
    return torch.stack(parts).sqrt() if parts else squares.new_zeros(0, 1)


def _moved(arguments: dict[str, Any], seed: int, inner: float) -> dict[str, Any]:
    """Return the arguments, each float input moved by roundings in its domain; `inner` is n u."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            signs = torch.randint(2, x.shape, generator=generator, device="cpu")
            noise = signs.to(torch.float64) * 2 - 1
            stored = arguments["q"].dtype if name.endswith("state") else x.dtype
            size = unit_roundoff(stored) + (0 if name == "alpha" else inner)
            wide = x.double().cpu() * (1 + size * noise)
            if name == "alpha":
                wide = wide.clamp(max=1)
            if name == "log_alpha":
                wide = x.double().cpu() + unit_roundoff(x.dtype) * noise
                wide = wide.clamp(max=0)
            if name in ("beta", "erase", "write"):
                wide = wide.clamp(max=2)
            moved[name] = wide.to(compute_dtype(x.dtype)).to(x.device)
    return moved


def _upcast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


@dataclass(frozen=True)
class Judgement:
    """Hold the reference of one example and how far a result may be from it.

    Attributes:
        example: the call.
        reference: results of `naive` in float64.
        allowance: absolute allowance per (sequence, head), by result.
        scale: norm of the reference per (sequence, head), by result.
    """

    example: Example
    reference: Results
    allowance: dict[str, Tensor]
    scale: dict[str, Tensor]

    def judge(self, results: Results) -> Verdict:
        """Compare results with the reference."""
        return self.compare(results, self.reference, 1.0)

    def compare(self, results: Results, others: Results, factor: float) -> Verdict:
        """Compare two sets of results of this call, which may differ by `factor` allowances."""
        names = [name for name in others if name in results]
        if not names:
            raise ValueError("no result to compare")
        return worst(self._verdict(name, results[name], others[name], factor) for name in names)

    def _verdict(self, name: str, x: Tensor, y: Tensor, factor: float) -> Verdict:
        if x.shape != y.shape:
            shapes = f"{name} has shape {tuple(x.shape)}, should be {tuple(y.shape)}"
            return Verdict(float("inf"), shapes, float("inf"), 0.0)
        error = norms(x.double() - y.double(), name, self.example)
        allowed = factor * self.allowance[name]
        if error.numel() == 0:
            return Verdict(0.0, name, 0.0, 0.0)
        ratio = torch.where(error == 0, 0.0, error / allowed)
        ratio = ratio.nan_to_num(nan=float("inf"), posinf=float("inf"))
        flat = int(ratio.argmax())
        n, h = divmod(flat, ratio.shape[1])
        size = max(float(self.scale[name][n, h]), 1e-300)
        return Verdict(
            float(ratio[n, h]),
            f"{name}, sequence {n}, head {h}",
            float(error[n, h]) / size,
            float(allowed[n, h]) / size,
        )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict with the largest ratio."""
    return max(verdicts, key=lambda verdict: verdict.worst)


@functools.lru_cache(maxsize=64)
def judgement(example: Example, gradients: bool = True) -> Judgement:
    """Return the reference and the allowances of an example."""
    cotangents = example.cotangents() if gradients else None
    return judgement_of(example.arguments(), cotangents, example)


def judgement_of(
    arguments: dict[str, Any], cotangents: tuple[Tensor, Tensor] | None, example: Example
) -> Judgement:
    """Return the reference and the allowances of a call that a law made from an example."""
    reference = run(_upcast(arguments, torch.float64), "naive", cotangents)
    runs = [run(arguments, "naive", cotangents)]
    inner = inner_product(runs[0]["final_state"].dtype, example)
    for seed in range(FAINT_PERTURBATIONS if example.is_faint else PERTURBATIONS):
        moved = _moved(arguments, example.seed + seed, inner)
        wide = moved if example.dtype == "float64" else _upcast(moved, torch.float32)
        runs.append(run(wide, "naive", cotangents))
    scaled = _scaled_error(arguments, cotangents, example) if example.dtype == "float64" else None
    operand = unit_roundoff(getattr(torch, example.dtype))
    kept = _kept(arguments, cotangents, example)
    terms = operand_sizes(arguments, cotangents, example, _chunk(example))
    allowance, scale = {}, {}
    for name, y in reference.items():
        own = norms(y, name, example)
        error = torch.zeros_like(own)
        for other in runs:
            error = torch.maximum(error, norms(other[name].double() - y, name, example))
        if scaled is not None:
            error = torch.maximum(error, scaled[name])
        scale[name] = own
        typical = own.square().mean().sqrt() if own.numel() else own.sum()
        stored = runs[0][name].dtype
        rounding = 2 * operand
        rounding += inner_product(stored, example)
        rounding += _largest_log_sum(arguments, _chunk(example)) * unit_roundoff(
            compute_dtype(stored)
        )
        allowance[name] = 2 * error + rounding * torch.maximum(own, typical)
        if name in kept:
            allowance[name] += 2 * LEAST_DECAY * kept[name]
        tiny = _half_of_smallest(stored)
        tiny += (example.K + _chunk(example)) * _half_of_smallest(compute_dtype(stored))
        allowance[name] += tiny * (y.numel() / max(own.numel(), 1)) ** 0.5
        if name.endswith("state"):
            before = arguments.get("initial_state")
            if name != "final_state" and cotangents is not None:
                before = cotangents[1]
            if before is not None:
                carried = _carried(arguments, example) * norms(before, name, example)
                # beta <= 2: what is taken off is at most twice what was there.
                allowance[name] += 2 * inner_product(stored, example) * carried
        if name in terms:
            roundings = (2 if name.endswith("state") else 4) * operand
            cancelled = roundings * norms(terms[name], name, example)
            allowance[name] = torch.maximum(allowance[name], cancelled)
    return Judgement(example, reference, allowance, scale)


def _kept(
    arguments: dict[str, Any], cotangents: tuple[Tensor, Tensor] | None, example: Example
) -> dict[str, Tensor]:
    """Return the norms of results if nothing decayed, were erased or cancelled.

    Only where decays are that small.
    """
    if not example.is_faint:
        return {}
    sizes = {
        name: x.abs() if isinstance(x, Tensor) else x
        for name, x in _upcast(arguments, torch.float64).items()
    }
    # A gate stays an argument, for its gradient.
    ones = {"alpha": torch.ones_like, "log_alpha": torch.zeros_like}
    sizes |= {name: one(sizes[name]) for name, one in ones.items() if sizes.get(name) is not None}
    if example.apart is None:
        sizes["rule"] = "gated"
    else:
        v = sizes["v"]
        sizes["erase"] = torch.zeros_like(sizes.get("erase", v[..., 0]))
    given = None if cotangents is None else (cotangents[0].abs(), cotangents[1].abs())
    return {name: norms(x, name, example) for name, x in run(sizes, "naive", given).items()}


def inner_product(stored: torch.dtype, example: Example) -> float:
    """Return n u, the a-priori bound on the error of an inner product of length n = K + C."""
    return (example.K + _chunk(example)) * unit_roundoff(compute_dtype(stored))


def _half_of_smallest(dtype: torch.dtype) -> float:
    """Return half of the smallest positive number, the largest rounding next to zero."""
    return torch.finfo(dtype).smallest_normal * unit_roundoff(dtype)


def _chunk(example: Example) -> int:
    """Return C, the tokens of the longest chunk that a backend may form for a call."""
    return max(CHUNK, min(example.chunk_size or 0, example.T))


def _carried(arguments: dict[str, Any], example: Example) -> Tensor:
    """Return the product of the decays per (sequence, head): the share of a state that is left.

    Of channels it is that of the one with most left.
    """
    gate = arguments.get("alpha")
    if arguments.get("log_alpha") is not None:
        gate = arguments["log_alpha"].double().exp()
    s = example.sizes
    if gate is None:
        return torch.ones(s.N, s.HV, dtype=torch.float64, device=arguments["q"].device)
    wide: Tensor = gate.double()
    if example.lengths is None:
        left = wide.prod(1)
    else:
        parts = [part.prod(0) for part in wide[0].split(list(example.lengths))]
        left = torch.stack(parts) if parts else wide.new_ones(0, *wide.shape[2:])
    return left.amax(-1) if example.channels else left


def _largest_log_sum(arguments: dict[str, Any], chunk: int) -> float:
    """Return the largest |G|: the sum of the finite log gates over at most `chunk` tokens."""
    gate = arguments.get("log_alpha")
    if arguments.get("alpha") is not None:
        gate = arguments["alpha"].double().log()
    if gate is None or gate.numel() == 0:
        return 0.0
    log = torch.where(gate.isfinite(), gate.double(), 0.0)
    return float(-log.unfold(1, min(chunk, log.shape[1]), 1).sum(-1).min())


def _scaled_error(
    arguments: dict[str, Any], cotangents: tuple[Tensor, Tensor] | None, example: Example
) -> dict[str, Tensor]:
    """Return the error of `naive` in float32, scaled to float64 (errors are first order in u)."""
    given = None if cotangents is None else (cotangents[0].float(), cotangents[1].float())
    ratio = unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    largest: dict[str, Tensor] = {}
    # One number may be right by luck: look at several calls that are equally hard.
    for seed in range(-1, PERTURBATIONS):
        moved = arguments if seed < 0 else _moved(arguments, example.seed + seed, 1e-7)
        small = _upcast(moved, torch.float32)
        results = run(small, "naive", given)
        for name, y in run(_upcast(small, torch.float64), "naive", given).items():
            error = norms(results[name].double() - y, name, example) * ratio
            largest[name] = torch.maximum(largest.get(name, error), error)
    return largest


def judge(example: Example, backend: str, gradients: bool = True) -> Verdict:
    """Run an example on a backend and compare it with the definition in float64."""
    return judgement(example, gradients).judge(example.run(backend, gradients=gradients))
