"""Run one node with the custom-op library of native/, and judge it by naive in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from gdn_ops import gated_delta, gated_delta_step
from gdn_ops.export.node.schema import (
    DOMAIN,
    ELEMENT_TYPES,
    INPUTS,
    OUTPUTS,
    SEQUENCE,
    STEP,
    Operator,
)
from paths import ORT_LIBRARY

needs_library = pytest.mark.skipif(
    not ORT_LIBRARY.exists(),
    reason="native/build/libgdn_ops_ort.so is not there: run `make native`",
)

DTYPES = {name: getattr(torch, name) for name in ELEMENT_TYPES}
# Half a unit in the last place, twice where a result may fall on the other side of a tie.
ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}
ARITHMETIC = {"float64": 1e-14}


class Node:
    """A model of one node, and how to run it.

    Every input and output of the model is float64; casts give the node the types it is to have,
    so that numpy never meets a bfloat16.
    """

    def __init__(
        self,
        heads: tuple[int, int] = (2, 4),
        *,
        types: str | Mapping[str, str] = "float32",
        threads: int = 1,
        functions: Sequence[Any] = (),
        without: Sequence[str] = (),
        operator: Operator = STEP,
        **attributes: Any,
    ) -> None:
        self.operator = operator
        self.attributes = {
            "num_qk_heads": heads[0],
            "num_v_heads": heads[1],
            "scale": 0.3,
            "rule": "gated_delta",
            "qk_l2norm": 0,
        } | attributes
        if self.attributes["rule"] in ("delta", "linear") and "log_alpha" not in attributes:
            without = (*without, "log_alpha")
        given = self.attributes.pop("log_alpha", None)
        self.inputs = tuple(name for name in INPUTS if name not in without or given == name)
        names = (*INPUTS, *OUTPUTS)
        self.types = dict.fromkeys(names, types) if isinstance(types, str) else dict(types)
        self.session = session_of(self.model(functions), threads)

    def model(self, functions: Sequence[Any]) -> Any:
        written = {key: value for key, value in self.attributes.items() if value is not None}
        kinds = {name: ELEMENT_TYPES.get(self.types[name], TensorProto.INT64) for name in INPUTS}
        nodes = [
            helper.make_node("Cast", [f"{name}_64"], [name], to=kinds[name]) for name in self.inputs
        ]
        given = [name if name in self.inputs else "" for name in INPUTS]
        nodes.append(helper.make_node(self.operator.name, given, OUTPUTS, domain=DOMAIN, **written))
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_64"], to=TensorProto.DOUBLE)
            for name in OUTPUTS
        ]
        inputs, outputs = ([f"{name}_64" for name in names] for names in (self.inputs, OUTPUTS))
        return model_of(nodes, TensorProto.DOUBLE, inputs, outputs, functions)

    def __call__(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        feeds = {f"{name}_64": tensors[name].double().numpy() for name in self.inputs}
        o, state = self.session.run(None, feeds)
        return torch.from_numpy(o), torch.from_numpy(state)

    def draw(
        self, B: int = 3, K: int = 24, V: int = 40, seed: int = 0, T: int = 5
    ) -> dict[str, Tensor]:
        """Return inputs, in float64, of values that the node's types have; T tokens of a prompt."""
        random = torch.Generator().manual_seed(seed)
        H, HV = self.attributes["num_qk_heads"], self.attributes["num_v_heads"]
        rows = (B, T) if self.operator is SEQUENCE else (B,)
        shapes = {"q": (*rows, H, K), "k": (*rows, H, K), "v": (*rows, HV, V)}
        shapes["state"] = (B, HV, K, V)
        tensors = {
            name: torch.randn(shape, generator=random, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        tensors["k"] = tensors["k"] / tensors["k"].norm(dim=-1, keepdim=True)
        channels = (K,) if self.attributes.get("decay") == "channel" else ()
        log_alpha = torch.rand((*rows, HV, *channels), generator=random, dtype=torch.float64)
        tensors["log_alpha"] = -log_alpha
        tensors["beta"] = 2 * torch.rand((*rows, HV), generator=random, dtype=torch.float64)
        return {name: tensors[name].to(DTYPES[self.types[name]]).double() for name in self.inputs}

    def expected(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return what naive says, in float64."""
        options = {
            "rule": self.attributes["rule"],
            # As float32 has it: so it stands in the file.
            "scale": float(np.float32(self.attributes["scale"])),
            "qk_l2norm": bool(self.attributes["qk_l2norm"]),
            "backend": "naive",
        }
        if self.operator is STEP:
            return gated_delta_step(**tensors, **options)
        state = tensors.pop("state")
        return gated_delta(**tensors, initial_state=state, return_state=True, **options)

    def check(self, **tensors: Tensor) -> None:
        """Assert that the node gives what naive gives, as nearly as its types allow."""
        arithmetic = ARITHMETIC.get(self.types["state"], 1e-6)
        pairs = zip(OUTPUTS, self(**tensors), self.expected(**tensors), strict=True)
        for name, computed, expected in pairs:
            assert computed.shape == expected.shape
            if not expected.numel():
                continue
            # float32 cannot hold what a float64 state gives.
            rounding = 2**-24 if self.types[name] == "float32" else ROUNDING[self.types[name]]
            error = ((computed - expected).abs().max() / expected.abs().max()).item()
            assert error <= arithmetic + rounding, f"{name} is off by {error:.1e}"


def model_of(
    nodes: Sequence[Any],
    kind: int,
    inputs: Sequence[str],
    outputs: Sequence[str],
    functions: Sequence[Any] = (),
) -> Any:
    """Return a model whose inputs and outputs have one element type.

    They have no shapes: what is wrong with them, the library is to say.
    """
    values = (
        [helper.make_tensor_value_info(name, kind, None) for name in names]
        for names in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "steps", *values)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def session_of(model: Any, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors are the subject of these tests, not a thing to print.
    options.log_severity_level = 4
    options.register_custom_ops_library(str(ORT_LIBRARY))
    return ort.InferenceSession(model.SerializeToString(), options)
