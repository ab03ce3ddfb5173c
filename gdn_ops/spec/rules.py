"""Define the members of the family as values, and what a backend can run of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")


def require(condition: bool, message: str) -> None:
    """Raise a ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message)


Width = Literal["none", "scalar", "channel"]
"""Name the numbers of a gate on a head: none, one, or one per channel of K or V."""

WIDTHS: tuple[Width, ...] = ("none", "scalar", "channel")


@dataclass(frozen=True)
class Rule:
    """Describe one rule as what it puts into u_t = w_t v_t - e_t S'^T k_t (docs/math.md §2).

    Attributes:
        name: value of `rule=`.
        decays: the decays it takes: ("none",) if it reads no alpha, which is then 1.
        erases: the erase strengths it takes: ("none",) if e is 0, whatever beta is.
        writes: the write strengths it takes. It is beta, and 1 where that is not given.
        has_decay: whether alpha is read.
        has_erase: whether there is an error term.
        known_as: names in the literature.
    """

    name: str
    known_as: str
    decays: tuple[Width, ...] = ("scalar",)
    erases: tuple[Width, ...] = ("scalar",)
    writes: tuple[Width, ...] = ("scalar",)

    has_decay: bool = field(init=False, repr=False)
    has_erase: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for widths in (self.decays, self.erases, self.writes):
            require(bool(widths) and set(widths) <= set(WIDTHS), f"{self.name} takes {widths}")
        object.__setattr__(self, "has_decay", self.decays != ("none",))
        object.__setattr__(self, "has_erase", self.erases != ("none",))

    def __str__(self) -> str:
        return self.name


OF_DECODE = ("decays", "erases", "writes", "apart")
"""Name the limits that may be others for decode ops."""


@dataclass(frozen=True)
class Limits:
    """Describe what a backend can run, as data; `gdn_ops.dispatch.registry` turns it into text.

    Attributes:
        devices: device types it runs on.
        emulated_devices: device types on which it runs for checking only, when pinned.
        dtypes: dtypes of q, k, v.
        state_dtypes: dtypes of the state of the step.
        head_dims: the allowed K and V, or None for all.
        head_dim_multiple: K and V must be multiples of this.
        rules: names of the rules.
        decays, erases, writes: the widths that these strengths may have: none, scalar, channel.
        apart: whether erase and write may differ, given in place of beta.
        decode_decays, decode_erases, decode_writes, decode_apart: the same of decode ops, or None
            where they take what the sequence op takes.
        ops: names of the ops.
        grad: whether it has gradients.
        second_grad: whether gradients of gradients exist.
        forward_mode: whether forward-mode derivatives exist (`torch.func.jvp`, dual tensors).
        varlen: whether cu_seqlens is supported.
        chunk_sizes: allowed chunk_size, or None for all.
        min_capability: lowest CUDA capability, or None.
        pools: whether its decode ops read `state_indices` themselves. It is no reason against a
            call: for any other backend the rows of a pool are gathered and scattered.
    """

    devices: tuple[str, ...]
    emulated_devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    state_dtypes: tuple[str, ...] = FLOAT_DTYPES
    head_dims: range | tuple[int, ...] | None = None
    head_dim_multiple: int = 1
    rules: tuple[str, ...] = ("gated_delta", "delta", "gated", "linear")
    decays: tuple[Width, ...] = ("none", "scalar")
    erases: tuple[Width, ...] = ("none", "scalar")
    writes: tuple[Width, ...] = ("scalar",)
    apart: bool = False
    decode_decays: tuple[Width, ...] | None = None
    decode_erases: tuple[Width, ...] | None = None
    decode_writes: tuple[Width, ...] | None = None
    decode_apart: bool | None = None
    ops: tuple[str, ...] = ("gated_delta", "gated_delta_step", "gated_delta_steps")
    grad: bool = True
    second_grad: bool = False
    forward_mode: bool = False
    varlen: bool = True
    chunk_sizes: range | tuple[int, ...] | None = None
    min_capability: tuple[int, int] | None = None
    pools: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "emulated_devices", "dtypes", "state_dtypes", "rules", "ops"):
            names = getattr(self, name)
            are_names = isinstance(names, (tuple, list)) and all(isinstance(x, str) for x in names)
            require(are_names, f"{name} is {names!r}, should be a tuple of strings")
        for name in ("head_dims", "chunk_sizes", "min_capability"):
            sizes = getattr(self, name)
            is_listed = isinstance(sizes, (range, tuple, list)) and len(sizes) > 0
            require(sizes is None or is_listed, f"{name} is {sizes!r}, should list integers")
        require(bool(self.devices), "limits name no device")
        require(set(self.dtypes) <= set(FLOAT_DTYPES), f"limits name unknown dtypes {self.dtypes}")
        require(self.head_dim_multiple >= 1, "head_dim_multiple is below 1")

    def of(self, *, decode: bool) -> Limits:
        """Return the limits of decode ops alone, or of the sequence op.

        Args:
            decode: whether decode ops are asked about.

        Returns:
            Limits that are the same for all ops: `decays`, `erases`, `writes` and `apart` are those
            that the ops in question take.

        Example:
            >>> from gdn_ops import Limits
            >>> limits = Limits(devices=("cpu",), decode_decays=("none", "scalar", "channel"))
            >>> limits.of(decode=True).decays, limits.of(decode=False).decays
            (('none', 'scalar', 'channel'), ('none', 'scalar'))
        """
        taken: dict[str, Any] = {}
        for name in OF_DECODE:
            own = getattr(self, f"decode_{name}")
            taken[f"decode_{name}"] = None
            if decode and own is not None:
                taken[name] = own
        return replace(self, **taken)


class Widths(NamedTuple):
    """Hold the widths of the gates of one call.

    Attributes:
        decay, erase, write: the width of each.
        apart: whether erase and write are given in place of beta.
        wide: whether there is more than a decay and a beta per head (docs/math.md §9).
    """

    decay: Width
    erase: Width
    write: Width
    apart: bool = False
    wide: bool = False
