"""Layers and models that are split by heads over 2 and 4 processes train as whole ones do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import split_models
from errors import message_of
from gdn_ops import SpecTypeError
from gdn_ops.nn import GatedDeltaNet, HybridLM
from gdn_ops.parallel import tensor_plan
from mesh_ranks import Ranks
from split_models import MIXERS, MODELS, Results

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
    pytest.mark.usefixtures("one_thread"),
]

STEPS = 4


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield made
    made.close()


def worst_error(found: Results, right: Results) -> tuple[float, str]:
    """Return the largest relative error of any result, and its name."""
    assert found.keys() == right.keys()
    errors = {}
    for name, x in right.items():
        assert found[name].shape == x.shape, name
        difference = (found[name].double() - x.double()).norm()
        errors[name] = float(difference / x.double().norm())
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_split_layer_is_the_whole_one(ranks: Ranks, name: str, masked: bool) -> None:
    right = split_models.of_layer(name, 0, masked)
    for found in ranks.run(split_models.of_layer, name, ranks.count, masked):
        assert worst_error(found, right) < (1e-5, "")


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_trains_as_the_whole_one(
    ranks: Ranks, name: str, is_checkpointed: bool
) -> None:
    right = split_models.trained(name, 0, STEPS, False)
    answers = ranks.run(split_models.trained, name, ranks.count, STEPS, is_checkpointed)
    for found in answers:
        assert worst_error(found, right) < (1e-5, "")
        assert torch.equal(found["losses"], answers[0]["losses"])


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_around_a_split_model_trains_as_the_whole_one(ranks: Ranks, name: str) -> None:
    if ranks.count != 4:
        pytest.skip("a mesh of two by two has four ranks")
    right = split_models.trained(name, 0, STEPS, False)
    for found in ranks.run(split_models.trained_on_rows, name, STEPS):
        assert worst_error(found, right) < (1e-5, "")


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_tokens_are_split_together(ranks: Ranks, name: str) -> None:
    if ranks.count != 4:
        pytest.skip("a mesh of two by two has four ranks")
    right = split_models.of_tokens(name, False)
    for found in ranks.run(split_models.of_tokens, name, True):
        assert worst_error(found, right) < (1e-5, "")


@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_decodes_on_states_of_its_own_heads(ranks: Ranks, name: str) -> None:
    tokens, shapes = split_models.generated(name, 0)
    for found, own in ranks.run(split_models.generated, name, ranks.count):
        assert torch.equal(found, tokens)
        for part, shape in zip(own, shapes, strict=True):
            assert part == (shape[0], shape[1] // ranks.count, *shape[2:])


def test_a_state_dict_has_the_names_and_the_numbers_of_the_whole_model(ranks: Ranks) -> None:
    right = split_models.model("hybrid").state_dict()
    for found in ranks.run(split_models.saved, "hybrid", ranks.count):
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], x) for name, x in right.items())


@pytest.mark.parametrize("mutant", ["shares are called copies", "another order of channels"])
def test_a_planted_fault_is_seen(ranks: Ranks, mutant: str) -> None:
    right = split_models.of_layer("as published", 0, False)
    found = ranks.run(split_models.with_mutant, mutant, ranks.count)[0]
    assert worst_error(found, right)[0] > 1e-2


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("heads", "GatedDeltaNet has num_heads = 3"),
        ("inner", "SwiGLU has inner_size = 5"),
        ("attention", "SlidingWindowAttention has num_heads = 3"),
    ],
)
def test_what_does_not_come_apart_evenly_is_refused(ranks: Ranks, kind: str, what: str) -> None:
    assert ranks.refusal(split_models.unsplittable, kind, ranks.count) == (
        f"tensor_plan: {what}, should be a multiple of the {ranks.count} devices of the mesh"
    )


def test_a_plan_names_every_part_with_parameters() -> None:
    for name in MODELS:
        model = split_models.model(name)
        owners = {path.rpartition(".")[0] for path, _ in model.named_parameters()}
        assert set(tensor_plan(model)) == owners
        assert set(tensor_plan(nn.Sequential(model))) == {f"0.{owner}" for owner in owners}


def test_mistakes_are_named() -> None:
    text = message_of(SpecTypeError, tensor_plan, HybridLM)
    assert text == "tensor_plan: module has type type, should be a torch.nn.Module"
    assert message_of(ValueError, tensor_plan, nn.Linear(2, 2)) == (
        "tensor_plan: Linear has no layer that can be split, should have a GatedDeltaNet, a "
        "SlidingWindowAttention or another layer with a method tensor_plan"
    )


def test_a_layer_that_is_not_split_has_all_its_heads() -> None:
    layer = GatedDeltaNet(32, 4)
    assert layer.shards == 1 and layer.tensor_mesh is None
