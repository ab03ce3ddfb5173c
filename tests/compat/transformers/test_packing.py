"""Packed sequences are kept apart or refused, and a cache that is padded on the right too."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from compat_models import SMALL, has_convolutions, model, relative, run, tokens
from compat_stand_ins import Load, only
from errors import message_of
from gdn_ops.compat.transformers import accelerate, packing

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")

LENGTHS = (5, 1, 6)
CUTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()


# Packed sequences.


@pytest.fixture
def packed() -> tuple[Any, Tensor]:
    """Return a layer that keeps packed sequences apart, and its input."""
    has_convolutions(SMALL)
    tiny = model(SMALL)
    torch.manual_seed(0)
    layer = next(m for m in tiny.modules() if type(m).__name__.endswith("GatedDeltaNet"))
    return layer, torch.randn(1, 12, tiny.config.hidden_size)


@pytest.mark.parametrize("cuts", [CUTS, None])
@pytest.mark.parametrize("numbers", [NUMBERS, 7 - NUMBERS, NUMBERS.long()])
def test_packed_sequences_are_kept_apart(
    packed: tuple[Any, Tensor], cuts: Tensor | None, numbers: Tensor
) -> None:
    layer, x = packed
    more = {} if cuts is None else {"cu_seq_lens_q": cuts}
    with accelerate(), torch.no_grad():
        y = layer(x, seq_idx=numbers, **more)
        alone = [layer(part) for part in x.split(LENGTHS, 1)]
    assert relative(y, torch.cat(alone, 1)) < 1e-5


def test_gradients_of_packed_sequences_are_those_of_each(packed: tuple[Any, Tensor]) -> None:
    layer, x = packed
    weights = torch.randn(x.shape).split(LENGTHS, 1)
    with accelerate():
        y = layer(x.requires_grad_(), seq_idx=NUMBERS)
        (d_x,) = torch.autograd.grad(y, x, torch.cat(weights, 1))
        alone = []
        for part, weight in zip(x.detach().split(LENGTHS, 1), weights, strict=True):
            leaf = part.clone().requires_grad_()
            alone += torch.autograd.grad(layer(leaf), leaf, weight)
    assert relative(d_x, torch.cat(alone, 1)) < 1e-5


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "accelerate: cu_seqlens is given without seq_idx, should be given with it: the short "
        "convolution in front would mix the packed sequences": {"cu_seq_lens_q": CUTS},
        "accelerate: cu_seqlens has boundaries [0, 12], should be those of seq_idx, "
        "[0, 5, 6, 12]: the delta rule would keep other sequences apart than the short "
        "convolution": {
            "cu_seq_lens_q": torch.tensor([0, 12], dtype=torch.int32),
            "seq_idx": NUMBERS,
        },
        "accelerate: cu_seqlens has boundaries [0, 5, 6, 12], should be those of seq_idx, "
        "[0, 12]: the delta rule would keep other sequences apart than the short convolution": {
            "cu_seq_lens_q": CUTS,
            "seq_idx": torch.zeros_like(NUMBERS),
        },
    }.items(),
)
def test_half_of_what_tells_of_packed_sequences_is_refused(
    packed: tuple[Any, Tensor], options: dict[str, Tensor], message: str
) -> None:
    layer, x = packed
    with accelerate():
        assert message_of(gdn_ops.SpecError, layer, x, **options) == message


def test_packed_rows_of_a_batch_are_refused(packed: tuple[Any, Tensor]) -> None:
    layer, x = packed
    with accelerate(), pytest.raises(gdn_ops.SpecError, match="packed sequences are given where"):
        layer(x.expand(2, -1, -1), seq_idx=NUMBERS.expand(2, -1))
    assert message_of(
        gdn_ops.SpecError, packing.boundaries, None, NUMBERS.expand(2, -1), 2, 12
    ) == (
        "accelerate: seq_idx has shape (2, 12) for 2 rows of 12 tokens, should be (1, 12) for one "
        "row: pack all sequences into it"
    )


def test_empty_sequences_have_no_number() -> None:
    cuts = torch.tensor([0, 0, 5, 6, 6, 12, 12], dtype=torch.int32)
    assert packing.boundaries(cuts, NUMBERS, 1, 12) is cuts
    assert packing.boundaries(None, NUMBERS[:, :0], 1, 0).tolist() == [0, 0]  # type: ignore[union-attr]
    assert packing.boundaries(None, None, 2, 12) is None


def test_a_compiled_graph_refuses_packed_sequences(packed: tuple[Any, Tensor]) -> None:
    layer, x = packed
    with accelerate(), torch.no_grad():
        compiled = torch.compile(layer, backend="eager")
        with pytest.raises(Exception, match="packed sequences are given where causal_conv1d_fn"):
            compiled(x, seq_idx=NUMBERS, cu_seq_lens_q=CUTS)
    torch.compiler.reset()


def test_a_compiled_rule_asks_for_the_boundaries() -> None:
    assert message_of(gdn_ops.SpecError, packing.boundaries, None, NUMBERS.to("meta"), 1, 12) == (
        "accelerate: seq_idx is given without cu_seq_lens_q, should be given with it in a "
        "compiled graph: the number of sequences is not known there"
    )
    cuts = CUTS.to("meta")
    assert packing.boundaries(cuts, NUMBERS.to("meta"), 1, 12) is cuts


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_a_layer_whose_own_convolution_mixes_sequences_refuses_them(
    loaded: Load, name: str
) -> None:
    layer, x = loaded(holds=True).Layer(), torch.rand(1, 12, 1, 2)
    with only(strict=True):
        layer(x)
        message = message_of(gdn_ops.SpecError, layer, x, **{name: NUMBERS})
    assert message == (
        "accelerate: packed sequences are given, should be one sequence per row: the convolution "
        "of Layer would mix them; install causal-conv1d or a transformers whose module has a "
        "function causal_conv1d_fn"
    )


def test_a_models_own_guard_of_packed_sequences_is_kept() -> None:
    has_convolutions(SMALL)
    options = {"use_cache": False, "cu_seq_lens_q": CUTS}
    with accelerate():
        message = message_of(gdn_ops.SpecError, run, model(SMALL), tokens(1, 12), **options)
    assert message == f"accelerate: {packing.WITHOUT_NUMBERS}"


# Padding on the right.


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
        # transformers calls it by one name or the other.
        names = inspect.signature(tiny.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        with pytest.raises(gdn_ops.SpecError) as error:
            tiny(ids[:, :1], attention_mask=longer, **{name: filled.past_key_values})
    assert str(error.value) == (
        "accelerate: attention_mask of the call that filled the cache has padding on the right "
        "in row 1, should have it on the left: the short convolution would continue from the "
        "padding; tokenizer.padding_side = 'left'"
    )


class Cache:
    """A cache that tells whether it has a state of a layer as some releases do."""

    def __init__(self, kind: str) -> None:
        self.kind, self.filled = kind, False

    @property
    def has_previous_state(self) -> Any:
        return {
            "a property": self.filled,
            "a method": lambda: self.filled,
            "a method of the layer": lambda layer_idx=None: self.filled,
        }[self.kind]


@pytest.mark.parametrize("kind", ["a property", "a method", "a method of the layer"])
@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values", "memory"])
def test_a_cache_is_found_by_what_it_is(loaded: Load, kind: str, name: str) -> None:
    module = loaded()
    looking = module.Layer.forward
    parameters = f"self, hidden_states, {name}=None, attention_mask=None"
    space = {"looking": looking, "names": module}
    body = "names.torch_chunk_gated_delta_rule, names.torch_recurrent_gated_delta_rule"
    exec(f"def forward({parameters}):\n    {body}\n    return looking(self, hidden_states)", space)
    module.Layer.forward = space["forward"]
    layer, cache, x = module.Layer(), Cache(kind), torch.rand(2, 3, 1, 2)
    right = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with only(strict=True):
        layer(x, cache, right)
        cache.filled = True
        for arguments, keywords in (((x, cache), {}), ((x,), {name: cache})):
            with pytest.raises(gdn_ops.SpecError, match="right in row 1"):
                layer(*arguments, **keywords)
        cache.filled = False
        layer(x, attention_mask=torch.ones(2, 3), **{name: cache})
        cache.filled = True
        layer(x, **{name: cache})
