"""The layer is exported to ONNX as one decode graph, which onnxruntime runs like the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errors import refusal
from nn_layers import OPTIONS, make

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
export = pytest.importorskip("gdn_ops.export")
from onnx_layers import Layer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, STEPS, WIDTH = 3, 5, 16
QUICK = ("the paper", "no gate", "no short conv", "a bounded decay of low rank")
"""Exported in every run; the others with -m slow: a few seconds each."""

APART = [name for name, options in OPTIONS.items() if options.get("erase_write")]
"""Layers that the operator for onnxruntime has no inputs for."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in QUICK else pytest.mark.slow)
        for n in OPTIONS
        if n not in APART
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_layer_decodes_in_onnxruntime(name: str, tmp_path: Path) -> None:
    layer = make(**OPTIONS[name]).eval()
    path, x = tmp_path / "layer.onnx", torch.zeros(2, 1, WIDTH)
    model = export.export_decode(Layer(layer), (x, *layer.zero_state(2)), path)
    assert len(export.nodes_of(model)) == 1
    session = export.DecodeSession(path, batch=ROWS)
    state, x = None, torch.randn(ROWS, STEPS, WIDTH)
    for t in range(STEPS):
        with torch.no_grad():
            expected, state = layer(x[:, t : t + 1], state)
        y = session.step(x[:, t : t + 1].numpy())
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", APART)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_erase_and_write_gates_are_refused(name: str, tmp_path: Path) -> None:
    layer = make(**OPTIONS[name]).eval()
    given = torch.zeros(2, 1, WIDTH), *layer.zero_state(2)
    text = refusal(export.export_decode, Layer(layer), given, tmp_path / "layer.onnx")
    assert text == (
        "gated_delta_step: erase is given, should be None in an export to ONNX: "
        "gdn_ops::GatedDeltaStep has one strength, beta, and no erase or write"
    )
