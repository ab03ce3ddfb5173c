"""Plan the training of a model over devices: what each split of the work takes, by the cost model.

A layer is a `gdn_ops.nn.GatedDeltaNet` and a SwiGLU, each behind a norm; embedding and loss are
left out. Whatever acts on tokens by themselves is shared out evenly by every split.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from gdn_ops.parallel import work
from gdn_ops.parallel.cost import (
    Strategy,
    exchange_bytes,
    op_seconds,
    reduced_bytes,
    ring_seconds,
    send_seconds,
)
from gdn_ops.parallel.machines import Machine
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Sizes

PARAMETER_BYTES: Final = 16
"""Bytes of a parameter with its gradient, its float32 copy where it is in 16 bits, and the two
moments of Adam."""

CONVOLUTION: Final = 4
"""Taps of the short convolution; a rank needs one token less from the rank before."""

MISSING: Final = frozenset({"heads"})
"""Strategies that gdn_ops does not have."""


@dataclass(frozen=True)
class Model:
    """Describe a training step.

    Attributes:
        sizes: of a call of the op in one layer, with all tokens and sequences.
        layers: how many there are.
        hidden: width of the model.
        mlp_size: inner width of the SwiGLU; 0 for none.
        dtype: of activations and products.
        checkpoint: whether a layer keeps its input only, and runs forward again in the backward.
        fsdp: whether parameters, gradients and moments are shared out over all ranks, as FSDP2
            does; otherwise they are on every rank.
    """

    sizes: Sizes
    layers: int
    hidden: int
    mlp_size: int
    dtype: str = "bfloat16"
    checkpoint: bool = False
    fsdp: bool = False

    @property
    def channels(self) -> int:
        """Return the numbers of q, k and v of a token."""
        s = self.sizes
        return 2 * s.H * s.K + s.HV * s.V

    @property
    def matrices(self) -> int:
        """Return the parameters of the linear layers of a layer."""
        s = self.sizes
        mixer = self.channels + 2 * s.HV * s.V + 2 * s.HV
        return self.hidden * (mixer + 3 * self.mlp_size)

    @property
    def parameters(self) -> int:
        """Return the parameters of all layers."""
        s = self.sizes
        norms = self.hidden * (2 if self.mlp_size else 1) + s.V
        return self.layers * (self.matrices + CONVOLUTION * self.channels + 2 * s.HV + norms)

    def activations(self, tokens: int) -> int:
        """Return the bytes that a layer keeps of tokens for its backward, beside the op's own.

        Inputs and outputs of the norms; inputs and outputs of the convolution, q, k and v; output
        of the op, gate, their product; four widths of the SwiGLU; alpha and beta.
        """
        s = self.sizes
        numbers = 3 * self.channels + 3 * s.HV * s.V + 2 * self.hidden
        if self.mlp_size:
            numbers += 2 * self.hidden + 4 * self.mlp_size
        return tokens * (work.ELEMENTS[self.dtype] * numbers + 8 * s.HV)


@dataclass(frozen=True)
class Split:
    """Describe how a step is split.

    Attributes:
        strategy: of the op over the ranks of a sequence; "data" where that is one.
        sequence: ranks that share a sequence.
        data: ranks, or groups of them, with sequences of their own.
    """

    strategy: Strategy
    sequence: int
    data: int

    def __str__(self) -> str:
        parts = [f"{self.strategy} x{self.sequence}"] if self.sequence > 1 else []
        parts += [f"data x{self.data}"] if self.data > 1 or not parts else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """Hold what a split takes.

    Attributes:
        split: which one.
        layer: seconds of a layer, forward and backward.
        step: seconds of a step.
        memory: bytes of a rank.
        exchanged: bytes that a rank receives in a step.
        efficiency: time of one device over that of all, times their number.
        op_efficiency: the same of the op alone.
        refusal: why it cannot be; None if it can.
    """

    split: Split
    layer: float = 0.0
    step: float = 0.0
    memory: int = 0
    exchanged: int = 0
    efficiency: float = 0.0
    op_efficiency: float = 0.0
    refusal: str | None = None


def splits(ranks: int, batch: int) -> list[Split]:
    """Return the ways to split a step over ranks, those that share a sequence first.

    Beside each strategy alone, these are sequences over fewer ranks in as many groups as there are
    sequences for.
    """
    found: list[Split] = []
    for data in (n for n in range(1, ranks + 1) if ranks % n == 0):
        sequence = ranks // data
        if sequence == 1:
            found.append(Split("data", 1, data))
        elif batch % data == 0:
            found += [Split(way, sequence, data) for way in ("pipeline", "gather", "heads")]
    return found


def rows(model: Model, ranks: int, machine: Machine) -> list[Row]:
    """Return a row for each way to split a step over ranks."""
    return [row(model, split, machine) for split in splits(ranks, model.sizes.B)]


def row(model: Model, split: Split, machine: Machine) -> Row:
    """Return what a split takes, or why it cannot be."""
    whole, ranks = model.sizes, split.sequence * split.data
    try:
        if whole.B % split.data:
            raise SpecError(
                f"sequences ({whole.B}) cannot be shared out evenly over {split.data} ranks"
            )
        if split.sequence > whole.T:
            raise SpecError(f"tokens ({whole.T}) are fewer than ranks ({split.sequence})")
        own = dataclasses.replace(whole, B=whole.B // split.data, N=whole.N // split.data)
        op = op_seconds(split.strategy, own, split.sequence, machine, model.dtype).total
    except SpecError as error:
        return Row(split, refusal=str(error))
    one = op_seconds("data", whole, 1, machine, model.dtype).total
    again = 4 / 3 if model.checkpoint else 1.0
    linear = _linear_seconds(model, machine)
    layer = again * (op + linear / ranks + _halo(model, split, machine))
    alone = again * (one + linear)
    moved = _parameters_exchanged(model, ranks)
    # Parameters move while the layers compute, gradients in the backward, two thirds of the time.
    late = ring_seconds(machine, ranks, moved, turns=2) - model.layers * layer * 2 / 3
    step = model.layers * layer + max(0.0, late)
    return Row(
        split,
        layer,
        step,
        _memory(model, split, machine),
        moved + model.layers * _exchanged(model, split),
        model.layers * alone / (ranks * step),
        one / (ranks * op),
    )


def choice(found: list[Row], machine: Machine) -> Row | None:
    """Return the fastest row that gdn_ops has and that fits; None where none does."""
    able = [x for x in found if x.refusal is None and x.split.strategy not in MISSING]
    return min((x for x in able if x.memory <= machine.memory), key=lambda x: x.step, default=None)


def _parameters_exchanged(model: Model, ranks: int) -> int:
    """Return the bytes of parameters and gradients that a rank receives in a step.

    A sum of gradients is two turns of a ring; FSDP2 gathers parameters twice and sums once: three.
    """
    received = reduced_bytes(model.parameters, ranks, work.ELEMENTS[model.dtype]).received
    return received * 3 // 2 if model.fsdp else received


def _linear_seconds(model: Model, machine: Machine) -> float:
    """Return the time of everything in a layer but the op, on one device, forward and backward.

    A backward takes twice the forward. Element by element, a forward reads and writes: the stream
    twice for each norm, the channels twice, the output of the op and the SwiGLU three times.
    """
    s, e = model.sizes, work.ELEMENTS[model.dtype]
    tokens = s.B * s.T
    flops = 2 * model.matrices * tokens
    numbers = 4 * model.hidden + 2 * model.channels + 3 * s.HV * s.V + 3 * model.mlp_size
    products = flops / (machine.linear[model.dtype] * machine.dense)
    return 3 * (products + 2 * e * numbers * tokens / machine.bandwidth)


def _halo_bytes(model: Model, split: Split) -> int:
    """Return the bytes of the tokens that the convolution needs of the rank before."""
    rows = model.sizes.B // split.data
    return (CONVOLUTION - 1) * rows * model.channels * work.ELEMENTS[model.dtype]


def _halo(model: Model, split: Split, machine: Machine) -> float:
    if split.sequence == 1:
        return 0.0
    return 2 * send_seconds(machine, split.sequence, _halo_bytes(model, split))


def _exchanged(model: Model, split: Split) -> int:
    """Return the bytes that a rank receives for a layer: forward, backward, forward again."""
    if split.sequence == 1:
        return 0
    s = dataclasses.replace(
        model.sizes, B=model.sizes.B // split.data, N=model.sizes.N // split.data
    )
    element = work.ELEMENTS[model.dtype]
    op = exchange_bytes(split.strategy, s, split.sequence, element=element).received
    return (3 if model.checkpoint else 2) * (op + _halo_bytes(model, split))


def _memory(model: Model, split: Split, machine: Machine) -> int:
    """Return the bytes of a rank: parameters, and what all layers keep of its tokens.

    With checkpoints all layers keep their inputs, and one of them the rest.
    """
    s = model.sizes
    rows, run = s.B // split.data, -(-s.T // split.sequence)
    own = dataclasses.replace(s, B=rows, N=rows, T=run)
    kept = model.activations(rows * run)
    if split.strategy == "heads" and split.sequence > 1:
        ranks = split.sequence
        own = dataclasses.replace(own, T=s.T, H=s.H // ranks, HV=s.HV // ranks)
    kept += work.saved_bytes(own, machine, model.dtype)
    if split.strategy == "gather" and split.sequence > 1:
        kept += split.sequence * 4 * rows * s.HV * s.K * (s.K + s.V)
    shared = split.sequence * split.data if model.fsdp else 1
    parameters = model.parameters * PARAMETER_BYTES // shared
    if not model.checkpoint:
        return parameters + model.layers * kept
    stream = work.ELEMENTS[model.dtype] * rows * run * model.hidden
    return parameters + kept + model.layers * stream
