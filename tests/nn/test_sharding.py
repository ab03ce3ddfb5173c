"""A model of two dtypes is sharded by FSDP2, its gates apart, and trains as it does whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from processes import output_of

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

CODE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from gdn_ops.nn import DecayGate, HybridLM, optimizer_groups, parameters_without_weight_decay

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
torch.set_num_threads(1)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


def made():
    torch.manual_seed(0)
    options = {"num_heads": 2, "head_dim": 4, "window": 4, "dtype": torch.bfloat16}
    return HybridLM("GA", 20, 16, **options)


def loss(model, seed):
    tokens = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(seed))
    return model(tokens)[0].double().logsumexp(-1).sum()


whole, model = made(), made()
for module in model.modules():
    if isinstance(module, DecayGate):
        fully_shard(module, mesh=mesh)
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)

# Over gloo torch 2.8 adds gradients up instead of averaging them, of any module.
plain = fully_shard(torch.nn.Linear(1, 1), mesh=mesh)
plain(torch.ones(1, 1)).sum().backward()
times = plain.weight.grad.full_tensor().item()

assert parameters_without_weight_decay(model) == parameters_without_weight_decay(whole)
((loss(whole, 0) + loss(whole, 1)) / 2).backward()
loss(model, rank).backward()
for (name, x), y in zip(model.named_parameters(), whole.parameters(), strict=True):
    grad, right = x.grad.full_tensor().double() / times, y.grad.double()
    error = (grad - right).norm() / right.norm()
    assert error < 2e-2, (name, error)
    assert x.dtype == (torch.float32 if "decay" in name else torch.bfloat16)
for part in (model, whole):
    torch.optim.AdamW(optimizer_groups(part, 0.1), lr=1e-2).step()
gate = model.blocks[0].mixer.decay.A_log.full_tensor()
torch.testing.assert_close(gate, whole.blocks[0].mixer.A_log, rtol=1e-2, atol=1e-2)

prompt = torch.tensor([[3, 4, 5]])
assert model.generate(prompt, 4, temperature=0).shape == (1, 7)
state = model.blocks[0].mixer.zero_state(2)
assert all(type(x) is torch.Tensor for x in state), state
dist.destroy_process_group()
print("same")
"""


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    script, store = tmp_path / "shard.py", tmp_path / "store"
    script.write_text(CODE)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(output_of, script, rank, store) for rank in (0, 1)]
        assert [run.result().splitlines()[-1] for run in runs] == ["same", "same"]
