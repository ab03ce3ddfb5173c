"""The patch of a modeling module is installed and taken back whole, and says what it leaves."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import gdn_ops
from compat_models import FAMILIES, SMALL, architecture, model, originals, run, tokens
from errors import message_of
from gdn_ops import SpecError
from gdn_ops.compat.transformers import Acceleration, accelerate, known_architectures
from gdn_ops.compat.transformers.discovery import FUNCTIONS
from processes import printed

pytestmark = pytest.mark.usefixtures("one_thread", "eager_compiler")


# What is replaced, and how it comes back.


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_puts_the_very_objects_back(family: str) -> None:
    before = originals(family)
    used = accelerate(architectures=[architecture(family)], strict=True)
    now = originals(family)
    changed = {name for name in now if now[name] is not before.get(name)}
    assert set(FUNCTIONS) < changed
    assert len(changed) == len(set(used.replaced))
    used.undo()
    used.undo()
    now = originals(family)
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in before)
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def test_an_error_inside_the_block_undoes_too() -> None:
    before = originals(SMALL)
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert originals(SMALL) == before


def test_what_was_undone_is_not_used_again() -> None:
    handle = accelerate()
    handle.undo()
    assert message_of(SpecError, handle.__enter__) == (
        "accelerate: this use was undone, should be a new one: accelerate(...)"
    )


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "backend has type list, should be the name of one": {"backend": ["torch"]},
        "backend has type NoneType, should be the name of one": {"backend": None},
        "architectures has type str, should be a list of names": {"architectures": "qwen3_5"},
        "architectures has type int, should be a list of names": {"architectures": 1},
        "strict is 'no', should be True or False": {"strict": "no"},
    }.items(),
)
def test_arguments_of_the_wrong_kind_are_refused(message: str, options: dict[str, Any]) -> None:
    assert message_of(SpecError, accelerate, **options) == f"accelerate: {message}"


def test_the_latest_use_wins_whatever_is_undone_first() -> None:
    tiny, ids, name = model(SMALL), tokens(1, 5), architecture(SMALL)
    before = originals(SMALL)
    outer, inner = accelerate("torch"), accelerate("naive", architectures=[name])
    run(tiny, ids)
    outer.undo()
    run(tiny, ids)
    inner.undo()
    assert outer.calls == {}
    assert inner.calls == {(name, "gated_delta", "naive"): 6}
    assert originals(SMALL) == before


def test_it_says_what_it_replaced_and_what_ran() -> None:
    tiny, name = model(SMALL), architecture(SMALL)
    with accelerate("torch", architectures=[name]) as used:
        for function in FUNCTIONS:
            assert f"transformers.models.{name}.modeling_{name}.{function}" in used.replaced
        assert any(part.endswith("RMSNormGated.forward") for part in used.replaced)
        assert any(part.endswith("GatedDeltaNet.forward") for part in used.replaced)
        short = ", ".join(part.removeprefix("transformers.models.") for part in used.replaced)
        head = ["accelerate(backend='torch'), active", f"  {name}: replaced {short}"]
        # Older releases have no function for the convolution, and the report says so.
        left = [f"  {name}: left to transformers: {reason}" for _, reason in used.left]
        assert str(used).splitlines() == [*head, *left, "  no call yet"]
        run(tiny, tokens(1, 5))
        assert str(used).splitlines() == [*head, *left, f"  {name}: gated_delta torch x 3"]
    assert used.replaced == ()
    assert str(used).splitlines()[0] == "accelerate(backend='torch'), undone"


def test_use_backend_decides_where_auto_is_left_open() -> None:
    with accelerate() as used, gdn_ops.use_backend("naive"):
        run(model(SMALL), tokens(1, 5))
    assert used.calls == {(architecture(SMALL), "gated_delta", "naive"): 3}


# Modules that are loaded later.

LATER = """
import importlib, sys
from gdn_ops.compat.transformers import accelerate, known_architectures
from gdn_ops.compat.transformers.discovery import functions_of

used = accelerate()
assert "transformers" not in sys.modules
print(str(used).splitlines()[1])
first = known_architectures()[0]
module = importlib.import_module(f"transformers.models.{first}.modeling_{first}")
assert "exec_module" not in vars(module.__spec__.loader)
chunk = functions_of(module)[0]
print(getattr(module, chunk).__module__)
used.undo()
print(getattr(module, chunk).__module__ == module.__name__)
last = known_architectures()[-1]
other = importlib.import_module(f"transformers.models.{last}.modeling_{last}")
print(getattr(other, functions_of(other)[0]).__module__ == other.__name__)
"""

CHANGED = """
import importlib, sys, warnings
from gdn_ops.compat.transformers import accelerate, rule

name = "qwen3_next"
used = accelerate(strict={strict})
# As if the next release had renamed an argument.
rule.PARAMETERS["torch_chunk_gated_delta_rule"] = ("query", "key", "value", "log_decay", "beta")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter({action})
    try:
        importlib.import_module(f"transformers.models.{{name}}.modeling_{{name}}")
    except Exception as error:
        print(type(error).__name__, error)
print([str(w.message) for w in told if "accelerate" in str(w.message)])
print(f"transformers.models.{{name}}.modeling_{{name}}" in sys.modules, used.replaced, used.left)
"""

INCOMPATIBILITY = (
    "torch_chunk_gated_delta_rule takes (query, key, value, g, beta, chunk_size, initial_state, "
    "output_final_state, use_qk_l2norm_in_kernel), should begin with (query, key, value, "
    "log_decay, beta)"
)


def test_a_module_that_is_loaded_later_is_replaced_too() -> None:
    waiting, now, undone, other = printed(LATER).splitlines()
    assert waiting == f"  not loaded yet: {', '.join(known_architectures())}"
    assert now == "gdn_ops.compat.transformers.rule"
    assert (undone, other) == ("True", "True")


def test_a_module_that_is_loaded_later_and_looks_different_loads_and_is_left() -> None:
    told, state = printed(CHANGED.format(strict=False, action="'always'")).splitlines()
    name = "qwen3_next"
    assert told.startswith(f"['accelerate: transformers.models.{name}.modeling_{name} of")
    assert f"is not as it should be: {INCOMPATIBILITY}; all of it is left to transformers']" in told
    assert state == f"True () [({name!r}, {INCOMPATIBILITY!r})]"


def test_a_strict_use_stops_the_import_of_a_module_that_looks_different() -> None:
    error, told, state = printed(CHANGED.format(strict=True, action="'always'")).splitlines()
    assert error.startswith("SpecError accelerate: transformers.models.")
    assert error.endswith(f"is not as it should be: {INCOMPATIBILITY}")
    assert (told, state) == ("[]", "False () []")


def test_a_module_loads_even_where_warnings_are_errors() -> None:
    action = "'error', UserWarning"
    told, state = printed(CHANGED.format(strict=False, action=action)).splitlines()
    assert told == "[]"
    assert state.startswith("True () [(")
