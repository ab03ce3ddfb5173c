"""Compute the rule on sequences that are split over ranks: exactly, with states and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Never

import torch
from torch import Tensor

from gdn_ops.call.bind import Arguments, Call, Tokens, bind, requires_grad
from gdn_ops.call.pointers import refuse_unknown
from gdn_ops.call.structure import dtype_name
from gdn_ops.dispatch import registry
from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.parallel import exchange
from gdn_ops.parallel.cost import Choice, choose
from gdn_ops.parallel.exchange import agree, check_device, eagerly
from gdn_ops.parallel.failures import reported
from gdn_ops.parallel.gather import Gather
from gdn_ops.parallel.parts import LocalCall, Saved
from gdn_ops.parallel.pipeline import Pipeline
from gdn_ops.parallel.schedule import Schedule, head_groups, shares_keys
from gdn_ops.parallel.split import SequenceSplit
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.torch_ops.eager import autocast, full_precision

STRATEGIES: Final = ("auto", "pipeline", "gather")
"""Ways to compute what is split."""

NAME: Final = "gdn_ops.parallel.gated_delta"

FINALS: Final = "final states of gated_delta"
"""Name the exchange of final states in messages and in `counting`."""

SECOND_ORDER: Final = f"second derivatives of {NAME} are not computed: run it on one process"


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None, *,
    split: SequenceSplit, log_alpha: Tensor | None = None, erase: Tensor | None = None,
    write: Tensor | None = None, rule: str = "gated_delta", scale: float | None = None,
    qk_l2norm: bool = False, initial_state: Tensor | None = None, return_state: bool = False,
    chunk_size: int | None = None, backend: str = "auto", strategy: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `gdn_ops.gated_delta` on sequences whose tokens are split over ranks.

    Every rank calls it with its own tokens, and has what one process would have computed for them;
    no term is left out. Backward passes exchange too: every rank runs one, at the same place.

    Args:
        q, k: (B, T_local, H, K), the tokens of this rank in the order of its fragments.
        v: (B, T_local, HV, V).
        alpha, beta, log_alpha, erase, write: (B, T_local, HV), or with a channel axis, as
            `gdn_ops.gated_delta` takes them.
        split: which tokens the ranks hold.
        rule, scale, qk_l2norm, chunk_size, backend: as `gdn_ops.gated_delta` takes them.
        initial_state: (N, HV, K, V), the same on every rank. Its gradient on a rank is the share
            of what starts there: the sum over ranks is the gradient.
        return_state: whether to return the final states, to every rank.
        strategy: "pipeline" (ranks walk different heads; nothing is computed twice), "gather"
            (ranks exchange summaries; all work at once), or "auto" for the one that should end
            first. The results of one strategy are the same bits every time.

    Returns:
        o (B, T_local, HV, V) in the dtype of v; with return_state also the final states
        (N, HV, K, V) of all sequences.

    Raises:
        SpecError: the call breaks the specification of `gated_delta`, or does not fit the split.
        ParallelError: the ranks disagree, another rank has an error, or an exchange failed.
        BackendUnsupportedError: the backend cannot run it.

    Source:
        docs/math.md §6

    Example:
        >>> import torch, torch.distributed as dist
        >>> from gdn_ops import parallel
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> split = parallel.SequenceSplit.contiguous(8)
        >>> q, k, v = torch.randn(3, 1, 8, 2, 4)
        >>> parallel.gated_delta(q, k, v, torch.rand(1, 8, 2), split=split).shape
        torch.Size([1, 8, 2, 4])
    """
    if unknown:
        refuse_unknown(GATED_DELTA, unknown)
    tokens = Tokens(q, k, v, alpha, log_alpha, beta, erase, write)
    attributes = {"rule": rule, "scale": scale, "qk_l2norm": qk_l2norm, "chunk_size": chunk_size}
    arguments = Arguments(tokens, initial_state, **attributes, backend=backend)  # type: ignore[arg-type]
    o, finals = run(arguments._replace(return_state=return_state), split, strategy)
    return (o, finals) if return_state else o


