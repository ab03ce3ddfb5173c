"""Build an ONNX graph node by node; its weights go to a file beside it as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

ALIGNMENT = 4096
"""Weights begin at multiples of this, so that a runtime can map them from the file."""

_SMALL = 1024
"""Bytes up to which a tensor stands in the graph itself."""


class WeightFile:
    """Write tensors one after another to a file, without holding them.

    Args:
        path: of the file, in the folder of the model.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, name: str, array: np.ndarray[Any, Any]) -> TensorProto:
        """Write an array, and return the tensor that refers to it."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        start = self._file.tell()
        self._file.write(np.ascontiguousarray(array).data.cast("B"))
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        facts = {"location": self.name, "offset": start, "length": array.nbytes}
        for key, value in facts.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """Collect the nodes, weights, inputs and outputs of a graph.

    Args:
        weights: where large tensors are written.
    """

    def __init__(self, weights: WeightFile) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self._weights = weights
        self._initializers: list[TensorProto] = []
        self._known: dict[Any, str] = {}
        self._kept: list[Tensor] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names: set[str] = set()
        self._scope = ""

    def enter(self, scope: str) -> None:
        """Begin the names of what follows with a scope, such as "layers.3"."""
        self._scope = f"{scope}/" if scope else ""

    def __call__(
        self,
        operator: str,
        *inputs: str,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node.

        Args:
            operator: the op type.
            inputs: names of values, "" for one that is not given.
            outputs: how many there are, or their names.
            domain: of the operator.
            name: of the node and what it returns; the operator's when not given.
            attributes: of the node; None for one that is left out.

        Returns:
            The name of the output, or a list of them where there are several.
        """
        label = self.local(name or operator)
        if isinstance(outputs, int):
            outputs = [label] if outputs == 1 else [f"{label}.{i}" for i in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(operator, [*inputs], [*outputs], label, domain=domain, **given)
        self.nodes.append(node)
        return outputs[0] if len(outputs) == 1 else [*outputs]

    def local(self, name: str) -> str:
        """Return a name within the scope that nothing has yet."""
        label, unique, count = f"{self._scope}{name}", f"{self._scope}{name}", 1
        while unique in self._names:
            count += 1
            unique = f"{label}_{count}"
        self._names.add(unique)
        return unique

    def inner(self, scope: str) -> Graph:
        """Return a graph inside a node of this one, which sees its values and adds its weights."""
        inner = Graph(self._weights)
        inner._names, inner._known, inner._shapes = self._names, self._known, self._shapes
        inner._kept = self._kept
        inner._scope = f"{self._scope}{scope}/"
        return inner

    def weight(self, name: str, x: Tensor, *, is_transposed: bool = False) -> str:
        """Add a weight in float32, once however often it is asked for; return its name.

        Args:
            name: within the scope.
            x: the weight.
            is_transposed: whether its last two axes are exchanged.
        """
        key = (x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype, is_transposed)
        if x.numel() and key in self._known:
            return self._known[key]
        # While it is kept no other tensor can have its memory.
        self._kept.append(x)
        array = x.detach().to("cpu", torch.float32)
        if is_transposed:
            array = array.transpose(-1, -2)
        self._known[key] = self._add(name, array.contiguous().numpy())
        return self._known[key]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Add a small constant, once however often it is asked for; return its name."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self._known:
            self._known[key] = self._add("constant", array)
        return self._known[key]

    def shape(self, weight: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._shapes[weight]

    def _add(self, name: str, array: np.ndarray[Any, Any]) -> str:
        label = self.local(name)
        self._shapes[label] = array.shape
        if array.nbytes <= _SMALL:
            self._initializers.append(numpy_helper.from_array(array, label))
        else:
            self._initializers.append(self._weights.write(label, array))
        return label

    def add_input(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        """Add an input of the graph."""
        self._names.add(name)
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def add_output(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        """Add an output of the graph; a node is to write it."""
        self._names.add(name)
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def returns(self, *values: tuple[str, int, Sequence[str | int]]) -> None:
        """Make values that nodes have written the outputs: name, element type and shape of each."""
        self.outputs += [helper.make_tensor_value_info(*value) for value in values]

    def finished(self, name: str) -> GraphProto:
        """Return the graph."""
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self._initializers)
