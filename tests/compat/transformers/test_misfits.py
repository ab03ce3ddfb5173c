"""What does not fit is left to transformers and named, and a strict use refuses it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from compat_models import SMALL, architecture, originals, relative
from compat_stand_ins import NAME, Load, functions_of, gates, only, plan_of, recurrence, run_layer
from errors import message_of
from gdn_ops.compat.transformers import Acceleration, accelerate, known_architectures
from gdn_ops.compat.transformers.discovery import CHUNK, RECURRENT
from gdn_ops.dispatch import registry

pytestmark = pytest.mark.usefixtures("one_thread", "eager_compiler")


def other_numbers(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a chunk function that computes something else."""
    return functions_of(lambda kind, *arguments: change(recurrence(*arguments)))[CHUNK]


MISFITS: dict[str, tuple[str, Any, str]] = {
    # id: function, what stands in its place, the reason
    "changed parameters": (
        CHUNK,
        lambda query, key, value, gate, beta: None,
        f"{CHUNK} takes (query, key, value, gate, beta), should begin with (query, key, value, g, "
        "beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel)",
    ),
    "only one function": (RECURRENT, None, f"it has no function {RECURRENT}"),
    "only the other function": (CHUNK, None, f"it has no function {CHUNK}"),
    "other numbers": (
        CHUNK,
        other_numbers(lambda r: (2 * r[0], r[1])),
        f"{CHUNK} gives other numbers on an example: relative difference 5.0e-01",
    ),
    "no numbers": (
        CHUNK,
        other_numbers(lambda r: (r[0] * float("nan"), r[1])),
        f"{CHUNK} gives other numbers on an example: relative difference nan",
    ),
    "another layout of the state": (
        CHUNK,
        other_numbers(lambda r: (r[0], r[1].mT)),
        f"{CHUNK} gives float32 (2, 2, 3, 4) on an example where gdn_ops gives float32 "
        "(2, 2, 4, 3)",
    ),
    "an error": (
        CHUNK,
        other_numbers(mock.Mock(side_effect=RuntimeError("no such kernel"))),
        f"{CHUNK} cannot be tried: RuntimeError: no such kernel",
    ),
}


@pytest.mark.parametrize(("name", "function", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_left_and_named_and_strict_refuses(
    loaded: Load, name: str, function: Any, reason: str
) -> None:
    import transformers

    module = loaded(**{name: function})
    before, own = originals(SMALL), dict(vars(module))
    text = (
        f"accelerate: {NAME} of transformers {transformers.__version__} is not as it should be: "
        f"{reason}"
    )
    with pytest.warns(UserWarning) as told, accelerate() as used:
        # The others are accelerated all the same.
        assert originals(SMALL) != before
        assert vars(module) == own
        lines = str(used).splitlines()
    assert [str(w.message) for w in told] == [f"{text}; all of it is left to transformers"]
    assert told[0].filename == __file__
    assert f"  someones_model: left to transformers: {reason}" in lines
    assert ("someones_model", reason) in used.left
    assert message_of(gdn_ops.SpecError, accelerate, strict=True) == text
    assert originals(SMALL) == before
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def test_a_layer_without_a_mask_is_replaced_without_one(loaded: Load) -> None:
    module = loaded()

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        functions = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
        return run_layer(hidden_states, *functions)

    module.Layer.forward = forward
    x = torch.rand(1, 3, 1, 2)
    expected = module.Layer()(x)
    with pytest.warns(UserWarning, match="that is left to transformers"):
        used = only()
    with used:
        assert relative(module.Layer()(x), expected) < 1e-6
    assert used.calls == {("someones_model", "gated_delta", "cpp"): 1}
    assert ("someones_model", "the padding mask: Layer.forward has no attention_mask") in used.left


def test_functions_that_no_layer_calls_are_replaced(loaded: Load) -> None:
    module = loaded(Layer=None)
    with pytest.warns(UserWarning, match="the padding mask: no layer calls torch_chunk"):
        used = only()
    with used:
        x = torch.rand(1, 3, 1, 2)
        module.torch_chunk_gated_delta_rule(x, x, x, **gates())
    assert used.calls == {("someones_model", "gated_delta", "cpp"): 1}


def test_the_surroundings_of_a_model_that_is_built_do_not_matter(loaded: Load) -> None:
    loaded()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu"), only(strict=True):
            pass
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(dtype)


def test_a_module_of_neither_function_is_nobodys_business(loaded: Load) -> None:
    loaded(torch_chunk_gated_delta_rule=None, torch_recurrent_gated_delta_rule=None)
    with accelerate(strict=True) as used:
        assert "someones_model" not in str(used)


def test_unknown_names_are_refused() -> None:
    known = ", ".join(known_architectures())
    message = message_of(gdn_ops.SpecError, accelerate, architectures=["llama"])
    assert message == f"accelerate: unknown architecture 'llama', known: {known}"
    backends = ", ".join(registry.known_backends())
    message = message_of(gdn_ops.SpecError, accelerate, "cuda")
    assert message == f"unknown backend 'cuda', known: {backends}"


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = "accelerate: package 'transformers' is not installed; pip install transformers"
    assert message_of(ModuleNotFoundError, accelerate) == expected


def test_a_log_tells_where_warnings_are_errors(
    loaded: Load, caplog: pytest.LogCaptureFixture
) -> None:
    module = loaded(torch_recurrent_gated_delta_rule=None)
    caplog.set_level(logging.WARNING, "gdn_ops")
    with accelerate(architectures=[architecture(SMALL)]) as used, warnings.catch_warnings():
        warnings.simplefilter("error")
        used._meet(module)
    assert "it has no function torch_recurrent_gated_delta_rule" in caplog.text
    assert used.left[-1][0] == "someones_model"


def test_a_function_that_the_package_kernels_wrapped_is_looked_through(loaded: Load) -> None:
    class Function(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

    module = loaded()
    inner = module.torch_chunk_gated_delta_rule
    # The package `kernels` makes a module of a function.
    module.torch_chunk_gated_delta_rule = Function()
    assert plan_of(module).rules["torch_chunk_gated_delta_rule"].definition is inner
