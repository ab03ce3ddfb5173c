"""Say that the layers of a model have their sequences split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gdn_ops.parallel.foreign_models import refused
from gdn_ops.parallel.sequence import STRATEGIES
from gdn_ops.parallel.split import SequenceSplit
from gdn_ops.spec.errors import SpecError, SpecTypeError


class Active(NamedTuple):
    """Hold what layers compute with inside `sequence_parallel`.

    Attributes:
        split: which tokens the ranks hold.
        return_state: whether layers return the states behind the sequences.
        strategy: of the rule.
    """

    split: SequenceSplit
    return_state: bool
    strategy: str


_active: list[Active] = []
"""Contexts that are entered, the innermost last. Of the process, not of a thread: a backward may
compute checkpointed layers again on a thread of autograd."""


def active() -> Active | None:
    """Return what layers compute with, or None outside of `sequence_parallel`."""
    return _active[-1] if _active else None


@contextmanager
def suspended() -> Iterator[None]:
    """Let layers compute for a while as outside of `sequence_parallel`."""
    entered = _active[:]
    _active.clear()
    try:
        yield
    finally:
        _active[:] = entered


@contextmanager
def sequence_parallel(
    split: SequenceSplit, *, return_state: bool = False, strategy: str = "auto"
) -> Iterator[SequenceSplit]:
    """Let the layers of gdn_ops.nn compute on tokens that are split over ranks.

    Inside, every rank gives a layer or model of `gdn_ops.nn` its own tokens: the rule, the short
    convolution and attention in a window see those of the other ranks, and all else is per token.
    So do models of transformers with `gdn_ops.compat.transformers.accelerate`; others are refused.
    Backward passes belong inside too: a checkpoint computes layers anew there.

    Args:
        split: which tokens the ranks hold.
        return_state: whether layers return the states behind all sequences, on every rank;
            otherwise theirs are of no sequences.
        strategy: of `gdn_ops.parallel.gated_delta`.

    Raises:
        SpecError: an argument has a wrong value; inside, a model of transformers is called that
            would see the tokens of its rank alone.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from gdn_ops.nn import HybridLM
        >>> from gdn_ops.parallel import SequenceSplit, sequence_parallel
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> split, model = SequenceSplit.contiguous(16), HybridLM("GA", 256, 32, num_heads=2)
        >>> tokens = torch.randint(256, (1, 16))
        >>> with sequence_parallel(split):
        ...     logits, _ = model(split.local(tokens))
        >>> logits.shape
        torch.Size([1, 16, 256])
    """
    if not isinstance(split, SequenceSplit):
        raise SpecTypeError(
            f"sequence_parallel: split is a {type(split).__name__}, should be a SequenceSplit"
        )
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise SpecError(f"sequence_parallel: strategy is {strategy!r}, should be one of {known}")
    entered = Active(split, return_state, strategy)
    _active.append(entered)
    try:
        with refused():
            yield split
    finally:
        _active.pop()
