"""The patch of a modeling module is installed and taken back whole, and says what it leaves."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from compat_models import FAMILIES, SMALL, architecture, model, relative, run, stand_in, tokens
from gdn_ops.compat.transformers import Acceleration, accelerate, known_architectures
from gdn_ops.compat.transformers.discovery import FUNCTIONS
from gdn_ops.compat.transformers.examine import Plan, examine
from gdn_ops.dispatch import registry
from paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread", "eager_compiler")

NAME = "transformers.models.someones_model.modeling_someones_model"
"""A model folder that no release has."""


def module_of(family: str) -> types.ModuleType:
    return sys.modules[type(model(family)).__module__]


def originals(family: str) -> dict[str, Any]:
    """Return every object of a family's module and of its classes that a patch may replace."""
    module = module_of(family)
    classes = [x for x in vars(module).values() if isinstance(x, type)]
    own = [cls for cls in classes if cls.__module__ == module.__name__]
    found = {f"{cls.__name__}.{n}": x for cls in own for n, x in vars(cls).items() if n[:2] != "__"}
    return found | {name: x for name, x in vars(module).items() if callable(x)}


def available() -> list[str]:
    """Return the families that the installed transformers has, their models made."""
    found = []
    for family in FAMILIES:
        try:
            model(family)
        except pytest.skip.Exception:
            continue
        found.append(family)
    return found


# What is replaced, and how it comes back.


def test_undo_puts_the_very_objects_back() -> None:
    before = {family: originals(family) for family in available()}
    used = accelerate(strict=True)
    for family, kept in before.items():
        now = originals(family)
        changed = {name for name in now if now[name] is not kept.get(name)}
        assert set(FUNCTIONS) < changed
        assert len(changed) == len({n.rpartition("modeling_")[2] for n in replaced(used, family)})
    used.undo()
    used.undo()
    for family, kept in before.items():
        now = originals(family)
        assert now.keys() == kept.keys()
        assert all(now[name] is kept[name] for name in kept)
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def replaced(used: Acceleration, family: str) -> list[str]:
    module = module_of(family)
    classes = {x.__name__ for x in vars(module).values() if isinstance(x, type)}
    return [
        name
        for name in used.replaced
        if name.startswith(f"{module.__name__}.") or name.partition(".")[0] in classes
    ]


def test_an_error_inside_the_block_undoes_too() -> None:
    before = originals(SMALL)
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert originals(SMALL) == before


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

used = accelerate()
assert "transformers" not in sys.modules
print(str(used).splitlines()[1])
first = known_architectures()[0]
module = importlib.import_module(f"transformers.models.{first}.modeling_{first}")
assert "exec_module" not in vars(module.__spec__.loader)
print(module.torch_chunk_gated_delta_rule.__module__)
used.undo()
print(module.torch_chunk_gated_delta_rule.__module__ == module.__name__)
last = known_architectures()[-1]
other = importlib.import_module(f"transformers.models.{last}.modeling_{last}")
print(other.torch_chunk_gated_delta_rule.__module__ == other.__name__)
"""

CHANGED = """
import importlib, sys, warnings
from gdn_ops.compat.transformers import accelerate, known_architectures, rule

name = known_architectures()[0]
used = accelerate(strict={strict})
# As if the next release had renamed an argument.
rule.PARAMETERS["torch_chunk_gated_delta_rule"] = ("query", "key", "value", "log_decay", "beta")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        importlib.import_module(f"transformers.models.{{name}}.modeling_{{name}}")
    except Exception as error:
        print(type(error).__name__, error)
