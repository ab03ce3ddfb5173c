"""Calls on DTensors of 2 and 4 processes give what one process computes, or say why not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdn_ops
import sharded_calls
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import judgement
from gdn_ops.testing.runs import installed
from gdn_ops.testing.strategies import calls
from mesh_ranks import Raised, Ranks
from processes import printed
from sharded_calls import SPLITS, Layout

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
    pytest.mark.usefixtures("one_thread"),
]

MESHES = {2: ((2,), (1, 2)), 4: ((4,), (2, 2))}
"""The shapes of meshes of so many processes."""


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield made
    made.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(2, tmp_path_factory.mktemp("two") / "store")
    yield made
    made.close()


def axes_of(spec: OpSpec, name: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    return {"d_o": ("B", "T", "HV", "V"), "d_state": ("N", "HV", "K", "V")}.get(name) or (
        sharded_calls.axes_in(spec, name, arguments)
    )


@st.composite
def layouts(draw: st.DrawFn, example: Example, count: int) -> Layout:
    """Draw how the arguments of an example lie, now and then not as one split has them."""
    shape = draw(st.sampled_from(MESHES[count]))
    known = [split for split in SPLITS if split != "batch" or example.lengths is None]
    splits = tuple(draw(st.sampled_from(known)) for _ in shape)
    arguments = example.arguments()
    names = [n for n, x in arguments.items() if isinstance(x, Tensor)]
    others = []
    for name in draw(st.lists(st.sampled_from([*names, "d_o", "d_state"]), max_size=2)):
        places = [
            axis for axis in axes_of(GATED_DELTA, name, arguments) if axis not in ("T", "B", "N")
        ]
        how = draw(st.sampled_from(["whole", *([] if name == "cu_seqlens" else ["sum"]), *places]))
        others.append((name, draw(st.integers(0, len(shape) - 1)), how))
    return Layout(shape, splits, tuple(others))


@st.composite
def cases(draw: st.DrawFn, backend: str, count: int) -> tuple[Example, Layout]:
    limits = installed(backend if backend != "auto" else "torch").limits
    example = draw(calls(GATED_DELTA, limits, dtypes=("float32", "bfloat16"), max_tokens=33))
    return example, draw(layouts(example, count))


def shards_of_heads(layout: Layout) -> int:
    """Return into how many shards heads may be cut."""
    dims = {dim for dim, split in enumerate(layout.splits) if split == "heads"}
    dims |= {dim for _, dim, how in layout.others if how in ("H", "HV")}
    return math.prod(layout.shape[dim] for dim in dims)


@pytest.mark.parametrize("backend", ["torch", "cpp", "auto"])
def test_a_sharded_call_gives_what_one_process_computes(ranks: Ranks, backend: str) -> None:
    refused = 0

    @settings(max_examples=60)
    @given(cases(backend, ranks.count))
    def check(case: tuple[Example, Layout]) -> None:
        nonlocal refused
        example, layout = case
        answers = ranks.results(sharded_calls.sequence, example, backend, layout)
        if isinstance(answers[0], Raised) and "cut key heads" in answers[0].text:
            assert len(set(answers)) == 1
            assert example.R > 1 and example.H % shards_of_heads(layout), (example, layout)
            refused += 1
            return
        for rank, results in enumerate(answers):
            assert not isinstance(results, Raised), (rank, results, example, layout)
            assert all(torch.equal(x, answers[0][name]) for name, x in results.items())
        verdict = judgement(example).judge(answers[0])
        assert verdict.passed, (str(verdict), example, layout)

    check()
    assert refused < 30


FOUR = Example(T=9, B=4, H=4, R=2, K=5, V=8, initial_state=True, gate="slow", chunk_size=4)
"""A call that every split divides evenly."""

PLAIN = {split: Layout((2,), (split,)) for split in SPLITS}
TENSORS = ("q", "k", "v", "alpha", "beta", "initial_state")


@pytest.mark.parametrize(
    ("mutant", "split"),
    [
        ("shares of a gradient are called copies", "columns"),
        ("key heads stay whole", "heads"),
    ],
)
def test_a_planted_fault_is_seen(two: Ranks, mutant: str, split: str) -> None:
    good = two.run(sharded_calls.with_mutant, "", FOUR, PLAIN[split])[0]
    assert judgement(FOUR).judge(good).passed
    found = two.results(sharded_calls.with_mutant, mutant, FOUR, PLAIN[split])[0]
    assert isinstance(found, Raised) or not judgement(FOUR).judge(found).passed


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        (Layout((2,), ("none",), (("q", 0, "B"),)), "batch"),
        (Layout((2,), ("none",), (("v", 0, "HV"),)), "heads"),
        (Layout((2,), ("columns",), (("q", 0, "K"), ("k", 0, "sum"))), "columns"),
        (Layout((2,), ("none",), (("q", 0, "K"), ("k", 0, "K"))), "none"),
        (Layout((1, 2), ("heads", "batch")), "batch"),
    ],
)
def test_results_lie_as_the_arguments_do(two: Ranks, layout: Layout, split: str) -> None:
    """Arguments that lie otherwise are redistributed, where that moves the least."""
    o, grads = two.run(sharded_calls.placements, FOUR, layout)[1]
    dims = {"batch": (0, 0, 0), "heads": (2, 2, 2), "columns": (3, None, 3), "none": (None,) * 3}
    expected = dims[split]
    whole = "P(sum)" if split == "columns" else "R"
    shown = [f"S({dim})" if dim is not None else whole for dim in expected]
    assert o[-1] == (shown[0] if split != "none" else "R")
    assert [grads["q"][-1], grads["v"][-1]] == shown[1:]


def test_a_sharded_sequence_is_refused(two: Ranks) -> None:
    for name in TENSORS[:5]:
        layout = Layout((1, 2), ("none", "none"), ((name, 1, "T"),))
        assert two.refusal(sharded_calls.sequence, FOUR, "auto", layout) == (
            f"gated_delta: {name} is sharded along T, its tokens, over mesh dimension 1 "
            f"('model'), should be sharded along the batch, heads or V, or not at all: "
            f"gdn_ops.parallel.gated_delta, and gdn_ops.parallel.sequence_parallel for modules, "
            f"run sequences that are cut over devices"
        )
        # A mesh of one device cuts nothing.
        layout = Layout((1, 2), ("none", "none"), ((name, 0, "T"),))
        assert judgement(FOUR).judge(two.run(sharded_calls.sequence, FOUR, "auto", layout)[0])
    given = decoded(GATED_DELTA_STEPS, FOUR)
    layout = Layout((2,), ("none",), (("k", 0, "T"),))
    assert two.refusal(sharded_calls.decode, "gated_delta_steps", given, layout) == (
        "gated_delta_steps: k is sharded along T, its tokens, over mesh dimension 0 ('data'), "
        "should be sharded along the batch, heads or V, or not at all: redistribute it first"
    )


def test_heads_that_shards_would_cut_are_refused(two: Ranks) -> None:
    example = replace(FOUR, H=3, R=2)
    assert two.refusal(sharded_calls.sequence, example, "torch", PLAIN["heads"]) == (
        "gated_delta: HV=6 value heads of H=3 key heads are sharded over mesh dimension 0 "
        "('data'), which would cut key heads from their value heads: H should be a multiple of "
        "the 2 shards; shard V, or repeat the key heads"
    )
    # As many value heads as key heads are cut alike: 2 and 1 here, 1 and 0 there.
    for heads in (3, 1):
        example = replace(FOUR, H=heads, R=1)
        results = two.run(sharded_calls.sequence, example, "torch", PLAIN["heads"])[0]
        assert judgement(example).judge(results).passed


def test_tensors_of_one_device_beside_dtensors_are_refused(two: Ranks) -> None:
    expected = (
        "gated_delta: q is a DTensor and v is none, should be all or none of them: "
        "distribute_tensor(v, q.device_mesh, placements) makes one"
    )
    for function in ("gated_delta", "operator"):
        assert two.refusal(sharded_calls.mixed, function, FOUR, ("v",)) == expected
    for answer in two.results(sharded_calls.mixed, "compiled", FOUR, ("v",)):
        assert isinstance(answer, Raised) and expected in answer.text
    text = two.refusal(sharded_calls.mixed, "backward", FOUR, ())
    assert text == "gated_delta: d_state is no DTensor, should be one, as q is"
    text = two.refusal(sharded_calls.mixed, "gated_delta", FOUR, TENSORS[:5])
    assert text.startswith("gated_delta: initial_state is a DTensor and q is none, should be all")
    assert two.refusal(sharded_calls.on_two_meshes, FOUR) == (
        "gated_delta: v is a DTensor on another mesh than q, should be on the same one"
    )


def test_values_are_checked_where_they_lie(two: Ranks) -> None:
    answers = two.results(sharded_calls.with_a_bad_gate, FOUR)
    assert not isinstance(answers[0], Raised)
    assert answers[1].text.startswith("gated_delta: alpha has values in [")


def test_explain_tells_of_the_largest_part(two: Ranks) -> None:
    texts = two.run(sharded_calls.explained, FOUR, PLAIN["heads"])
    first = "gated_delta on q float32 (4, 9, 2, 5) cpu, v (4, 9, 4, 8), rule gated_delta"
    assert texts[0] == texts[1] and texts[0].splitlines()[0] == first
    layout = Layout((2,), ("none",), (("q", 0, "T"),))
    assert "sharded along T" in two.refusal(sharded_calls.explained, FOUR, layout)


def decoded(spec: OpSpec, example: Example, **more: Any) -> dict[str, Any]:
    """Return the arguments of a decode op from those of a sequence, its state included."""
    given = example.arguments()
    given.pop("chunk_size")
    given["state"] = given.pop("initial_state")
    if spec is GATED_DELTA_STEP:
        given |= {n: given[n][:, 0] for n in TENSORS[:5] if n in given}
    return given | more


@pytest.mark.parametrize("spec", [GATED_DELTA_STEP, GATED_DELTA_STEPS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_decoding_gives_what_one_process_computes(
    ranks: Ranks, split: str, inplace: bool, spec: OpSpec
) -> None:
    given = decoded(spec, FOUR, inplace=inplace)
    if spec is GATED_DELTA_STEPS:
        given["return_states"] = True
    before = given["state"].clone()
    # On a mesh of one device a state lies whole, whatever it is sharded along.
    layout = Layout((1, ranks.count), ("none", split), (("state", 0, "K"),))
    found = ranks.run(sharded_calls.decode, spec.name, given, layout)[0]
    right = getattr(gdn_ops, spec.name)(**given | {"state": before.clone(), "inplace": False})
    torch.testing.assert_close(found[:-1], right)
    torch.testing.assert_close(found[-1], right[1] if inplace else before)


@pytest.mark.parametrize("spec", [GATED_DELTA_STEP, GATED_DELTA_STEPS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_pool_is_split_along_heads_and_columns(two: Ranks, inplace: bool, spec: OpSpec) -> None:
    given = decoded(spec, FOUR, inplace=inplace)
    given["state"] = torch.randn(6, *given["state"].shape[1:])
    given["state_indices"] = torch.tensor([4, -1, 0, 2])
    for split in ("none", "heads", "columns"):
        right = getattr(gdn_ops, spec.name)(**given | {"state": given["state"].clone()})
        found = two.run(sharded_calls.decode, spec.name, given, PLAIN[split])[0]
        torch.testing.assert_close(found[:-1], right)
        torch.testing.assert_close(found[-1], right[1] if inplace else given["state"])
    for how, lies in (("P", "sharded along P"), ("sum", "a sum of shares")):
        layout = Layout((2,), ("none",), (("state", 0, how),))
        if not inplace:
            right = getattr(gdn_ops, spec.name)(**given)
            found = two.run(sharded_calls.decode, spec.name, given, layout)[0]
            torch.testing.assert_close(found[:-1], right)
            continue
        text = two.refusal(sharded_calls.decode, spec.name, given, layout)
        assert text.startswith(f"{spec.name}: state is {lies}") and text.endswith(
            " over mesh dimension 0 ('data'), where inplace=True cannot update it, should be "
            "sharded along the batch, heads or V, or replicated; pools and their slots are not "
            "split"
        )


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_has_gradients(two: Ranks, split: str) -> None:
    found = two.run(sharded_calls.step_gradients, FOUR, PLAIN[split])[0]
    example = replace(FOUR, T=1)
    for name, right in judgement(example).reference.items():
        found[name] = found[name].reshape(right.shape)
    assert judgement(example).judge(found).passed


@pytest.mark.parametrize("split", SPLITS)
def test_a_compiled_call_is_sharded_too(two: Ranks, split: str) -> None:
    results = two.run(sharded_calls.compiled, FOUR, PLAIN[split])[0]
    assert judgement(FOUR).judge(results).passed


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("saves", [False, True])
def test_operators_of_the_sequence_take_dtensors(two: Ranks, split: str, saves: bool) -> None:
    results = two.run(sharded_calls.by_operators, FOUR, PLAIN[split], saves)[0]
    assert judgement(FOUR).judge(results).passed


def test_a_checkpointed_call_computes_again_what_it_computed(two: Ranks) -> None:
    for split in SPLITS:
        results = two.run(sharded_calls.checkpointed, FOUR, PLAIN[split])[0]
        assert judgement(FOUR).judge(results).passed


def test_dtensors_are_loaded_when_one_comes() -> None:
    code = "import sys, gdn_ops; print('torch.distributed.tensor' in sys.modules)"
    assert printed(code) == "False"
    ours = "import torch.distributed.tensor, gdn_ops, sys; print('gdn_ops.torch_ops.sharded' in "
    assert printed(f"{ours} sys.modules)") == "True"
