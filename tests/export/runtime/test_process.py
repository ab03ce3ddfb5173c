"""A file decodes in a process that has onnxruntime and numpy, but not torch or this library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gdn_ops import export
from onnx_layers import layer_args, make_layer
from onnx_needs import ALL_BODIES
from onnx_steps import STATE, opset_for
from processes import printed

DECODE_WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "gdn_ops", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import numpy
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
data = numpy.load(sys.argv[2])
feeds = {name: data[name] for name in data.files if name.startswith("past_key_values")}
states = {name.replace("past_key_values", "present"): name for name in feeds}
worst = 0.0
for x, expected in zip(data["x"], data["output"]):
    output, *new = session.run(["output", *states], {"x": x, **feeds})
    feeds = dict(zip(states.values(), new))
    worst = max(worst, float(numpy.abs(output - expected).max()))
for name, value in feeds.items():
    worst = max(worst, float(numpy.abs(value - data["final." + name]).max()))

# The same in place, as a C++ or C# program does it.
values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(data[name].copy()) for name in feeds}
binding = session.io_binding()
for output, name in states.items():
    binding.bind_ortvalue_input(name, values[name])
    binding.bind_ortvalue_output(output, values[name])
binding.bind_output("output")
for x, expected in zip(data["x"], data["output"]):
    binding.bind_cpu_input("x", x)
    session.run_with_iobinding(binding)
    found = binding.copy_outputs_to_cpu()[-1]
    worst = max(worst, float(numpy.abs(found - expected).max()))
assert not {"torch", "gdn_ops", "onnx", "onnxscript"} & set(sys.modules)
print(len(data["x"]), worst <= 5e-6, worst)
"""


@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_process_without_torch_and_without_this_library_decodes(
    body: str, tmp_path: Path
) -> None:
    path, values = tmp_path / "decode.onnx", tmp_path / "values.npz"
    torch.manual_seed(0)
    layer = make_layer()
    export.export_decode(layer, layer_args(1), path, opset=opset_for(body), body=body)
    exact = make_layer().double()
    exact.load_state_dict(layer.state_dict())
    _, *states = (x.double() for x in layer_args(3))
    names = "past_key_values.0.conv_state", STATE
    saved = {name: x.float().numpy() for name, x in zip(names, states, strict=True)}
    xs = [layer_args(3, seed=t)[0] for t in range(32)]
    outputs = []
    with torch.no_grad():
        for x in xs:
            o, *states = exact(x.double(), *states)
            outputs.append(o.numpy())
    saved |= {f"final.{name}": x.numpy() for name, x in zip(names, states, strict=True)}
    np.savez(values, x=torch.stack(xs).numpy(), output=np.stack(outputs), **saved)
    results = printed(DECODE_WITHOUT_TORCH, path, values)
    assert results.split()[:2] == ["32", "True"], results
