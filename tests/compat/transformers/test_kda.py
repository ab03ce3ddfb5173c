"""Models with a decay of every key channel compute on gdn_ops what they compute on their own."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat_models import (
    KDA_FAMILIES,
    architecture,
    exact_gradients,
    gradients,
    model,
    module_of,
    originals,
    relative,
    run,
    text_config,
    tokens,
)
from compat_stand_ins import NAME, only
from errors import message_of
from gdn_ops import SpecError, gated_delta
from gdn_ops.backends.cpp.library import missing
from gdn_ops.compat.transformers import (
    accelerate,
    known_architectures,
    speculative_generate,
)
from gdn_ops.compat.transformers.discovery import KDA_CHUNK, KDA_FUNCTIONS, KDA_RECURRENT
from gdn_ops.compat.transformers.examine import Plan, examine
from gdn_ops.compat.transformers.rule import LEFT
from gdn_ops.nn import PromptLookup
from graphs import compiled, nodes

pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_blocks", "eager_compiler"),
    # Some releases of transformers warn of what they call themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

LENGTH = 70
"""More than one chunk of any backend, and no multiple of one."""

ALLOWED = 4e-6
"""Largest relative difference to what transformers itself computes in float32."""


def padded(lengths: tuple[int, ...], length: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a batch padded on the left, its mask, and its rows alone."""
    rows = [tokens(1, row, seed) for seed, row in enumerate(lengths)]
    ids = torch.cat([nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long(), rows


def greedy(tiny: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """Return a prompt and its most likely continuation by `count` tokens."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    found: Tensor = tiny.generate(ids, do_sample=False, **lengths, **options)
    return found


def linear_layers(family: str) -> int:
    count: int = text_config(model(family)).layer_types.count("linear_attention")
    return count


def layer_of(family: str) -> Any:
    return next(m for m in model(family).modules() if hasattr(m, "forget_gate"))


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family: str, backend: str) -> None:
    ids, tiny = tokens(2, LENGTH), model(family)
    short, mask, _ = padded((LENGTH, 41, 3), LENGTH)
    masked = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected, expected_masked = run(tiny, ids), run(tiny, short, **masked)
    expected_gradients = gradients(tiny, ids)
    exact = exact_gradients(family, 2, LENGTH)
    with accelerate(backend, strict=True) as used:
        logits = run(tiny, ids)
        real = mask.bool()
        assert relative(run(tiny, short, **masked)[real], expected_masked[real]) < ALLOWED
        ours = gradients(tiny, ids)
    assert relative(logits, expected) < ALLOWED
    assert float((logits - expected).abs().max()) < 1e-5
    assert ours.keys() == exact.keys() == expected_gradients.keys()
    assert any("A_log" in name for name in ours)
    for name, grad in exact.items():
        assert relative(ours[name].double(), grad) < 1e-4, name
    flat = [
        torch.cat([x.flatten() for x in grads.values()]) for grads in (ours, expected_gradients)
    ]
    assert relative(*flat) < ALLOWED
    assert used.calls == {(architecture(family), "gated_delta", backend): 3 * linear_layers(family)}


@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_greedy_tokens_after_left_padding_are_those_of_transformers_and_of_the_rows(
    family: str,
) -> None:
    tiny = model(family)
    ids, mask, rows = padded((9, 5), 9)
    expected = greedy(tiny, ids, 24, attention_mask=mask)
    with accelerate() as used:
        ours = greedy(tiny, ids, 24, attention_mask=mask)
    counted = dict(used.calls)
    with accelerate():
        alone = greedy(tiny, rows[1], 24)
    assert torch.equal(ours, expected)
    assert torch.equal(ours[1, 4:], alone[0])
    steps = {count for (_, op, _), count in counted.items() if op == "gated_delta_step"}
    assert steps == {23 * linear_layers(family)}


@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_several_tokens_continue_a_cache(family: str) -> None:
    tiny, ids = model(family), tokens(2, 20)
    expected = run(tiny, ids)
    with accelerate(), torch.no_grad():
        first = tiny(ids[:, :9], use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        more = tiny(ids[:, 9:], use_cache=True, past_key_values=cache)
    assert relative(torch.cat([first.logits, more.logits], 1), expected) < 1e-5


@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_speculation_gives_the_tokens_of_greedy_decoding(family: str) -> None:
    tiny, ids = model(family), tokens(1, 9)
    expected = greedy(tiny, ids, 12)
    with accelerate() as used:
        ours = speculative_generate(tiny, ids, max_new_tokens=12, draft=PromptLookup())
    assert torch.equal(ours, expected[:, : ours.shape[1]])
    assert ours.shape[1] > 10
    assert used.calls[architecture(family), "gated_delta", LEFT] == 0
    assert sum(used.calls.values()) > linear_layers(family)


@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_undo_puts_the_very_objects_back(family: str) -> None:
    before = originals(family)
    used = accelerate(architectures=[architecture(family)], strict=True)
    now = originals(family)
    changed = {name for name in now if now[name] is not before.get(name)}
    assert set(KDA_FUNCTIONS) < changed
    assert len(changed) == len(set(used.replaced))
    used.undo()
    now = originals(family)
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in before)
    assert architecture(family) in known_architectures()


@pytest.mark.parametrize("family", KDA_FAMILIES)
def test_all_parts_of_a_module_are_replaced(family: str) -> None:
    plan = examine(module_of(family))
    assert isinstance(plan, Plan)
    assert set(plan.rules) == set(KDA_FUNCTIONS)
    assert set(plan.convolutions) == {"causal_conv1d_fn", "causal_conv1d_update"}
    (layer,) = plan.layers
    # Layers before transformers 5.24 call their cache cache_params, and advance part by part.
    assert layer.left == missing() if "cache" in layer.parameters else layer.left
    assert len(plan.norms) == 1
    assert (plan.left, plan.absent) == ([], [])


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("names", [("g",), ("beta",), ("query",), ("value",), ("initial_state",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_operands_of_several_dtypes_are_taken_as_by_transformers(
    length: int, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    module = module_of("kimi_linear-softplus")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 4) for _ in range(3))
    state = torch.randn(2, 2, 4, 4)
    call = {"query": q, "key": k, "value": v, "initial_state": state, "output_final_state": True}
    call |= {"g": -torch.rand(2, length, 2, 4), "beta": torch.rand(2, length, 2)}
    call |= {name: call[name].to(dtype) for name in names}
    name = KDA_CHUNK if length > 1 else KDA_RECURRENT
    expected = getattr(module, name)(**call, use_qk_l2norm_in_kernel=True)
    with accelerate():
        results = getattr(module, name)(**call, use_qk_l2norm_in_kernel=True)
    assert results[0].dtype == expected[0].dtype
    for ours, theirs in zip(results, expected, strict=True):
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert relative(ours.double(), theirs.double()) < limit


# Packed sequences.

LENGTHS = (5, 1, 6)
CUTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()


@pytest.mark.parametrize("family", KDA_FAMILIES)
@pytest.mark.parametrize("cuts", [CUTS, None])
def test_packed_sequences_are_kept_apart(family: str, cuts: Tensor | None) -> None:
    layer = layer_of(family)
    torch.manual_seed(0)
    x = torch.randn(1, 12, 32)
    weights = torch.randn(x.shape).split(LENGTHS, 1)
    more = {} if cuts is None else {"cu_seq_lens_q": cuts}
    with accelerate():
        y = layer(x.requires_grad_(), seq_idx=NUMBERS, **more)
        (d_x,) = torch.autograd.grad(y, x, torch.cat(weights, 1))
        alone, d_alone = [], []
        for part, weight in zip(x.detach().split(LENGTHS, 1), weights, strict=True):
            leaf = part.clone().requires_grad_()
            alone.append(layer(leaf))
            d_alone += torch.autograd.grad(alone[-1], leaf, weight)
    assert relative(y, torch.cat(alone, 1)) < 1e-5
    assert relative(d_x, torch.cat(d_alone, 1)) < 1e-5


def test_packed_sequences_of_a_model_are_kept_apart() -> None:
    tiny, ids = model("bailing_hybrid-bounded"), tokens(1, 12)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    options = {"use_cache": False, "seq_idx": NUMBERS, "position_ids": positions}
    with accelerate():
        packed = run(tiny, ids, **options)
        alone = [run(tiny, part, use_cache=False) for part in ids.split(LENGTHS, 1)]
    assert relative(packed, torch.cat(alone, 1)) < 1e-5


@pytest.mark.parametrize("family", KDA_FAMILIES)
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
    }.items(),
)
def test_half_of_what_tells_of_packed_sequences_is_refused(
    family: str, options: dict[str, Tensor], message: str
) -> None:
    layer = layer_of(family)
    with accelerate():
        assert message_of(SpecError, layer, torch.randn(1, 12, 32), **options) == message


def test_a_cache_that_was_padded_on_the_right_is_not_continued() -> None:
    tiny, ids = model("kimi_linear-softplus"), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with accelerate(), pytest.raises(SpecError, match="has padding on the right in row 1"):
        greedy(tiny, ids, 2, attention_mask=mask)


def test_a_masked_token_is_the_identity_after_real_tokens_too() -> None:
    module, layer = module_of("glm5_next-bounded"), layer_of("glm5_next-bounded")
    x = torch.randn(2, 6, 32)
    mask = torch.ones(2, 6)
    mask[1, 2:] = 0
    finals = []

    def noted(*arguments: Any, **options: Any) -> Any:
        results = function(*arguments, **options | {"output_final_state": True})
        finals.append(results[1])
        return results

    with accelerate(), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        function = getattr(module, KDA_CHUNK)
        patch.setattr(module, KDA_CHUNK, noted)
        layer(x, attention_mask=mask)
        layer(x[1:, :2])
    torch.testing.assert_close(finals[0][1:], finals[1])


def test_a_compiled_layer_is_one_graph_with_the_op_in_it() -> None:
    # Experts of the tiny models cannot be compiled; the layer can.
    layer, x = layer_of("kimi_linear-softplus"), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = layer(x)
        graph, graphs = compiled(layer)
        with accelerate():
            y = graph(x)
    assert nodes(graphs).count("gdn_ops.gated_delta") == 1
    assert relative(y, expected) < 1e-5


# Modules of releases that are not there.


def stand_in(**changes: Any) -> types.ModuleType:
    """Return a modeling module whose functions compute KDA."""
    module = types.ModuleType(NAME)

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *rest: Any) -> Any:
        state, is_returned, l2 = rest
        o, final = gated_delta(
            *(q, k, v), log_alpha=g, beta=beta, initial_state=state, qk_l2norm=l2,
            return_state=True, backend="naive",
        )  # fmt: skip
        return o, final if is_returned else None

    def chunk_kimi_delta_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return rule(query, key, value, g, beta, *rest)

    def recurrent_kimi_delta_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return rule(query, key, value, g, beta, *rest)

    class Layer(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
            functions = module.chunk_kimi_delta_attention, module.recurrent_kimi_delta_attention
            x = hidden_states
            o: Tensor = functions[0](x, x, x, g=-x.abs(), beta=x[..., 0].abs())[0]
            return o

    Layer.__module__ = NAME
    functions = (chunk_kimi_delta_attention, recurrent_kimi_delta_attention)
    vars(module).update({f.__name__: f for f in functions} | {"Layer": Layer} | changes)
    return module


def test_an_architecture_that_nobody_listed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = stand_in(), torch.rand(1, 3, 1, 2)
    monkeypatch.setitem(sys.modules, NAME, module)
    layer = module.Layer()
    expected = layer(x)
    assert "someones_model" in known_architectures()
    with only(strict=True) as used:
        assert relative(layer(x), expected) < 1e-6
    assert [key[:2] for key in used.calls.elements()] == [("someones_model", "gated_delta")]


def summed(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **rest: Any) -> Any:
    """Compute one decay per head, the mean of those of the channels."""
    original = vars(stand_in())[KDA_CHUNK]
    return original(query, key, value, g.mean(-1, keepdim=True).expand_as(g), beta, **rest)


def other_numbers(
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
    rest = {"initial_state": initial_state, "output_final_state": output_final_state}
    return summed(
        query, key, value, g, beta, **rest, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({KDA_RECURRENT: None}, f"it has no function {KDA_RECURRENT}"),
        ({KDA_CHUNK: None}, f"it has no function {KDA_CHUNK}"),
        (
            {KDA_CHUNK: lambda query, key, value, gate: None},
            f"{KDA_CHUNK} takes (query, key, value, gate), should begin with (query, key, value, "
            f"g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel)",
        ),
        (
            {KDA_CHUNK: other_numbers},
            f"{KDA_CHUNK} gives other numbers on an example: relative difference",
        ),
    ],
)
def test_a_module_that_does_not_fit_is_left(changes: dict[str, Any], reason: str) -> None:
    reasons = examine(stand_in(**changes))
    assert isinstance(reasons, list)
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)
