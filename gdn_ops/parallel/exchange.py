"""Exchange tensors between the ranks of a group, and agree on calls before it.

Ranks that pass different shapes to one collective hang, or read each other's bytes as something
else. So every call first compares what it is, by a hash of a few bytes that CPU tensors carry: on
an accelerator nothing waits for the device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_ops.parallel.failures import ParallelError, exchanging

Function = TypeVar("Function", bound=Callable[..., Any])


def eagerly(function: Function) -> Function:
    """Keep a function out of the graphs of torch.compile, which break there: it exchanges.

    `torch.compiler.disable` would import the compiler at once, which takes seconds.
    """
    disabled: Any = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    return disabled  # type: ignore[no-any-return]


@dataclass(eq=False)
class Traffic:
    """Count what this rank sends.

    Attributes:
        bytes: by kind of exchange; what goes to several ranks counts once for each.
        messages: by kind likewise.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, nbytes: int, messages: int = 1) -> None:
        """Count messages of one kind."""
        self.bytes[kind] += nbytes
        self.messages[kind] += messages


_counted: list[Traffic] = []
"""Counters of all contexts that are entered; of the process, since a backward may run on another
thread than its forward."""


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count the tensors that this rank sends inside the context, backward passes included.

    Example:
        >>> from gdn_ops.parallel import counting
        >>> with counting() as traffic:
        ...     pass
        >>> traffic.bytes.total()
        0
    """
    traffic = Traffic()
    _counted.append(traffic)
    try:
        yield traffic
    finally:
        _counted.remove(traffic)


def _count(kind: str, nbytes: int, messages: int = 1) -> None:
    for traffic in _counted:
        traffic.add(kind, nbytes, messages)


class Message(NamedTuple):
    """Hold a tensor that is sent to, or received from, a rank of the group."""

    rank: int
    tensor: Tensor


class Pending(NamedTuple):
    """Hold a transfer that has been started, and how long a thread waits for it at most."""

    work: Any
    timeout: timedelta | None


def agree(
    group: dist.ProcessGroup, name: str, facts: Mapping[str, str], error: Exception | None = None
) -> None:
    """Check that all ranks make the same call, none of them with an error of its own.

    Args:
        group: the process group; all its ranks call this.
        name: the call, for messages.
        facts: what must be the same on all ranks, as text by name.
        error: why this rank cannot make the call, or None.

    Raises:
        ParallelError: ranks differ, or one has an error. It names them.
        Exception: `error` itself, on the rank that has it.
    """
    ranks, host = dist.get_world_size(group), _host_group(group)
    digest = hashlib.blake2b(repr((name, sorted(facts.items()))).encode(), digest_size=7).digest()
    own = torch.tensor(
        [int.from_bytes(digest, "big"), error is not None], dtype=torch.int64, device="cpu"
    )
    table = [torch.empty_like(own) for _ in range(ranks)]
    with exchanging(group, f"facts of {name}"):
        dist.all_gather(table, own, group=host)
        rows = torch.stack(table)
        if not rows[:, 1].any() and bool((rows[:, 0] == rows[0, 0]).all()):
            return
        told: list[Any] = [None] * ranks
        text = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(told, (name, dict(facts), text), group=host)
    if error is not None:
        raise error
    raise ParallelError(_difference(told))


def _difference(told: Sequence[tuple[str, dict[str, str], str | None]]) -> str:
    """Return which ranks have errors, or in what they differ, as text."""
    name = told[0][0]
    errors = [f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(told) if text]
    if errors:
        return "; ".join(errors)
    other = next((rank for rank, (its, _, _) in enumerate(told) if its != name), None)
    if other is not None:
        return f"ranks disagree: rank 0 calls {name}, rank {other} calls {told[other][0]}"
    for fact, value in told[0][1].items():
        for rank, (_, facts, _) in enumerate(told):
            if facts.get(fact) != value:
                return (
                    f"{name}: ranks disagree: {fact} is {value} on rank 0, {facts.get(fact)} on "
                    f"rank {rank}"
                )
    return f"{name}: ranks disagree"


_hosts: dict[tuple[str, int], dist.ProcessGroup] = {}


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the group itself, or one of the same ranks that exchanges tensors of the CPU."""
    if "cpu:" in dist.get_backend_config(group) or dist.get_backend(group) == "gloo":
        return group
    key = group.group_name, id(group)
    if key not in _hosts:
        _hosts[key] = dist.new_group(
            dist.get_process_group_ranks(group), _patience(group, torch.device("cuda")),
            backend="gloo", use_local_synchronization=True,
        )  # fmt: skip
    return _hosts[key]


