"""Compute on one rank what the tests compare: functions that its process can find by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional

from gdn_ops import parallel
from gdn_ops.nn import HybridLM
from gdn_ops.testing.example import Example

VOCABULARY = 11

GIVEN = ("q", "k", "v", "alpha", "log_alpha", "beta")


@dataclass(frozen=True)
class Case:
    """Describe one call on several ranks.

    Attributes:
        example: the call of one process.
        fragments: of every rank.
        strategy: "pipeline" or "gather".
        backend: of the op.
        holder: the rank whose loss reads the final states.
    """

    example: Example
    fragments: tuple[tuple[tuple[int, int], ...], ...]
    strategy: str
    backend: str
    holder: int = 0

    def split(self, group: Any) -> parallel.SequenceSplit:
        cuts = None
        if self.example.lengths is not None:
            cuts = self.example.arguments()["cu_seqlens"]
        return parallel.SequenceSplit(group, self.fragments, cuts)


def forward_and_gradients(group: Any, case: Case) -> dict[str, Tensor]:
    """Return the results of this rank, and its gradients by name."""
    split, example = case.split(group), case.example
    arguments, (d_o, d_state) = example.arguments(), example.cotangents()
    arguments.pop("cu_seqlens", None)
    inputs: dict[str, Tensor] = {}
    for name in (*GIVEN, "initial_state"):
        if name in arguments:
            x = arguments[name] if name == "initial_state" else split.local(arguments[name])
            inputs[name] = arguments[name] = x.detach().clone().requires_grad_()
    o, state = parallel.gated_delta(
        **arguments, split=split, return_state=True, strategy=case.strategy, backend=case.backend
    )
    d_state = d_state.to(state.dtype)
    if split.rank != case.holder:
        d_state = torch.zeros_like(d_state)
    gradients = torch.autograd.grad((o, state), [*inputs.values()], (split.local(d_o), d_state))
    found = {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "final_state": state.detach(), **found}


@dataclass(frozen=True)
class ModelCase:
    """Describe a training step of a model on several ranks.

    Attributes:
        pattern: of HybridLM.
        fragments: of every rank.
        rows: B.
        lengths: of packed sequences, or None.
        window: of attention.
        checkpoint: whether blocks are computed anew in the backward.
        strategy: of the rule.
        seed: of weights and tokens.
        options: of the model.
    """

    pattern: str
    fragments: tuple[tuple[tuple[int, int], ...], ...]
    rows: int = 1
    lengths: tuple[int, ...] | None = None
    window: int = 4
    checkpoint: bool = False
    strategy: str = "auto"
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(stop - start for runs in self.fragments for start, stop in runs)

    @property
    def boundaries(self) -> list[int] | None:
        return None if self.lengths is None else [0, *itertools.accumulate(self.lengths)]

    def model(self, dtype: torch.dtype = torch.float64) -> HybridLM:
        torch.manual_seed(self.seed)
        options = {"num_heads": 2, "head_dim": 4, "window": self.window, **dict(self.options)}
        return HybridLM(self.pattern, VOCABULARY, 16, **options).to(dtype)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return tokens and labels, (B, T) each."""
        random = torch.Generator().manual_seed(self.seed + 1)
        shape = (2, self.rows, self.tokens)
        x, y = torch.randint(VOCABULARY, shape, generator=random)
        return x, y


def loss_of(model: HybridLM, tokens: Tensor, labels: Tensor, checkpoint: bool) -> Tensor:
    """Return the sum of the cross entropies of tokens."""
    x = model.embedding(tokens)
    for block in model.blocks:
        if checkpoint:
            x = torch.utils.checkpoint.checkpoint(
                lambda y, block=block: block(y)[0], x, use_reentrant=False
            )
        else:
            x, _ = block(x)
    logits = model.logits(model.norm(x))
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def model_gradients(group: Any, case: ModelCase) -> dict[str, Tensor]:
    """Return the loss of this rank, and its shares of the gradients."""
    split = parallel.SequenceSplit(group, case.fragments, case.boundaries)
    model, (tokens, labels) = case.model(), case.data()
    with parallel.sequence_parallel(split, strategy=case.strategy):
        loss = loss_of(model, split.local(tokens), split.local(labels), case.checkpoint)
        loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad
             for n, p in model.named_parameters()}  # fmt: skip
    return {"loss": loss.detach(), **grads}


def model_states(group: Any, case: ModelCase) -> list[Any]:
    """Return the logits of this rank and the states behind the sequences."""
    split = parallel.SequenceSplit(group, case.fragments, case.boundaries)
    model, (tokens, _) = case.model(), case.data()
    with torch.no_grad(), parallel.sequence_parallel(split, return_state=True):
        logits, states = model(split.local(tokens))
    return [split.whole(logits), states]
