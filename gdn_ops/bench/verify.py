"""Check the numbers of contenders on a benchmark's own inputs, before they are timed.

Each runs once at full size, and its results are compared with the definition in float64:
o of all heads over the first tokens; o of the last key head's value heads over all tokens;
the gradients of these heads over the last tokens, which depend on nothing after them. The
rest is compared with the first contender's. So is a short forward with a gate of exactly 0, which
some peers cannot do: of them the error is told. An error is the worst, over heads, of
max |x - x64| / max |x64|. It is allowed to be twice the error of the definition at working
precision plus one rounding band; two contenders may differ by what both are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.contender import Contender, error_line
from gdn_ops.bench.inputs import OPERANDS, Inputs, make_output_gradient
from gdn_ops.spec.language import Case

ALL_HEADS_TOKENS = 64
GRADIENT_TOKENS = 512
ZERO_TOKENS = 96
"""Tokens of a forward with a gate of exactly 0 in the middle."""
ROUNDING_BAND = 16
"""In units of the working precision's epsilon."""

GRADIENTS = tuple(f"d{name}" for name in OPERANDS)

AT_ZERO = "o at alpha = 0"


class RefusedError(RuntimeError):
    """Report that a contender computes something else, so that its time means nothing."""


@dataclass(frozen=True)
class Check:
    """Hold the relative error of the contender's worst output or gradient, and what is allowed."""

    comparator: str
    case: str
    what: str
    error: float
    allowance: float
    dtype: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is within the allowance; NaN is not."""
        return self.error <= self.allowance

    def __str__(self) -> str:
        verdict = "within" if self.passed else "above"
        kind = f" in {self.dtype}" if self.dtype else ""
        return (
            f"{self.comparator} on {self.case}{kind}: {self.what} off by {self.error:.2g}, "
            f"{verdict} the allowance of {self.allowance:.2g}"
        )


@dataclass(frozen=True)
class Part:
    """Hold a part of a contender's results, and its exact values.

    Attributes:
        what: "o", "state", "dq", ...
        index: of the result among all results.
        take: takes the part out of the whole result.
        exact: its values in float64, in the result's layout.
        axes: that an error is the norm over; of the others the worst counts.
        order: of that norm: 2, or infinity for the largest element.
    """

    what: str
    index: int
    take: Callable[[Tensor], Tensor]
    exact: Tensor
    axes: tuple[int, ...]
    order: float = math.inf

    def error(self, results: Sequence[Tensor]) -> float:
        """Return the worst |x - exact| / |exact|; NaN stays NaN."""
        return relative_error(self.take(results[self.index]), self.exact, self.axes, self.order)


def relative_error(
    x: Tensor, exact: Tensor, axes: tuple[int, ...], order: float = math.inf
) -> float:
    """Return the worst |x - exact| / |exact|, norms over some axes; NaN stays NaN."""
    if not exact.numel():
        return 0.0

    def norm(y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y, order, axes) if axes else y.abs()

    size = norm(exact).clamp(min=torch.finfo(torch.float32).tiny)
    return float((norm(x.double() - exact) / size).max())


def head_axes(x: Tensor) -> tuple[int, ...]:
    """Return the axes of a result that are not its heads, (B, T, heads, ...)."""
    return tuple(axis for axis in range(x.dim()) if axis != 2)


def take(*index: slice) -> Callable[[Tensor], Tensor]:
    """Return a function that takes a part out of a tensor."""
    return lambda x: x[index]


def define(x: Inputs, backend: str = "naive") -> tuple[Tensor, Tensor]:
    """Return o and the final state by the definition, or by another backend."""
    return ops.gated_delta(
        x.q,
        x.k,
        x.v,
        None,
        x.beta,
        log_alpha=x.log_alpha,
        initial_state=x.state,
        return_state=True,
        backend=backend,
    )


def define_step(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return o and the new state of a step by the definition, in float64."""
    y = x.double()
    return ops.gated_delta_step(
        y.q, y.k, y.v, None, y.beta, y.state, log_alpha=y.log_alpha, backend="naive"
    )


def _outputs(
    run: Callable[[Inputs], Tensor], x: Inputs, d_o: Tensor, gradients: bool
) -> list[Tensor]:
    """Return o of a run and, if wanted, the gradients of q, k, v, log_alpha and beta."""
    if not gradients:
        with torch.no_grad():
            return [run(x)]
    leaves = x.with_grad()
    o = run(leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves.operands()[:5], d_o)]


