"""Choose configurations from the tables of kernel backends, print a row, run with another one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch

from gdn_ops.call.bind import Call
from gdn_ops.kernel_support.launches import recorded_target
from gdn_ops.spec.ops import GATED_DELTA


@runtime_checkable
class Tunable(Protocol):
    """Describe a backend that `gdn-ops bench --tune` can try configurations of."""

    def tunables(self, call: Call) -> Sequence[object]:
        """Return the configurations to try on a call; none where there is nothing to tune.

        str() of one is the row to paste into the backend's table.
        """

    def using(self, config: object) -> AbstractContextManager[object]:
        """Return a context in which every call, on any thread, runs with one of `tunables`.

        Any thread: autograd runs a backward on a thread of its own.
        """


@dataclass(frozen=True)
class Row:
    """Hold a row of a table: its key and its configuration. str() is the row as source text.

    Attributes:
        key: the class of calls that the row is for, in the backend's terms.
        config: a frozen dataclass; the source text leaves out fields at their default.
    """

    key: tuple[Any, ...]
    config: Any

    def __str__(self) -> str:
        found = [(f, getattr(self.config, f.name)) for f in fields(self.config)]
        text = ", ".join(f"{f.name}={value!r}" for f, value in found if value != f.default)
        return f"{self.key!r}: {type(self.config).__name__}({text}),"


Choices = Mapping[str, Sequence[Any]]
"""Field of a configuration -> the values to try."""


class Tables:
    """Choose configurations from a backend's tables, or from one row instead of theirs.

    Keys are (device class, width class, dtype class) for the sequence op, and (device class, width
    class) for decoding. The dtype class is "float32", or "low" for bfloat16 and float16.

    Args:
        sequence, step: the tables.
        target_of: returns the device class of a CUDA device, by its index.
        emulated: the device class that an emulation stands for.
        width_of: returns the width class of K and V.
        choices: what `neighbours` tries: for a row of `step`, for one of `sequence`, and for each
            kernel's tiles in one of `sequence`.
        allows: returns whether a configuration may be replaced by another.
    """

    def __init__(
        self,
        sequence: Mapping[tuple[str, int, str], Any],
        step: Mapping[tuple[str, int], Any],
        *,
        target_of: Callable[[int], str],
        emulated: str,
        width_of: Callable[[int, int], int],
        choices: tuple[Choices, Choices, Mapping[str, Choices]],
        allows: Callable[[Any, Any], bool] = lambda own, other: True,
    ) -> None:
        self.sequence, self.step = sequence, step
        self._target_of, self._emulated, self._width_of = target_of, emulated, width_of
        self._choices, self._allows = choices, allows
        self._override: Row | None = None

    def target(self, device: torch.device) -> str:
        """Return the device class that launches on a device are configured for."""
        recorded = recorded_target()
        if recorded is not None:
            return recorded
        return self._target_of(device.index or 0) if device.type == "cuda" else self._emulated

    def sequence_key(
        self, device: torch.device, dtype: torch.dtype, K: int, V: int
    ) -> tuple[str, int, str]:
        """Return the key of the row for a call of the sequence op."""
        kind = "float32" if dtype == torch.float32 else "low"
        return self.target(device), self._width_of(K, V), kind

    def step_key(self, device: torch.device, K: int, V: int) -> tuple[str, int]:
        """Return the key of the row for a call of a decode op."""
        return self.target(device), self._width_of(K, V)

    def choose(self, device: torch.device, dtype: torch.dtype, K: int, V: int) -> Any:
        """Return the configuration of a call of the sequence op."""
        return self._row(self.sequence, self.sequence_key(device, dtype, K, V)).config

    def choose_step(self, device: torch.device, K: int, V: int) -> Any:
        """Return the configuration of a call of a decode op."""
        return self._row(self.step, self.step_key(device, K, V)).config

    def row(self, call: Call) -> Row:
        """Return the row of a call of any op."""
        s, device = call.sizes, call.device
        if call.op is GATED_DELTA:
            key = self.sequence_key(device, call.tokens.q.dtype, s.K, s.V)
            return self._row(self.sequence, key)
        return self._row(self.step, self.step_key(device, s.K, s.V))

    def _row(self, table: Mapping[Any, Any], key: tuple[Any, ...]) -> Row:
        if self._override is not None and self._override.key == key:
            return self._override
        return Row(key, table[key])

    @contextlib.contextmanager
    def using(self, row: Row) -> Iterator[None]:
        """Run with a row instead of the table's, on every thread."""
        previous, self._override = self._override, row
        try:
            yield
        finally:
            self._override = previous

    def neighbours(self, row: Row) -> tuple[Row, ...]:
        """Return a row, and after it the rows that differ from it in a single choice."""
        step, sequence, kernels = self._choices
        if len(row.key) == 2:
            found = _varied(row.config, step)
        else:
            found = _varied(row.config, sequence)
            for kernel, choices in kernels.items():
                tiles = _varied(getattr(row.config, kernel), choices)
                found += [replace(row.config, **{kernel: t}) for t in tiles]
        found = [config for config in found if self._allows(row.config, config)]
        return tuple(Row(row.key, config) for config in dict.fromkeys([row.config, *found]))


def _varied(config: Any, choices: Choices) -> list[Any]:
    """Return a dataclass with one field after the other set to each of its choices."""
    return [replace(config, **{k: v}) for k, values in choices.items() for v in values]
