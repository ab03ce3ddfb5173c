"""Describe laws as values, and cut, join and compare the calls that laws are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn_ops.call.bind import Tokens
from gdn_ops.dispatch.registry import Backend, get_backend
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits
from gdn_ops.testing.example import Example, Results, run
from gdn_ops.testing.oracle import Verdict, judgement

Check = Callable[[str, Example], Verdict]
"""A function from a backend's name and an example to a verdict."""


def _needs_nothing(limits: Limits) -> bool:
    return True


@dataclass(frozen=True)
class Law:
    """Describe a law of docs/math.md §8, and which backends it concerns.

    Attributes:
        check: judges a backend on an example. Its docstring begins with "Law", the number, ": "
            and the law in a line.
        rules: the rules it needs, where it does not keep the drawn one.
        op: the op it is about.
        needs: whether a backend with given limits has what else the law asks for.
        draws_decode: whether it draws what only decode ops have: the dtype of the state, a pool,
            skipped rows.
    """

    check: Check
    rules: tuple[str, ...] = ()
    op: OpSpec = GATED_DELTA
    needs: Callable[[Limits], bool] = _needs_nothing
    draws_decode: bool = False

    @property
    def name(self) -> str:
        """Return the name of the law's function."""
        return self.check.__name__

    @property
    def number(self) -> str:
        """Return the law's number in §8 and the words after it, if any: "3, pool"."""
        return self._first_line()[0].removeprefix("Law ")

    @property
    def text(self) -> str:
        """Return the statement of the law, in a line."""
        return self._first_line()[2]

    def _first_line(self) -> tuple[str, str, str]:
        return (self.check.__doc__ or "").strip().splitlines()[0].partition(": ")

    def concerns(self, limits: Limits) -> bool:
        """Return whether a backend with these limits must keep the law."""
        has_rules = set(self.rules) <= set(limits.rules)
        return self.op.name in limits.ops and has_rules and self.needs(limits)


def installed(name: str) -> Backend:
    """Return the backend of that name; raise SpecError if it is not installed."""
    backend = get_backend(name)
    if isinstance(backend, str):
        raise SpecError(f"backend {name!r}: {backend}")
    return backend


def token_slice(arguments: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """Return the arguments of a call, cut to a slice of its tokens."""
    names = Tokens._fields
    return {
        name: x[:, tokens] if name in names and x is not None else x
        for name, x in arguments.items()
    }


def single(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop the token axis, of length 1, from every tensor of a call."""
    return {n: x.squeeze(1) if isinstance(x, Tensor) else x for n, x in arguments.items()}


def forward(arguments: dict[str, Any], backend: str) -> Results:
    """Run `gated_delta` without gradients; return o and final_state by name."""
    return run(arguments, backend, None)


def compare(example: Example, results: Results, others: Results, factor: float = 2.0) -> Verdict:
    """Compare two sets of results of one call."""
    gradients = any(name.startswith("d_") for name in others)
    return judgement(example, gradients).compare(results, others, factor)
