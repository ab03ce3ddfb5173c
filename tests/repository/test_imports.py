"""Importing gdn_ops costs torch and nothing else, and its public names are the documented ones."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import gdn_ops
from paths import FOLDERS, ROOT
from processes import printed

OPTIONAL = (
    *("triton", "tilelang", "onnx", "onnxruntime", "onnxscript"),
    *("hypothesis", "transformers", "rich", "matplotlib"),
)

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""

PUBLIC = {
    # the ops, and which backend runs them
    *("gated_delta", "gated_delta_product", "gated_delta_step", "gated_delta_steps"),
    *("explain", "list_backends", "register_backend", "use_backend"),
    *("Explanation", "BackendInfo", "SpecError", "SpecTypeError", "BackendUnsupportedError"),
    # what a backend is written with, and the specs as values
    *("Backend", "Forward", "Grads", "Limits"),
    *("GATED_DELTA", "GATED_DELTA_STEP", "GATED_DELTA_STEPS"),
}


def test_forward_and_backward_work_with_every_optional_package_blocked() -> None:
    output = printed(
        BLOCK
        + """
import torch
import gdn_ops
q = k = torch.nn.functional.normalize(torch.ones(1, 3, 1, 2), dim=-1)
v, gate = torch.ones(1, 3, 1, 2, requires_grad=True), torch.ones(1, 3, 1)
o = gdn_ops.gated_delta(q, k, v, gate, scale=1.0)
o.sum().backward()
print(o.detach().flatten().round(decimals=5).tolist(), v.grad[0, 0, 0].round(decimals=5).tolist())
step, state = gdn_ops.gated_delta_step(q[:, 0], k[:, 0], v[:, 0], gate[:, 0], scale=1.0)
print(step.detach().flatten().round(decimals=5).tolist())
missing = {info.name: info.status for info in gdn_ops.list_backends() if info.status != "available"}
assert all("is not installed" in status for status in missing.values()), missing
"""
    )
    # The same key three times: each write replaces the last, and each read returns it.
    assert output.splitlines() == [
        "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0] [1.0, 1.0]",
        "[1.0, 1.0]",
    ]


def test_import_loads_nothing_that_torch_has_not_loaded() -> None:
    output = printed(
        f"""
import sys
import torch
before = set(sys.modules)
import gdn_ops
new = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] != "gdn_ops")
print(new)
print([name for name in {OPTIONAL!r} if name in sys.modules])
print([name for name in sys.modules if name.startswith("gdn_ops.backends.")])
"""
    )
    new, optional, backends = map(ast.literal_eval, output.splitlines())
    heavy = [name for name in new if name.partition(".")[0] not in sys.stdlib_module_names]
    assert heavy == [], "import gdn_ops loads more than torch; torch._dynamo alone takes a second"
    assert optional == []
    assert backends == [], "a backend is loaded before it is asked for"


def test_a_step_compiles_as_the_first_call_of_a_process() -> None:
    output = printed(
        """
import torch
import gdn_ops
q, v, gate, state = torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1), torch.ones(1, 1, 2, 2)
compiled = torch.compile(gdn_ops.gated_delta_step, fullgraph=True, backend="eager")
o, new = compiled(q, q, v, gate, gate, state)
expected = gdn_ops.gated_delta_step(q, q, v, gate, gate, state)
torch.testing.assert_close((o, new), expected)
print(o.isfinite().all().item())
"""  # noqa: E501
    )
    assert output == "True"


@pytest.mark.parametrize(
    "folder", ["gdn_ops", "backends", "export", "tests", "benchmarks", "examples"]
)
def test_no_file_imports_a_second_copy_of_backends_or_export(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno}"
                for name in names
                if name.partition(".")[0] in ("backends", "export")
            ]
    assert wrong == []


def test_the_public_names_are_exactly_the_documented_ones() -> None:
    assert set(gdn_ops.__all__) == PUBLIC
    assert len(gdn_ops.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(gdn_ops, name).__doc__, f"{name} has no docstring"


def public_modules() -> list[str]:
    """Return every module of gdn_ops whose name has no underscore, packages included."""
    paths = [
        Path(package, path.relative_to(ROOT / folder))
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).glob("**/*.py")
    ]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if "._" not in name)


def test_every_public_module_is_imported_in_both_forms() -> None:
    # In one process each form, from the first module on: what one imports hides no other.
    modules = public_modules()
    assert {
        "gdn_ops.backends.naive",
        "gdn_ops.export.runtime.decode_session",
        "gdn_ops.spec.ops",
    } <= set(modules)
    nested = [name for name in modules if "." in name]
    first = "\n".join(f"import {name} as c; assert c.__name__ == {name!r}, c" for name in modules)
    second = "\n".join(
        f"from {parent} import {child} as c; assert c.__name__ == {parent + '.' + child!r}, c"
        for parent, _, child in (name.rpartition(".") for name in nested)
    )
    for text in (first, second):
        printed(f"import warnings; warnings.simplefilter('ignore')\n{text}")
