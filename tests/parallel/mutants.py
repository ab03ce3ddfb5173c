"""Break one exchange at a time on the ranks, so that tests can show that they notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gdn_ops.parallel import exchange, gather, halo, parts, pipeline
from tests.parallel.workers import Case, ModelCase, forward_and_gradients, model_gradients


@contextlib.contextmanager
def mutated(name: str) -> Iterator[None]:
    """Break one exchange."""
    target, attribute, broken = MUTANTS[name]
    kept = getattr(target, attribute)
    setattr(target, attribute, broken(kept))
    try:
        yield
    finally:
        setattr(target, attribute, kept)


def _applied_without_reverse(right: Any) -> Any:
    return lambda M, state, R, is_backward: right(M, state, R, False)


def _applied_without_map(right: Any) -> Any:
    return lambda M, state, R, is_backward: R


def _applied_in_wrong_order(right: Any) -> Any:
    def applied(M: Tensor, state: Tensor | None, R: Tensor, is_backward: bool) -> Tensor:
        return R if state is None else right(M, R, state, is_backward)

    return applied


def _without_last_hop(right: Any) -> Any:
    def started(self: Any, turn: Any, came: Any) -> Any:
        state = right(self, turn, came)
        return None if state is None else state * 0 if turn.g == len(self.groups) - 1 else state

    return started


def _d_final_of_the_chain_dropped(right: Any) -> Any:
    def d_final(self: Any, turn: Any, came: Any, d_finals: Any) -> Any:
        return right(self, turn, came, d_finals) * 0

    return d_final


def _swapped_groups(right: Any) -> Any:
    def transfer(group: Any, kind: str, sent: Any, received: Any) -> Any:
        if "states" in kind:
            sent = [message._replace(tensor=message.tensor.flip(-3)) for message in sent]
        return right(group, kind, sent, received)

    return transfer


def _lends_nothing(right: Any) -> Any:
    return lambda split, count: iter(())


def _lends_one_token_too_early(right: Any) -> Any:
    def local(piece: Any, start: int, stop: int) -> slice:
        shift = int(start > piece.start)
        own: slice = right(piece, start - shift, stop - shift)
        return own

    return local


def _keeps_gradients_of_loans(right: Any) -> Any:
    def exchange_tokens(*arguments: Any, is_backward: bool) -> None:
        if not is_backward:
            right(*arguments, is_backward=False)

    return exchange_tokens


def _totals_own_share(right: Any) -> Any:
    return lambda group, kind, share, source=None: share


def _walks_from_zeros(right: Any) -> Any:
    return lambda self, *given: right(self, *given) * 0


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a missing reverse map": (gather, "_applied", _applied_without_reverse),
    "maps dropped": (gather, "_applied", _applied_without_map),
    "maps in the wrong order": (gather, "_applied", _applied_in_wrong_order),
    "a state of the last heads dropped": (pipeline.Pipeline, "_started", _without_last_hop),
    "a gradient of states dropped": (pipeline.Pipeline, "_d_final", _d_final_of_the_chain_dropped),
    "states of other heads": (exchange, "transfer", _swapped_groups),
    "a halo dropped": (halo, "loans", _lends_nothing),
    "a halo one token early": (halo, "_local", _lends_one_token_too_early),
    "the gradient of a halo dropped": (halo, "_exchange", _keeps_gradients_of_loans),
    "a walked state dropped": (parts.Part, "walk", _walks_from_zeros),
    "a walked gradient dropped": (parts.Part, "walk_back", _walks_from_zeros),
    "final states not summed": (exchange, "total", _totals_own_share),
}
"""Broken exchanges: what is replaced, and by what of it."""


def mutated_call(group: Any, name: str, case: Case) -> dict[str, Tensor]:
    with mutated(name):
        return forward_and_gradients(group, case)


def mutated_model(group: Any, name: str, case: ModelCase) -> dict[str, Tensor]:
    with mutated(name):
        return model_gradients(group, case)
