"""Wrap this library's backends and other people's implementations as comparators.

A comparator is a name and a function of `Inputs`. A peer that is not installed is a reason,
never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from gdn_ops.bench.inputs import Inputs
from gdn_ops.dispatch import registry
from gdn_ops.ops import gated_delta


@dataclass(frozen=True)
class Comparator:
    """Hold one implementation under measurement.

    Attributes:
        name: of the backend or the peer.
        run: from operands to o (B, T, HV, V), differentiable.
        is_peer: whether it is another library's.
        context: entered around `run` and around the backward of what it returned.
    """

    name: str
    run: Callable[[Inputs], Tensor]
    is_peer: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def backend_comparator(name: str) -> Comparator | str:
    """Return a backend as a comparator, or why it cannot run here.

    Raises:
        SpecError: no backend has that name.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        return backend

    def run(x: Inputs) -> Tensor:
        return gated_delta(x.q, x.k, x.v, log_alpha=x.log_alpha, beta=x.beta, backend=name)

    return Comparator(name, run)


def transformers_comparator() -> Comparator | str:
    """Return transformers' `torch_chunk_gated_delta_rule`, its path on CPUs, or why it cannot run.

    q and k are repeated to the value heads inside the timed call, as the models do and, in
    newer releases, the function itself.
    """
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as model
        from transformers.utils import logging
    except ImportError as error:
        return f"package 'transformers' is not usable: {error}"
    logging.set_verbosity_error()

    def run(x: Inputs) -> Tensor:
        heads = x.v.shape[2] // x.q.shape[2]
        q, k = (y.repeat_interleave(heads, 2) if heads > 1 else y for y in (x.q, x.k))
        o: Tensor = model.torch_chunk_gated_delta_rule(q, k, x.v, x.log_alpha, x.beta)[0]
        return o

    return Comparator("transformers", run, is_peer=True)


PEERS: dict[str, Callable[[], Comparator | str]] = {"transformers": transformers_comparator}


def comparator(name: str) -> Comparator | str:
    """Return the peer or backend of that name, or why it cannot run.

    Raises:
        SpecError: nothing has that name.
    """
    return PEERS[name]() if name in PEERS else backend_comparator(name)
