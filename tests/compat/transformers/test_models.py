"""transformers' models compute on gdn_ops what they compute on their own, and get it all back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from torch import Tensor, nn

from compat_models import (
    FAMILIES,
    SMALL,
    architecture,
    exact_gradients,
    gradients,
    model,
    module_of,
    relative,
    run,
    tokens,
)
from gdn_ops.compat.transformers import accelerate
from gdn_ops.compat.transformers.delta_rule import delta_rule
from graphs import compiled, nodes

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_blocks", "eager_compiler"),
    # Some releases of transformers warn of what they call themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

BACKENDS = ("torch", "cpp", "compile", "naive")
LENGTH = 70
"""More than one chunk of any backend, and no multiple of one."""

ALLOWED = 4e-6
"""Largest relative difference to what transformers itself computes in float32."""


def assert_gradients(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert computed.keys() == expected.keys()
    assert any("A_log" in name for name in computed)
    for name, grad in expected.items():
        assert relative(computed[name].double(), grad.double()) < 1e-4, name


def padded(lengths: tuple[int, ...], length: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a batch padded on the left, its mask, and its rows alone."""
    rows = [tokens(1, row, seed) for seed, row in enumerate(lengths)]
    ids = torch.cat([nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long(), rows


def greedy(model: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """Return a prompt and its most likely continuation by `count` tokens."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    return model.generate(ids, do_sample=False, **lengths, **options)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family: str, backend: str) -> None:
    ids, tiny = tokens(2, LENGTH), model(family)
    short, mask, _ = padded((LENGTH, 41, 3), LENGTH)
    masked = {"attention_mask": mask, "position_ids": positions(mask)}
    expected, expected_masked = run(tiny, ids), run(tiny, short, **masked)
    expected_gradients = gradients(tiny, ids)
    # Every single one against transformers in float64: in float32 its own ones of the gates, sums
    # of large terms that cancel, are off by up to 3e-2.
    exact = exact_gradients(family, 2, LENGTH)
    with accelerate(backend, strict=True) as used:
        assert relative(run(tiny, ids), expected) < ALLOWED
        real = mask.bool()
        assert relative(run(tiny, short, **masked)[real], expected_masked[real]) < ALLOWED
        ours = gradients(tiny, ids)
    assert_gradients(ours, exact)
    assert relative(all_of(ours), all_of(expected_gradients)) < ALLOWED
    layers = tiny.config.layer_types.count("linear_attention")
    assert used.calls == {(architecture(family), "gated_delta", backend): 3 * layers}


def all_of(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_are_those_of_transformers(family: str, backend: str) -> None:
    ids, tiny = tokens(2, 9), model(family)
    expected = greedy(tiny, ids, 64)
    with accelerate(backend) as used:
        ours = greedy(tiny, ids, 64)
    assert ours.shape == (2, 9 + 64)
    assert torch.equal(ours, expected)
    layers = tiny.config.layer_types.count("linear_attention")
    key = (architecture(family), "gated_delta_step", backend)
    assert used.calls[key] == 63 * layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_its_rows(family: str, backend: str) -> None:
    tiny = model(family)
    ids, mask, rows = padded((LENGTH, 41, 3), LENGTH)
    with accelerate(backend):
        batch = run(tiny, ids, attention_mask=mask, position_ids=positions(mask))
        for i, row in enumerate(rows):
            assert relative(batch[i : i + 1, LENGTH - row.shape[1] :], run(tiny, row)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_16_tokens_after_left_padding_are_those_of_transformers_and_of_the_rows(
    family: str,
) -> None:
    tiny = model(family)
    ids, mask, rows = padded((9, 5), 9)
    expected = greedy(tiny, ids, 16, attention_mask=mask)
    with accelerate() as used:
        ours = greedy(tiny, ids, 16, attention_mask=mask)
        alone = greedy(tiny, rows[1], 16)
    assert torch.equal(ours, expected)
    assert torch.equal(ours[1, 4:], alone[0])
    assert used.calls[architecture(family), "gated_delta_step", "cpp"] > 0


def test_a_masked_token_is_the_identity_after_real_tokens_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    g, beta = -torch.rand(2, 6, 2), torch.rand(2, 6, 2)
    state = torch.randn(2, 2, 8, 8)
    mask = torch.ones(2, 6)
    mask[1, 2:4] = 0
    run_rule = functools.partial(
        delta_rule,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=None,
        chunk_size=None,
        backend="auto",
        note=lambda op, backend: None,
    )
    _, final = run_rule(q, k, v, g, beta, initial_state=state, mask=mask)
    alone = [x[1:, mask[1].bool()] for x in (q, k, v, g, beta)]
    _, expected = run_rule(*alone, initial_state=state[1:], mask=None)
    assert final is not None
    assert expected is not None
    torch.testing.assert_close(final[1:], expected)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("names", [("g",), ("beta",), ("query",), ("value",), ("initial_state",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_operands_of_several_dtypes_are_taken_as_by_transformers(
    length: int, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 4) for _ in range(3))
    state = torch.randn(2, 2, 4, 4)
    call = {"query": q, "key": k, "value": v, "initial_state": state, "output_final_state": True}
    call |= {"g": -torch.rand(2, length, 2), "beta": torch.rand(2, length, 2)}
    call |= {name: call[name].to(dtype) for name in names}
    name = "torch_chunk_gated_delta_rule" if length > 1 else "torch_recurrent_gated_delta_rule"
    expected = getattr(module_of(SMALL), name)(**call, use_qk_l2norm_in_kernel=True)
    with accelerate():
        results = getattr(module_of(SMALL), name)(**call, use_qk_l2norm_in_kernel=True)
    assert results[0].dtype == expected[0].dtype
    for ours, theirs in zip(results, expected, strict=True):
        assert relative(ours.double(), theirs.double()) < (
            1e-2 if dtype == torch.bfloat16 else 1e-5
        )


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tiny, ids = copy.deepcopy(model(SMALL)).train(), tokens(2, LENGTH)
    expected = exact_gradients(SMALL, 2, LENGTH)
    # transformers calls it by one name or the other.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(tiny, name) for name in names if hasattr(tiny, name))()
    with accelerate() as used:
        assert_gradients(gradients(tiny, ids), expected)
    # Three layers forward, and the same three again in the backward.
    assert used.calls == {(architecture(SMALL), "gated_delta", "cpp"): 6}


def compile_or_skip(compiled: Any, ids: Tensor) -> None:
    """Skip where torch.compile cannot do a model without gdn_ops either."""
    try:
        run(compiled, ids, use_cache=False)
    except Exception as error:
        pytest.skip(f"torch.compile cannot compile this model itself: {type(error).__name__}")


# Dynamo itself looks at what it resumes with after it broke a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_follows_accelerate_and_its_undo() -> None:
    family = SMALL
    tiny, ids = model(family), tokens(2, LENGTH)
    expected, expected_gradients = run(tiny, ids), exact_gradients(family, 2, LENGTH)
    graph = torch.compile(tiny, backend="aot_eager")
    compile_or_skip(graph, ids)
    assert relative(run(graph, ids, use_cache=False), expected) < 1e-5
    with accelerate() as used:
        assert relative(run(graph, ids, use_cache=False), expected) < 1e-5
        key = (architecture(family), "gated_delta", "in a compiled graph")
        # A graph for each of the three layers; where torch breaks graphs, one may be made again.
        assert used.calls.keys() == {key}
        assert used.calls[key] >= 3
        grads = gradients(graph, ids)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
        assert_gradients(grads, expected_gradients)
    traced = dict(used.calls)
    assert relative(run(graph, ids, use_cache=False), expected) < 1e-5
    assert dict(used.calls) == traced


def test_a_compiled_model_is_one_graph_with_the_op_in_it() -> None:
    tiny, ids = model(SMALL), tokens(1, LENGTH)
    one_graph, graphs = compiled(tiny)
    compile_or_skip(one_graph, ids)
    graphs.clear()
    with accelerate():
        run(one_graph, ids, use_cache=False)
    assert nodes(graphs).count("gdn_ops.gated_delta") == 3
