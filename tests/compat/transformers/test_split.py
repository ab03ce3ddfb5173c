"""A model of transformers whose sequences are split over ranks computes what one process does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gdn_ops
from compat_late import refusal_of_a_late_model
from compat_models import (
    FAMILIES,
    KDA_FAMILIES,
    SMALL,
    architecture,
    has_convolutions,
    model,
    module_of,
    relative,
    tokens,
    transformers,
)
from compat_split import Case, loss_and_gradients, on_one_process, trained
from errors import message_of
from gdn_ops.compat.transformers import accelerate
from gdn_ops.compat.transformers.split_calls import ARCHITECTURES
from gdn_ops.parallel import SequenceSplit, sequence_parallel
from tests.parallel.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITTING = [name for name in (*FAMILIES, *KDA_FAMILIES) if architecture(name) in ARCHITECTURES]

UNEVEN = (((11, 17), (0, 3)), ((10, 11),), ((3, 10), (20, 23)), ((17, 20),))
"""Of 23 tokens."""


@pytest.fixture
def alone() -> Iterator[SequenceSplit]:
    """Return a split of 12 tokens over a group of this process alone."""
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SequenceSplit(None, [[(5, 12), (0, 5)]])
    if is_ours:
        dist.destroy_process_group()


@pytest.fixture
def split(alone: SequenceSplit) -> SequenceSplit:
    """Return that split where models compute on one."""
    has_convolutions(SMALL)
    return alone


def check_equal(ranks: Ranks, count: int, case: Case) -> None:
    has_convolutions(case.family)
    parts = ranks.run(count, loss_and_gradients, case)
    for name, expected in on_one_process(case).items():
        total = sum(part[name] for part in parts)
        assert float((total - expected).norm()) <= 1e-9 * (float(expected.norm()) + 1e-3), name


@pytest.mark.parametrize("family", SPLITTING)
@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(2, {"fragments": "contiguous", "rows": 2}, id="contiguous"),
        pytest.param(4, {"fragments": "zigzag", "lengths": (4, 1, 12, 6)}, id="packed"),
        pytest.param(4, {"fragments": UNEVEN}, id="uneven"),
    ],
)
def test_loss_and_gradients_equal_those_of_one_process(
    ranks: Ranks, count: int, options: dict[str, Any], family: str
) -> None:
    check_equal(ranks, count, Case(family, **options))


@pytest.mark.parametrize("count", [2, 4])
def test_layers_are_computed_anew_in_the_backward(ranks: Ranks, count: int) -> None:
    check_equal(ranks, count, Case(SMALL, "zigzag", rows=2, checkpoint=True))


def test_training_takes_the_same_course_on_any_number_of_processes(ranks: Ranks) -> None:
    has_convolutions(SMALL)
    alone = ranks.run(1, trained, SMALL, "contiguous", 20)[0]
    assert alone[-1] < alone[0] - 0.5
    for count, layout in ((2, "contiguous"), (4, "zigzag")):
        for losses in ranks.run(count, trained, SMALL, layout, 20):
            assert losses == pytest.approx(alone, abs=1e-5, rel=0)


def test_tokens_of_a_rank_that_forgets_the_others_give_another_loss(ranks: Ranks) -> None:
    """The comparison sees tokens that are mixed on each rank alone."""
    has_convolutions(SMALL)
    case = Case(SMALL, "contiguous")
    alone = Case(SMALL, "contiguous", lengths=(12, 11))
    assert relative(on_one_process(alone)["loss"], on_one_process(case)["loss"]) > 1e-4


# What is refused.

MIXED = torch.zeros(1, 12, dtype=torch.int32)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "attention_mask is given, should be None under sequence_parallel: sequences have no padding, "
    "and the split tells packed ones apart": {"attention_mask": torch.ones(1, 12)},
    "past_key_values is given, should be None under sequence_parallel: tokens are split, and a "
    "cache holds all of one sequence": {"past_key_values": object()},
    "seq_idx is given, should be None under sequence_parallel: the split tells packed sequences "
    "apart": {"seq_idx": MIXED},
    "cu_seq_lens_q is given, should be None under sequence_parallel: the split tells packed "
    "sequences apart": {"cu_seq_lens_q": torch.tensor([0, 12])},
    "use_cache is True, should be False under sequence_parallel: there is no cache": {
        "use_cache": True
    },
    "logits_to_keep is given, should be 0 under sequence_parallel: the last tokens are on one "
    "rank": {"logits_to_keep": 1},
    "output_router_logits is True, should be False under sequence_parallel: the auxiliary loss is "
    "not a sum over tokens": {"output_router_logits": True},
    "pixel_values is given, should be None under sequence_parallel: tokens are of text": {
        "pixel_values": torch.ones(1)
    },
    "pixel_values_videos is given, should be None under sequence_parallel: tokens are of text": {
        "pixel_values_videos": torch.ones(1)
    },
    "cache_params is given, should be None under sequence_parallel: tokens are split, and a cache "
    "holds all of one sequence": {"cache_params": object()},
    "cu_seq_lens_k is given, should be None under sequence_parallel: the split tells packed "
    "sequences apart": {"cu_seq_lens_k": torch.tensor([0, 12])},
    "position_ids are others than those of the split, should be split.positions()": {
        "position_ids": torch.arange(12)[None]
    },
    "labels are given without shift_labels, should be given with them under sequence_parallel: "
    "the token after the last one of a rank is on another": {"labels": MIXED},
    "labels are given without num_items_in_batch, should be given with it under "
    "sequence_parallel: the loss of a rank is its share of the sum over all tokens": {
        "labels": MIXED,
        "shift_labels": MIXED,
    },
    "input_ids has T=3 tokens, should have 12: those of rank 0 in SequenceSplit(12 tokens; rank "
    "0: 5-12 0-5)": {"input_ids": torch.ones(1, 3, dtype=torch.int64)},
}


@pytest.mark.parametrize(("message", "options"), ARGUMENTS.items())
def test_arguments_that_the_split_tells_or_cannot_are_refused(
    split: SequenceSplit, message: str, options: dict[str, Any]
) -> None:
    given = {"input_ids": tokens(1, 12)} | options
    with accelerate(), sequence_parallel(split):
        found = message_of(gdn_ops.SpecError, model(SMALL), **given)
    assert found == f"accelerate: {message}"


def test_the_positions_of_the_split_may_be_given(split: SequenceSplit) -> None:
    tiny, ids = model(SMALL), tokens(2, 12)
    with accelerate(), torch.no_grad():
        expected = tiny(ids, use_cache=False).logits
        with sequence_parallel(split):
            own = split.positions().expand(2, -1)
            for positions in (None, own, own.expand(4, -1, -1)):
                logits = tiny(split.local(ids), position_ids=positions).logits
                assert relative(split.whole(logits), expected) < 1e-5


def test_rows_of_packed_sequences_are_refused(split: SequenceSplit) -> None:
    packed = SequenceSplit.contiguous(12, None, [0, 5, 12])
    with accelerate(), sequence_parallel(packed):
        assert message_of(gdn_ops.SpecError, model(SMALL), tokens(2, 12)) == (
            "accelerate: input_ids has B=2 rows, should be 1: sequences are packed"
        )


def test_a_rank_without_tokens_is_refused(ranks: Ranks) -> None:
    has_convolutions(SMALL)
    expected = (
        "SpecError: accelerate: rank 1 has no tokens in SequenceSplit(23 tokens; rank 0: 0-20, "
        "rank 1: none, rank 2: 20-23), should have some: layers of transformers cannot shape them"
    )
    case = Case(SMALL, (((0, 20),), (), ((20, 23),)))
    answers = ranks.try_run(3, loss_and_gradients, case)
    assert [answer.args[0] for answer in answers] == [expected] * 3


def test_some_logits_chosen_by_a_tensor_are_refused(split: SequenceSplit) -> None:
    with accelerate(), sequence_parallel(split):
        found = message_of(
            gdn_ops.SpecError, model(SMALL), tokens(1, 12), logits_to_keep=torch.tensor([11])
        )
    assert found == (
        "accelerate: logits_to_keep is given, should be 0 under sequence_parallel: the last "
        "tokens are on one rank"
    )


def test_a_configuration_that_asks_for_the_auxiliary_loss_is_refused(
    split: SequenceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = model("qwen3_next-2:1")
    monkeypatch.setattr(experts.config, "output_router_logits", True)
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, experts, tokens(1, 12)) == (
            "accelerate: output_router_logits is True, should be False under sequence_parallel: "
            "the auxiliary loss is not a sum over tokens"
        )
        experts(tokens(1, 12), output_router_logits=False)


def test_a_call_without_tokens_is_an_error_of_the_model(split: SequenceSplit) -> None:
    tiny = model(SMALL)
    expected = message_of(ValueError, tiny)
    with accelerate(), sequence_parallel(split):
        assert message_of(ValueError, tiny) == expected


@pytest.mark.parametrize(
    ("family", "task"),
    [
        (SMALL, "ForSequenceClassification"),
        (SMALL, "ForTokenClassification"),
        ("qwen3_next-2:1", "ForSequenceClassification"),
        ("qwen3_next-2:1", "ForQuestionAnswering"),
    ],
)
def test_models_for_other_tasks_are_refused(split: SequenceSplit, family: str, task: str) -> None:
    tiny = model(family)
    name = type(tiny).__name__.removesuffix("ForCausalLM") + task
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    kind = getattr(transformers, name)
    expected = (
        f"sequence_parallel: {name} of transformers does not compute on tokens that are split "
        f"over ranks, should be a language model that does, while "
        f"gdn_ops.compat.transformers.accelerate() is active"
    )
    if "forward" in vars(kind):
        # Not the one that classes of all architectures share, which is not replaced.
        expected = (
            f"accelerate: {name} is called under sequence_parallel, should be a class whose name "
            f"ends with one of Model, ForCausalLM, ForConditionalGeneration"
        )
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, kind(tiny.config), tokens(1, 12)) == expected


def test_a_class_with_the_forward_of_a_language_model_is_refused_by_its_name(
    split: SequenceSplit,
) -> None:
    tiny = copy.copy(model(SMALL))
    tiny.__class__ = type("Scorer", (type(tiny),), {})
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == (
            "accelerate: Scorer is called under sequence_parallel, should be a class whose name "
            "ends with one of Model, ForCausalLM, ForConditionalGeneration"
        )


@pytest.mark.parametrize("name", ["position_bias", "softcap", "s_aux"])
def test_what_attention_on_split_tokens_does_not_compute_is_refused(
    split: SequenceSplit, name: str
) -> None:
    module, (q, k) = module_of(SMALL), torch.randn(2, 1, 2, 12, 16)
    with accelerate(), sequence_parallel(split):
        attention = module.ALL_ATTENTION_FUNCTIONS["sdpa"]
        given = {name: torch.ones(1)}
        found = message_of(gdn_ops.SpecError, attention, torch.nn.Module(), q, k, k, None, **given)
        assert found == (
            f"accelerate: {name} of attention is given, should be None under sequence_parallel"
        )
        without, _ = attention(torch.nn.Module(), q, k, k, None, **{name: None})
    assert without.shape == (1, 12, 2, 16)


def test_attention_that_is_not_causal_is_refused(
    split: SequenceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = model(SMALL)
    layer = next(m for m in tiny.modules() if type(m).__name__.endswith("Attention"))
    monkeypatch.setattr(layer, "is_causal", False)
    expected = "accelerate: attention is not causal, should be causal under sequence_parallel"
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == expected
        attention = module_of(SMALL).ALL_ATTENTION_FUNCTIONS["sdpa"]
        q = torch.randn(1, 2, 12, 16)
        given = {"is_causal": False}
        found = message_of(gdn_ops.SpecError, attention, torch.nn.Module(), q, q, q, None, **given)
    assert found == expected


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_another_attention_implementation_is_refused(
    split: SequenceSplit, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = copy.deepcopy(model(SMALL))
    monkeypatch.setattr(tiny.config, "_attn_implementation_internal", implementation)
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == (
            f"accelerate: the attention implementation is {implementation!r}, should be 'sdpa' "
            f"under sequence_parallel: model.set_attn_implementation('sdpa')"
        )


def test_a_model_that_is_not_accelerated_is_refused(split: SequenceSplit) -> None:
    tiny = model(SMALL)
    name = type(tiny).__name__
    expected = (
        f"sequence_parallel: {name} of transformers does not compute on tokens that are split "
        f"over ranks, should be a language model that does, while "
        f"gdn_ops.compat.transformers.accelerate() is active"
    )
    ids = tokens(1, 12)
    with sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, ids) == expected
        with sequence_parallel(split), accelerate(architectures=["olmo_hybrid"]):
            assert message_of(gdn_ops.SpecError, tiny, ids) == expected
        with accelerate():
            tiny(split.local(ids))
        assert message_of(gdn_ops.SpecError, tiny, ids) == expected
    tiny(ids)


def test_a_model_that_is_loaded_inside_is_refused_too() -> None:
    started = Ranks(1)
    try:
        (reason,) = started.run(1, refusal_of_a_late_model)
    finally:
        started.close()
    assert reason == (
        "sequence_parallel: LlamaForCausalLM of transformers does not compute on tokens that are "
        "split over ranks, should be a language model that does, while "
        "gdn_ops.compat.transformers.accelerate() is active"
    )


@pytest.mark.parametrize("family", ["qwen4_exp-2:1", "glm5_next-bounded"])
def test_a_model_of_another_architecture_is_refused(split: SequenceSplit, family: str) -> None:
    tiny = model(family)
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == (
            f"accelerate: a model of {architecture(family)} is called, should be of "
            f"bailing_hybrid, kimi_linear, lara_mini, olmo_hybrid, qwen3_5, qwen3_5_moe, "
            f"qwen3_next under sequence_parallel"
        )


def test_layers_are_checked_too(split: SequenceSplit) -> None:
    tiny = model(SMALL)
    x = torch.randn(1, 12, tiny.config.hidden_size)
    linear = next(m for m in tiny.modules() if type(m).__name__.endswith("GatedDeltaNet"))
    attention = next(m for m in tiny.modules() if type(m).__name__.endswith("Attention"))
    with accelerate(), sequence_parallel(split):
        found = message_of(gdn_ops.SpecError, linear, x, attention_mask=torch.ones(1, 12))
        assert found.startswith("accelerate: attention_mask is given, should be None")
        found = message_of(gdn_ops.SpecError, linear, x[:, :5])
        assert found.startswith("accelerate: hidden_states has T=5 tokens, should have 12")
        found = message_of(gdn_ops.SpecError, attention, x, None, torch.ones(1, 1, 12, 12))
        assert found.startswith("accelerate: attention_mask is given, should be None")


def test_a_release_whose_layers_convolve_themselves_is_refused(
    alone: SequenceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, name = model(SMALL), architecture(SMALL)
    monkeypatch.delattr(module_of(SMALL), "causal_conv1d_fn", raising=False)
    with accelerate(), sequence_parallel(alone):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == (
            f"accelerate: the short convolution of {name} is transformers' own, should be a "
            f"function that is replaced, as with transformers 5.15 and newer, under "
            f"sequence_parallel"
        )


def test_a_module_without_attention_functions_is_refused(
    split: SequenceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, name = model(SMALL), architecture(SMALL)
    monkeypatch.setattr(module_of(SMALL), "ALL_ATTENTION_FUNCTIONS", {"sdpa": None})
    with accelerate(), sequence_parallel(split):
        assert message_of(gdn_ops.SpecError, tiny, tokens(1, 12)) == (
            f"accelerate: {name} has no ALL_ATTENTION_FUNCTIONS with 'sdpa', should have it under "
            f"sequence_parallel"
        )


def test_a_compiled_model_runs_as_it_is_written(split: SequenceSplit) -> None:
    tiny, ids = model(SMALL), tokens(1, 12)
    torch.compiler.reset()
    compiled = torch.compile(tiny, backend="eager")
    with accelerate(), torch.no_grad():
        expected = tiny(ids, use_cache=False).logits
        with sequence_parallel(split):
            logits = split.whole(compiled(split.local(ids)).logits)
    torch.compiler.reset()
    assert relative(logits, expected) < 1e-5


def test_accelerate_inside_examines_as_outside(split: SequenceSplit) -> None:
    tiny, ids = model(SMALL), tokens(1, 12)
    with sequence_parallel(split), accelerate(strict=True) as used, torch.no_grad():
        tiny(split.local(ids))
    calls = {key: count for key, count in used.calls.items()}
    layers = sum(kind == "linear_attention" for kind in tiny.config.layer_types)
    assert calls == {(architecture(SMALL), "gated_delta", "split over ranks"): layers}