print([str(w.message) for w in told if "accelerate" in str(w.message)])
print(f"transformers.models.{{name}}.modeling_{{name}}" in sys.modules, used.replaced, used.left)
"""

OBJECTION = (
    "torch_chunk_gated_delta_rule takes (query, key, value, g, beta, chunk_size, initial_state, "
    "output_final_state, use_qk_l2norm_in_kernel), should begin with (query, key, value, "
    "log_decay, beta)"
)


def fresh(code: str, *options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_module_that_is_loaded_later_is_replaced_too() -> None:
    waiting, now, undone, other = fresh(LATER)
    assert waiting == f"  not loaded yet: {', '.join(known_architectures())}"
    assert now == "gdn_ops.compat.transformers.rule"
    assert (undone, other) == ("True", "True")


def test_a_module_that_is_loaded_later_and_looks_different_loads_and_is_left() -> None:
    told, state = fresh(CHANGED.format(strict=False))
    name = known_architectures()[0]
    assert told.startswith(f"['accelerate: transformers.models.{name}.modeling_{name} of")
    assert f"is not as it should be: {OBJECTION}; all of it is left to transformers']" in told
    assert state == f"True () [({name!r}, {OBJECTION!r})]"


def test_a_strict_use_stops_the_import_of_a_module_that_looks_different() -> None:
    error, told, state = fresh(CHANGED.format(strict=True))
    assert error.startswith("SpecError accelerate: transformers.models.")
    assert error.endswith(f"is not as it should be: {OBJECTION}")
    assert (told, state) == ("[]", "False () []")


def test_a_module_loads_even_where_warnings_are_errors() -> None:
    code = CHANGED.format(strict=False).replace(
        'warnings.simplefilter("always")', 'warnings.simplefilter("error", UserWarning)'
    )
    told, state = fresh(code)
    assert told == "[]"
    assert state.startswith("True () [(")


# Stand-ins for releases that are not there.


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Return what loads a stand-in for a modeling module."""

    def load(*, holds: bool = False, **changes: Any) -> types.ModuleType:
        module = stand_in(NAME, holds=holds)
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setitem(sys.modules, NAME, module)
        return module

    return load


Load = Callable[..., types.ModuleType]


def only(strict: bool = False, backend: str = "auto") -> Acceleration:
    return accelerate(backend, architectures=["someones_model"], strict=strict)


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
    assert used.calls == {("someones_model", "gated_delta", "torch"): 1}


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
    assert used.calls == {("someones_model", "gated_delta", "torch"): 2}
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
    plan = examine(module)
    assert isinstance(plan, Plan)
    (layer,) = plan.layers
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
    assert used.calls == {("someones_model", "gated_delta", "torch"): 1}


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
    assert inner.calls == {("someones_model", "gated_delta", "torch"): 1}
    assert {name: getattr(other, name) for name in FUNCTIONS} == kept


def gates() -> dict[str, Tensor]:
    return {"g": -torch.rand(1, 3, 1), "beta": torch.rand(1, 3, 1)}


