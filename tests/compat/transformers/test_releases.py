"""Modules of releases that are not there: layers that hold functions, decorators, options."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from compat_models import relative
from compat_stand_ins import NAME, Load, gates, only, plan_of, stand_in
from gdn_ops.compat.transformers import known_architectures
from gdn_ops.compat.transformers.discovery import FUNCTIONS

pytestmark = pytest.mark.usefixtures("one_thread", "eager_compiler")


@pytest.mark.parametrize("holds", [False, True])
def test_an_architecture_that_nobody_listed_is_found(loaded: Load, holds: bool) -> None:
    layer, x = loaded(holds=holds).Layer(), torch.rand(1, 3, 1, 2)
    module = sys.modules[NAME]
    expected = layer(x)
    assert "someones_model" in known_architectures()
    with only(strict=True) as used:
        module.ran.clear()
        assert relative(layer(x), expected) < 1e-6
        assert module.ran == []
    assert used.calls == {("someones_model", "gated_delta", "cpp"): 1}


def test_a_layer_that_holds_the_functions_is_reached_and_not_changed(loaded: Load) -> None:
    module, x = loaded(holds=True), torch.rand(1, 3, 1, 2)

    def another(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.full((1, 3, 1, 2), 9.0), None

    before = module.Layer()
    held = dict(vars(before))
    with only() as used:
        meanwhile = module.Layer()
        own = module.Layer()
        own.chunk_gated_delta_rule = another
        module.ran.clear()
        before(x), meanwhile(x)
        assert module.ran == []
        assert bool((own(x) == 9).all())
    assert used.calls == {("someones_model", "gated_delta", "cpp"): 2}
    assert vars(before) == held
    before(x), meanwhile(x)
    assert module.ran == ["chunk", "chunk"]
    assert meanwhile.chunk_gated_delta_rule is module.torch_chunk_gated_delta_rule
    assert "chunk_gated_delta_rule" not in vars(module.Layer)


def test_a_compiled_layer_that_holds_the_functions_follows(loaded: Load) -> None:
    module, x = loaded(holds=True), torch.rand(1, 3, 1, 2)
    compiled = torch.compile(module.Layer(), backend="eager")
    expected = compiled(x)
    with only() as used:
        assert relative(compiled(x), expected) < 1e-6
        assert used.calls == {("someones_model", "gated_delta", "in a compiled graph"): 1}
    traced = dict(used.calls)
    assert relative(compiled(x), expected) < 1e-6
    assert used.calls == traced


def silent(function: Any) -> Any:
    """Decorate as transformers 5.13 to 5.15 do: without saying what is inside."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapped


def spoken(function: Any) -> Any:
    """Decorate as transformers does otherwise."""
    return functools.wraps(function)(silent(function))


@pytest.mark.parametrize("decorators", [[silent], [spoken], [silent, spoken], [spoken, silent]])
@pytest.mark.parametrize("holds", [False, True])
def test_decorators_are_looked_through(loaded: Load, holds: bool, decorators: list[Any]) -> None:
    module = loaded(holds=holds)
    for decorator in decorators:
        module.Layer.forward = decorator(module.Layer.forward)
    (layer,) = plan_of(module).layers
    assert (layer.holds, "attention_mask" in layer.parameters) == (holds, True)
    x, mask = torch.rand(2, 3, 1, 2), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with only(strict=True), torch.no_grad():
        masked = module.Layer()(x, None, mask)
        alone = module.Layer()(x[:1, 1:])
    assert relative(masked[:1, 1:], alone) < 1e-6


@pytest.mark.parametrize("decorate", [silent, spoken])
def test_decorated_functions_are_looked_through(loaded: Load, decorate: Any) -> None:
    module = loaded()
    for name in FUNCTIONS:
        setattr(module, name, decorate(getattr(module, name)))
    with only(strict=True) as used:
        module.Layer()(torch.rand(1, 3, 1, 2))
    assert used.calls == {("someones_model", "gated_delta", "cpp"): 1}


def test_what_one_module_has_of_another_is_its_original(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, other = loaded(), stand_in(f"{NAME}_text", holds=False)
    kept = {name: getattr(module, name) for name in FUNCTIONS}
    with only():
        # As `from .modeling_other import ...` while that module is replaced.
        vars(other).update({name: getattr(module, name) for name in FUNCTIONS})
        monkeypatch.setitem(sys.modules, other.__name__, other)
        with only(strict=True) as inner:
            x = torch.rand(1, 3, 1, 2)
            other.torch_chunk_gated_delta_rule(x, x, x, **gates())
    assert inner.calls == {("someones_model", "gated_delta", "cpp"): 1}
    assert {name: getattr(other, name) for name in FUNCTIONS} == kept


def test_what_is_not_known_runs_as_transformers_has_it(loaded: Load) -> None:
    module = loaded()
    x, g = torch.rand(1, 3, 1, 2), -9 * torch.rand(1, 3, 1)
    arguments = {"query": x, "key": x, "value": x, "g": g, "beta": torch.rand(1, 3, 1)}
    expected = module.torch_chunk_gated_delta_rule(**arguments, lower_bound=-0.5)[0]
    with only(strict=True) as used:
        for more in ({"lower_bound": None}, {"use_cache": True}, {}):
            module.torch_chunk_gated_delta_rule(**arguments, **more)
        o = module.torch_chunk_gated_delta_rule(**arguments, lower_bound=-0.5)[0]
        positional = module.torch_chunk_gated_delta_rule(
            *arguments.values(), 64, None, False, False, -0.5
        )[0]
    assert torch.equal(o, expected)
    assert torch.equal(positional, expected)
    assert used.calls == {
        ("someones_model", "gated_delta", "cpp"): 3,
        ("someones_model", "gated_delta", "transformers"): 2,
    }
