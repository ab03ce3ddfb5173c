"""Apply the short causal depthwise convolution in front of the rule, with its state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn_ops.call.scalars import as_python
from gdn_ops.nn.blocks import runs_in_blocks
from gdn_ops.nn.causal import causal_convolution, convolved_window
from gdn_ops.nn.packing import check_boundaries, check_lengths
from gdn_ops.nn.values import (
    check_counts,
    check_device,
    check_flags,
    check_kept,
    check_made,
    check_sequences,
    check_tensor,
)
from gdn_ops.spec.errors import SpecError
from gdn_ops.torch_ops.eager import full_precision


class ShortConvolution(nn.Module):
    """Convolve every channel on its own: y_t = activation(Σ_j w_j ⊙ x_{t−k+1+j} + bias), j < k.

    Args:
        channels: width of the last axis.
        kernel_size: k.
        bias: whether there is one.
        activation: "silu" or None.
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
        self.activation = activation
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
            return self._advance(x, state, lengths, cu_seqlens)

    def _advance(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve what was checked, and return the state behind it."""
        if cu_seqlens is not None:
            return self._packed(x, state, cu_seqlens)
        reach, tokens = self.kernel_size - 1, x.shape[1]
        past = self.zero_state(x.shape[0]) if state is None else state
        window = torch.cat([past.mT.to(x.dtype), x], 1)
        if lengths is None:
            last = window[:, tokens:]
        else:
            # The token at index i of a row stands at i + reach of its window.
            index = lengths[:, None] + torch.arange(reach, device=x.device)
            last = window.gather(1, index[..., None].expand(-1, -1, self.channels))
        # A copy: a view would keep the whole window alive.
        return self._convolve(window), last.mT.contiguous()

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

    def _convolve(self, window: Tensor) -> Tensor:
        """Convolve (B, reach + T, channels) to (B, T, channels)."""
        reach, silu = self.kernel_size - 1, self.activation == "silu"
        if window.shape[1] > reach + 1 and runs_in_blocks(window):
            return causal_convolution(window, self.weight, self.bias, silu=silu)[:, reach:]
        return convolved_window(window, self.weight, self.bias, silu=silu)

    def _packed(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve packed sequences as one long row, each behind its own past inputs."""
        reach, sequences, cuts = self.kernel_size - 1, cu_seqlens.shape[0] - 1, cu_seqlens.long()
        token, sequence, step = (
            torch.arange(count, device=cuts.device) for count in (x.shape[1], sequences, reach)
        )
        own = torch.searchsorted(cuts[1:].contiguous(), token, right=True)
        # Indices into the row: (N, reach) of what precedes a sequence, (T,) of the tokens, and
        # (N, reach) of the last inputs of each sequence, its past included.
        past_slots = (cuts[:-1] + sequence * reach)[:, None] + step
        token_slots = token + (own + 1) * reach
        last_slots = (cuts[1:] + sequence * reach)[:, None] + step
        past = self.zero_state(sequences) if state is None else state
        window = x.new_zeros(x.shape[1] + past_slots.numel(), self.channels)
        window = window.index_copy(0, past_slots.flatten(), past.mT.to(x.dtype).flatten(0, 1))
        window = window.index_copy(0, token_slots, x[0])
        y = self._convolve(window.unsqueeze(0))[:, token_slots - reach]
        return y, window[last_slots].mT.contiguous()

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation!r}"