@eagerly
def run(arguments: Arguments, split: SequenceSplit, strategy: str) -> tuple[Tensor, Tensor]:
    """Check a call with all ranks, and compute it; return o and the final states, if asked for."""
    if not isinstance(split, SequenceSplit):
        raise SpecTypeError(f"{NAME}: split is a {type(split).__name__}, should be a SequenceSplit")
    with reported(split.group, NAME):
        error: Exception | None = None
        facts: dict[str, str] = {}
        try:
            if strategy not in STRATEGIES:
                known = ", ".join(STRATEGIES)
                raise SpecError(f"{NAME}: strategy is {strategy!r}, should be one of {known}")
            local = _bound(autocast(arguments), split)
            choice = _choice(local, strategy)
            run = runner(local, choice)
            run.check()
            facts = _facts(local, strategy)
        except (SpecError, RuntimeError) as raised:
            error = raised
        agree(split.group, NAME, facts, error)
        with full_precision(local.call.device.type):
            o, finals = _Sequence.apply(run, choice, local.state, *local.call.tokens)  # type: ignore[no-untyped-call]
            return o, finals


def _bound(arguments: Arguments, split: SequenceSplit) -> LocalCall:
    """Check the call of this rank, and return it."""
    arguments = arguments._replace(backend=registry.resolve(arguments.backend))
    state = arguments.state
    call = bind(GATED_DELTA, arguments._replace(state=None))
    s = call.sizes
    if split.local_tokens != s.T:
        raise SpecError(
            f"{NAME}: q has T={s.T} tokens, should have {split.local_tokens}: those of rank "
            f"{split.rank} in {split}"
        )
    if split.is_packed and s.B != 1:
        raise SpecError(f"{NAME}: q has B={s.B} rows, should be 1 where sequences are packed")
    check_device(split.group, call.device)
    if state is not None:
        state = state.resolve_neg()
        # The check of one process: as if the sequences had no tokens here.
        empty = arguments.tokens.map(lambda x: x[:, :0])
        cuts = None
        if split.is_packed:
            cuts = torch.zeros(split.sequences + 1, dtype=torch.int64, device=call.device)
        bind(GATED_DELTA, arguments._replace(tokens=empty, cu_seqlens=cuts))
    needs_grad = torch.is_grad_enabled() and requires_grad(arguments)
    return LocalCall(replace(call, needs_grad=needs_grad), state, split, arguments.backend)


def _facts(local: LocalCall, strategy: str) -> dict[str, str]:
    """Return what must be the same on all ranks, as text by name."""
    call, s, split = local.call, local.call.sizes, local.split
    tokens = call.tokens
    present = [name for name, x in zip(Tokens._fields, tokens, strict=True) if x is not None]
    return {
        "rule": str(call.rule),
        "(B, H, HV, K, V)": str((s.B, s.H, s.HV, s.K, s.V)),
        "the dtype of q": dtype_name(tokens.q.dtype),
        "the tensors given": ", ".join(present),
        "initial_state": "not given" if local.state is None else dtype_name(local.state.dtype),
        "return_state": str(call.return_state),
        "scale": repr(call.scale),
        "qk_l2norm": str(call.qk_l2norm),
        "strategy": strategy,
        "the device": call.device.type,
        "whether gradients are needed": str(call.needs_grad),
        "split": repr(split),
        "cu_seqlens": str(list(split.boundaries)) if split.is_packed else "not given",
    }


def _choice(local: LocalCall, strategy: str) -> Choice:
    """Return how a call is computed: the same on all ranks, whatever tokens they hold."""
    call, s, split = local.call, local.call.sizes, local.split
    longest = max((len(split.chain(n)) for n in range(split.sequences)), default=0)
    if strategy != "auto":
        return Choice(strategy, s.H if longest > 1 else 1)
    whole = Sizes(s.B, split.tokens, s.H, s.HV, s.K, s.V, s.B)
    dtype = dtype_name(call.tokens.q.dtype)
    return choose(whole, split.ranks, longest, call.device.type, dtype, trains=call.needs_grad)


