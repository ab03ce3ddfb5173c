"""Run the kernels around the rule, and plain torch in float64, on the same operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import gdn_ops
from fences import assert_untouched, fenced
from gdn_ops.backends.cpp import layer_token, layers
from gdn_ops.gates import BoundedGate, SoftplusGate
from gdn_ops.nn.norm import gated_rms_norm
from gdn_ops.nn.windows import advance
from gdn_ops.spec.ops import GATED_DELTA

ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest number of a result, and at least of 1."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(x: Tensor | None) -> Tensor | None:
    """Return a leaf with the same numbers in float64."""
    return None if x is None else x.detach().double().requires_grad_()


def assert_close(names: str, actual: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(names.split(), actual, wanted, strict=True):
        size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        error = float((a.double() - b.detach()).abs().max()) if b.numel() else 0.0
        assert error <= ROUNDING[a.dtype] * size, (name, error, size)


def convolved(
    call: layers.Convolution, d_y: Tensor, d_final: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y, the last inputs and the gradients, of the kernels and of plain torch in float64."""
    x, reach = call.x, call.weight.shape[1] - 1
    final = torch.empty(call.sequences, x.shape[2], reach, dtype=x.dtype) if reach else None
    own = [layers.convolution(call, final)]
    given = [exact(t) for t in call[:4]]
    options = {"silu": call.silu, "lengths": call.lengths, "cu_seqlens": call.starts}
    y, last = advance(*given, **options)
    loss = (y * d_y.double()).sum()
    if d_final is not None:
        loss = loss + (last * d_final.double()).sum()
    leaves = [t for t in given if t is not None]
    reference = [y, *([last] if reach else []), *torch.autograd.grad(loss, leaves)]
    gradients = layers.convolution_backward(call, d_y, d_final, needs_x=True)
    own += [t for t in (final, *gradients) if t is not None]
    return own, reference


def names_of(call: layers.Convolution) -> str:
    names = ["y", *(["final"] if call.weight.shape[1] > 1 else []), "d_x", "d_weight"]
    names += [] if call.bias is None else ["d_bias"]
    return " ".join(names + ([] if call.state is None else ["d_state"]))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x,
    "tokens last": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.stack((x, x), 3)[..., 0],
    "reversed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


class ConvolutionCase(NamedTuple):
    """Describe a convolution: its kind is "whole", "lengths" or "packed", cut at `cuts`."""

    rows: int = 2
    tokens: int = 37
    channels: int = 20
    taps: int = 4
    dtype: torch.dtype = torch.float32
    layout: str = "channels last"
    kind: str = "whole"
    silu: bool = True
    has_bias: bool = True
    has_state: bool = True
    has_d_final: bool = True
    cuts: Sequence[int] = (2, 2, 20)

    def operands(self) -> tuple[layers.Convolution, Tensor, Tensor | None]:
        """Return the operands, and the gradients of y and of the last inputs."""
        rows, tokens, channels, taps = self[:4]
        rows = 1 if self.kind == "packed" else rows
        made = functools.partial(normal, dtype=self.dtype)
        ends = sorted(min(cut, tokens) for cut in self.cuts)
        starts = torch.tensor([0, *ends, tokens]) if self.kind == "packed" else None
        past = (rows if starts is None else len(starts) - 1, channels, taps - 1)
        call = layers.Convolution(
            LAYOUTS[self.layout](made(rows, tokens, channels)),
            made(channels, taps, seed=1),
            made(channels, seed=2) if self.has_bias else None,
            made(*past, seed=3) if self.has_state and taps > 1 else None,
            starts,
            torch.arange(rows) * 7 % (tokens + 1) if self.kind == "lengths" else None,
            self.silu,
        )
        d_final = made(*past, seed=4) if self.has_d_final and taps > 1 else None
        return call, LAYOUTS[self.layout](made(rows, tokens, channels, seed=5)), d_final

    def check(self) -> None:
        """Compare the kernels with plain torch."""
        call, d_y, d_final = self.operands()
        assert_close(names_of(call), *convolved(call, d_y, d_final))


