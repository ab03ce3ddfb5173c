"""An exported language model runs where numpy and onnxruntime are all that is installed."""

from __future__ import annotations

import pytest

from exported_models import exported, greedy, prompts, session
from onnx_needs import needs_ort_body
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
