"""Lay a training out over the processes that torchrun starts: rows, tokens and weights.

A process computes some rows of a batch, some tokens of these, and its share of their loss. The
shares of all processes add up to the loss, and their gradients to its gradient, whatever the
layout is. Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdn_ops.nn import DecayGate, HybridLM
from gdn_ops.parallel import ParallelError, SequenceSplit, sequence_parallel
from gdn_ops.parallel.failures import exchanging, register, reported


@dataclass(frozen=True)
class Layout:
    """Describe what processes share; no checkpoint depends on it.

    Attributes:
        data_parallel: "ddp" (every process has all weights), "fsdp" (each a part of them), or
            None for DDP where there are several processes.
        context_parallel: how many processes share the tokens of a row; 0 for all of them.
        bfloat16: whether FSDP computes in bfloat16; gates, gradients and weights stay float32.
        recompute: whether a backward computes blocks anew instead of keeping activations.
        timeout: seconds that an exchange may take.
    """

    data_parallel: str | None = None
    context_parallel: int = 1
    bfloat16: bool = False
    recompute: bool = False
    timeout: float = 600.0


class Mesh:
    """Hold the place of this process in a mesh: rows of processes that share the same tokens.

    Args:
        layout: how the work is shared.

    Raises:
        SystemExit: the layout does not fit the processes.
    """

    def __init__(self, layout: Layout = Layout()) -> None:
        self.layout = layout
        self.is_launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
        self.count = int(os.environ["WORLD_SIZE"]) if self.is_launched else 1
        self.rank = int(os.environ["RANK"]) if self.is_launched else 0
        self.sequence = layout.context_parallel or self.count
        self._check()
        self.data = self.count // self.sequence
        self.device = torch.device("cpu")
        if self.is_launched:
            self._join()

    def _check(self) -> None:
        layout = self.layout
        if not self.is_launched and (layout.data_parallel or layout.context_parallel != 1):
            raise SystemExit(
                "this is for several processes: start it with torchrun --nproc-per-node COUNT"
            )
        if self.sequence < 1 or self.count % self.sequence:
            raise SystemExit(
                f"--context-parallel is {self.sequence}, should divide the {self.count} processes"
            )
        if layout.bfloat16 and layout.data_parallel != "fsdp":
            raise SystemExit("--bfloat16 is given, should be with --data-parallel fsdp alone")

    def _join(self) -> None:
        """Join the processes: all, and those of a row, which share sequences."""
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        backend = "gloo"
        if torch.cuda.device_count() >= here:
            self.device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=self.layout.timeout)
        dist.init_process_group(backend, timeout=timeout)
        register(dist.group.WORLD)
        # Said again: a group does not take the timeout of another.
        self.row, _ = dist.new_subgroups(self.sequence, timeout=timeout)

    def leave(self) -> None:
        """Part from the other processes, once all have ended what they do together."""
        if self.is_launched:
            dist.barrier()
            dist.destroy_process_group()

    # Weights.

    def placed(self, model: HybridLM) -> HybridLM:
        """Return a model with its weights where this process computes: all, or a shard of each.

        It is made before the optimizer, since sharding replaces the parameters.
        """
        model = model.to(self.device)
        if self.layout.recompute:
            for block in model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if self.layout.data_parallel == "fsdp":
            self._shard(model)
        return model

    def _shard(self, model: HybridLM) -> None:
        """Shard weights over all processes, by FSDP2.

        Parameters that are gathered together have one dtype: those of gates come first, on their
        own. Nothing casts inputs: a state that is handed in stays float32.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(self.device.type, (self.count,))
        dtype = torch.bfloat16 if self.layout.bfloat16 else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        in_float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, DecayGate):
                fully_shard(module, mesh=mesh, mp_policy=in_float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The gradient is the sum of the shares; by default it would be their mean.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)

    def called(self, model: HybridLM) -> nn.Module:
        """Return what a training calls in the place of a placed model."""
        if self.count == 1 or self.layout.data_parallel == "fsdp":
            return model
        return nn.parallel.DistributedDataParallel(model)

    # Tokens.

    def own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of this process, given all tokens (B, T + 1)."""
        tokens = tokens.tensor_split(self.data)[self.rank // self.sequence].to(self.device)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if self.sequence > 1:
            split = self.split(inputs.shape[1])
            inputs, labels = split.local(inputs), split.local(labels)
        return inputs, labels

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def split(self, tokens: int) -> SequenceSplit:
        """Return which tokens of a row the processes hold that share it."""
        return SequenceSplit.contiguous(tokens, self.row)

    @contextmanager
    def computing(self, what: str, tokens: int) -> Iterator[None]:
        """Let layers act on the tokens of this process, forward and backward.

        Args:
            what: is computed, for messages.
            tokens: T of a row.

        Raises:
            ParallelError: as of `together`.
        """
        split = sequence_parallel(self.split(tokens)) if self.sequence > 1 else nullcontext()
        with self.together(what), split:
            yield

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Say which process failed, and why, where an exchange between them does.

        Args:
            what: is computed, for messages.

        Raises:
            ParallelError: of RuntimeErrors of torch.distributed; ranks are those of torchrun.
        """
        if not self.is_launched:
            yield
            return
        world: Any = dist.group.WORLD
        with reported(world, what), exchanging(world, what):
            try:
                yield
            except ParallelError as error:
                if self.sequence == self.count:
                    raise
                # A layer counts the processes of its row, and knows of no others.
                raise RuntimeError(f"in row {self.rank // self.sequence}, {error}") from error

    # Sums.

    @property
    def backward_scale(self) -> float:
        """Return by what a share is multiplied before its backward: DDP divides by as much."""
        return 1.0 if self.layout.data_parallel == "fsdp" else float(self.count)

    def total(self, share: Tensor) -> float:
        """Return the sum of a number over all processes."""
        total = share.detach().clone()
        if self.is_launched:
            dist.all_reduce(total)
        return float(total)