def test_what_is_not_known_runs_as_transformers_has_it(loaded: Load) -> None:
    module = loaded()
    chunk = module.torch_chunk_gated_delta_rule

    def torch_chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        lower_bound: float | None = None,
        **kwargs: Any,
    ) -> Any:
        g = g if lower_bound is None else g.clamp(min=lower_bound)
        rest = (chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return chunk(query, key, value, g, beta, *rest)

    module.torch_chunk_gated_delta_rule = torch_chunk_gated_delta_rule
    x, g = torch.rand(1, 3, 1, 2), -9 * torch.rand(1, 3, 1)
    arguments = {"query": x, "key": x, "value": x, "g": g, "beta": torch.rand(1, 3, 1)}
    expected = torch_chunk_gated_delta_rule(**arguments, lower_bound=-0.5)[0]
    with only(strict=True) as used:
        for more in ({"lower_bound": None}, {"use_cache": True}, {}):
            module.torch_chunk_gated_delta_rule(**arguments, **more)
        found = module.torch_chunk_gated_delta_rule(**arguments, lower_bound=-0.5)[0]
        positional = module.torch_chunk_gated_delta_rule(
            *arguments.values(), 64, None, False, False, -0.5
        )[0]
    assert torch.equal(found, expected)
    assert torch.equal(positional, expected)
    assert used.calls == {
        ("someones_model", "gated_delta", "torch"): 3,
        ("someones_model", "gated_delta", "transformers"): 2,
    }


# What does not fit.


def other_numbers(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a chunk function that computes something else."""
    chunk = stand_in(NAME, holds=False).torch_chunk_gated_delta_rule

    @functools.wraps(chunk)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(chunk(*args, **kwargs))

    changed.__wrapped__ = None  # type: ignore[attr-defined]

    def torch_chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        rest = (chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return changed(query, key, value, g, beta, *rest)

    return torch_chunk_gated_delta_rule


def fails(result: Any) -> Any:
    raise RuntimeError("no such kernel")


MISFITS: list[Any] = [
    pytest.param(
        {"torch_chunk_gated_delta_rule": lambda query, key, value, gate, beta: None},
        "torch_chunk_gated_delta_rule takes (query, key, value, gate, beta), should begin with "
        "(query, key, value, g, beta, chunk_size, initial_state, output_final_state, "
        "use_qk_l2norm_in_kernel)",
        id="changed parameters",
    ),
    pytest.param(
        {"torch_recurrent_gated_delta_rule": None},
        "it has no function torch_recurrent_gated_delta_rule",
        id="only one function",
    ),
    pytest.param(
        {"torch_chunk_gated_delta_rule": None},
        "it has no function torch_chunk_gated_delta_rule",
        id="only the other function",
    ),
    pytest.param(
        {"torch_chunk_gated_delta_rule": other_numbers(lambda r: (2 * r[0], r[1]))},
        "torch_chunk_gated_delta_rule gives other numbers on an example: relative difference "
        "5.0e-01",
        id="other numbers",
    ),
    pytest.param(
        {"torch_chunk_gated_delta_rule": other_numbers(lambda r: (r[0] * float("nan"), r[1]))},
        "torch_chunk_gated_delta_rule gives other numbers on an example: relative difference nan",
        id="no numbers",
    ),
    pytest.param(
        {"torch_chunk_gated_delta_rule": other_numbers(lambda r: (r[0], r[1].mT))},
        "torch_chunk_gated_delta_rule gives float32 (2, 2, 3, 4) on an example where gdn_ops "
        "gives float32 (2, 2, 4, 3)",
        id="another layout of the state",
    ),
    pytest.param(
        {"torch_chunk_gated_delta_rule": other_numbers(fails)},
        "torch_chunk_gated_delta_rule cannot be tried: RuntimeError: no such kernel",
        id="an error",
    ),
]


@pytest.mark.parametrize(("change", "reason"), MISFITS)
def test_what_does_not_fit_is_left_and_named_and_strict_refuses(
    loaded: Load, change: dict[str, Any], reason: str
) -> None:
    import transformers

    module = loaded(**change)
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
    with pytest.raises(gdn_ops.SpecError) as error:
        accelerate(strict=True)
    assert str(error.value) == text
    assert originals(SMALL) == before
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def test_a_layer_without_a_mask_is_replaced_without_one(loaded: Load) -> None:
    module = loaded()

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        functions = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
        gate = -hidden_states[..., 0].abs()
        rest = {"g": gate, "beta": -gate}
        return functions[0](hidden_states, hidden_states, hidden_states, **rest)[0]

    module.Layer.forward = forward
    x = torch.rand(1, 3, 1, 2)
    expected = module.Layer()(x)
    with pytest.warns(UserWarning, match="that is left to transformers"):
        used = only()
    with used:
        assert relative(module.Layer()(x), expected) < 1e-6
    assert used.calls == {("someones_model", "gated_delta", "torch"): 1}
    assert ("someones_model", "the padding mask: Layer.forward has no attention_mask") in used.left


def test_functions_that_no_layer_calls_are_replaced(loaded: Load) -> None:
    module = loaded(Layer=None)
    with pytest.warns(UserWarning, match="the padding mask: no layer calls torch_chunk"):
        used = only()
    with used:
        x = torch.rand(1, 3, 1, 2)
        module.torch_chunk_gated_delta_rule(x, x, x, **gates())
    assert used.calls == {("someones_model", "gated_delta", "torch"): 1}


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: accelerate(architectures=["llama"]),
            "accelerate: unknown architecture 'llama', known: {}",
        ),
        (
            lambda: accelerate("cuda"),
            f"unknown backend 'cuda', known: {', '.join(registry.known_backends())}",
        ),
    ],
)
def test_unknown_names_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(gdn_ops.SpecError) as error:
        call()
    assert str(error.value) == message.format(", ".join(known_architectures()))


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError) as error:
        accelerate()
    expected = "accelerate: package 'transformers' is not installed; pip install transformers"
    assert str(error.value) == expected


def test_a_log_tells_where_warnings_are_errors(
    loaded: Load, caplog: pytest.LogCaptureFixture
) -> None:
    from gdn_ops.compat.transformers import acceleration

    module = loaded(torch_recurrent_gated_delta_rule=None)
    caplog.set_level(logging.WARNING, "gdn_ops")
    with accelerate(architectures=[architecture(SMALL)]) as used, warnings.catch_warnings():
        warnings.simplefilter("error")
        acceleration._meet(used, module)
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
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert plan.rules["torch_chunk_gated_delta_rule"].definition is inner
