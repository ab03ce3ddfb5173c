"""Compute on one rank what the tests of split models of transformers compare."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from compat_models import model, no_float32, tokens
from gdn_ops.compat.transformers import accelerate
from gdn_ops.parallel import SequenceSplit, sequence_parallel

Fragments = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Case:
    """Describe a loss on tokens that are split.

    Attributes:
        family: of models.
        fragments: of every rank; or "contiguous" or "zigzag".
        rows: B.
        lengths: of packed sequences, or of the only one.
        checkpoint: whether layers are computed anew in the backward.
    """

    family: str
    fragments: Fragments | str
    rows: int = 1
    lengths: tuple[int, ...] = (23,)
    checkpoint: bool = False

    @property
    def cuts(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    def split(self, group: Any) -> SequenceSplit:
        cuts = self.cuts if len(self.lengths) > 1 else None
        if isinstance(self.fragments, str):
            make = getattr(SequenceSplit, self.fragments)
            return make(sum(self.lengths), group, cuts)  # type: ignore[no-any-return]
        return SequenceSplit(group, self.fragments, cuts)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return tokens, and the token after each in its sequence, -100 after the last."""
        ids = tokens(self.rows, sum(self.lengths))
        following = [
            functional.pad(part[:, 1:], (0, 1), value=-100) for part in ids.split(self.lengths, 1)
        ]
        return ids, torch.cat(following, 1)


def local_loss(tiny: Any, split: SequenceSplit, ids: Tensor, following: Tensor) -> Tensor:
    """Return the share of this rank of the mean loss."""
    own, labels = split.local(ids), split.local(following)
    count = int(following.ne(-100).sum())
    loss: Tensor = tiny(own, labels=own, shift_labels=labels, num_items_in_batch=count).loss
    return loss


def loss_and_gradients(group: Any, case: Case) -> dict[str, Tensor]:
    """Return the share of this rank in float64, and its shares of the gradients."""
    split, (ids, following) = case.split(group), case.data()
    # Loaded before: accelerate tries replacements in float32.
    wide = copy.deepcopy(model(case.family)).double()
    with accelerate(), no_float32(), sequence_parallel(split):
        if case.checkpoint:
            checkpointed(wide)
        loss = local_loss(wide, split, ids, following)
        loss.backward()
    return {"loss": loss.detach()} | gradients_of(wide)


def checkpointed(tiny: Any) -> None:
    """Let a model compute its layers anew in the backward."""
    enable = getattr(tiny, "activation_checkpointing_enable", None)
    (enable or tiny.gradient_checkpointing_enable)({"use_reentrant": False})
    tiny.train()


def gradients_of(tiny: Any) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in tiny.named_parameters()}  # fmt: skip


def trained(group: Any, family: str, layout: str, steps: int) -> list[float]:
    """Return the losses of a training, on several ranks with the sequence split."""
    tiny = copy.deepcopy(model(family))
    with torch.no_grad():
        # As built: wider weights make of roundings more than a loss forgives.
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.div_(3)
    optimizer = torch.optim.AdamW(tiny.parameters(), 1e-3)
    case, losses = Case(family, layout, rows=2, lengths=(32,)), []
    split, (ids, following) = case.split(group), case.data()
    with accelerate():
        for _ in range(steps):
            if split.ranks == 1:
                loss = tiny(ids, labels=ids, use_cache=False).loss
                loss.backward()
            else:
                with sequence_parallel(split):
                    loss = local_loss(tiny, split, ids, following)
                    loss.backward()
            total = loss.detach()
            for x in (total, *gradients_of(tiny).values()):
                dist.all_reduce(x, group=group)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return losses
