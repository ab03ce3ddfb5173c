"""Every tensor that is made says its device, and its dtype where the default could be another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
"""What makes integers of integers, whatever the default dtype is."""

NUMBERS = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "normal", "linspace"}
NUMBERS |= {"logspace", "tensor", "as_tensor", "asarray", "scalar_tensor", "empty_strided"}


def unsaid(path: Path) -> Iterator[str]:
    """Yield every call of a factory of torch that leaves its device or dtype to a default."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
        if not is_torch or name not in INTEGERS | NUMBERS:
            continue
        values = [x.value for x in node.args if isinstance(x, ast.Constant)]
        is_integer = name in INTEGERS and not any(isinstance(x, float) for x in values)
        said = {keyword.arg for keyword in node.keywords}
        missing = {"device"} - said if is_integer else {"device", "dtype"} - said
        if missing and None not in said:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name} without {missing}"


def test_no_factory_takes_the_default_dtype_or_device() -> None:
    folders = [ROOT / name for name in ("gdn_ops", "backends", "export")]
    found = [text for folder in folders for path in folder.rglob("*.py") for text in unsaid(path)]
    assert not found, "\n".join(sorted(found))


def test_a_factory_that_takes_a_default_is_found() -> None:
    fixture = ROOT / "tests" / "good_calls.py"
    assert any("torch.randn without" in text for text in unsaid(fixture))
