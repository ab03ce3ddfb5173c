"""The layer is exported to ONNX as one decode graph, which onnxruntime runs like the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_ops.nn import State
from nn_layers import OPTIONS, make

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
export = pytest.importorskip("gdn_ops.export")

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, STEPS, WIDTH = 3, 5, 16
QUICK = ("the paper", "no gate", "no short conv")
"""Exported in every run; the others with -m slow: a few seconds each."""


class Decoder(torch.nn.Module):
    """One token of a layer, with its states as plain arguments and results."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, memory: torch.Tensor, conv_state: Any = None) -> Any:
        y, state = self.layer(x, State(conv_state, memory))
        return (y, state.memory) if state.conv is None else (y, state.memory, state.conv)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIONS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_layer_decodes_in_onnxruntime(name: str, tmp_path: Path) -> None:
    layer = make(**OPTIONS[name]).eval()
    zero = layer.zero_state(2)
    states = (zero.memory,) if zero.conv is None else (zero.memory, zero.conv)
    path = tmp_path / "layer.onnx"
    model = export.export_decode(Decoder(layer), (torch.zeros(2, 1, WIDTH), *states), path)
    assert len(export.nodes_of(model)) == 1
    session = export.DecodeSession(path, batch=ROWS)
    state, x = None, torch.randn(ROWS, STEPS, WIDTH)
    for t in range(STEPS):
        with torch.no_grad():
            expected, state = layer(x[:, t : t + 1], state)
        found = session.step(x[:, t : t + 1].numpy())
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
