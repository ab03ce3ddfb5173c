"""Decode with onnxruntime: one session holds the states of all layers, updated in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from onnx import ModelProto

from gdn_ops.export.model.conversion import with_body
from gdn_ops.export.model.files import about_file, load_model
from gdn_ops.export.model.naming import states_of
from gdn_ops.export.model.nodes import nodes_of, opset_of
from gdn_ops.export.node.arguments import check_flag, check_integer, check_path
from gdn_ops.export.runtime.buffers import Buffer, Port, Results, check_memory, neighbours, ports_of
from gdn_ops.export.runtime.exclusive import Exclusive
from gdn_ops.export.runtime.sessions import CUSTOM, choose_body, open_session, refusal_to_run
from gdn_ops.spec.errors import SpecError, SpecTypeError

Array = np.ndarray[Any, Any]

MOST_THREADS = 1024
"""The most threads of one operator: onnxruntime starts all of them, and ends where it cannot."""

_KEPT = 2
"""Results that are used again: that of the last step, which a caller still has, and another."""


class DecodeSession:
    """Run a model that decodes one token at a time, and hold its states.

    Every buffer that onnxruntime reads belongs to the session: what `step` takes is copied in,
    unless it is one of `buffers`, where a caller may write the next token; an array that lies in
    memory of the session, whatever gave it, is read before that is written.
    What it returns belongs to the caller; its memory is written again only when nothing refers to
    it any more. In place, a state is one buffer, bound as the input and as the output. If a run
    fails midway its states may be half updated: set them again. A session is used by one thread at
    a time, in the process that made it, and is neither copied nor pickled.

    What it was made with cannot be set afterwards.
    """

    def __init__(
        self,
        model_or_path: ModelProto | str | os.PathLike[str],
        *,
        batch: int,
        body: str = "auto",
        threads: int | None = None,
        custom_op_library: str | os.PathLike[str] | None = None,
        in_place: bool = True,
    ) -> None:
        """Load a model; its states start at zero.

        Args:
            model_or_path: with nodes of this library.
            batch: the number of rows that every step has.
            body: "auto" takes the kernel of a library that is given, else "ort" where the
                installed onnxruntime has it, else "standard". For "onnx" a model of an older
                opset is converted in memory.
            threads: that one operator computes with; onnxruntime's choice when not given.
            custom_op_library: a library that brings a kernel of gdn_ops::GatedDeltaStep.
            in_place: whether a state is one buffer; two take turns otherwise.

        Raises:
            SpecError: an argument is wrong, the model is none that decodes, or the installed
                onnx or onnxruntime is too old for the body.
            BackendUnsupportedError: onnxruntime does not take the model; it is a SpecError too.
            ModuleNotFoundError: onnxruntime is not installed.
        """
        label = "DecodeSession"
        check_integer(label, "batch", batch, 0, 2**63 - 1)
        if threads is not None:
            check_integer(label, "threads", threads, 1, MOST_THREADS)
            threads = int(threads)
        check_flag(label, "in_place", in_place)
        if custom_op_library is not None:
            check_path(label, "custom_op_library", custom_op_library)
        model, folder = _loaded(model_or_path)
        self._batch = batch = int(batch)
        has_library = custom_op_library is not None
        with about_file(model_or_path):
            nodes = nodes_of(model)
        chosen = choose_body(nodes, body, has_library, opset_of(model))
        if chosen is not None and batch < chosen.min_rows:
            raise SpecError(
                f"DecodeSession: batch is {batch}, should be at least {chosen.min_rows} for body "
                f"{chosen.name!r}, whose operator onnxruntime does not run on no rows; take "
                f"body='standard'"
            )
        self._body = CUSTOM if chosen is None else chosen.name
        with about_file(model_or_path):
            model = with_body(model, None if chosen is None else chosen.name, "DecodeSession")
            self._ort = open_session(model, folder, threads, custom_op_library)
            inputs, outputs = ports_of(self._ort, batch)
            states = states_of(model)
            self._check_states(states, inputs, outputs)
            check_memory([*inputs.values(), *outputs.values()], 1 if in_place else 2)
        self._hold(states, inputs, outputs, 1 if in_place else 2)

    def _hold(
        self,
        states: dict[str, str],
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        copies: int,
    ) -> None:
        """Make the buffers of inputs and states; a state has one or two that take turns."""
        self._exclusive = Exclusive("DecodeSession")
        written = set(states.values())
        own = [port for port in inputs.values() if port.name not in states]
        self._inputs, self._memory = neighbours(own)
        # Keep what a step reads in few places: it runs cold after the pass over the states.
        self._taken = tuple((b.array, b.shape, b.dtype, b) for b in self._inputs.values())
        self._ports = [port for port in outputs.values() if port.name not in written]
        # Read next from [turn % copies].
        self._states = {name: [Buffer(inputs[name]) for _ in range(copies)] for name in states}
        self._turn, self._copies, self._carried = 0, copies, states
        self._results: list[Results] = []
        self._outputs = tuple(port.name for port in self._ports)

    def _check_states(
        self, states: Mapping[str, str], inputs: Mapping[str, Port], outputs: Mapping[str, Port]
    ) -> None:
        """Check that the model carries its states from input to output."""
        if not states:
            raise SpecError(
                "DecodeSession: the model has no state input and output, should have some: name "
                "them past_key_values.{i}.recurrent_state and present.{i}.recurrent_state"
            )
        for old, new in states.items():
            if old not in inputs or new not in outputs:
                raise SpecError(
                    f"DecodeSession: the state {old} -> {new} is written in the model's metadata, "
                    f"should be an input and an output of its graph"
                )
            if list(states.values()).count(new) > 1:
                raise SpecError(
                    f"DecodeSession: {new} is the next value of more than one state, should be of "
                    f"one"
                )
            if not inputs[old].is_like(outputs[new]):
                raise SpecError(
                    f"DecodeSession: the state {old} is {inputs[old]}, should be like its next "
                    f"value {new}, {outputs[new]}"
                )

    def _bind(self, turn: int, results: Results) -> Any:
        """Bind every buffer for the steps of one turn."""
        binding = self._ort.io_binding()
        for name, buffer in self._inputs.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in results.buffers.items():
            binding.bind_ortvalue_output(name, buffer.value)
        for old, new in self._carried.items():
            buffers = self._states[old]
            binding.bind_ortvalue_input(old, buffers[turn].value)
            binding.bind_ortvalue_output(new, buffers[(turn + 1) % len(buffers)].value)
        return binding

    def _new_results(self) -> Results:
        """Return new results that no caller has, and keep the last ones to be used again."""
        results = Results(self._ports)
        results.bindings = [self._bind(turn, results) for turn in range(self._copies)]
        self._results = [*self._results[1 - _KEPT :], results]
        return results

    def step(self, *args: Array, **kwargs: Array) -> Any:
        """Decode one token per row and advance the states.

        Args:
            args: the inputs that are no states, in the order of `inputs`.
            kwargs: the same by name.

        Returns:
            The output that is no state, or a tuple of them in the order of `outputs`.

        Raises:
            SpecError: an input is missing, unknown, or has another shape or dtype; the states
                have not changed.
            BackendUnsupportedError: onnxruntime fails, as on a damaged model; states may be half
                updated. It is a SpecError too.
        """
        if kwargs or len(args) != len(self._taken):
            args = self._in_order(args, kwargs)
        with self._exclusive:
            return self._step(args)

    def _step(self, args: tuple[Array, ...]) -> Any:
        foreign = []
        for (array, shape, dtype, buffer), x in zip(self._taken, args, strict=True):
            if x is not array:
                if type(x) is not np.ndarray or x.dtype is not dtype or x.shape != shape:
                    buffer.check("DecodeSession.step", x)
                # Copy what lies in a buffer, by whatever way, before that is written.
                if not x.flags.owndata and np.may_share_memory(x, self._memory):
                    x = x.copy()
                foreign.append((array, x))
        for array, x in foreign:
            array[...] = x
        for results in self._results:
            if results.is_free():
                break
        else:
            results = self._new_results()
        try:
            self._ort.run_with_iobinding(results.bindings[self._turn])
        except Exception as error:
            raise refusal_to_run(error) from error
        self._turn = (self._turn + 1) % self._copies
        return results.given()

    def _in_order(self, args: tuple[Array, ...], kwargs: Mapping[str, Array]) -> tuple[Array, ...]:
        """Return the inputs of a step in the order of the graph."""
        names, label = ", ".join(self.inputs), "DecodeSession.step"
        if len(args) > len(self.inputs):
            raise SpecTypeError(
                f"{label}: {len(args)} inputs are given, should be {len(self.inputs)}: {names}"
            )
        given = dict(zip(self.inputs, args, strict=False))
        for name in kwargs:
            if name not in self._inputs:
                raise SpecTypeError(f"{label}: {name} is given, should be one of {names}")
            if name in given:
                raise SpecTypeError(f"{label}: {name} is given twice, should be given once")
        given |= kwargs
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise SpecTypeError(
                f"{label}: {missing[0]} is missing, should be given: the inputs are {names}"
            )
        return tuple(given[name] for name in self.inputs)

    @property
    def batch(self) -> int:
        """Return the number of rows."""
        return self._batch

    @property
    def body(self) -> str:
        """Return what runs: the name of a body, or "custom" for the kernel of a library."""
        return self._body

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of what `step` takes, in order."""
        return tuple(self._inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of what `step` returns, in order."""
        return self._outputs

    @property
    def buffers(self) -> dict[str, Array]:
        """Return the session's own input arrays, by name: `step` takes them without a copy.

        Write a token into them and hand them over, some or all: `step(**session.buffers)`. What
        `step` copies in overwrites them.
        """
        return {name: buffer.array for name, buffer in self._inputs.items()}

    @property
    def state(self) -> dict[str, Array]:
        """Return copies of the states, by the name of their input."""
        with self._exclusive:
            turn = self._turn
            return {name: buffers[turn].array.copy() for name, buffers in self._states.items()}

    @state.setter
    def state(self, states: Mapping[str, Array] | Array) -> None:
        """Set some or all states from arrays, copied: a mapping by name, or the only state."""
        if not isinstance(states, Mapping):
            if len(self._states) > 1:
                raise SpecTypeError(
                    f"DecodeSession.state: is set to {type(states).__name__}, should be a mapping "
                    f"from names of states: {', '.join(self._states)}"
                )
            states = dict.fromkeys(self._states, states)
        with self._exclusive:
            self._set(states)

    def _set(self, states: Mapping[str, Array]) -> None:
        for name, x in states.items():
            if name not in self._states:
                raise SpecError(
                    f"DecodeSession.state: {name} is given, should be one of "
                    f"{', '.join(self._states)}"
                )
            self._states[name][self._turn].check("DecodeSession.state", x)
        # A state that lies in the memory of another one is read before that is written.
        own = [buffers[self._turn].array for buffers in self._states.values()]
        read = {
            name: x.copy() if any(np.may_share_memory(x, array) for array in own) else x
            for name, x in states.items()
        }
        for name, x in read.items():
            np.copyto(self._states[name][self._turn].array, x)

    def reset(self) -> None:
        """Set every state to zero."""
        with self._exclusive:
            for buffers in self._states.values():
                buffers[self._turn].array.fill(0)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled, by name."""
        self._exclusive.__reduce__()

    def __repr__(self) -> str:
        return (
            f"DecodeSession({', '.join(self.inputs)} -> {', '.join(self.outputs)}; "
            f"{len(self._states)} states, batch={self.batch}, body={self.body!r})"
        )


def _loaded(model_or_path: ModelProto | str | os.PathLike[str]) -> tuple[ModelProto, Path | None]:
    """Return a model and the folder of its file; weights in other files stay there."""
    if isinstance(model_or_path, ModelProto):
        return model_or_path, None
    if not isinstance(model_or_path, (str, os.PathLike)):
        kind = type(model_or_path).__name__
        raise SpecTypeError(
            f"DecodeSession: model_or_path has type {kind}, should be a path or an onnx.ModelProto"
        )
    model = load_model(model_or_path, label="DecodeSession: model_or_path")
    return model, Path(model_or_path).absolute().parent