class Definition:
    """Hold the parts that the definition gives of one case, and the errors that are allowed."""

    def __init__(self, case: Case, x: Inputs, d_o: Tensor, gradients: bool) -> None:
        s = case.sizes
        self.case, self.gradients = case.name, gradients
        self.few = slice(0, ALL_HEADS_TOKENS)
        self.last = slice(max(0, s.T - GRADIENT_TOKENS), s.T)
        self.keys, self.values = slice(s.H - 1, None), slice(s.HV - s.R, None)
        self.parts = self._parts(self._values(x.double(), d_o.double()))
        working = self._values(x, d_o)
        band = ROUNDING_BAND * torch.finfo(x.q.dtype).eps
        self.allowed = [
            2 * relative_error(w, part.exact, part.axes) + band
            for w, part in zip(working, self.parts, strict=True)
        ]

    def _values(self, x: Inputs, d_o: Tensor) -> list[Tensor]:
        """Return the values of all parts: o twice, and the gradients if they are wanted."""
        everything, start = slice(None), self.last.start
        with torch.no_grad():
            all_heads, _ = define(x.select(everything, self.few, everything, everything))
            before = x.select(everything, slice(0, start), self.keys, self.values)
            o, state = define(before)
        window = x.select(everything, self.last, self.keys, self.values)
        d_window = d_o[:, self.last, self.values]

        def run(y: Inputs) -> Tensor:
            return define(replace(y, state=state))[0]

        outputs = _outputs(run, window, d_window, self.gradients)
        return [all_heads, torch.cat((o, outputs[0]), 1), *outputs[1:]]

    def _parts(self, exact: list[Tensor]) -> list[Part]:
        everything = slice(None)
        whats = ("o of all heads", "o", *GRADIENTS[:5])
        heads = (self.keys, self.keys, self.values, self.values, self.values)
        takes = [
            (0, take(everything, self.few)),
            (0, take(everything, everything, self.values)),
            *((i, take(everything, self.last, h)) for i, h in enumerate(heads, 1)),
        ]
        return [
            Part(what, index, function, y, head_axes(y))
            for what, (index, function), y in zip(whats, takes, exact, strict=False)
        ]

    def check(self, name: str, results: list[Tensor]) -> Check:
        """Compare a contender's o and gradients with the definition."""
        return self._worst(name, self.parts, results, self.allowed)

    def agree(self, name: str, results: list[Tensor], other: str, others: list[Tensor]) -> Check:
        """Compare all of a contender's results with those of another one."""
        parts = [
            Part(f"{what} against {other}", i, take(), y.double(), head_axes(y))
            for i, (what, y) in enumerate(zip(("o", *GRADIENTS[:5]), others, strict=False))
        ]
        return self._worst(name, parts, results, [2 * allowed for allowed in self.allowed[1:]])

    def _worst(
        self, name: str, parts: list[Part], results: list[Tensor], allowed: list[float]
    ) -> Check:
        """Return the check of the part that uses most of its allowance; NaN comes first."""
        # Of a contender without a backward there is o and nothing else.
        checks = [
            Check(name, self.case, part.what, part.error(results), allowance)
            for part, allowance in zip(parts, allowed, strict=False)
            if part.index < len(results)
        ]
        return max(checks, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.allowance)


def verify(
    contenders: Sequence[Contender], case: Case, x: Inputs, *, gradients: bool | Collection[str]
) -> list[Check]:
    """Check every contender on the operands of a case, and gradients where they are wanted.

    Args:
        contenders: what is checked.
        case: of the operands.
        x: the operands.
        gradients: whether gradients are checked, or the names of those whose gradients are.

    Returns:
        A check per contender, the one that used most of its allowance.

    Raises:
        RefusedError: one of them failed.
    """
    d_o = make_output_gradient(case.sizes, x.v.dtype, str(x.v.device))
    if isinstance(gradients, bool):
        gradients = [c.name for c in contenders] if gradients else []
    definition = Definition(case, x, d_o, bool(gradients))
    checks: list[Check] = []
    first: list[Tensor] | None = None
    for c in contenders:
        with c.context():
            results = _outputs(c.output, x, d_o, c.name in gradients)
        verdicts = [definition.check(c.name, results)]
        if first is None:
            first = results
        else:
            verdicts.append(definition.agree(c.name, results, contenders[0].name, first))
        checks.append(next((check for check in verdicts if not check.passed), verdicts[0]))
    refuse(checks)
    return checks


def refuse(checks: Sequence[Check]) -> None:
    """Refuse to go on where a check failed.

    Raises:
        RefusedError: one did.
    """
    failed = "; ".join(str(check) for check in checks if not check.passed)
    if failed:
        raise RefusedError(f"no times are shown, the numbers are wrong: {failed}")


def first_tokens(x: Inputs, count: int = ZERO_TOKENS) -> Inputs:
    """Return the first tokens of inputs, as sequences without a state."""
    everything = slice(None)
    return x.select(everything, slice(0, count), everything, everything)


def first_error(c: Contender, x: Inputs) -> str:
    """Return the error of a peer on the first tokens of inputs, or "": each has limits of its own.

    An error of ours is raised: `explain` should have told it.
    """
    if not c.is_peer:
        return ""
    try:
        with torch.no_grad(), c.context():
            c.output(first_tokens(x))
    except Exception as error:
        return error_line(error)
    return ""


def check_zeros(contenders: Sequence[Contender], case: Case, x: Inputs) -> list[Check]:
    """Check o of every contender where a gate is exactly 0, its logarithm -inf, in every head.

    Peers that cannot do it are told by their error, which may be NaN: their times are of other
    gates.

    Raises:
        RefusedError: one of ours failed.
    """
    few = first_tokens(x)
    log_alpha = few.log_alpha.clone()
    log_alpha[:, log_alpha.shape[1] // 2] = -math.inf
    few = replace(few, log_alpha=log_alpha)
    checks = []
    with torch.no_grad():
        exact, working = define(few.double())[0], define(few)[0]
        axes = head_axes(exact)
        band = ROUNDING_BAND * torch.finfo(x.q.dtype).eps
        allowed = 2 * relative_error(working, exact, axes) + band
        for c in contenders:
            with c.context():
                error = relative_error(c.output(few), exact, axes)
            checks.append(Check(c.name, case.name, AT_ZERO, error, allowed))
    ours = [c.name for c in contenders if not c.is_peer]
    refuse([check for check in checks if check.comparator in ours])
    return checks
