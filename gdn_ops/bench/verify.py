"""Check the numbers of comparators on the benchmark's own inputs, before they are timed.

Each runs once at full size, and its results are compared with the definition in float64:
o of all heads over the first tokens; o of the last key head's value heads over all tokens;
the gradients of these heads over the last tokens, which depend on nothing after them. The
rest is compared with the first comparator's. An error is the worst, over heads, of
max |x - x64| / max |x64|. It is allowed to be twice the error of the definition at working
precision plus one rounding band; two comparators may differ by what both are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_ops.bench.inputs import Inputs, make_output_gradient, with_grad
from gdn_ops.bench.peers import Comparator
from gdn_ops.ops import gated_delta
from gdn_ops.spec.language import Case

ALL_HEADS_TOKENS = 64
GRADIENT_TOKENS = 512
ROUNDING_BAND = 16
"""In units of the working precision's epsilon."""

_NAMES = ("o of all heads", "o", "dq", "dk", "dv", "dlog_alpha", "dbeta")


class RefusedError(RuntimeError):
    """Report that a comparator computes something else, so that its time means nothing."""


@dataclass(frozen=True)
class Check:
    """Hold the check of one comparator against the definition, on one case.

    Attributes:
        comparator: its name.
        case: name of the case.
        what: the output or gradient with the largest error / allowance.
        error: its relative error.
        allowance: what is allowed.
    """

    comparator: str
    case: str
    what: str
    error: float
    allowance: float

    @property
    def passed(self) -> bool:
        """Return whether the error is within the allowance; NaN is not."""
        return self.error <= self.allowance

    def __str__(self) -> str:
        verdict = "within" if self.passed else "above"
        return (
            f"{self.comparator} on {self.case}: {self.what} off by {self.error:.2g}, "
            f"{verdict} the allowance of {self.allowance:.2g}"
        )


def head_error(x: Tensor, exact: Tensor) -> float:
    """Return the worst max |x - exact| / max |exact| over heads (axis 2)."""
    if exact.numel() == 0:
        return 0.0
    axes = [axis for axis in range(exact.dim()) if axis != 2]
    size = exact.abs().amax(axes).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((x.double() - exact).abs().amax(axes) / size).max())


def _definition(x: Inputs, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    o, state = gated_delta(
        x.q,
        x.k,
        x.v,
        None,
        x.beta,
        log_alpha=x.log_alpha,
        initial_state=state,
        return_state=True,
        backend="naive",
    )
    return o, state


def _select(x: Inputs, heads: slice, value_heads: slice, tokens: slice) -> Inputs:
    q, k = (y[:, tokens, heads] for y in (x.q, x.k))
    return Inputs(q, k, *(y[:, tokens, value_heads] for y in x[2:]))


def _outputs(
    run: Callable[[Inputs], Tensor], x: Inputs, d_o: Tensor, gradients: bool
) -> list[Tensor]:
    """Return o of a run and, if wanted, the gradients of every operand."""
    if not gradients:
        with torch.no_grad():
            return [run(x)]
    leaves = with_grad(x)
    o = run(leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]


class _Judge:
    """Judge results by the definition's on one case, in float64 and at working precision."""

    def __init__(self, case: Case, x: Inputs, d_o: Tensor, gradients: bool) -> None:
        s = case.sizes
        self.case, self.gradients = case, gradients
        self.few = slice(0, ALL_HEADS_TOKENS)
        self.last = slice(max(0, s.T - GRADIENT_TOKENS), s.T)
        self.key, self.value = slice(s.H - 1, None), slice(s.HV - s.R, None)
        working = self._define(x, d_o)
        self.exact = self._define(Inputs(*(y.double() for y in x)), d_o.double())
        band = ROUNDING_BAND * torch.finfo(x.q.dtype).eps
        pairs = zip(working, self.exact, strict=True)
        self.allowed = [2 * head_error(w, e) + band for w, e in pairs]

    def _define(self, x: Inputs, d_o: Tensor) -> list[Tensor]:
        """Return the definition's values of the parts that `_parts` takes out of results."""
        every, start = slice(None), self.last.start
        with torch.no_grad():
            all_heads, _ = _definition(_select(x, every, every, self.few))
            o, state = _definition(_select(x, self.key, self.value, slice(0, start)))
        window = _select(x, self.key, self.value, self.last)
        found = _outputs(
            lambda y: _definition(y, state)[0],
            window,
            d_o[:, self.last, self.value],
            self.gradients,
        )
        return [all_heads, torch.cat((o, found[0]), 1), *found[1:]]

    def _parts(self, results: list[Tensor]) -> list[Tensor]:
        o, *grads = results
        heads = (self.key, self.key, self.value, self.value, self.value)
        parts = [g[:, self.last, h] for g, h in zip(grads, heads, strict=False)]
        return [o[:, self.few], o[:, :, self.value], *parts]

    def check(self, name: str, results: list[Tensor]) -> Check:
        """Compare a comparator's o and gradients with the definition."""
        return self._worst(name, _NAMES, self._parts(results), self.exact, self.allowed)

    def agree(self, name: str, results: list[Tensor], others: list[Tensor]) -> Check:
        """Compare all of a comparator's results with those of another one."""
        names = tuple(f"{what} against the first comparator" for what in _NAMES[1:])
        exact = [y.double() for y in others]
        allowed = [2 * allowance for allowance in self.allowed[1:]]
        return self._worst(name, names, results, exact, allowed)

    def _worst(
        self,
        name: str,
        names: tuple[str, ...],
        parts: list[Tensor],
        exact: list[Tensor],
        allowed: list[float],
    ) -> Check:
        """Return the check of the part that uses most of its allowance; NaN comes first."""
        found = [
            Check(name, self.case.name, what, head_error(part, e), allowance)
            for what, part, e, allowance in zip(names, parts, exact, allowed, strict=False)
        ]
        return max(found, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.allowance)


def verify(
    comparators: Sequence[Comparator], case: Case, x: Inputs, *, gradients: bool
) -> list[Check]:
    """Check every comparator on the operands of a case.

    Args:
        comparators: what will be measured.
        case: the case.
        x: its operands.
        gradients: whether gradients are measured too.

    Returns:
        A check per comparator, the one that used most of its allowance.

    Raises:
        RefusedError: one of them failed.
    """
    d_o = make_output_gradient(case.sizes, x.v.dtype, str(x.v.device))
    judge = _Judge(case, x, d_o, gradients)
    checks: list[Check] = []
    first: list[Tensor] | None = None
    for c in comparators:
        with c.context():
            results = _outputs(c.run, x, d_o, gradients)
        found = [judge.check(c.name, results)]
        if first is None:
            first = results
        else:
            found.append(judge.agree(c.name, results, first))
        checks.append(next((check for check in found if not check.passed), found[0]))
    failed = [str(check) for check in checks if not check.passed]
    if failed:
        raise RefusedError("no times are shown, the numbers are wrong: " + "; ".join(failed))
    return checks
