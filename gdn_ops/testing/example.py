"""Describe a drawn call by a few plain values, from which every tensor follows.

An `Example` prints as the code that makes it, so a failure is reproduced by pasting it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import gdn_ops
from gdn_ops.call.numerics import compute_dtype
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA

GATES = ("uniform", "slow", "extreme", "strong", "one", "zero")
"""Name ways to draw decays: anywhere; close to 1; with exact 0, 1, 1 - 2**-24 and 1e-30 among
them; e**-20 per token; all 1; all 0."""

BETAS = ("unit", "wide", "edges", "none")
"""Name ways to draw write strengths: in [0, 1]; in [0, 2]; among 0, 1 and 2; not given."""

STRENGTHS = ("scalars", "channels", "erase", "write")
"""Names ways to give erase and write in place of beta: both per head; both per channel; one of them
alone, per channel. `beta` says how their numbers are drawn."""

KEYS = ("random", "parallel", "repeated")
"""Name ways to draw keys of norm 1: independent; nearly parallel; from three vectors."""

MAGNITUDES = ("unit", "half_range", "large_gradients", "tiny_keys", "faint")
"""Name sizes of numbers: of the order of 1; values near 3e4 with alternating signs and states
beyond 65504, read by tiny queries; gradients that large, with tiny keys and values; zero and tiny
keys among others; one decay per sequence around the smallest normal float32, after which a large
state is as small as the values that follow. What a call of float16 results in fits float16, what is
formed on the way may not."""

FAINT_DECAYS = (2.0**-123, 2.0**-126, 2.0**-127, 2.0**-128)
"""The decays of `faint`: two normal numbers of float32, two subnormal ones."""

FAINT = 2.0**-127
"""Shrinks a large state to the size of the values that follow, about."""

STATE_LAYOUTS = ("dense", "transposed", "gaps", "heads_last")
"""Names how the state of a decode op lies in memory: whole, with other strides, or in parts."""

SHARED = ("q", "k", "v", "gate", "beta")
"""Names the arguments that may be views of the state that a decode op updates in place."""

Results = dict[str, Tensor]


class Units(NamedTuple):
    """Hold what the random numbers of an example are multiplied by."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    state: float = 1.0
    d_o: float = 1.0
    d_state: float = 1.0