def _patience(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the timeout of a group for tensors of a device, or None where it tells none."""
    try:
        options = getattr(group._get_backend(device), "options", None)
    except RuntimeError:
        return None
    return getattr(options, "_timeout", None)


def check_device(group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that a group exchanges tensors of a device.

    Raises:
        ParallelError: it has no backend for it.
    """
    try:
        group._get_backend(device)
    except RuntimeError:
        raise ParallelError(
            f"the process group has the backends {dist.get_backend_config(group)}, none for "
            f"tensors on {device.type}"
        ) from None


def transfer(
    group: dist.ProcessGroup, kind: str, sent: Sequence[Message], received: Sequence[Message]
) -> tuple[list[Pending], list[Pending]]:
    """Start to send and to receive tensors between pairs of ranks.

    Between two ranks messages go in the order in which each of the two lists them.

    Args:
        group: the process group.
        kind: what is sent, for messages and `counting`.
        sent: contiguous tensors, to be kept until they have gone.
        received: tensors to fill.

    Returns:
        What `wait` waits for until all has been received, and until all has been sent; where a
        group ends them together, all is in the first.
    """
    for message in sent:
        _count(kind, message.tensor.nbytes)
    if not sent and not received:
        return [], []
    device = (*sent, *received)[0].tensor.device
    timeout = _timeout(group, device)
    with exchanging(group, kind):
        if device.type == "cpu":
            # Without what `dist.isend` asks again of every tensor, while other ranks wait for it.
            coming = [group.recv([x], rank, 0) for rank, x in received]
            going = [group.send([x], rank, 0) for rank, x in sent]
            return _pending(coming, timeout), _pending(going, timeout)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(what, x, group=group, group_peer=rank)
                for what, messages in ((dist.irecv, received), (dist.isend, sent))
                for rank, x in messages
            ]
        )
    pending = _pending(works, timeout)
    if len(pending) != len(received) + len(sent):
        return pending, []
    return pending[: len(received)], pending[len(received) :]


def _pending(works: Sequence[Any], timeout: timedelta | None) -> list[Pending]:
    return [Pending(work, timeout) for work in works]


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return how long a thread waits for a transfer of CPU tensors, or None for another device.

    Gloo would wait for ever. On an accelerator a wait with a timeout would hold the thread, and
    torch watches over transfers itself.
    """
    return _patience(group, device) if device.type == "cpu" else None


def wait(group: dist.ProcessGroup, kind: str, pending: Sequence[Pending]) -> None:
    """Wait until transfers have ended; on an accelerator its stream does."""
    with exchanging(group, kind):
        for work, timeout in pending:
            if timeout is None:
                work.wait()
            else:
                work.wait(timeout)


def gather(group: dist.ProcessGroup, kind: str, x: Tensor) -> Tensor:
    """Return the tensors of all ranks, of one shape, stacked in their order: (ranks, ...)."""
    ranks = dist.get_world_size(group)
    _count(kind, x.nbytes * (ranks - 1), ranks - 1)
    whole = x.new_empty((ranks, *x.shape))
    with exchanging(group, kind):
        dist.all_gather([*whole.unbind()], x.contiguous(), group=group)
    return whole


def total(group: dist.ProcessGroup, kind: str, share: Tensor, source: int | None = None) -> Tensor:
    """Sum a tensor over all ranks in its own memory, and return it.

    Args:
        group: the process group.
        kind: what is summed, for messages and `counting`.
        share: of this rank, contiguous; the sum is written over it.
        source: the rank that alone has a share, if it is known: it is sent, the others are not
            read.
    """
    ranks = dist.get_world_size(group)
    if source is None or source == dist.get_rank(group):
        _count(kind, share.nbytes * (ranks - 1), ranks - 1)
    with exchanging(group, kind):
        if source is None:
            dist.all_reduce(share, group=group)
        else:
            dist.broadcast(share, dist.get_global_rank(group, source), group=group)
    return share


def copied(x: Tensor) -> Tensor:
    """Return a contiguous copy, whose memory `total` may write."""
    return x.clone(memory_format=torch.contiguous_format)


class Total(torch.autograd.Function):
    """Sum a tensor over all ranks; the gradient of every share is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, kind: str, x: Tensor) -> Tensor:
        ctx.group, ctx.kind = group, kind
        return total(group, kind, copied(x))

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[None, None, Tensor]:
        return None, None, total(ctx.group, ctx.kind, copied(d_whole))
