"""Predict what the op costs over ranks: bytes exchanged, seconds, and the strategy for a split.

This is a model, not a measurement. Times are those of the slowest rank, and no exchange is hidden
behind work: what overlaps makes it less. Four splits are known:

- pipeline: a rank has a run of tokens, and hands the state on, heads in groups: rank r walks group
  g while rank r + 1 walks group g - 1;
- gather: a rank has a run of tokens, and gathers the summaries M and R of all runs;
- heads: every rank has all tokens of some heads after an all-to-all, and gives them back by another
  one. Megatron-LM and OLMo-core do so; gdn_ops does not: it is here to compare with;
- data: a rank has sequences of its own, and nothing of the op is exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Final, Literal, NamedTuple

from gdn_ops.parallel import work
from gdn_ops.parallel.machines import MACHINES, Machine
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Sizes

Strategy = Literal["pipeline", "gather", "heads", "data"]
STRATEGIES: Final = ("pipeline", "gather", "heads", "data")

_MACHINE_OF: Final = {"cpu": "cpu"}
"""The machine that stands for a type of device; the H200 for all that are not here."""


class Exchange(NamedTuple):
    """Hold what a rank exchanges in one direction of one call, in bytes.

    Attributes:
        given: what it hands over: to the next rank, or as its part of a collective.
        received: what it gets from other ranks.
        messages: exchanges one after another.
    """

    given: int = 0
    received: int = 0
    messages: int = 0


class Seconds(NamedTuple):
    """Hold the seconds of a forward and its backward over ranks.

    Attributes:
        compute: the rank's part of the work of one device.
        added: work that the split adds: summaries, walks that are made twice, more launches.
        bubble: waiting for other ranks, beside the exchange.
        exchange: moving bytes.
    """

    compute: float
    added: float = 0.0
    bubble: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.compute + self.added + self.bubble + self.exchange


def exchange_bytes(
    strategy: Strategy,
    sizes: Sizes,
    ranks: int,
    *,
    pieces: int | None = None,
    groups: int = 1,
    element: int = 2,
    erases: bool = True,
) -> Exchange:
    """Count the bytes that a rank exchanges in the forward; in the backward they are as many.

    States and summaries are float32. Of a pipeline a rank between others is counted: the first
    receives nothing in the forward, and the last gives nothing.

    Args:
        strategy: how the call is split.
        sizes: of the whole call.
        ranks: processes.
        pieces: runs that the sequence is cut into, spread evenly; `ranks` when not given. Runs of a
            rank that follow one another are one: in zigzag there are 2 ranks - 1.
        groups: of heads, in a pipeline.
        element: bytes of a number of q, k and v.
        erases: whether the rule has an error term; without, M is a number.

    Raises:
        SpecError: the call cannot be split so.

    Example:
        >>> from gdn_ops.parallel.cost import exchange_bytes
        >>> from gdn_ops.spec.language import Sizes
        >>> exchange_bytes("gather", Sizes(1, 131072, 16, 32, 128, 128, 1), 8)
        Exchange(given=4194304, received=29360128, messages=1)
    """
    s = sizes
    _check(strategy, s, ranks)
    # The last piece of a chain gives nothing.
    cuts = -(-((ranks if pieces is None else pieces) - 1) // ranks)
    if ranks == 1 or strategy == "data":
        return Exchange()
    if strategy == "pipeline":
        state = 4 * s.N * s.HV * s.K * s.V * cuts
        return Exchange(state, state, groups * cuts)
    if strategy == "gather":
        summary = 4 * s.N * s.HV * (s.K * s.V + (s.K * s.K if erases else 1)) * cuts
        return Exchange(summary, summary * (ranks - 1), 1)
    tokens = -(-s.T // ranks) * s.B
    inputs = tokens * (element * (2 * s.H * s.K + s.HV * s.V) + 8 * s.HV)
    moved = (inputs + tokens * element * s.HV * s.V) * (ranks - 1) // ranks
    return Exchange(moved, moved, 2)


def reduced_bytes(parameters: int, ranks: int, element: int = 4) -> Exchange:
    """Count the bytes of summing the gradients of parameters over ranks once, by a ring.

    Args:
        parameters: numbers.
        ranks: processes.
        element: bytes of a number.
    """
    if ranks == 1:
        return Exchange()
    whole = parameters * element
    return Exchange(whole, -(-2 * (ranks - 1) * whole // ranks), 1)


def _check(strategy: str, s: Sizes, ranks: int) -> None:
    if strategy not in STRATEGIES:
        raise SpecError(f"strategy is {strategy!r}, should be one of {', '.join(STRATEGIES)}")
    if ranks < 1:
        raise SpecError(f"ranks is {ranks}, should be at least 1")
    if strategy == "heads" and s.H % ranks:
        raise SpecError(f"key heads ({s.H}) cannot be shared out evenly over {ranks} ranks")
    if strategy == "data" and s.B % ranks:
        raise SpecError(f"sequences ({s.B}) cannot be shared out evenly over {ranks} ranks")


def ring_seconds(machine: Machine, ranks: int, received: int, *, turns: int = 1) -> float:
    """Return the time of a collective that passes bytes around a ring.

    A ring over nodes crosses the links of all devices of a node, each for a part of the bytes.

    Args:
        machine: of the ranks, the first ones on the first node.
        ranks: in the ring.
        received: bytes of each.
        turns: times around: 2 where sums are formed and then spread.
    """
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // machine.devices)
    hops = (ranks - nodes) * machine.inside.hop + (nodes - 1) * machine.between.hop
    bandwidth = machine.inside.bandwidth
    if nodes > 1:
        across = machine.between.bandwidth * machine.devices
        bandwidth = min(bandwidth, across) if machine.devices > 1 else across
    return machine.start + turns * hops + received / bandwidth


def send_seconds(machine: Machine, ranks: int, nbytes: int) -> float:
    """Return the time of a message to the next rank, over the slowest link of the chain."""
    link = machine.inside if ranks <= machine.devices else machine.between
    return machine.start + link.hop + nbytes / link.bandwidth


def all_to_all_seconds(machine: Machine, ranks: int, received: int) -> float:
    """Return the time of an all-to-all: what leaves the node takes a device's own link."""
    if ranks <= machine.devices:
        return send_seconds(machine, ranks, received)
    outside = received * (ranks - machine.devices) / (ranks - 1)
    inside = (received - outside) / machine.inside.bandwidth
    return machine.start + machine.between.hop + max(outside / machine.between.bandwidth, inside)


