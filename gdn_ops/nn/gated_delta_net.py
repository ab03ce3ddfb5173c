"""Apply the token mixer of Gated DeltaNet (arXiv 2412.06464, Fig. 1), its ablations as options.

q, k = feature_map(conv(W x)), normalised per head        v = SiLU(conv(W x))
log α = −exp(A_log) softplus(W x + dt_bias)                β = sigmoid(W x)
y = W (RMSNorm(rule(q, k, v, α, β)) ⊙ SiLU(W x))

Options too are Kimi Delta Attention (arXiv 2510.26692), with an α of every key channel, and Gated
DeltaNet-2 (arXiv 2605.22791), with β apart: a gate of key channels erases, one of values writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Never

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.call.scalars import as_python
from gdn_ops.nn import kernels, split_tokens, steps, token
from gdn_ops.nn.convolution import ShortConvolution, convolve_apart
from gdn_ops.nn.decay_groups import parameters_without_weight_decay
from gdn_ops.nn.gates import DecayGate
from gdn_ops.nn.mixer_gates import gates_of, projection
from gdn_ops.nn.names import own_options, refuse_input, refuse_option
from gdn_ops.nn.norm import GATE_ACTIVATIONS, GatedRMSNorm
from gdn_ops.nn.options import (
    FEATURE_MAPS,
    QK_NORMS,
    check_choice,
    check_member,
    fail,
    key_width,
    value_width,
)
from gdn_ops.nn.packing import check_boundaries, check_mask
from gdn_ops.nn.padding import Padding
from gdn_ops.nn.rollback import MemoryStates
from gdn_ops.nn.rule import run_rule
from gdn_ops.nn.shares import Splittable, entering
from gdn_ops.nn.state import State, check_state, made_in
from gdn_ops.nn.values import (
    check_counts,
    check_flags,
    check_made,
    check_numbers,
    check_sequences,
    check_weights,
)
from gdn_ops.parallel.context import Active, active
from gdn_ops.spec.ops import GATED_DELTA

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "b_proj", "w_proj", "a_proj", "g_proj")
"""Names of what is applied to the input."""


class GatedDeltaNet(Splittable):
    """Apply the layer of Gated DeltaNet: projections, convolution, gates, rule, norm, output gate.

    Args:
        hidden_size: width of the input and output.
        num_heads: H, key heads.
        num_value_heads: HV, a multiple of H; H when not given.
        head_dim: K; 0.75 hidden_size / num_heads when not given.
        expand_v: V / K.
        rule: a member of the family: gated_delta, delta, gated, linear.
        short_conv: kernel size of the convolution; 0 for none.
        feature_map: the activation of q and k: silu, relu, elu (1 + ELU), none.
        qk_norm: "l2", "l1" or None.
        output_gate: "silu", "sigmoid" or None.
        output_norm: whether the output is normalised per head.
        allow_neg_eigval: whether β, or the erase gate, reaches up to 2.
        channel_decay: whether every key channel has a decay of its own, as in Kimi Delta Attention.
        lower_bound: None for the softplus gate, or a number in [-5, 0) for the bounded one:
            log α = lower_bound · sigmoid(exp(A_log) (W x + dt_bias)).
        erase_write: whether β is apart, as in Gated DeltaNet-2: an erase gate of every key channel,
            a write gate of every value channel.
        gate_rank: inner width of two matrices that stand for the one of the decay and the one of
            the output gate; None for one each.
        norm_eps: the epsilon of the output norm.
        conv_bias: whether the convolution has a bias.
        backend: the backend of the op, by name.
        device, dtype: those of the parameters; A_log and dt_bias are made in float32.

    Raises:
        SpecError: an option is unknown or has a wrong value, or the sizes do not fit.
    """

    columns, rows = _PROJECTIONS, "o_proj"

    has_token_kernel: ClassVar[bool] = True
    """Say whether `nn.token` computes what a class does, which each says for itself."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        *,
        rule: str = "gated_delta",
        short_conv: int = 4,
        feature_map: str = "silu",
        qk_norm: str | None = "l2",
        output_gate: str | None = "silu",
        output_norm: bool = True,
        allow_neg_eigval: bool = False,
        channel_decay: bool = False,
        lower_bound: float | None = None,
        erase_write: bool = False,
        gate_rank: int | None = None,
        norm_eps: float = 1e-5,
        conv_bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if unknown:
            refuse_option("GatedDeltaNet", unknown, _OPTIONS)
        check_choice("rule", rule, tuple(GATED_DELTA.rule))
        check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
        check_choice("qk_norm", qk_norm, QK_NORMS)
        check_choice("output_gate", output_gate, (*GATE_ACTIVATIONS, None))
        self._size(hidden_size, num_heads, num_value_heads, head_dim, expand_v)
        check_counts("GatedDeltaNet", least=0, short_conv=short_conv)
        check_numbers("GatedDeltaNet", norm_eps=norm_eps)
        flags = {"output_norm": output_norm, "allow_neg_eigval": allow_neg_eigval}
        check_flags("GatedDeltaNet", **flags, conv_bias=conv_bias)
        check_member(rule, channel_decay, lower_bound, erase_write, gate_rank)
        check_made("GatedDeltaNet", device, dtype)
        self.rule, self.feature_map, self.qk_norm = rule, feature_map, qk_norm
        self.output_gate, self.output_norm = output_gate, as_python(output_norm)
        self.allow_neg_eigval, self.backend = as_python(allow_neg_eigval), backend
        self.channel_decay, self.erase_write = as_python(channel_decay), as_python(erase_write)
        self.lower_bound, self.gate_rank = as_python(lower_bound), as_python(gate_rank)
        self._build(short_conv, conv_bias, norm_eps, {"device": device, "dtype": dtype})

    def _size(
        self,
        hidden_size: int,
        num_heads: int,
        num_value_heads: int | None,
        head_dim: int | None,
        expand_v: float,
    ) -> None:
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads}
        given = {"num_value_heads": num_value_heads, "head_dim": head_dim}
        sizes |= {name: size for name, size in given.items() if size is not None}
        check_counts("GatedDeltaNet", **sizes)
        check_numbers("GatedDeltaNet", expand_v=expand_v)
        hidden_size, num_heads, num_value_heads, head_dim = map(
            as_python, (hidden_size, num_heads, num_value_heads, head_dim)
        )
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_value_heads = num_heads if num_value_heads is None else num_value_heads
        self.head_dim = key_width(hidden_size, num_heads) if head_dim is None else head_dim
        self.value_dim = value_width(self.head_dim, expand_v)
        if self.num_value_heads % num_heads:
            fail(
                f"num_value_heads is {self.num_value_heads}, should be a multiple of "
                f"num_heads = {num_heads}"
            )

    def _build(self, kernel: int, conv_bias: bool, eps: float, made: dict[str, Any]) -> None:
        width, heads = self.hidden_size, self.num_value_heads
        keys, values = self.num_heads * self.head_dim, heads * self.value_dim
        # First among the modules: parameters keep the order that they had in older checkpoints.
        self.register_module("decay", None)
        self.q_proj = nn.Linear(width, keys, bias=False, **made)
        self.k_proj = nn.Linear(width, keys, bias=False, **made)
        self.v_proj = nn.Linear(width, values, bias=False, **made)
        of_heads = heads * self.head_dim
        rows = of_heads if self.erase_write else heads
        self.b_proj = nn.Linear(width, rows, bias=False, **made)
        if self.erase_write:
            self.w_proj = nn.Linear(width, values, bias=False, **made)
        if GATED_DELTA.rule[self.rule].has_decay:
            rows = of_heads if self.channel_decay else heads
            self.a_proj = projection(width, self.gate_rank, rows, **made)
            channels = self.head_dim if self.channel_decay else None
            bound = {"channels": channels, "lower_bound": self.lower_bound}
            self.decay = DecayGate(heads, made["device"], **bound)
        self.conv: ShortConvolution | None = None
        if kernel:
            channels = 2 * keys + values
            self.conv = ShortConvolution(
                channels, kernel, bias=conv_bias, activation=None, backend=self.backend, **made
            )
        if self.output_gate is not None:
            self.g_proj = projection(width, self.gate_rank, values, **made)
        if self.output_norm:
            activation = self.output_gate or "silu"
            self.o_norm = GatedRMSNorm(
                self.value_dim, eps, activation, backend=self.backend, **made
            )
        self.o_proj = nn.Linear(values, width, bias=False, **made)

    @property
    def A_log(self) -> Tensor:
        """Return the log of the rate A, (HV,): `decay.A_log`."""
        return self._of_decay("A_log")

    @property
    def dt_bias(self) -> Tensor:
        """Return the bias of the step size, (HV,) or (HV K,): `decay.dt_bias`."""
        return self._of_decay("dt_bias")

    def _of_decay(self, name: str) -> Tensor:
        if self.decay is None:
            raise AttributeError(f"GatedDeltaNet with rule {self.rule!r} has no {name}")
        parameter: Tensor = getattr(self.decay, name)
        return parameter

    def parameters_without_weight_decay(self) -> list[str]:
        """Return the names of the parameters that take no weight decay."""
        return parameters_without_weight_decay(self)

    def split_sizes(self) -> dict[str, int]:
        return {"num_heads": self.num_heads}

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Return how its parts are split over devices: key heads with their value heads."""
        from gdn_ops.nn import tensor_styles  # imports torch.distributed.tensor

        keys, values = self.num_heads * self.head_dim, self.num_value_heads * self.value_dim
        parts = {
            "conv": tensor_styles.Channels([keys, keys, values]),
            "decay": tensor_styles.Gate(),
            "o_norm": tensor_styles.HeadNorm(),
        }
        there = {name: x for name, x in parts.items() if getattr(self, name, None) is not None}
        plan = super().tensor_plan() | there
        for name in ("a_proj", "g_proj"):
            if isinstance(getattr(self, name, None), nn.Sequential):
                del plan[name]
                plan |= tensor_styles.low_rank(name)
        return plan

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the parameters of the gate by the names that they had in the layer, too."""
        for name in ("A_log", "dt_bias") if self.decay is not None else ():
            if prefix + name in state_dict:
                state_dict[f"{prefix}decay.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def zero_state(self, rows: int) -> State:
        """Return the state before any token.

        Raises:
            SpecError: `rows` is no integer, or negative.
        """
        check_counts("GatedDeltaNet.zero_state", least=0, rows=rows)
        dtype, device = made_in(self.o_proj, self)
        dtype = torch.promote_types(dtype, torch.float32)
        shape = (rows, self.num_value_heads // self.shards, self.head_dim, self.value_dim)
        memory = torch.zeros(shape, dtype=dtype, device=device)
        return State(None if self.conv is None else self.conv.zero_state(rows), memory)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_states: bool = False,
        **unknown: Never,
    ) -> tuple[Tensor, State | MemoryStates]:
        """Mix whole sequences, or continue them by any number of tokens.

        Args:
            x: (B, T, hidden_size).
            state: what an earlier call returned, or None to start.
            mask: (B, T), 0 where a token is padding, which may be anywhere in a row. It changes
                no state, and its output is 0.
            cu_seqlens: (N+1,) boundaries of sequences packed along T with B = 1. The states are
                those of the N sequences.
            return_states: whether to keep what leads to the state after any of the tokens, which
                are read one after the other; without gradients.

        Returns:
            y like x, and the state after the last token, or MemoryStates with `return_states`.

        Raises:
            SpecError: an argument is of the wrong type, or a shape does not fit.
        """
        if unknown:
            known = ("x", "state", "mask", "cu_seqlens", "return_states")
            refuse_input("GatedDeltaNet", unknown, known)
        check_flags("GatedDeltaNet", return_states=return_states)
        self._check(x, state, mask, cu_seqlens)
        if return_states:
            return steps.mixed(self, entering(self, x), state, mask=mask, cu_seqlens=cu_seqlens)
        if state is not None and mask is None and cu_seqlens is None and self._is_token(x):
            mixed = token.mixed(self, x, state)
            if mixed is not None:
                return self._project(mixed[0]), mixed[1]
        split = active()
        if split is not None:
            x = entering(self, x)
            return self._mix_split(x, split, state=state, mask=mask, cu_seqlens=cu_seqlens)
        padding = None if mask is None else Padding.of(mask)
        if padding is not None:
            x = padding.front(x)
        x = entering(self, x)
        lengths = None if padding is None else padding.lengths
        conv, memory = (None, None) if state is None else state
        q, k, v, conv = self._qkv(x, conv, lengths, cu_seqlens)
        options: dict[str, Any] = {"rule": self.rule, "backend": self.backend}
        options["qk_l2norm"] = self.qk_norm == "l2"
        tokens = {"q": q, "k": k, "v": v, **gates_of(self, x, padding)}
        o, memory = run_rule(tokens, memory, cu_seqlens, **options)
        y = self._output(o, x)
        return (y if padding is None else padding.back(y)), State(conv, memory)

    def _qkv(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, k (B, T, H, K), v (B, T, HV, V) and the state of the convolution."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return self._convolved(parts, state, lengths, cu_seqlens)

    def _convolved(
        self,
        parts: list[Tensor],
        state: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Convolve and activate what was projected, (B, T, width) each; return as `_qkv` does."""
        features = [self.feature_map, self.feature_map, "silu"]
        if self.conv is not None and self._convolves_apart(*parts, state):
            silu = [name == "silu" for name in features]
            parts, state = convolve_apart(
                self.conv, parts, silu, state, lengths=lengths, cu_seqlens=cu_seqlens
            )
            features = ["none" if name == "silu" else name for name in features]
        elif self.conv is not None:
            mixed, state = self.conv(
                torch.cat(parts, -1), state, lengths=lengths, cu_seqlens=cu_seqlens
            )
            parts = list(mixed.split([y.shape[-1] for y in parts], -1))
        q, k, v = (FEATURE_MAPS[name](y) for name, y in zip(features, parts, strict=True))
        q, k = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k))
        if self.qk_norm == "l1":
            q, k = (functional.normalize(y, p=1.0, dim=-1, eps=1e-6) for y in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_dim)), state

    def _mix_split(self, x: Tensor, split: Active, **given: Any) -> tuple[Tensor, State]:
        """Mix tokens that are split over ranks."""
        split_tokens.check_local("GatedDeltaNet", split, x, **given)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        conv, own = None, split_tokens.Convolved(parts, None, None)
        if self.conv is not None:
            reach = self.conv.kernel_size - 1
            own = split_tokens.convolved(split, parts, reach)
            conv = split_tokens.last_inputs(split, parts, reach)
        *qkv, _ = self._convolved(own.parts, own.past, None, own.cu_seqlens)
        q, k, v = (y.reshape(*x.shape[:2], *y.shape[2:]) for y in qkv if y is not None)
        tokens = {"q": q, "k": k, "v": v, **gates_of(self, x, None)}
        norm = self.qk_norm == "l2"
        o, memory = split_tokens.run_rule(split, tokens, self.rule, self.backend, qk_l2norm=norm)
        return self._output(o, x), State(conv, memory)

    def _convolves_apart(self, *tensors: Tensor | None) -> bool:
        """Return whether the convolution takes q, k and v where they lie, not joined into one."""
        conv = self.conv
        if conv is None or not kernels.may_run(self.backend, *tensors):
            return False
        return kernels.is_bare(conv, ShortConvolution)

    def _is_token(self, x: Tensor) -> bool:
        """Return whether x is one token outside of a graph, and the layer none of a subclass."""
        has_kernel = vars(type(self)).get("has_token_kernel", False)
        return not torch.compiler.is_compiling() and x.shape[1] == 1 and has_kernel

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise and gate o (B, T, HV, V), then project to (B, T, hidden_size)."""
        z = None
        if self.output_gate is not None:
            z = self.g_proj(x).unflatten(-1, (-1, self.value_dim))
        if self.output_norm:
            o = self.o_norm(o, z)
        elif z is not None:
            o = o * GATE_ACTIVATIONS[self.output_gate or "silu"](z)
        return self._project(o.flatten(-2))

    def _project(self, o: Tensor) -> Tensor:
        """Project o (B, T, HV V) to (B, T, hidden_size)."""
        check_weights("GatedDeltaNet", "o", o, o_proj=self.o_proj)
        y: Tensor = self.o_proj(o)
        return y

    def _check(
        self, x: Tensor, state: State | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        check_sequences("GatedDeltaNet", x, self.hidden_size, "hidden_size")
        projections = {n: m for n, m in self.named_children() if n in _PROJECTIONS}
        check_weights("GatedDeltaNet", "x", x, **projections)
        if mask is not None and cu_seqlens is not None:
            fail(
                "mask and cu_seqlens are both given, should be one of them: packing has no padding"
            )
        if mask is not None:
            check_mask("GatedDeltaNet", mask, x)
        if cu_seqlens is not None:
            check_boundaries("GatedDeltaNet", cu_seqlens, x)
        if state is not None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            conv = self.conv
            check_state(
                state,
                x,
                (rows, self.num_value_heads // self.shards, self.head_dim, self.value_dim),
                None if conv is None else (rows, conv.channels, conv.kernel_size - 1),
            )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, "
            f"num_value_heads={self.num_value_heads}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, rule={self.rule!r}{self._member()}"
        )

    def _member(self) -> str:
        """Return the options that make another member of the family of the layer, as text."""
        names = ("channel_decay", "lower_bound", "erase_write", "gate_rank")
        options = {name: getattr(self, name) for name in names}
        return "".join(f", {name}={x}" for name, x in options.items() if x not in (None, False))


_OPTIONS = own_options(GatedDeltaNet)
