"""Train a tiny Qwen3.5 of transformers on the bytes of a text, sequences split over processes.

    python examples/train_transformers.py
    torchrun --nproc-per-node 2 examples/train_transformers.py --length 4096

Losses are the same on any number of processes. The model is random and made from its
configuration: nothing is downloaded. To train one of yours, replace `made`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from gdn_ops.compat.transformers import accelerate
from gdn_ops.environment.text import shipped_text
from gdn_ops.parallel import SequenceSplit, sequence_parallel


def made() -> Qwen3_5ForCausalLM:
    """Return a model of bytes: three layers of linear attention, one of attention."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        pad_token_id=0,
    )
    return Qwen3_5ForCausalLM(config)


def join() -> None:
    """Join the processes that torchrun starts; without it this is the only one."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def batch(text: Tensor, step: int, rows: int, length: int) -> Tensor:
    """Return the (rows, length + 1) bytes of a step, the same on all processes."""
    random = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (rows, 1), generator=random)
    return text[starts + torch.arange(length + 1)].long()


def train(steps: int, rows: int, length: int) -> list[tuple[float, float]]:
    """Return the loss of each step, in nats per byte, and the norm of its gradient."""
    text = torch.frombuffer(bytearray(shipped_text()), dtype=torch.uint8)
    model = made()
    called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    split = SequenceSplit.zigzag(length)
    history = []
    for step in range(steps):
        tokens = batch(text, step, rows, length)
        # Shifted before they are split: the next byte may be on another process.
        inputs, labels = split.local(tokens[:, :-1]), split.local(tokens[:, 1:])
        with accelerate(), sequence_parallel(split):
            # The share of this process in the mean over the labels of all.
            share = called(
                inputs, labels=labels, shift_labels=labels, num_items_in_batch=rows * length
            ).loss
            (share * dist.get_world_size()).backward()  # DDP divides by as much
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = share.detach().clone()
        dist.all_reduce(loss)
        history.append((float(loss), float(norm)))
        if dist.get_rank() == 0:
            print(f"step {step + 1}: {loss:.6f} nats per byte, gradient {norm:.6f}", flush=True)
    return history


def main(arguments: list[str] | None = None) -> list[tuple[float, float]]:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--rows", type=int, default=2, help="sequences in a batch")
    options.add_argument("--length", type=int, default=512, help="bytes of a sequence")
    given = options.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    join()
    history = train(given.steps, given.rows, given.length)
    dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
