"""Run calls by kernels: the base class of backends that configure, plan and launch them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import (
    Backend,
    Forward,
    Grads,
    gradients_without_tokens,
    without_tokens,
)
from gdn_ops.kernel_support.launches import recorded_target
from gdn_ops.kernel_support.tuning import TRIED, Row, StepConfig, Tiles, trying
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits

MOST_STEPS: Final = 8
"""Tokens per row up to which a call without gradients takes the decode kernel."""

PROCESSORS: Final = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of A100, H200, B200 and MI300X, for launches that are only recorded."""

EMULATED_PROCESSORS: Final = PROCESSORS["sm_90"]
"""Those of the GPU that an emulation stands for."""

EMULATED_MEMORY: Final = 141 * 10**9
"""Bytes of memory of an H200."""

MOST_HEADS: Final = 65535
"""Programs along the second and the third axis of a GPU's grid, where heads and, in blocks of
columns, V are. Rows, sequences and chunks are along the first one, of 2**31 - 1 programs."""

Choices = Mapping[str, Sequence[Any]]
"""Field of a configuration -> the values to try."""

_TILES: Final[Choices] = {"BV": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}
_WITHOUT_COLUMNS: Final[Choices] = {"warps": (2, 4, 8), "stages": (1, 2, 3)}


class Tables:
    """Choose configurations from a backend's rows, or from one row instead of theirs.

    Keys are (device class, width class, dtype class) for the sequence op, and (device class, width
    class) for decoding. The dtype class is "low" for bfloat16, "float16" or "float32".

    Args:
        rows: the configurations by key.
        target_of: returns the device class of a CUDA device, by its index.
        emulated: the device class that an emulation stands for.
        width_of: returns the width class of K and V.
        step, sequence: what `neighbours` tries beside the tiles, for decoding and the sequence op.
        allows: returns whether a configuration may be replaced by another.
    """

    def __init__(
        self,
        rows: Mapping[Any, Any],
        *,
        target_of: Callable[[int], str],
        emulated: str,
        width_of: Callable[[int, int], int],
        step: Choices,
        sequence: Choices,
        allows: Callable[[Any, Any], bool] = lambda own, other: True,
    ) -> None:
        self.rows = rows
        self._target_of, self._emulated, self._width_of = target_of, emulated, width_of
        self._step, self._sequence, self._allows = step, sequence, allows

    def target(self, device: torch.device) -> str:
        """Return the device class that launches on a device are configured for."""
        recorded = recorded_target() if device.type == "meta" else None
        if recorded is not None:
            return recorded
        return self._target_of(device.index or 0) if device.type == "cuda" else self._emulated

    def processors(self, device: torch.device) -> int:
        """Return how many multiprocessors a device has, each of which runs a program or more."""
        if device.type == "cpu":
            return EMULATED_PROCESSORS
        recorded = recorded_target()
        if device.type == "cuda" and recorded is None:
            return _processors_of(device.index or 0)
        return PROCESSORS.get((recorded or "").removesuffix("a"), EMULATED_PROCESSORS)

    def memory(self, device: torch.device) -> int:
        """Return the bytes of memory that a device has."""
        is_real = device.type == "cuda" and recorded_target() is None
        return _memory_of(device.index or 0) if is_real else EMULATED_MEMORY

    def key(
        self, device: torch.device, K: int, V: int, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        """Return the key of a row of the sequence op, or of decoding where no dtype is given."""
        key = self.target(device), self._width_of(K, V)
        return key if dtype is None else (*key, _CLASSES.get(dtype, "low"))

    def choose(self, device: torch.device, K: int, V: int, dtype: torch.dtype | None = None) -> Any:
        """Return the configuration of a call, of which `key` returns the key."""
        return self._row(self.key(device, K, V, dtype)).config

    def row(self, call: Call) -> Row:
        """Return the row of a call of any op."""
        dtype = call.tokens.q.dtype if call.op is GATED_DELTA else None
        return self._row(self.key(call.device, call.sizes.K, call.sizes.V, dtype))

    def _row(self, key: tuple[Any, ...]) -> Row:
        row: Row | None = TRIED.get().get(self)
        if row is not None and row.key == key:
            return row
        return Row(key, self.rows[key])

    def using(self, row: Row) -> AbstractContextManager[None]:
        """Return a context in which the calls of this thread run with a row, not the table's."""
        return trying(self, row)

    def neighbours(self, row: Row) -> tuple[Row, ...]:
        """Return a row, and after it the rows that differ from it in a single choice."""
        own = row.config
        configs = [
            own,
            *_varied(own, self._step if isinstance(own, StepConfig) else self._sequence),
        ]
        for name, tiles in vars(own).items():
            if isinstance(tiles, Tiles):
                choices = _TILES if tiles.BV else _WITHOUT_COLUMNS
                configs += [replace(own, **{name: other}) for other in _varied(tiles, choices)]
        configs = [config for config in configs if self._allows(own, config)]
        return tuple(Row(row.key, config) for config in dict.fromkeys(configs))


@functools.cache
def _processors_of(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _memory_of(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).total_memory)


_CLASSES = {torch.bfloat16: "low", torch.float16: "float16", torch.float32: "float32"}
"""Classes of the sequence op's configurations by dtype: the memory of operands is in one dtype, of
two parts, or three."""


def _varied(config: Any, choices: Choices) -> list[Any]:
    """Return a dataclass with one field after the other set to each of its choices."""
    return [replace(config, **{k: v}) for k, values in choices.items() for v in values]


def environment_choice(variable: str, allowed: Sequence[str]) -> str:
    """Return the value of an environment variable: one of those allowed, the first by default."""
    choice = os.environ.get(variable) or allowed[0]
    if choice not in allowed:
        raise ValueError(f"{variable} is {choice!r}, should be one of {', '.join(allowed)}")
    return choice


class KernelBackend(Backend):
    """Decode few tokens in one launch, plan the rest, and choose configurations from tables.

    Attributes:
        tables: the configurations of its kernels.
        make_plan: returns the plan of a call of `gated_delta`, from its shapes and attributes.
        empty_saved: allocates what the forward of a call and its plan saves for the backward.
        tool_reasons: returns why kernels cannot be built for a device type, whatever the call.
        run_forward: runs a call of `gated_delta` that has tokens, given its plan.
        run_backward: returns its gradients, given the plan, the saved tensors, d_o and d_state.
        run_decode: runs a call of a decode op, given q, k and v with a token axis, into o, the new
            state, which may be that of the call, and the state after every token, or None.
    """

    kernels = True
    limits = Limits(
        devices=("cuda",),
        emulated_devices=("cpu",),
        dtypes=("bfloat16", "float16", "float32"),
        state_dtypes=("float32", "bfloat16", "float16"),
        min_capability=(8, 0),
        pools=True,
    )
    tables: ClassVar[Tables]

    make_plan: ClassVar[Callable[..., Any]]
    empty_saved: ClassVar[Callable[..., tuple[Tensor, ...]]]
    tool_reasons: ClassVar[Callable[..., tuple[str, ...]]]
    run_forward: ClassVar[Callable[..., Forward]]
    run_backward: ClassVar[Callable[..., Grads]]
    run_decode: ClassVar[Callable[..., None]]

    def reasons(self, call: Call) -> list[str]:
        too_many = [f"HV={call.sizes.HV} (supported: up to {MOST_HEADS})"]
        return [
            *self.tool_reasons(call.device.type),
            *(too_many if call.sizes.HV > MOST_HEADS else ()),
        ]

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        return self.empty_saved(call, self.make_plan(call))

    def forward(self, call: Call) -> Forward:
        if not call.has_tokens:
            return without_tokens(call, self.saved_like(call) if call.needs_grad else ())
        is_planned = call.needs_grad or call.cu_seqlens is not None or call.chunk_size
        if call.sizes.T <= MOST_STEPS and not is_planned:
            if call.state is not None and call.state.dtype != torch.float32:
                # A final state is float32, where decode ops keep the dtype of the given one.
                call = replace(call, state=call.state.to(torch.float32))
            return Forward(*self.decode_many(call)[:2])
        return self.run_forward(call, self.make_plan(call))

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        if not call.has_tokens:
            return gradients_without_tokens(call, d_state)
        if saved is None:
            raise RuntimeError("gradients of gradients were asked for, which limits exclude")
        return self.run_backward(call, self.make_plan(call), saved, d_o, d_state)

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the tokens of a call in one launch.

        Args:
            call: of `gated_delta_step`, `gated_delta_steps`, or `gated_delta` without packing; q,
                k and v without a token axis count as one token.

        Returns:
            o like v, the new state, and the state after every token (B, T, HV, K, V) or None.
        """
        q, k, v = (x if x.dim() == 4 else x.unsqueeze(1) for x in call.tokens[:3])
        B, T, HV, V = v.shape
        state, device, shape = call.state, call.device, (HV, q.shape[-1], V)
        stored = torch.float32 if state is None else state.dtype
        new_state, states = state, None
        if new_state is None or not call.inplace:
            new_state = torch.empty((B, *shape), dtype=stored, device=device)
        if call.return_states:
            states = torch.empty((B, T, *shape), dtype=stored, device=device)
        o = torch.empty(v.shape, dtype=v.dtype, device=device)
        self.run_decode(call, (q, k, v), o, new_state, states)
        return o.view(call.tokens.v.shape), new_state, states

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.decode_many(call)[:2]

    def tunables(self, call: Call) -> Sequence[Row]:
        return self.tables.neighbours(self.tables.row(call))

    def using(self, config: object) -> AbstractContextManager[object]:
        if not isinstance(config, Row):
            raise TypeError(f"config is {type(config).__name__}, should be one of `tunables`")
        return self.tables.using(config)
