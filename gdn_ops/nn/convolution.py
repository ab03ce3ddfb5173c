"""Apply the short causal depthwise convolution in front of the rule, with its state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gdn_ops.call.scalars import as_python
from gdn_ops.nn import kernels
from gdn_ops.nn.packing import check_boundaries, check_lengths
from gdn_ops.nn.shares import share
from gdn_ops.nn.values import (
    check_counts,
    check_device,
    check_flags,
    check_kept,
    check_made,
    check_sequences,
    check_tensor,
)
from gdn_ops.nn.windows import advance
from gdn_ops.spec.errors import SpecError
from gdn_ops.torch_ops.eager import full_precision


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    *,
    silu: bool,
    backend: str,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve what was checked, by the C++ kernels or in plain torch.

    Args:
        backend: of the rule.
        x, weight, bias, state, silu, lengths, cu_seqlens: as `advance` takes them.

    Returns:
        What `advance` returns.
    """
    plain: Callable[..., tuple[Tensor, Tensor]] = functools.partial(
        advance, silu=silu, lengths=lengths, cu_seqlens=cu_seqlens
    )
    tells = [y for y in (lengths, cu_seqlens) if y is not None]
    if kernels.may_run(backend, x, weight, bias, state) and all(map(kernels.tells, tells)):
        y, final = kernels.convolve(
            x, weight, bias, state, plain, silu=silu, lengths=lengths, starts=cu_seqlens
        )
        assert final is not None
        return y, final
    return plain(x, weight, bias, state)


class ShortConvolution(nn.Module):
    """Convolve every channel on its own: y_t = activation(Σ_j w_j ⊙ x_{t−k+1+j} + bias), j < k.

    Args:
        channels: width of the last axis.
        kernel_size: k.
        bias: whether there is one.
        activation: "silu" or None.
        backend: of the rule beside it: the C++ kernels run beside "cpp", and beside "auto" where
            they can.
        device, dtype: of the parameters.

    Raises:
        SpecError: an option has a wrong value.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("silu", None):
            raise SpecError(
                f"ShortConvolution: activation is {activation!r}, should be 'silu' or None"
            )
        check_counts("ShortConvolution", channels=channels, kernel_size=kernel_size)
        check_flags("ShortConvolution", bias=bias)
        check_made("ShortConvolution", device, dtype)
        self.channels, self.kernel_size = as_python(channels), as_python(kernel_size)
        self.activation, self.backend = activation, backend
        self.own_channels: list[slice] | None = None
        weight = torch.empty(self.channels, self.kernel_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty_like(weight[:, 0])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters uniformly from ±1/sqrt(k), as torch does for a depthwise Conv1d."""
        bound = self.kernel_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def zero_state(self, rows: int) -> Tensor:
        """Return the state before any token: (rows, channels, kernel_size - 1).

        Raises:
            SpecError: `rows` is no integer, or negative.
        """
        check_counts("ShortConvolution.zero_state", least=0, rows=rows)
        shape = (rows, self.channels, self.kernel_size - 1)
        return torch.zeros(shape, dtype=self.weight.dtype, device=self.weight.device)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve whole sequences or the next token.

        Args:
            x: (B, T, channels).
            state: (N, channels, kernel_size - 1), the inputs before x, latest last; or None for
                zeros. N = B, or the number of packed sequences.
            lengths: (B,) number of tokens of each row, what follows them being padding; or None.
            cu_seqlens: (N+1,) boundaries of sequences packed along T with B = 1, or None.

        Returns:
            y like x, and the state after the last token of every sequence.

        Raises:
            SpecError: a shape or a value does not fit.
        """
        self._check(x, state, lengths, cu_seqlens)
        # Autocast of one narrow dtype refuses to join tensors of the other.
        with full_precision(x.device.type):
            return convolve(
                *(x, *own_parameters(self, x), state),
                silu=self.activation == "silu",
                backend=self.backend,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
            )

    def _check(
        self,
        x: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        owner = "ShortConvolution"
        check_sequences(owner, x, self.channels, "channels")
        check_device(owner, "x", x, self.weight.device, "weight")
        rows = x.shape[0]
        if cu_seqlens is not None:
            if lengths is not None:
                raise SpecError(
                    f"{owner}: lengths and cu_seqlens are both given, should be one of them: "
                    f"packing has no padding"
                )
            check_boundaries(owner, cu_seqlens, x)
            rows = cu_seqlens.shape[0] - 1
        if lengths is not None:
            check_lengths(owner, lengths, x)
        expected = (rows, self.channels, self.kernel_size - 1)
        if state is None:
            return
        check_tensor(owner, "state", state)
        if tuple(state.shape) != expected:
            raise SpecError(
                f"{owner}: state has shape {tuple(state.shape)}, should be (N, channels, "
                f"kernel_size - 1) = {expected}"
            )
        check_kept(owner, x, {"state": state})

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation!r}"


def own_parameters(conv: ShortConvolution, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of the channels that this device has, which x are."""
    weight, bias = share(conv.weight, x), share(conv.bias, x)
    if conv.own_channels is None:
        return weight, bias
    parts = conv.own_channels
    weight = torch.cat([weight[part] for part in parts])
    return weight, None if bias is None else torch.cat([bias[part] for part in parts])


def convolve_apart(
    conv: ShortConvolution,
    parts: Sequence[Tensor],
    silu: Sequence[bool],
    state: Tensor | None,
    *,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Convolve inputs that lie apart, each with the next of the channels; nothing is checked.

    Args:
        conv: the convolution, one that `kernels.is_bare`.
        parts: (B, T, width) each, their widths adding up to the channels.
        silu: whether each is activated, in place of the activation of the module.
        state, lengths, cu_seqlens: as `ShortConvolution.forward` takes them.

    Returns:
        The results, and the state of all channels.
    """
    widths = [x.shape[2] for x in parts]
    weight, bias = own_parameters(conv, parts[0])
    weights = weight.split(widths)
    biases = [None] * len(parts) if bias is None else bias.split(widths)
    states = [None] * len(parts) if state is None else state.split(widths, 1)
    with full_precision(parts[0].device.type):
        results = [
            convolve(
                *(x, weight, bias, past),
                silu=is_active,
                backend=conv.backend,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
            )
            for x, weight, bias, past, is_active in zip(
                parts, weights, biases, states, silu, strict=True
            )
        ]
    return [y for y, _ in results], torch.cat([final for _, final in results], 1)
