"""Train models that are split by heads; ranks import this module, and tests compare with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from gdn_ops.nn import GatedDeltaNet, HybridLM, norm
from gdn_ops.nn.tensor_styles import Channels
from gdn_ops.parallel import SequenceSplit, sequence_parallel, tensor_plan

Results = dict[str, Tensor]

MIXERS: dict[str, dict[str, Any]] = {
    "as published": {},
    "grouped": {"num_value_heads": 8, "conv_bias": True, "backend": "torch"},
    "bare": {"short_conv": 0, "output_norm": False, "output_gate": None, "rule": "delta"},
    "l1": {"qk_norm": "l1", "feature_map": "elu", "output_gate": "sigmoid", "rule": "gated"},
    "channels": {"channel_decay": True, "lower_bound": -5.0, "gate_rank": 3, "num_value_heads": 8},
    "apart": {"channel_decay": True, "erase_write": True, "gate_rank": 3},
}
"""Options of a layer, by a name."""

MODELS: dict[str, dict[str, Any]] = {
    "recurrent": {"pattern": "GG"},
    "hybrid": {"pattern": "GMA", "num_value_heads": 8, "window": 4},
    "bare": {"pattern": "GA", "mlp_size": 0, "short_conv": 0, "backend": "torch"},
    "family": {"pattern": "KE", "mlp_size": 0},
}
"""Options of a model, by a name."""


@functools.cache
def mesh(count: int) -> Any:
    return init_device_mesh("cpu", (count,), mesh_dim_names=("heads",))


def split(model: nn.Module, count: int) -> nn.Module:
    """Split a model over ranks; over none for 0."""
    if count:
        parallelize_module(model, mesh(count), tensor_plan(model))
    return model


def layer(name: str) -> GatedDeltaNet:
    torch.manual_seed(1)
    return GatedDeltaNet(32, 4, head_dim=5, **MIXERS[name])


def model(name: str) -> HybridLM:
    torch.manual_seed(2)
    options: dict[str, Any] = {"num_heads": 4, "head_dim": 6, "mlp_size": 24, **MODELS[name]}
    return HybridLM(vocab_size=37, hidden_size=32, **options)


def whole(x: Any) -> Tensor:
    """Return a parameter or its gradient as a plain tensor."""
    y: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return y.detach().clone()


def gradients(module: nn.Module) -> Results:
    return {f"d_{name}": whole(p.grad) for name, p in module.named_parameters()}


def of_layer(name: str, count: int, masked: bool) -> Results:
    """Return results, states and gradients of a layer that is split, and of its input."""
    made = split(layer(name), count)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 32, generator=generator).requires_grad_()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]) if masked else None
    y, _ = made(x, mask=mask)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return {"y": y.detach(), "d_x": x.grad, **gradients(made)}  # type: ignore[dict-item]


def trained(name: str, count: int, steps: int, is_checkpointed: bool) -> Results:
    """Return the losses and the first gradients of a model that is split."""
    made: Any = split(model(name), count)
    if is_checkpointed:
        for block in made.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return training(made, steps, slice(None))


def trained_on_rows(name: str, steps: int) -> Results:
    """Return those of a model that is split over two ranks by heads, over two by FSDP2."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    made: Any = model(name)
    parallelize_module(made, both["heads"], tensor_plan(made))
    for block in made.blocks:
        fully_shard(block, mesh=both["data"])
    fully_shard(made, mesh=both["data"])
    row = both["data"].get_local_rank()
    results = training(made, steps, slice(row, row + 1))
    # Over gloo torch 2.8 adds gradients up instead of averaging them, of any module.
    plain = fully_shard(nn.Linear(1, 1), mesh=both["data"])
    plain(torch.ones(1, 1)).sum().backward()
    times = whole(plain.weight.grad).item()
    results = {name: x / times if name != "losses" else x for name, x in results.items()}
    dist.all_reduce(results["losses"], group=both["data"].get_group())
    return results | {"losses": results["losses"] / 2}


def of_tokens(name: str, is_split: bool) -> Results:
    """Return logits and gradients, over two ranks by heads and over two by tokens if split."""
    made: Any = model(name)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(37, (2, 11), generator=generator)
    weights = torch.randn(2, 11, 37, generator=generator)
    if not is_split:
        logits = made(tokens)[0]
        (logits * weights).sum().backward()
        return {"logits": logits.detach()} | gradients(made)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "heads"))
    parallelize_module(made, both["heads"], tensor_plan(made))
    sequences = SequenceSplit.contiguous(11, both["tokens"])
    with sequence_parallel(sequences):
        logits = made(sequences.local(tokens))[0]
    (logits * sequences.local(weights)).sum().backward()
    results = gradients(made)
    for x in results.values():
        dist.all_reduce(x, group=both["tokens"].get_group())
    return {"logits": sequences.whole(logits).detach()} | results


def training(made: Any, steps: int, rows: slice) -> Results:
    """Train a model on rows of batches; return the losses and the first gradients."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    results: Results = {}
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(37, (2, 11), generator=generator)[rows]
        logits = made(tokens)[0]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            results |= gradients(made)
        optimizer.step()
    return results | {"losses": torch.stack(losses)}


def generated(name: str, count: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return tokens that a model continues with, and the shapes of its state."""
    made: Any = split(model(name), count)
    tokens = made.generate(torch.tensor([[3, 4, 5, 6, 7]]), 6, temperature=0)
    with torch.no_grad():
        _, states = made(tokens)
    mixer = made.blocks[0].mixer
    shapes = [x.shape for x in (*states[0], *mixer.zero_state(1)) if x is not None]
    return tokens, [tuple(shape) for shape in shapes]


def saved(name: str, count: int) -> Results:
    """Return the state dict of a model that is split, whole."""
    state: Mapping[str, Any] = split(model(name), count).state_dict()
    return {key: whole(x) for key, x in state.items()}


def with_mutant(mutant: str, count: int) -> Results:
    """Return the results of a layer with a planted fault."""
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "shares are called copies":
            patch.setattr(norm, "share", lambda x, _: x.to_local())
        else:
            made = Channels.__init__
            patch.setattr(Channels, "__init__", lambda self, widths: made(self, widths[::-1]))
        return of_layer("as published", count, False)


def unsplittable(kind: str, count: int) -> None:
    """Split a model that does not come apart so."""
    made: nn.Module = GatedDeltaNet(32, 3)
    if kind == "inner":
        made = HybridLM("A", 8, 32, num_heads=4, mlp_size=5)
    elif kind == "attention":
        made = HybridLM("A", 8, 30, num_heads=3)
    split(made, count)
