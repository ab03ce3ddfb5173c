"""Make what the columns of the compose table name, and run it in processes of its own."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compose_table import OPS
from gdn_ops import gated_delta
from gdn_ops.backends.compile import Compile
from gdn_ops.nn import GatedDeltaNet

WIDTH = 16

NO_GRADIENTS = "refused: RuntimeError: Unable to handle autograd's threading"
"""What a fork says of any backward, where torch has threads for devices and has run a backward."""


class Mixer(nn.Module):
    """Map x (B, T, 16) to the same shape by the op on one backend."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).unsqueeze(2).chunk(3, -1)
        alpha = torch.full(v.shape[:-1], 0.9, dtype=torch.float32, device=x.device)
        o = gated_delta(q, k, v, alpha, alpha, qk_l2norm=True, backend=self.backend)
        return o.squeeze(2)


class Layer(nn.Module):
    """Return the output alone of a GatedDeltaNet."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = GatedDeltaNet(WIDTH, 1, head_dim=WIDTH, expand_v=1.0, backend="torch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.mixer(x)
        return out[0] if isinstance(out, tuple) else out


def module(column: str) -> nn.Module:
    """Return a module, the same in every process."""
    warnings.filterwarnings("ignore", message="backend .* emulates")
    torch.manual_seed(0)
    return Mixer(column) if column in OPS else Layer()


def inputs(rows: int = 2) -> Tensor:
    """Return x (rows, 5, 16)."""
    return torch.sin(torch.arange(rows * 5 * WIDTH, dtype=torch.float32)).view(rows, 5, WIDTH)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of a loss by every parameter."""
    (model(x).float() ** 2).mean().backward()
    return [_whole(p.grad) for p in model.parameters() if p.grad is not None]


def _whole(x: Any) -> Tensor:
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole.detach().clone()


def outcome(run: Callable[[], Any]) -> str:
    """Return "works", or "refused: " and what the error says."""
    try:
        run()
    except Exception as error:
        return f"refused: {type(error).__name__}: {error}"
    return "works"


def distributed(rank: int, wrapping: str, address: str, columns: list[str], into: Any) -> None:
    """Train every column's module on half of the rows, and compare with all rows at once."""
    torch.set_num_threads(1)
    Compile.compiler = "eager"
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)

    def train(column: str) -> None:
        right = gradients(module(column), inputs(4))
        model: Any = module(column)
        if wrapping == "DDP":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        got = gradients(model, inputs(4)[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(got, right, rtol=2e-4, atol=2e-5)

    for column in columns:
        result = outcome(lambda column=column: train(column))
        if rank == 0:
            into.put((column, result))
    dist.destroy_process_group()


def spawned(pickled: bytes, into: Any) -> None:
    """Run modules that come from another process, and return what they compute."""
    torch.set_num_threads(1)
    Compile.compiler = "eager"
    warnings.filterwarnings("ignore", message="backend .* emulates")
    for column, model in pickle.loads(pickled).items():
        into.put((column, gradients(model, inputs())[0].numpy()))


def in_a_fork(run: Callable[[], Any]) -> str:
    """Return the outcome of a function in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, outcome(run).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    text = os.read(reader, 5000).decode()
    os.close(reader)
    return text


def backward_of_torch() -> None:
    """Run a backward without an op of ours."""
    torch.ones(2, requires_grad=True).sum().backward()


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy."""
    return copy.deepcopy(model)