def op_seconds(
    strategy: Strategy,
    sizes: Sizes,
    ranks: int,
    machine: Machine,
    dtype: str = "bfloat16",
    *,
    pieces: int | None = None,
    groups: int | None = None,
    trains: bool = True,
) -> Seconds:
    """Predict the seconds of a forward and its backward over ranks.

    Args:
        strategy: how the call is split.
        sizes: of the whole call.
        ranks: processes, a device each.
        machine: theirs.
        dtype: of q, k and v.
        pieces: runs that the sequence is cut into; `ranks` when not given.
        groups: of heads, in a pipeline; the best number when not given.
        trains: whether a backward follows; a forward alone otherwise.

    Raises:
        SpecError: the call cannot be split so.
    """
    pieces = ranks if pieces is None else pieces
    _check(strategy, sizes, ranks)
    if strategy == "pipeline" and ranks > 1:
        counts = group_counts(sizes.H) if groups is None else [groups]
        found = [_pipeline(sizes, ranks, machine, dtype, pieces, n, trains) for n in counts]
        return min(found, key=lambda seconds: seconds.total)
    if strategy == "gather" and ranks > 1:
        return _gather(sizes, ranks, machine, dtype, pieces, trains)
    if strategy == "heads" and ranks > 1:
        own = dataclasses.replace(sizes, H=sizes.H // ranks, HV=sizes.HV // ranks)
        moved = exchange_bytes(strategy, sizes, ranks, element=work.ELEMENTS[dtype]).received
        exchange = (4 if trains else 2) * all_to_all_seconds(machine, ranks, moved // 2)
        return Seconds(_local(own, machine, dtype, trains), exchange=exchange)
    rows = sizes.B // ranks if strategy == "data" else sizes.B
    own = dataclasses.replace(sizes, B=rows, N=sizes.N * rows // max(sizes.B, 1))
    return Seconds(_local(own, machine, dtype, trains))


def group_counts(H: int) -> list[int]:
    """Return the numbers of groups into which key heads can be shared out evenly, largest first."""
    return [n for n in range(H, 0, -1) if H % n == 0]


def _gather(
    s: Sizes, ranks: int, machine: Machine, dtype: str, pieces: int, trains: bool
) -> Seconds:
    """Return the seconds of a gather: results are formed when all summaries are known.

    Without stages, the first piece of a sequence makes its results at once, those between make
    summaries, and all but the first wait for both. Backward, the last piece, and in its first pass
    each between, makes a backward before the exchange, and all but the last make one behind it.
    In stages all pieces do the same, and none waits for the work of another.
    """
    own = dataclasses.replace(s, T=-(-s.T // ranks))
    directions = 2 if trains else 1
    moved = exchange_bytes("gather", s, ranks, pieces=pieces).received
    exchange = directions * ring_seconds(machine, ranks, moved)
    both = _local(own, machine, dtype, trains)
    if max(s.K, s.V) <= machine.staged:
        return Seconds(both, _staged(own, machine, dtype, trains) - both, exchange=exchange)
    before = both
    if pieces > 2:
        there = _local(own, machine, dtype, trains=False)
        before += max(0.0, work.summary(own, machine, dtype).seconds(machine, dtype) - there)
    return Seconds(both, before, exchange=exchange)


def _staged(s: Sizes, machine: Machine, dtype: str, trains: bool) -> float:
    """Return the seconds of all stages of a rank: the same ones, whichever pieces it has."""
    stages = [
        work.summarise(s, machine, dtype),
        work.forward(s, machine, dtype, trains=trains, resumes=True),
    ]
    if trains:
        stages.append(work.summarise_gradients(s, machine, dtype))
        stages.append(work.backward(s, machine, dtype, resumes=True))
    return sum(stage.seconds(machine, dtype) for stage in stages)


def _pipeline(
    s: Sizes, ranks: int, machine: Machine, dtype: str, pieces: int, groups: int, trains: bool
) -> Seconds:
    """Return the seconds of a pipeline: a stage is a group of heads on a rank, all directions.

    The last rank has all tokens of the first group behind it when it ends that, however the tokens
    are spread: (ranks - 1) stages. Where a rank has one piece and the backend has walks, the others
    have only walked what it waits for.
    """
    own = dataclasses.replace(s, T=-(-s.T // ranks))
    group = dataclasses.replace(own, H=-(-s.H // groups), HV=-(-s.HV // groups))
    whole = _local(own, machine, dtype, trains)
    # Few heads may keep what many could not; that is no gain of the split.
    stage = max(_local(group, machine, dtype, trains), whole / groups)
    waits = stage
    if machine.backend in work.WALKING and pieces <= ranks:
        waits = work.walk(group, machine, dtype).seconds(machine, dtype)
        if trains:
            waits += work.walk_back(group, machine, dtype).seconds(machine, dtype)
    state = exchange_bytes("pipeline", s, ranks).given // groups
    # A state waits for the one before it only where walking a group is faster than sending it.
    sending = (2 if trains else 1) * send_seconds(machine, ranks, state)
    exchange = (pieces - 1) * sending + max(0.0, sending - stage) * (groups - 1)
    return Seconds(whole, groups * stage - whole, (ranks - 1) * waits, exchange)


def _local(s: Sizes, machine: Machine, dtype: str, trains: bool) -> float:
    """Return the seconds of a call on one device: its forward, and its backward if one follows."""
    there = work.forward(s, machine, dtype, trains=trains).seconds(machine, dtype)
    return there + (work.backward(s, machine, dtype).seconds(machine, dtype) if trains else 0.0)


class Choice(NamedTuple):
    """Hold how a split call is computed.

    Attributes:
        strategy: of its sequences: "pipeline" or "gather".
        groups: of heads, where that is the pipeline.
    """

    strategy: str
    groups: int


def choose(
    sizes: Sizes,
    ranks: int,
    pieces: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    trains: bool = True,
) -> Choice:
    """Choose the strategy of a call whose sequences are cut: the faster one by the model.

    It looks at nothing but its arguments, so that ranks which agree on them agree on the choice. It
    counts the backend that "auto" prefers on a device, whichever the caller chose.

    Args:
        sizes: of the whole call, T the tokens of all ranks.
        ranks: processes.
        pieces: runs that the longest chain of the sequences is cut into; `ranks` when not given.
        device: the type of the device: "cpu", or else a GPU, as which an H200 stands; with stages
            on "cuda" only, for dtypes, K and V that the triton backend takes.
        dtype: of q, k and v.
        trains: whether a backward follows.

    Example:
        >>> from gdn_ops.parallel.cost import choose
        >>> from gdn_ops.spec.language import Sizes
        >>> choose(Sizes(1, 16384, 16, 32, 128, 128, 1), 2, trains=False)
        Choice(strategy='pipeline', groups=16)
    """
    pieces = ranks if pieces is None else pieces
    if min(ranks, pieces) < 2:
        return Choice("pipeline", 1)
    return _chosen(sizes, min(ranks, pieces), pieces, device, dtype, trains)


@functools.lru_cache(maxsize=1024)
def _chosen(sizes: Sizes, ranks: int, pieces: int, device: str, dtype: str, trains: bool) -> Choice:
    machine = MACHINES[_MACHINE_OF.get(device, "h200")]
    if device != "cuda" or dtype not in machine.products:
        machine = dataclasses.replace(machine, staged=0)
    known = dtype if dtype in machine.products else "float32"

    def seconds(strategy: Strategy, groups: int | None = None) -> float:
        return op_seconds(
            strategy, sizes, ranks, machine, known, pieces=pieces, groups=groups, trains=trains
        ).total

    groups = min(group_counts(sizes.H), key=lambda n: seconds("pipeline", n))
    is_pipeline = seconds("pipeline", groups) <= seconds("gather")
    return Choice("pipeline" if is_pipeline else "gather", groups)
