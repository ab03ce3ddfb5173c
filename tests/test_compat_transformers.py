"""transformers' models compute on gdn_ops what they compute on their own, and get it all back."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from compat_models import (
    FAMILIES,
    architecture,
    exact_gradients,
    gradients,
    model,
    relative,
    tokens,
)
from torch import Tensor, nn

import gdn_ops
from gdn_ops.backends import compile as compile_backend
from gdn_ops.compat import modeling
from gdn_ops.compat.delta_rule import delta_rule
from gdn_ops.compat.transformers import ARCHITECTURES, Acceleration, accelerate
from gdn_ops.nn import blocks

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
BACKENDS = ("torch", "compile", "naive")
LENGTH = 70
"""More than one chunk of any backend, and no multiple of one."""

SMALL = "qwen3_5-3:1"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the convolution and the norm of a tiny model run in several blocks."""
    monkeypatch.setattr(blocks, "_BLOCK", 1 << 10)


@pytest.fixture(autouse=True)
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    monkeypatch.setattr(compile_backend.Compile, "compiler", "aot_eager")
    yield
    torch.compiler.reset()


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any("A_log" in name for name in found)
    for name, grad in expected.items():
        assert relative(found[name].double(), grad.double()) < 1e-4, name


def pairs() -> list[Any]:
    """Return every family with every backend."""
    return [pytest.param(family, backend) for family in FAMILIES for backend in BACKENDS]


