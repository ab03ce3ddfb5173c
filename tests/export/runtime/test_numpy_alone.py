"""An exported language model runs where numpy and onnxruntime are all that is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exported_models import exported, greedy, prompts, session
from onnx_needs import BODIES, needs_ort_body
from onnx_steps import NEW_STATE, STATE, Step, feed, rounding
from paths import ROOT
from processes import output_of

ALONE = """
import runpy, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "gdn_ops", "onnx", "onnxscript", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "gdn_ops", "onnx", "onnxscript", "transformers"} & set(sys.modules)
assert {"numpy", "onnxruntime"} <= set(sys.modules)
"""


@pytest.mark.parametrize("flavour", ["portable", pytest.param("onnxruntime", marks=needs_ort_body)])
def test_a_script_of_numpy_and_onnxruntime_adds_the_same_tokens(flavour: str) -> None:
    prompt = prompts()[0]
    given = ",".join(map(str, prompt))
    script, folder = ROOT / "examples" / "onnx_numpy.py", exported("qwen3_next-2:1", flavour)
    printed = output_of("-c", ALONE, script, folder, given, OMP_NUM_THREADS="1")
    added = [int(token) for token in printed.split(",")]
    assert added == greedy("qwen3_next-2:1")[0][:32]
    assert added == session("qwen3_next-2:1", flavour).generate(prompt, 32)


STEPS = f"""
import sys
import numpy, onnxruntime
file, given, found = sys.argv[1:]
tokens = numpy.load(given)
session, state = onnxruntime.InferenceSession(file), tokens["state"]
names = [name for name in tokens.files if name != "state"]
for t in range(len(tokens["q"])):
    feeds = {{name: tokens[name][t] for name in names}}
    o, state = session.run(["o", {NEW_STATE!r}], {{**feeds, {STATE!r}: state}})
numpy.savez(found, o=o, state=state)
"""


@pytest.mark.parametrize("body", BODIES)
def test_decays_of_every_key_channel_run_there_too(body: str, tmp_path: Path) -> None:
    step = Step(tokens=6, decay="channel", qk_l2norm=True)
    tokens, start = step.draw()
    (tmp_path / "steps.py").write_text(STEPS)
    onnx.save(step.model(body), tmp_path / "step.onnx")
    arrays = {name: np.stack([feed(token)[name] for token in tokens]) for name in tokens[0]}
    np.savez(tmp_path / "given.npz", **arrays, state=start.numpy())
    files = [tmp_path / name for name in ("steps.py", "step.onnx", "given.npz", "found.npz")]
    output_of("-c", ALONE, *files, OMP_NUM_THREADS="1")
    found, exact = np.load(tmp_path / "found.npz"), step.run(tokens, start, wide=True)
    for name, expected in (("o", exact[0][-1]), ("state", exact[1])):
        error = np.abs(found[name] - expected.numpy()).max()
        assert error <= 8 * step.K * rounding("float32") * float(expected.abs().max())