CONVOLUTIONS = (
    ConvolutionCase(),
    ConvolutionCase(taps=3, layout="tokens last", kind="lengths", silu=False),
    ConvolutionCase(layout="gaps", kind="packed"),
    ConvolutionCase(rows=3, tokens=2, channels=33, taps=5, kind="lengths", has_bias=False),
    ConvolutionCase(tokens=70, channels=64, layout="reversed", kind="packed", silu=False),
    ConvolutionCase(tokens=3, channels=70, layout="tokens last", has_state=False),
    ConvolutionCase(tokens=1, channels=16, taps=20, has_d_final=False),
    ConvolutionCase(rows=3, taps=1, kind="lengths"),
    ConvolutionCase(rows=1, tokens=65, channels=1100, has_bias=False),
)
"""Every layout and kind, whole and cut vectors, few and many taps, several tasks."""


def normed(
    x: Tensor, weight: Tensor, z: Tensor | None, d_y: Tensor, gate: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and the gradients of a norm, of the kernels and of plain torch in float64."""
    own = [layers.norm(x, weight, z, 0.01, gate)]
    own += [t for t in layers.norm_backward(x, weight, z, 0.01, gate, d_y) if t is not None]
    given = [exact(t) for t in (x, weight, z)]
    y = gated_rms_norm(*given, eps=0.01, activation=gate or "silu")
    leaves = [t for t in given if t is not None]
    return own, [y, *torch.autograd.grad(y, leaves, d_y.double())]


class NormCase(NamedTuple):
    """Describe a norm of rows, gated by "silu", by "sigmoid" or not."""

    shape: Sequence[int] = (2, 5, 3)
    width: int = 20
    dtype: torch.dtype = torch.float32
    gate: str | None = "silu"
    is_transposed: bool = False

    def check(self) -> None:
        """Compare the kernels with plain torch."""
        width, dtype = self.width, self.dtype
        x, z, d_y = (normal(*self.shape, width, seed=seed, dtype=dtype) for seed in (0, 1, 2))
        if self.is_transposed:
            x, z, d_y = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, z, d_y))
        weight = normal(width, seed=3, dtype=dtype)
        names = "y d_x d_weight" + (" d_z" if self.gate else "")
        assert_close(names, *normed(x, weight, z if self.gate else None, d_y, self.gate))


NORMS = (
    NormCase(),
    NormCase(width=64, gate="sigmoid"),
    NormCase(shape=(), width=7, gate=None),
    NormCase(shape=(2, 3, 4, 2), is_transposed=True),
    NormCase(shape=(150,), width=33, gate="sigmoid"),
    NormCase(shape=(150,), width=16, gate=None),
)
"""Every gate, whole and cut vectors, rows of one part of a sum and of several."""


class TokenCase(NamedTuple):
    """Describe one token of a layer of H key heads of width K, each with R value heads of width V.

    q, k and v are one projection, and so are the gates b and a. Without `has_bias` neither the
    convolution nor the decay has one; `inputs` of the convolution are kept, of which it reads the
    last taps - 1. `has_channels` and `lower_bound` are of the decay; gates are `steepness`
    times as wide as the rest.
    """

    sizes: tuple[int, int, int, int] = (2, 2, 20, 36)
    taps: int = 4
    inputs: int = 3
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    gate: str | None = "silu"
    rule: str = "gated_delta"
    has_bias: bool = True
    silu: bool = True
    qk_l2norm: bool = True
    inplace: bool = False
    has_channels: bool = False
    lower_bound: float | None = None
    steepness: float = 1.0

    def drawn(self) -> dict[str, Tensor | None]:
        """Return the tensors of a call by name, None for those that it does not have."""
        H, R, K, V = self.sizes
        rows, values, channels = 2, H * R * V, 2 * H * K + H * R * V
        made = functools.partial(normal, dtype=self.dtype)
        has_decay = GATED_DELTA.rule[self.rule].has_decay
        width = K if self.has_channels else 1
        return {
            "qkv": made(rows, 1, channels),
            "z": made(rows, 1, values, seed=1) if self.gate else None,
            "ba": self.steepness * made(rows, 1, H * R * (1 + width), seed=2),
            "A_log": normal(H * R, seed=3) if has_decay else None,
            "dt_bias": made(H * R * width, seed=4) if has_decay and self.has_bias else None,
            "weight": made(channels, self.taps, seed=5) if self.taps else None,
            "bias": made(channels, seed=6) if self.taps and self.has_bias else None,
            "norm": made(V, seed=7),
            "past": made(rows, channels, self.inputs, seed=8) if self.taps else None,
            "state": normal(rows, H * R, K, V, seed=9, dtype=self.state_dtype),
        }

    def run(self, x: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return o, the inputs that are kept and the new state, of the kernel."""
        sizes = layer_token.Sizes(*self.sizes)
        H, R, K, V = sizes
        heads, values, width = layer_token.heads, R * V, K if self.has_channels else 1
        given = layer_token.Projections(
            q=heads(x["qkv"], K),
            k=heads(x["qkv"], K, first=H * K),
            v=heads(x["qkv"], values, V, 2 * H * K),
            z=heads(x["z"], values, V),
            a=heads(x["ba"] if x["A_log"] is not None else None, R * (1 + width), width, R),
            b=heads(x["ba"], R * (1 + width)),
        )
        layer = layer_token.Parameters(
            *(x[name] for name in ("A_log", "dt_bias", "weight", "bias", "norm")),
            eps=0.01,
            gate=self.gate,
            beta_factor=2.0,
            silu=self.silu,
            has_erase=GATED_DELTA.rule[self.rule].has_erase,
            qk_l2norm=self.qk_l2norm,
            has_channels=self.has_channels,
            lower_bound=self.lower_bound,
        )
        past, state = (None if t is None else t.clone() for t in (x["past"], x["state"]))
        kept = past if past is None or self.inplace else torch.empty_like(past)
        new = state if self.inplace else torch.empty_like(state)
        o = layer_token.token(2, sizes, given, layer, (past, kept), (state, new), self.dtype)
        return o, kept, new

    def exact(self, x: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return o and the new state, of plain torch in float64."""
        H, R, K, V = self.sizes
        x = {name: None if t is None else t.double() for name, t in x.items()}
        p = x["qkv"]
        if self.taps:
            past = x["past"][..., self.inputs - self.taps + 1 :]
            p, _ = advance(p, x["weight"], x["bias"], past, silu=False)
        qk, v = p.split((2 * H * K, H * R * V), -1)
        q, k = (functional.silu(qk) if self.silu else qk).view(2, 2, H, K).unbind(1)
        b, a = x["ba"].view(2, H, -1).tensor_split((R,), -1)
        o, state = gdn_ops.gated_delta_step(
            *(q, k, functional.silu(v).view(2, H * R, V)),
            log_alpha=None if x["A_log"] is None else self.decay(a, x["A_log"], x["dt_bias"]),
            beta=2 * b.reshape(2, H * R).sigmoid(),
            state=x["state"],
            rule=self.rule,
            qk_l2norm=self.qk_l2norm,
            backend="naive",
        )
        z = None if x["z"] is None else x["z"].view(2, H * R, V)
        o = gated_rms_norm(o, x["norm"], z, eps=0.01, activation=self.gate or "silu")
        return o.view(2, 1, -1), state

    def decay(self, a: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
        """Return log α of plain torch in float64."""
        H, R, K, _ = self.sizes
        g = a.reshape(2, H * R, K) if self.has_channels else a.reshape(2, H * R)
        if self.lower_bound is None:
            return SoftplusGate(A_log, dt_bias, self.has_channels)(g)
        return BoundedGate(A_log, dt_bias, self.lower_bound, self.has_channels)(g)

    def check(self) -> None:
        """Compare the kernel with plain torch."""
        x = self.drawn()
        (o, kept, state), wanted = self.run(x), self.exact(x)
        assert_close("o state", [o, state], list(wanted))
        if kept is not None:
            assert torch.equal(kept, torch.cat([x["past"][..., 1:], x["qkv"].mT], -1))


TOKENS = (
    TokenCase(),
    TokenCase(inplace=True, inputs=4, gate="sigmoid"),
    TokenCase(sizes=(1, 3, 7, 5), taps=3, inputs=2, gate=None, has_bias=False, rule="gated"),
    TokenCase(sizes=(3, 1, 16, 64), taps=0, silu=False, rule="delta", inplace=True),
    TokenCase(sizes=(2, 1, 8, 33), taps=1, inputs=2, qk_l2norm=False, rule="linear"),
    TokenCase(sizes=(1, 2, 32, 130), state_dtype=torch.bfloat16, inplace=True),
    TokenCase(sizes=(1, 2, 32, 130), state_dtype=torch.float16, taps=0, has_bias=False),
    TokenCase(sizes=(2, 3, 10, 8), lower_bound=-2.0),
    TokenCase(sizes=(2, 1, 20, 20), has_channels=True, gate="sigmoid", inplace=True, inputs=4),
    TokenCase(sizes=(1, 3, 37, 5), has_channels=True, has_bias=False, steepness=30.0, rule="gated"),
    TokenCase(sizes=(2, 2, 16, 130), has_channels=True, lower_bound=-5.0, steepness=30.0, taps=0),
    TokenCase(sizes=(1, 2, 7, 64), has_channels=True, lower_bound=-1.0, state_dtype=torch.bfloat16),
)
"""Every option, whole and cut vectors, states of every type in their place and in another one."""


def check_in_place(dtype: torch.dtype, kept: int) -> None:
    """Convolve one token whose inputs, more than are read or just those, are updated in place."""
    weight = normal(50, 4, seed=1, dtype=dtype)
    state, x = normal(2, 50, kept, seed=3, dtype=dtype), normal(2, 1, 50, dtype=dtype)
    held, given = fenced(state, 7.0), exact(state[..., -3:])
    y = layers.convolution(layers.Convolution(x, weight, None, held, None, None, True), held)
    wanted, _ = advance(exact(x), exact(weight), None, given, silu=True)
    assert_close("y", [y], [wanted])
    assert torch.equal(held, torch.cat([state[..., 1:], x.mT], -1))
    assert_untouched([held])


def check_ends() -> None:
    """Compare SiLU where e^x is too large or too small, and beyond, with that of plain torch."""
    x = torch.tensor([-1e30, -1e4, -104.0, -88.0, -86.5, -1e-30, 0.0, 20.0, 88.0, 1e4, 1e30])
    call = layers.Convolution(x.view(1, -1, 1), torch.ones(1, 1), None, None, None, None, True)
    y = layers.convolution(call).flatten()
    wanted = functional.silu(x.double())
    assert torch.all((y - wanted).abs() <= 1e-6 * wanted.abs() + 1e-35)
    ends = x.clone()
    ends[[0, -1]] = torch.tensor([torch.nan, torch.inf])
    y = layers.convolution(call._replace(x=ends.view(1, -1, 1))).flatten()
    assert y[0].isnan() and y[-1] == torch.inf and y[1:-1].isfinite().all()


def check_float16() -> None:
    """Read and write every number of float16, one by one and in vectors."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    for width in (1, 64):
        weight = torch.ones(width, 1)
        call = layers.Convolution(x.view(1, -1, width), weight, None, None, None, None, False)
        y = layers.convolution(call).flatten()
        assert torch.all((y == x) | (y.isnan() & x.isnan()))
