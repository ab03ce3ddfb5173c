"""Compute on one rank what the tests compare: functions that its process can find by name."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from gdn_ops import gated_delta, parallel
from gdn_ops.nn import HybridLM
from gdn_ops.parallel import exchange, gather, parts
from gdn_ops.testing.example import Example

VOCABULARY = 11

GIVEN = ("q", "k", "v", "alpha", "log_alpha", "beta", "erase", "write")

STAGES = ("summarise", "resume", "summarise_gradients", "resume_gradients")


@dataclass(frozen=True)
class Case:
    """Describe one call on several ranks.

    Attributes:
        example: the call of one process.
        fragments: of every rank.
        strategy: "pipeline" or "gather".
        backend: of the op.
        holder: the rank whose loss reads the final states.
        has_one_reader: whether the losses of the others have no term of them, not even a zero.
    """

    example: Example
    fragments: tuple[tuple[tuple[int, int], ...], ...]
    strategy: str
    backend: str
    holder: int = 0
    has_one_reader: bool = False

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
    results, cotangents = [o], [split.local(d_o)]
    if split.rank == case.holder or not case.has_one_reader:
        results.append(state)
        cotangents.append(d_state.to(state.dtype) * (split.rank == case.holder))
    gradients = torch.autograd.grad(results, [*inputs.values()], cotangents)
    found = {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"o": o.detach(), "final_state": state.detach(), **found}


def called_as_in_stages(group: Any, case: Case) -> dict[str, Tensor]:
    """Compute by the calls of stages, as where "auto" gives them to a backend that has none."""

    def calls(self: gather.Gather, tokens: Any) -> gather.Calls:
        whole = self._steps(lambda piece: not self._is_cut(piece))
        return gather.Calls([*whole], [*self._steps(self._is_cut)], True)

    with mock.patch.object(gather.Gather, "_calls", calls):
        return forward_and_gradients(group, case)


def launches(group: Any, case: Case) -> list[str]:
    """Return the kernels that this rank launches, in their order, while they are emulated."""
    from gdn_ops.backends.triton.emulation import programs

    names: list[str] = []

    def noting(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        emulate(kernel, *arguments)

    emulate = programs.emulate
    programs.emulate = noting
    try:
        forward_and_gradients(group, case)
    finally:
        programs.emulate = emulate
    return names


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


def raised(group: Any, function: Any, *arguments: Any) -> str:
    """Return what a function raises on this rank, with its type; "nothing" if it returns."""
    try:
        function(group, *arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def make_split(group: Any, fragments: Any, cu_seqlens: Any = None) -> None:
    parallel.SequenceSplit(group, fragments, cu_seqlens)


def call_with(group: Any, changes: dict[int, dict[str, Any]], tokens: int = 6) -> None:
    """Make a call of ones, in which some ranks have other arguments."""
    change = dict(changes.get(group.rank(), {}))
    split = parallel.SequenceSplit.contiguous(change.pop("tokens", tokens), group)
    local = change.pop("local", split.local_tokens)
    dtype = change.pop("dtype", torch.float32)
    k = torch.ones(1, local, 2, 4, dtype=dtype)
    given: dict[str, Any] = {"q": k, "k": k, "v": torch.ones(1, local, 2, 3, dtype=dtype)}
    given |= {"alpha": torch.ones(1, local, 2), "beta": None, "split": split} | change
    if "state" in given:
        given["initial_state"] = torch.zeros(given.pop("state"))
    if given.get("rule") in ("delta", "linear"):
        given["alpha"] = None
    if given.pop("grad", False):
        given["v"].requires_grad_()
    parallel.gated_delta(**given)


def second_derivative(group: Any) -> None:
    split = parallel.SequenceSplit.contiguous(4, group)
    k = torch.ones(1, split.local_tokens, 1, 2, dtype=torch.float64, requires_grad=True)
    o = parallel.gated_delta(k, k, k, rule="delta", split=split, backend="torch")
    torch.autograd.grad(o.sum(), k, create_graph=True)


def layer_with(group: Any, kind: str, given: dict[str, Any], tokens: int = 6) -> None:
    """Call a layer inside `sequence_parallel` with arguments that the split says already."""
    split = parallel.SequenceSplit.contiguous(6, group, given.pop("cuts", None))
    layer = HybridLM(kind, VOCABULARY, 16, num_heads=2, window=4).blocks[0].mixer
    x = torch.zeros(given.pop("rows", 1), given.pop("tokens", split.local_tokens), 16)
    if given.pop("state", False):
        given["state"] = layer.zero_state(x.shape[0])
    if given.pop("mask", False):
        given["mask"] = torch.ones(x.shape[:2])
    with parallel.sequence_parallel(split, return_state=given.pop("return_state", False)):
        layer(x, **given)


def enter_with(group: Any, given: dict[str, Any]) -> None:
    split = parallel.SequenceSplit.contiguous(6, group)
    with parallel.sequence_parallel(**{"split": split, **given}):
        pass


def bits(group: Any, case: Case) -> list[Tensor]:
    """Return the results of this rank twice, by two calls."""
    return [
        *forward_and_gradients(group, case).values(),
        *forward_and_gradients(group, case).values(),
    ]


def traffic(group: Any, case: Case) -> dict[str, int]:
    """Return the bytes that this rank sends in a forward and backward, by kind."""
    with parallel.counting() as counted:
        forward_and_gradients(group, case)
    return dict(counted.bytes)


def order_of_parts(group: Any, case: Case) -> list[str]:
    """Return what this rank computes of its parts, and its gathers of summaries, in order."""
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in ("forward", "backward", "walk", "walk_back", *STAGES):
            stack.enter_context(noted(parts.Part, name, order))
        stack.enter_context(noted(exchange, "gather", order))
        forward_and_gradients(group, case)
    return order


@contextlib.contextmanager
def noted(owner: Any, name: str, order: list[str]) -> Iterator[None]:
    """Note every call of a method."""
    right = getattr(owner, name)

    def noting(*given: Any) -> Any:
        order.append(name)
        return right(*given)

    setattr(owner, name, noting)
    try:
        yield
    finally:
        setattr(owner, name, right)


def kept_bytes(group: Any, tokens: int, strategy: str) -> int:
    """Return the bytes that autograd keeps on this rank for a backward."""
    split = parallel.SequenceSplit.contiguous(tokens, group)
    T = split.local_tokens
    inputs = [torch.rand(1, T, 2, 16, requires_grad=True) for _ in range(3)]
    gates = [torch.rand(1, T, 2, requires_grad=True) for _ in range(2)]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        parallel.gated_delta(*inputs, *gates, split=split, strategy=strategy)
    return sum(kept.values())


def die(group: Any, victim: int, when: str) -> str:
    """End the process of one rank before or in the middle of a call; return what others raise."""
    started = time.monotonic()
    split = parallel.SequenceSplit.contiguous(12, group)
    k = torch.ones(1, split.local_tokens, 2, 4, requires_grad=True)
    try:
        if group.rank() == victim and when == "before":
            os._exit(1)
        o = parallel.gated_delta(k, k, k, rule="linear", split=split)
        if group.rank() == victim and when == "between":
            os._exit(1)
        o.sum().backward()
        parallel.gated_delta(k, k, k, rule="linear", split=split)
    except Exception as error:
        return f"{time.monotonic() - started:.1f} {type(error).__name__}: {error}"
    return "nothing"


def fail_inside(group: Any, victim: int, strategy: str) -> str:
    """Raise on one rank when its call has begun; return what this rank raises."""
    split = parallel.SequenceSplit.contiguous(12, group)
    # More heads than are walked before the first whole part, so that others wait for it.
    k = torch.ones(1, split.local_tokens, 8, 4)
    if group.rank() == victim:

        def forward(part: Any) -> Any:
            raise MemoryError("no memory for o")

        parts.Part.forward = forward  # type: ignore[method-assign]
    options: dict[str, Any] = {"rule": "linear", "split": split, "strategy": strategy}
    return raised(group, lambda _: parallel.gated_delta(k, k, k, **options))


def reset_at(
    group: Any, token: int, tokens: int, rule: str, strategy: str, seed: int, backend: str = "auto"
) -> list[Tensor]:
    """Return o, the final state, and gradients of a loss of what is behind a reset.

    The tokens before it, and the initial state, are drawn from `seed`.
    """
    split = parallel.SequenceSplit.contiguous(tokens, group)

    def drawn(*shape: int) -> Tensor:
        after = torch.rand(1, tokens, *shape, generator=torch.Generator().manual_seed(9))
        before = torch.rand(1, token, *shape, generator=torch.Generator().manual_seed(seed))
        return torch.cat([before, after[:, token:]], 1)

    q, k, v, alpha, beta = drawn(2, 4), drawn(2, 4), drawn(2, 3), drawn(2), drawn(2)
    alpha[:, token] = 0.0
    state = torch.rand(1, 2, 4, 3, generator=torch.Generator().manual_seed(seed)) * 100
    q, k, v, alpha, beta = (split.local(x).contiguous() for x in (q, k, v, alpha, beta))
    v.requires_grad_()
    state.requires_grad_()
    o, final = parallel.gated_delta(
        q, k, v, alpha, beta, rule=rule, initial_state=state, return_state=True, split=split,
        strategy=strategy, backend=backend,
    )  # fmt: skip
    behind = (split.positions() >= token)[None, :, None, None]
    loss = (o * behind).sum() + final.sum() * (split.rank == 0)
    d_v, d_state = torch.autograd.grad(loss, (v, state))
    return [o.detach(), final.detach(), d_v, d_state]


def compiled_logits(group: Any, case: ModelCase) -> list[Tensor]:
    """Return the logits of this rank by a compiled model, and by the model itself."""
    split = parallel.SequenceSplit(group, case.fragments, case.boundaries)
    model, (tokens, _) = case.model(torch.float32), case.data()
    compiled = torch.compile(model, backend="eager")
    with parallel.sequence_parallel(split):
        found, _ = compiled(split.local(tokens))
        found.sum().backward()
        own, _ = model(split.local(tokens))
    return [found.detach(), own.detach(), compiled(tokens)[0].detach(), model(tokens)[0].detach()]


def over_a_mesh(group: Any, rows: int, tokens: int) -> list[Any]:
    """Split rows over one dimension of a mesh and tokens over the other.

    Returns what a split over the whole mesh raises, o of this rank and what one process makes of
    its rows.
    """
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size(group) // 2), mesh_dim_names=("rows", "tokens")
    )
    refused = raised(mesh, lambda whole: parallel.SequenceSplit.contiguous(tokens, whole))
    random = torch.Generator().manual_seed(mesh.get_local_rank("rows"))
    q, k, v = torch.randn(3, rows, tokens, 2, 4, generator=random)
    split = parallel.SequenceSplit.zigzag(tokens, mesh["tokens"])
    own = (split.local(x) for x in (q, k, v))
    o = parallel.gated_delta(*own, rule="delta", qk_l2norm=True, split=split)
    return [refused, split.whole(o), gated_delta(q, k, v, rule="delta", qk_l2norm=True)]