@dataclass(frozen=True)
class Example:
    """Hold the parameters of one call of `gated_delta`.

    Attributes:
        rule: member of the family.
        dtype: of q, k, v.
        B, T, H, R, K, V: sizes; R is value heads per key head.
        lengths: lengths of packed sequences (then B is 1 and T their sum), or None.
        gate, beta, keys, magnitude: how values are drawn, see GATES, BETAS, KEYS, MAGNITUDES.
        log_gate: whether the gate is given as log_alpha.
        channels: whether every key channel has a decay of its own.
        apart: how erase and write are given in place of beta, see STRENGTHS, or None.
        initial_state: whether there is one.
        qk_l2norm, scale, chunk_size: as in the call.
        strided: whether q, k, v are views with gaps.
        state_dtype: of the state in a call of a decode op; the compute dtype by default.
        state_layout: in a call of a decode op, see STATE_LAYOUTS.
        shared: in a call of a decode op in place, the argument that is a view of the state, or
            None; see SHARED.
        slots: in a call of a decode op, `state_indices` into a pool, or None for no pool.
        pool: how many slots the pool has.
        seed: of every random number.
        device: torch device of every tensor.
    """

    rule: str = "gated_delta"
    dtype: str = "float32"
    B: int = 1
    T: int = 1
    H: int = 1
    R: int = 1
    K: int = 4
    V: int = 4
    lengths: tuple[int, ...] | None = None
    gate: str = "uniform"
    beta: str = "unit"
    keys: str = "random"
    magnitude: str = "unit"
    log_gate: bool = False
    channels: bool = False
    apart: str | None = None
    initial_state: bool = False
    qk_l2norm: bool = False
    scale: float | None = None
    chunk_size: int | None = None
    strided: bool = False
    state_dtype: str | None = None
    state_layout: str = "dense"
    shared: str | None = None
    slots: tuple[int, ...] | None = None
    pool: int = 0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.lengths is not None and (self.B != 1 or sum(self.lengths) != self.T):
            raise ValueError(f"lengths {self.lengths} need B=1 and T={sum(self.lengths)}")
        if self.slots is not None and len(self.slots) != self.B:
            raise ValueError(f"slots {self.slots} need B={len(self.slots)}")

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Example({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of the call's axes."""
        n = self.B if self.lengths is None else len(self.lengths)
        return Sizes(self.B, self.T, self.H, self.H * self.R, self.K, self.V, n)

    @property
    def units(self) -> Units:
        """Return what the random numbers are multiplied by, for results that fit float16.

        What is normalised is divided by 1e-3 at least: it is smaller by 2**-10.
        """
        small = 2.0**-10
        # Choose what the dtype of the values can hold after a faint decay.
        large = 2.0**115 if self.dtype == "float16" else 2.0**66
        normed = small if self.qk_l2norm else 1.0
        kinds = {
            "unit": Units(),
            "half_range": Units(
                q=small * normed, v=3e4, state=2.0**17, d_o=small * normed, d_state=small
            ),
            "large_gradients": Units(
                k=normed * 2.0**-8,
                v=normed * 2.0**-12,
                state=normed * 2.0**-12,
                d_o=3e4,
                d_state=2.0**17,
            ),
            "tiny_keys": Units(v=100.0, state=100.0, d_o=2.0**-14, d_state=2.0**-14),
            "faint": Units(v=large * FAINT, state=large) if self.is_faint else Units(),
        }
        return kinds[self.magnitude]

    @property
    def is_faint(self) -> bool:
        """Return whether one decay per sequence is one of FAINT_DECAYS.

        Not where all are 1, and not in float64, whose smallest numbers are far below them.
        """
        has_decay = GATED_DELTA.rule[self.rule].has_decay and self.gate != "one"
        return self.magnitude == "faint" and has_decay and self.dtype != "float64"

    def faint_tokens(self) -> list[tuple[int, int]]:
        """Return the tokens whose decay is one of FAINT_DECAYS, one per sequence that has any.

        Each comes as (first token of its sequence, token).
        """
        if not self.is_faint:
            return []
        tokens, start = [], 0
        for length in (self.T,) if self.lengths is None else self.lengths:
            # Values beside a large state would not fit float16: there the first token has it.
            within = length // 2 if self.seed % 2 and self.dtype != "float16" else 0
            tokens += [(start, start + within)] if length else []
            start += length
        return tokens

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the call, without `backend` and `return_state`."""
        return _Drawing(self).arguments()

    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Return random gradients of o (B, T, HV, V) and of the final state."""
        s = self.sizes
        draw = _Drawing(replace(self, seed=self.seed + 1))
        d_o = draw.in_units(draw.normal(s.B, s.T, s.HV, s.V), self.units.d_o)
        d_state = draw.normal(s.N, s.HV, s.K, s.V) * self.units.d_state
        return d_o.to(draw.dtype).to(self.device), d_state.to(draw.wide).to(self.device)

    def run(self, backend: str, *, gradients: bool = True, **changes: Any) -> Results:
        """Run the call and return its results by name.

        Args:
            backend: name of the backend.
            gradients: whether to include `d_NAME` for every differentiable tensor.
            changes: arguments that replace those of the example.
        """
        return run(self.arguments() | changes, backend, self.cotangents() if gradients else None)

    def code(self, backend: str) -> str:
        """Return the code that runs this example against the oracle."""
        return (
            "from gdn_ops.testing import Example\n"
            "from gdn_ops.testing.oracle import judge\n"
            f"print(judge({self!r}, {backend!r}))"
        )


def run(
    arguments: dict[str, Any], backend: str, cotangents: tuple[Tensor, Tensor] | None
) -> Results:
    """Run `gated_delta` on arguments; with cotangents (of o and final_state), its gradients too."""
    arguments = dict(arguments)
    inputs: dict[str, Tensor] = {}
    if cotangents is not None:
        for arg in GATED_DELTA.tensors:
            x = arguments.get(arg.name)
            if arg.differentiable and x is not None:
                inputs[arg.name] = arguments[arg.name] = x.detach().requires_grad_()
    with torch.set_grad_enabled(cotangents is not None):
        o, state = gdn_ops.gated_delta(**arguments, return_state=True, backend=backend)
    results = {"o": o.detach(), "final_state": state.detach()}
    if cotangents is not None:
        # o and the state do not depend on anything where there is no token.
        pairs = [(x, g) for x, g in zip((o, state), cotangents, strict=True) if x.requires_grad]
        gradients = torch.autograd.grad(
            [x for x, _ in pairs],
            list(inputs.values()),
            [g.to(x.dtype) for x, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        # Zeros made for an input that nothing depends on may themselves require gradients.
        results |= {f"d_{name}": g.detach() for name, g in zip(inputs, gradients, strict=True)}
    return results


class _Drawing:
    """Draw the tensors of one example from its seed."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.generator = torch.Generator().manual_seed(example.seed)
        self.dtype: torch.dtype = getattr(torch, example.dtype)
        self.wide = compute_dtype(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def pick(self, values: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
        index = torch.randint(len(values), shape, generator=self.generator, device="cpu")
        return torch.tensor(values, dtype=torch.float64, device="cpu")[index]

    def arguments(self) -> dict[str, Any]:
        e, s, units = self.example, self.example.sizes, self.example.units
        rule = GATED_DELTA.rule[e.rule]
        q, k = self.normal(s.B, s.T, s.H, s.K) * units.q, self.key_vectors() * units.k
        v = self.in_units(self.normal(s.B, s.T, s.HV, s.V), units.v)
        v = v * self.before_faint_decays()
        arguments: dict[str, Any] = {
            name: self.laid_out(x.to(self.dtype)) for name, x in (("q", q), ("k", k), ("v", v))
        }
        if rule.has_decay:
            alpha = self.decay()
            gate = alpha.log() if e.log_gate else alpha
            arguments["log_alpha" if e.log_gate else "alpha"] = gate.to(self.wide).to(e.device)
        arguments |= {name: x.to(self.wide).to(e.device) for name, x in self.strengths().items()}
        if e.initial_state:
            state = self.normal(s.N, s.HV, s.K, s.V) * units.state
            arguments["initial_state"] = state.to(self.wide).to(e.device)
        if e.lengths is not None:
            arguments["cu_seqlens"] = (
                torch.tensor((0, *e.lengths), dtype=torch.int64, device="cpu")
                .cumsum(0)
                .to(e.device)
            )
        return arguments | {
            "rule": e.rule,
            "qk_l2norm": e.qk_l2norm,
            "scale": e.scale,
            "chunk_size": e.chunk_size,
        }

    def key_vectors(self) -> Tensor:
        e, s = self.example, self.example.sizes
        shape = (s.B, s.T, s.H, s.K)
        keys = self.normal(*shape)
        if e.keys == "parallel":
            keys = self.normal(s.B, 1, s.H, s.K) + 1e-3 * keys
        elif e.keys == "repeated":
            index = torch.randint(3, (s.T,), generator=self.generator, device="cpu")
            keys = self.normal(s.B, 3, s.H, s.K)[:, index]
        keys = functional.normalize(keys, dim=-1)
        if e.magnitude == "tiny_keys":
            keys = keys * self.pick((0.0, 0.0, 1e-6, 1e-4, 1e-3, 1.0), (s.B, s.T, s.H, 1))
        return keys

    def in_units(self, x: Tensor, unit: float) -> Tensor:
        """Return random numbers (B, T, HV, V) in a unit; large ones lie near it, of both signs."""
        if unit < 1e4:
            return x * unit
        signs = 1 - 2 * (torch.arange(x.shape[1], device=x.device) % 2).double()
        return (1 + x / 64) * unit * signs[:, None, None]

    def before_faint_decays(self) -> Tensor:
        """Return what values are multiplied by, (T, 1, 1): more where a faint decay follows."""
        factor = torch.ones(self.example.T, 1, 1, dtype=torch.float64, device="cpu")
        for start, token in self.example.faint_tokens():
            factor[start:token] = 1 / FAINT
        return factor

    def decay(self) -> Tensor:
        """Return the decays (B, T, HV), or of channels (B, T, HV, K), the faint ones among them."""
        decay = self.ordinary_decay()
        for _, token in self.example.faint_tokens():
            decay[:, token] = self.pick(FAINT_DECAYS, decay[:, token].shape)
        return decay

    def ordinary_decay(self) -> Tensor:
        s = self.example.sizes
        shape: tuple[int, ...] = (s.B, s.T, s.HV, *((s.K,) if self.example.channels else ()))
        uniform = self.uniform(*shape)
        kinds: dict[str, Callable[[], Tensor]] = {
            "uniform": lambda: uniform,
            "slow": lambda: 1 - 0.1 * uniform,
            "extreme": lambda: torch.where(
                self.uniform(*shape) < 0.5,
                uniform,
                self.pick((0.0, 0.0, 1.0, 1 - 2**-24, 1e-30), shape),
            ),
            "strong": lambda: torch.exp(-20 - uniform),
            "one": lambda: torch.ones(shape, dtype=torch.float64, device="cpu"),
            "zero": lambda: torch.zeros(shape, dtype=torch.float64, device="cpu"),
        }
        return kinds[self.example.gate]()

    def strengths(self) -> dict[str, Tensor]:
        """Return beta, or erase and write in its place, as far as they are given."""
        e = self.example
        if e.apart is None:
            return {} if e.beta == "none" else {"beta": self.strength()}
        is_wide = e.apart != "scalars"
        given = {"erase": (e.K,), "write": (e.V,)}
        names = [e.apart] if e.apart in given else [*given]
        return {name: self.strength(*(given[name] if is_wide else ())) for name in names}

    def strength(self, *channels: int) -> Tensor:
        s = self.example.sizes
        shape = (s.B, s.T, s.HV, *channels)
        if self.example.beta == "edges":
            return self.pick((0.0, 1.0, 2.0), shape)
        return self.uniform(*shape) * (2 if self.example.beta == "wide" else 1)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return x, or for a strided example an equal view with gaps and transposed strides."""
        device = self.example.device
        if not self.example.strided:
            return x.to(device)
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=device)
        view = wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1::2]
        return view.copy_(x)
