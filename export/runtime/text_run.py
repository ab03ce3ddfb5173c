"""Run the graph of a language model call after call, its states in buffers of onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np

from gdn_ops.export.model.folder import (
    CAPACITY,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    TOKEN_IDS,
    Folder,
)
from gdn_ops.export.runtime.sessions import onnxruntime, refusal_to_run
from gdn_ops.export.runtime.text_state import TextState
from gdn_ops.spec.errors import SpecError

Array = np.ndarray[Any, Any]


class TextRun:
    """Hold the states of texts that are being read, and read on.

    States of fixed size are one buffer each, read and written in place. Keys and values are too
    where the flavour says so, with room for all tokens of the run; elsewhere every call makes
    longer ones.

    Args:
        session: of onnxruntime.
        folder: what the graph is.
        state: where texts begin; it is copied.
        more: how many tokens the run has room for.
    """

    def __init__(self, session: Any, folder: Folder, state: TextState, more: int) -> None:
        self._session, self._folder = session, folder
        self._total = state.tokens
        self._mask = np.ones((state.rows, state.tokens + more), np.int64)
        self._mask[:, : self._total] = state.mask
        self._arrays: dict[str, Array] = {}
        self._values: dict[str, Any] = {}
        # Keys and values: those that every call makes longer, and those with room for all.
        self._grows: set[str] = set()
        self._roomy: set[str] = set()
        inputs = session.get_inputs()
        self._has_positions = any(value.name == POSITIONS for value in inputs)
        for value in inputs:
            if value.name not in folder.states:
                continue
            own = state.values[value.name]
            if CAPACITY in value.shape:
                self._roomy.add(value.name)
                whole = np.zeros((*own.shape[:2], self._mask.shape[1], own.shape[3]), own.dtype)
                whole[:, :, : self._total] = own
                self._hold(value.name, whole)
                continue
            if PAST in value.shape:
                self._grows.add(value.name)
            self._hold(value.name, np.array(own))

    def _hold(self, name: str, array: Array) -> None:
        # The array is kept beside the value, which refers to its memory alone.
        self._arrays[name] = array
        self._values[name] = onnxruntime().OrtValue.ortvalue_from_numpy(array)

    def read(self, ids: Array, mask: Array | None = None) -> Array:
        """Read tokens, and return logits.

        Args:
            ids: (B, T) int64.
            mask: (B, T), 0 for padding before a text; None for no padding.

        Returns:
            (B, 1, vocabulary) behind the last token, or (B, T, vocabulary).
        """
        end = self._total + ids.shape[1]
        if mask is not None:
            self._mask[:, self._total : end] = mask
        binding = self._session.io_binding()
        feeds = {TOKEN_IDS: ids, MASK: self._mask[:, :end]}
        if self._has_positions:
            # -1 before a text: where a call reads padding alone, 0 would be its first token.
            own = self._mask[:, :end].cumsum(1)[:, self._total :] - 1
            feeds[POSITIONS] = np.broadcast_to(own, (3, *own.shape))
        for name, x in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        binding.bind_output(LOGITS, "cpu")
        for name, after in self._folder.states.items():
            binding.bind_ortvalue_input(name, self._values[name])
            if name in self._grows:
                binding.bind_output(after, "cpu")
            else:
                binding.bind_ortvalue_output(after, self._values[name])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise refusal_to_run(error) from error
        # They come in the order in which they were bound.
        logits, *states = binding.get_outputs()
        for name, value in zip(self._folder.states, states, strict=True):
            if name in self._grows:
                self._values[name] = value
        self._total = end
        found: Array = logits.numpy()
        return found

    def state(self) -> TextState:
        """Return what has been read, as a value."""
        values = {}
        for name, value in self._values.items():
            if name in self._grows:
                values[name] = value.numpy()
            elif name in self._roomy:
                values[name] = self._arrays[name][:, :, : self._total].copy()
            else:
                values[name] = self._arrays[name].copy()
        return TextState(self._mask[:, : self._total].copy(), values)


def empty_state(session: Any, folder: Folder, rows: int) -> TextState:
    """Return the state before any token of some texts."""
    values = {}
    for value in session.get_inputs():
        if value.name in folder.states:
            sizes = [0 if isinstance(size, str) else size for size in value.shape[1:]]
            values[value.name] = np.zeros((rows, *sizes), np.float32)
    return TextState(np.ones((rows, 0), np.int64), values)


def check_state(label: str, session: Any, folder: Folder, state: TextState) -> None:
    """Check that a state is one of a model.

    Raises:
        SpecError: a state is missing, or has another shape or dtype.
    """
    for value in session.get_inputs():
        if value.name not in folder.states:
            continue
        own = state.values.get(value.name)
        if own is None:
            raise SpecError(f"{label}: state has no {value.name}: it is of another model")
        named = {0: state.rows}
        shape = tuple(
            size if isinstance(size, int) else named.get(axis, state.tokens)
            for axis, size in enumerate(value.shape)
        )
        if own.shape != shape:
            raise SpecError(
                f"{label}: state has {value.name} of shape {own.shape}, should be {shape}: it is "
                f"of another model"
            )
        if own.dtype != np.float32:
            raise SpecError(
                f"{label}: state has {value.name} of dtype {own.dtype}, should be float32"
            )
