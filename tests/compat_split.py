"""Compute on one rank what the tests of split models of transformers compare."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

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


def on_one_process(case: Case) -> dict[str, Tensor]:
    """Return what transformers itself computes in float64, sequence by sequence."""
    with no_float32():
        wide = copy.deepcopy(model(case.family)).double()
        if case.checkpoint:
            checkpointed(wide)
        ids, following = case.data()
        loss = torch.zeros((), dtype=torch.float64)
        for start, stop in itertools.pairwise(case.cuts):
            logits = wide(ids[:, start:stop], use_cache=False).logits.flatten(0, 1)
            labels = following[:, start:stop].flatten()
            loss = loss + functional.cross_entropy(logits, labels, reduction="sum")
        loss = loss / int(following.ne(-100).sum())
        loss.backward()
    return {"loss": loss.detach()} | gradients_of(wide)


def local_loss(
    tiny: Any, split: SequenceSplit, ids: Tensor, following: Tensor, count: int | None = None
) -> Tensor:
    """Return the share of this rank of the mean loss over so many labels, or those given."""
    own, labels = split.local(ids), split.local(following)
    if count is None:
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


def wrapped(tiny: Any, wrapper: str, group: Any) -> Any:
    """Return what is called in the place of a model: by DDP, or itself, sharded by FSDP2."""
    if wrapper == "ddp":
        return DistributedDataParallel(tiny, process_group=group)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in tiny.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(tiny, mesh=mesh)
    for module in tiny.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return tiny


def backward_scale(wrapper: str, group: Any) -> int:
    """Return by what a share is multiplied: DDP divides by as much."""
    return dist.get_world_size(group) if wrapper == "ddp" else 1


def plain(x: Any) -> Tensor:
    """Return a parameter or its gradient, gathered if it is sharded."""
    y: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return y.detach()


def loss_and_gradients_of_wrapped(
    group: Any, case: Case, wrapper: str, groups: int
) -> tuple[dict[str, Tensor], float]:
    """Return loss and gradients, both summed over ranks, and which part of the weights is here.

    Args:
        group: of all ranks.
        case: of all rows.
        wrapper: "ddp" or "fsdp".
        groups: of ranks that share tokens, each of which takes some of the rows.
    """
    (ids, following), of_tokens, row = case.data(), group, 0
    count = int(following.ne(-100).sum())
    if groups > 1:
        shape = (groups, dist.get_world_size(group) // groups)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "tokens"))
        of_tokens, row = mesh["tokens"], mesh.get_local_rank("rows")
    ids, following = (x.tensor_split(groups)[row] for x in (ids, following))
    split = case.split(of_tokens)
    wide = copy.deepcopy(model(case.family)).double()
    whole = sum(p.numel() for p in wide.parameters())
    if case.checkpoint:
        checkpointed(wide)
    called = wrapped(wide, wrapper, group)
    here = sum(getattr(p, "_local_tensor", p).numel() for p in wide.parameters())
    with accelerate(), no_float32(), sequence_parallel(split):
        share = local_loss(called, split, ids, following, count)
        (share * backward_scale(wrapper, group)).backward()
    loss = share.detach().clone()
    dist.all_reduce(loss, group=group)
    grads = {n: plain(p.grad) for n, p in wide.named_parameters()}
    return {"loss": loss} | grads, here / whole


def trained(
    group: Any, family: str, layout: str, steps: int, wrapper: str | None = None
) -> list[float]:
    """Return the losses of a training, on several ranks with the sequence split.

    Args:
        group: of the ranks.
        family: of the model.
        layout: "contiguous" or "zigzag".
        steps: how many.
        wrapper: "ddp" or "fsdp"; None where gradients are summed by hand.
    """
    tiny = copy.deepcopy(model(family))
    with torch.no_grad():
        # As built: wider weights make of roundings more than a loss forgives.
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.div_(3)
    called = tiny if wrapper is None else wrapped(tiny, wrapper, group)
    scale = 1 if wrapper is None else backward_scale(wrapper, group)
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
                    loss = local_loss(called, split, ids, following)
                    (loss * scale).backward()
            total = loss.detach().clone()
            summed = gradients_of(tiny).values() if wrapper is None else ()
            for x in (total, *summed):
                dist.all_reduce(x, group=group)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return losses