def runner(local: LocalCall, choice: Choice) -> Pipeline | Gather:
    """Return what computes a call."""
    s = local.call.sizes
    merges = s.B == 1
    if choice.strategy == "gather":
        return Gather(local, merges=merges)
    groups = head_groups(s.H, s.HV, choice.groups)
    return Pipeline(local, Schedule(local.split, merges=merges), groups)


class _Sequence(torch.autograd.Function):
    """Run a split call, and its backward, by one strategy."""

    @staticmethod
    def forward(
        ctx: Any, run: Pipeline | Gather, choice: Choice, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        own = Tokens(*map(_detached, tensors[1:]))  # type: ignore[arg-type]
        local = run.local
        call, finals = local.call, None
        o = empty(own.v.shape, own.v.dtype, call.device)
        if call.return_state:
            source = _ending(local.split)
            if source in (None, local.split.rank):
                finals = _states(local, empty_from=local.state)
            else:
                finals = local.states(rows=_rows(local))
        saved = run.forward(own, o, finals)
        if finals is not None:
            exchange.total(local.split.group, FINALS, finals, source)
        ctx.local, ctx.choice = replace(local, state=None, call=_bare(call)), choice
        ctx.counts = [(part.state is not None, len(part.tensors)) for part in saved]
        kept = [x for state_, tensors_ in saved for x in (state_, *tensors_) if x is not None]
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return o, finals

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_finals: Tensor | None) -> tuple[Any, ...]:
        # Read first, and once: a checkpoint then computes them anew, with exchanges of its own.
        kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_ORDER)
        (state, *tokens), rest = kept[: ctx.count], iter(kept[ctx.count :])
        local: LocalCall = replace(ctx.local, state=state)
        own = Tokens(*tokens)
        saved = [
            Saved(next(rest) if has_state else None, tuple(next(rest) for _ in range(count)))
            for has_state, count in ctx.counts
        ]
        with reported(local.split.group, NAME), full_precision(d_o.device.type):
            run = runner(local, ctx.choice)
            adds = isinstance(run, Pipeline) and shares_keys(run.groups)
            grads = own.map(torch.zeros_like if adds else _empty_like)
            if d_finals is not None:
                # Of all ranks, whichever of them use the states.
                share = exchange.copied(d_finals)
                d_finals = exchange.total(local.split.group, FINALS, share)
            d_state = None if state is None else _d_state(local, d_finals)
            run.backward(own, saved, d_o.resolve_neg(), d_finals, grads, d_state)
        given = None if d_state is None or state is None else d_state.to(state.dtype)
        wanted = zip((given, *grads), ctx.needs_input_grad[2:], strict=True)
        return None, None, *(grad if needed else None for grad, needed in wanted)


def _states(local: LocalCall, empty_from: Tensor | None) -> Tensor:
    """Return zeros for all states, but on rank 0 what sequences without tokens start from."""
    states = local.states(rows=_rows(local)).zero_()
    if empty_from is not None and local.split.rank == 0:
        for rows_ in _empty_rows(local):
            states[rows_] = empty_from[rows_].to(states.dtype)
    return states


def _rows(local: LocalCall) -> int:
    """Return how many sequences the call has."""
    return local.split.sequences if local.split.is_packed else local.call.sizes.B


def _ending(split: SequenceSplit) -> int | None:
    """Return the rank that has all final states, or None where several have some."""
    chains = (split.chain(n) for n in range(split.sequences))
    ends = {chain[-1].rank if chain else 0 for chain in chains}
    return ends.pop() if len(ends) == 1 else None


def _d_state(local: LocalCall, d_finals: Tensor | None) -> Tensor:
    """Return the gradient of the initial states from sequences without tokens, to be added to."""
    return _states(local, empty_from=d_finals)


def _empty_rows(local: LocalCall) -> Sequence[slice]:
    split = local.split
    return [local.rows_of(n) for n in range(split.sequences) if not split.chain(n)]


def _empty_like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype, x.device)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().resolve_neg()


def _bare(call: Call) -> Call:
    """Return a call without its tensors, which autograd keeps."""
    return replace(call, tokens=Tokens(*(None for _ in call.tokens)), state=None)  # type: ignore[arg-type]