@pytest.mark.parametrize(("family", "backend"), pairs())
def test_logits_and_every_gradient_are_those_of_transformers(family: str, backend: str) -> None:
    ids, tiny = tokens(2, LENGTH), model(family)
    # Gradients against transformers in float64: in float32 its own ones of the gates, sums of
    # large terms that cancel, are off by up to 1e-2.
    expected, expected_gradients = run(tiny, ids), exact_gradients(family, 2, LENGTH)
    with accelerate(backend) as used:
        assert relative(run(tiny, ids), expected) < 1e-5
        assert_gradients(gradients(tiny, ids), expected_gradients)
    layers = tiny.config.layer_types.count("linear_attention")
    assert used.calls == {(architecture(family), "gated_delta", backend): 2 * layers}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_are_those_of_transformers(family: str, backend: str) -> None:
    ids, tiny = tokens(2, 9), model(family)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = tiny.generate(ids, **options)
    with accelerate(backend) as used:
        found = tiny.generate(ids, **options)
    assert found.shape == (2, 9 + 64)
    assert torch.equal(found, expected)
    layers = tiny.config.layer_types.count("linear_attention")
    key = (architecture(family), "gated_delta_step", backend)
    assert used.calls[key] == 63 * layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_its_rows(family: str, backend: str) -> None:
    tiny, lengths = model(family), (LENGTH, 41, 3)
    ids, mask = torch.zeros(3, LENGTH, dtype=torch.int64), torch.zeros(3, LENGTH)
    rows = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    for i, row in enumerate(rows):
        ids[i, LENGTH - row.shape[1] :] = row
        mask[i, LENGTH - row.shape[1] :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    with accelerate(backend):
        batch = run(tiny, ids, attention_mask=mask, position_ids=positions)
        for i, row in enumerate(rows):
            assert relative(batch[i : i + 1, LENGTH - row.shape[1] :], run(tiny, row)) < 1e-5


def test_generation_from_a_left_padded_batch_is_that_of_its_rows() -> None:
    tiny, row = model(SMALL), tokens(1, 5)
    ids = torch.cat([tokens(1, 9, 3), torch.nn.functional.pad(row, (4, 0))])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with accelerate():
        found = tiny.generate(ids, attention_mask=(ids != 0).long(), **options)
        alone = tiny.generate(row, **options)
    assert torch.equal(found[1, 4:], alone[0])


def test_a_masked_token_is_the_identity_after_real_tokens_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    g, beta = -torch.rand(2, 6, 2), torch.rand(2, 6, 2)
    state = torch.randn(2, 2, 8, 8)
    mask = torch.ones(2, 6)
    mask[1, 2:4] = 0
    rest = {
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "cu_seqlens": None,
        "chunk_size": None,
        "backend": "auto",
        "note": lambda op, backend: None,
        "initial_state": state,
    }
    _, final = delta_rule(q, k, v, g, beta, mask=mask, **rest)
    real = mask[1].bool()
    rest["initial_state"] = state[1:]
    alone = [x[1:, real] for x in (q, k, v, g, beta)]
    _, expected = delta_rule(*alone, mask=None, **rest)
    assert final is not None
    assert expected is not None
    torch.testing.assert_close(final[1:], expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tiny, ids = copy.deepcopy(model(SMALL)).train(), tokens(2, LENGTH)
    expected = exact_gradients(SMALL, 2, LENGTH)
    tiny.activation_checkpointing_enable()
    with accelerate() as used:
        assert_gradients(gradients(tiny, ids), expected)
    # Three layers forward, and the same three again in the backward.
    assert used.calls == {("qwen3_5", "gated_delta", "torch"): 6}


def test_a_compiled_model_follows_accelerate_and_its_undo() -> None:
    family = SMALL
    tiny, ids = model(family), tokens(2, LENGTH)
    expected, expected_gradients = run(tiny, ids), exact_gradients(family, 2, LENGTH)
    compiled = torch.compile(tiny, backend="aot_eager")
    assert relative(run(compiled, ids, use_cache=False), expected) < 1e-5
    with accelerate() as used:
        assert relative(run(compiled, ids, use_cache=False), expected) < 1e-5
        key = (architecture(family), "gated_delta", "in a compiled graph")
        assert used.calls == {key: 3}
        found = gradients(compiled, ids)
        found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
        assert_gradients(found, expected_gradients)
    traced = dict(used.calls)
    assert relative(run(compiled, ids, use_cache=False), expected) < 1e-5
    assert dict(used.calls) == traced


def test_a_compiled_model_is_one_graph_with_the_op_in_it() -> None:
    tiny, ids = model(SMALL), tokens(1, LENGTH)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with accelerate():
        run(torch.compile(tiny, backend=keep, fullgraph=True), ids, use_cache=False)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("gdn_ops.gated_delta") == 3


# What is replaced, and how it comes back.


def originals(family: str) -> dict[str, Any]:
    module = sys.modules[modeling.module_name(architecture(family))]
    (layer,) = modeling.layers(module)
    return {
        "chunk": module.torch_chunk_gated_delta_rule,
        "recurrent": module.torch_recurrent_gated_delta_rule,
        "convolution": module.causal_conv1d_fn,
        "update": module.causal_conv1d_update,
        "forward": vars(layer)["forward"],
        "norm": vars(parts(family)[1])["forward"],
        "names": set(vars(layer)),
    }


def test_undo_puts_the_very_objects_back() -> None:
    before = {family: originals(family) for family in FAMILIES if model(family)}
    used = accelerate()
    for family, kept in before.items():
        now = originals(family)
        assert all(now[name] is not kept[name] for name in kept.keys() - {"names"})
    used.undo()
    used.undo()
    for family, kept in before.items():
        now = originals(family)
        assert all(now[name] is kept[name] for name in kept.keys() - {"names"})
        assert now["names"] == kept["names"]
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def test_an_error_inside_the_block_undoes_too() -> None:
    model(SMALL)
    before = originals(SMALL)
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert originals(SMALL) == before


def test_the_latest_use_wins_whatever_is_undone_first() -> None:
    tiny, ids = model(SMALL), tokens(1, 5)
    before = originals(SMALL)
    outer, inner = accelerate("torch"), accelerate("naive", architectures=["qwen3_5"])
    run(tiny, ids)
    outer.undo()
    run(tiny, ids)
    inner.undo()
    assert outer.calls == {}
    assert inner.calls == {("qwen3_5", "gated_delta", "naive"): 6}
    assert originals(SMALL) == before


def test_it_says_what_it_replaced_and_what_ran() -> None:
    tiny = model(SMALL)
    with accelerate("torch", architectures=["qwen3_5"]) as used:
        assert used.replaced == (
            "transformers.models.qwen3_5.modeling_qwen3_5.torch_chunk_gated_delta_rule",
            "transformers.models.qwen3_5.modeling_qwen3_5.torch_recurrent_gated_delta_rule",
            "transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_fn",
            "transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_update",
            "Qwen3_5RMSNormGated.forward",
            "Qwen3_5GatedDeltaNet.forward",
        )
        assert str(used).splitlines()[-1] == "  no call yet"
        run(tiny, tokens(1, 5))
        assert str(used).splitlines() == [
            "accelerate(backend='torch'), active",
            "  qwen3_5: replaced qwen3_5.modeling_qwen3_5.torch_chunk_gated_delta_rule, "
            "qwen3_5.modeling_qwen3_5.torch_recurrent_gated_delta_rule, "
            "qwen3_5.modeling_qwen3_5.causal_conv1d_fn, "
            "qwen3_5.modeling_qwen3_5.causal_conv1d_update, "
            "Qwen3_5RMSNormGated.forward, "
            "Qwen3_5GatedDeltaNet.forward",
            "  qwen3_5: gated_delta torch x 3",
        ]
    assert used.replaced == ()
    assert str(used).splitlines()[0] == "accelerate(backend='torch'), undone"


def test_use_backend_decides_where_auto_is_left_open() -> None:
    with accelerate() as used, gdn_ops.use_backend("naive"):
        run(model(SMALL), tokens(1, 5))
    assert used.calls == {("qwen3_5", "gated_delta", "naive"): 3}


LATER = """
import sys
import torch
from gdn_ops.compat.transformers import accelerate

used = accelerate()
assert "transformers" not in sys.modules
print(str(used).splitlines()[1])
import transformers
from transformers.models.qwen3_5 import modeling_qwen3_5 as module
loader = module.__spec__.loader
assert "exec_module" not in vars(loader), vars(loader)
print(module.torch_chunk_gated_delta_rule.__module__)
used.undo()
print(module.torch_chunk_gated_delta_rule.__module__)
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as other
print(other.torch_chunk_gated_delta_rule.__module__)
"""

CHANGED = """
import sys
import types
from gdn_ops.compat import modeling
from gdn_ops.compat.transformers import accelerate

used = accelerate()
# As if the next release had renamed an argument.
modeling.PARAMETERS[modeling.CHUNK] = ("query", "key", "value", "log_decay", "beta")
try:
    from transformers.models.qwen3_5 import modeling_qwen3_5
except Exception as error:
    print(type(error).__name__, error)
print("transformers.models.qwen3_5.modeling_qwen3_5" in sys.modules, used.replaced)
"""


def fresh(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_module_that_is_loaded_later_is_replaced_too() -> None:
    waiting, replaced, undone, other = fresh(LATER)
    assert waiting == f"  not loaded yet: {', '.join(ARCHITECTURES)}"
    assert replaced == "gdn_ops.compat.patch"
    own = "transformers.models.{0}.modeling_{0}"
    assert undone == own.format("qwen3_5")
    assert other == own.format("olmo_hybrid")


def test_a_module_that_is_loaded_later_and_looks_different_is_refused() -> None:
    *refused, state = fresh(CHANGED)
    assert "torch_chunk_gated_delta_rule takes (query, key, value, g, beta," in refused[0]
    assert "should take (query, key, value, log_decay, beta)" in refused[0]
    assert state == "False ()"


# Layers that hold the functions, as before transformers 5.16.


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(value, 7.0), None


def one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(value, 8.0), None


def another(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return torch.full((1, 3, 1, 2), 9.0), None


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stand in for the modeling module of an architecture whose layers hold the functions."""
    name = modeling.module_name("olmo_hybrid")
    module = types.ModuleType(name)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_idx = 0
            self.chunk_gated_delta_rule = module.torch_chunk_gated_delta_rule
            self.recurrent_gated_delta_rule = module.torch_recurrent_gated_delta_rule

        def forward(
            self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None
        ) -> Tensor:
            x, gate = hidden_states, -hidden_states[..., 0].abs()
            which = self.chunk_gated_delta_rule if x.shape[1] > 1 else None
            function = which or self.recurrent_gated_delta_rule
            return function(x, x, x, g=gate, beta=-gate, initial_state=None)[0]

    Layer.__module__ = name
    module.Layer = Layer  # type: ignore[attr-defined]
    module.torch_chunk_gated_delta_rule = recurrence  # type: ignore[attr-defined]
    module.torch_recurrent_gated_delta_rule = one_token  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_layer_that_holds_the_functions_is_reached_and_not_changed(holding: Any) -> None:
    x = torch.rand(1, 3, 1, 2)
    before = holding.Layer()
    held = dict(vars(before))
    with accelerate(architectures=["olmo_hybrid"]) as used:
        meanwhile = holding.Layer()
        assert not bool((before(x) == 7).any())
        assert not bool((meanwhile(x) == 7).any())
        own = holding.Layer()
        own.chunk_gated_delta_rule = another
        assert bool((own(x) == 9).all())
    assert used.calls == {("olmo_hybrid", "gated_delta", "torch"): 2}
    assert vars(before) == held
    assert bool((before(x) == 7).all())
    assert bool((meanwhile(x) == 7).all())
    assert meanwhile.chunk_gated_delta_rule is recurrence
    assert "chunk_gated_delta_rule" not in vars(holding.Layer)


def test_a_compiled_layer_that_holds_the_functions_follows(holding: Any) -> None:
    x = torch.rand(1, 3, 1, 2)
    compiled = torch.compile(holding.Layer(), backend="eager")
    assert bool((compiled(x) == 7).all())
    with accelerate(architectures=["olmo_hybrid"]) as used:
        assert not bool((compiled(x) == 7).any())
        assert used.calls == {("olmo_hybrid", "gated_delta", "in a compiled graph"): 1}
    assert bool((compiled(x) == 7).all())


# Refusals.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"torch_chunk_gated_delta_rule": lambda query, key, value, gate, beta: None},
            "torch_chunk_gated_delta_rule takes (query, key, value, gate, beta), should take "
            "(query, key, value, g, beta, chunk_size, initial_state, output_final_state, "
            "use_qk_l2norm_in_kernel)",
        ),
        (
            {"torch_recurrent_gated_delta_rule": None},
            "it has no function torch_recurrent_gated_delta_rule",
        ),
        (
            {"Layer": None},
            "no layer calls torch_chunk_gated_delta_rule and torch_recurrent_gated_delta_rule",
        ),
    ],
)
def test_what_looks_different_is_refused_and_nothing_is_replaced(
    holding: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    import transformers

    model(SMALL)
    before = originals(SMALL)
    for name, value in change.items():
        monkeypatch.setattr(holding, name, value)
    with pytest.raises(gdn_ops.SpecError) as error:
        accelerate()
    assert str(error.value) == (
        f"accelerate: {holding.__name__} of transformers {transformers.__version__} is not as it "
        f"should be: {reason}"
    )
    assert originals(SMALL) == before
    assert not any(type(finder).__module__ == Acceleration.__module__ for finder in sys.meta_path)


def test_a_layer_without_a_mask_is_refused(holding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        function = self.chunk_gated_delta_rule or self.recurrent_gated_delta_rule
        return function(hidden_states)

    monkeypatch.setattr(holding.Layer, "forward", forward)
    with pytest.raises(gdn_ops.SpecError) as error:
        accelerate()
    assert str(error.value).endswith(": Layer.forward has no cache_params, attention_mask")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: accelerate(architectures=["llama"]),
            "accelerate: unknown architecture 'llama', known: qwen3_next, qwen3_5, qwen3_5_moe, "
            "olmo_hybrid, qwen4_exp",
        ),
        (
            lambda: accelerate("cuda"),
            f"unknown backend 'cuda', known: {', '.join(gdn_ops.registry.known_backends())}",
        ),
    ],
)
def test_unknown_names_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(gdn_ops.SpecError) as error:
        call()
    assert str(error.value) == message


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError) as error:
        accelerate()
    expected = "accelerate: package 'transformers' is not installed; pip install transformers"
    assert str(error.value) == expected


# The convolution and the norm around the rule.


def parts(family: str) -> Any:
    """Return the modeling module of a family, and its gated norm."""
    module = sys.modules[type(model(family)).__module__]
    return module, next(cls for name, cls in vars(module).items() if name.endswith("RMSNormGated"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_convolution_and_the_norm_are_those_of_transformers(
    family: str, dtype: torch.dtype
) -> None:
    module, norm_class = parts(family)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    norm = norm_class(6).to(dtype)
    x, weight, state, gate = draw(2, 6, 9), draw(6, 4), draw(2, 6, 4), draw(2, 9, 6)

    def results() -> list[Tensor]:
        y = module.causal_conv1d_fn(x, weight, None, activation="silu", position_ids=None)
        plain = module.causal_conv1d_fn(x, weight, state[0, :, 0])
        last, several = state.clone(), state[..., :3].clone()
        one = module.causal_conv1d_update(x[..., :1], last, weight, state[0, :, 0], "silu")
        two = module.causal_conv1d_update(x[..., :2], several, weight, None, "silu")
        return [y, plain, one, last, two, several, norm(y.mT, gate)]

    with torch.no_grad():
        expected = results()
        with accelerate():
            found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_what_the_package_of_kernels_has_is_left_to_it() -> None:
    # The convolution and the norm are replaced for numbers on CPUs alone.
    module, norm_class = parts(SMALL)
    x, weight = torch.empty(1, 6, 5, device="meta"), torch.empty(6, 4, device="meta")
    with accelerate():
        y = module.causal_conv1d_fn(x, weight, None, activation="silu")
        assert y.is_meta
        assert y.shape == x.shape
        with torch.device("meta"):
            assert norm_class(6)(x.mT, x.mT).is_meta
        with pytest.raises(KeyError, match="no such activation"):
            module.causal_conv1d_fn(x, weight, None, activation="no such activation")


def test_a_convolution_or_norm_that_looks_different_is_left_alone(holding: Any) -> None:
    def causal_conv1d_fn(x: Tensor, weight: Tensor) -> Tensor:
        return x

    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        return hidden_states + 7

    class GateBeforeRMSNormGated(nn.Module):
        def __init__(self, width: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps
            self.activation = "silu"

        def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
            x = hidden_states * nn.functional.silu(gate)
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    class AfterRMSNormGated(GateBeforeRMSNormGated):
        def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
            x = nn.functional.rms_norm(
                hidden_states, self.weight.shape, self.weight, self.variance_epsilon
            )
            return x * nn.functional.silu(gate)

    class OtherRMSNormGated(AfterRMSNormGated):
        def __init__(self, config: Any) -> None:
            raise AttributeError

    for cls in (GateBeforeRMSNormGated, AfterRMSNormGated, OtherRMSNormGated):
        cls.__module__ = holding.__name__
        setattr(holding, cls.__name__, cls)
    holding.causal_conv1d_fn = causal_conv1d_fn
    holding.causal_conv1d_update = causal_conv1d_update
    before = dict(vars(holding))
    with accelerate(architectures=["olmo_hybrid"]) as used:
        own = [name for name in used.replaced if "conv" in name or "Norm" in name]
        assert own == [f"{holding.__name__}.causal_conv1d_update", "AfterRMSNormGated.forward"]
    assert dict(vars(holding)) == before


def test_packed_sequences_are_kept_apart() -> None:
    tiny = model(SMALL)
    layer = next(m for m in tiny.modules() if type(m).__name__.endswith("GatedDeltaNet"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, tiny.config.hidden_size, generator=generator)
    lengths = (5, 1, 6)
    cuts = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    sequences = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with accelerate(), torch.no_grad():
        found = layer(x, cu_seq_lens_q=cuts, seq_idx=sequences.int())
        alone = [layer(part) for part in x.split(lengths, 1)]
    assert relative(found, torch.cat(alone, 1)) < 1e-5


def test_packed_sequences_without_their_numbers_are_refused() -> None:
    cuts = torch.tensor([0, 3, 5], dtype=torch.int32)
    with accelerate(), pytest.raises(gdn_ops.SpecError) as error:
        run(model(SMALL), tokens(1, 5), use_cache=False, cu_seq_lens_q=cuts)
    assert str(error.value) == (
        "accelerate: cu_seqlens is given without seq_idx, should be given with it: the short "
        "convolution in front would mix the packed sequences"
    )


def test_a_cache_that_was_padded_on_the_right_is_not_continued() -> None:
    tiny, ids = model(SMALL), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with accelerate():
        # Scoring a right-padded batch is fine: only its cache is not.
        filled = tiny(ids, attention_mask=mask, use_cache=True)
        alone = run(tiny, ids[1:, :4])
        assert relative(filled.logits[1:, :4], alone) < 1e-5
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        with pytest.raises(gdn_ops.SpecError) as error:
            tiny(ids[:, :1], attention_mask=longer, past_key_values=filled.past_key_values)
    assert str(error.value) == (
        "accelerate: attention_mask of the call that filled the cache has padding on the right "
        "in row 1, should have it on the left: the short convolution would continue from the "
        "padding; tokenizer.padding_side = 'left'"
    )
