"""The demo's memory sees only the past, beats the majority, and decodes as it reads."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from gdn_ops.demo import measure, show
from gdn_ops.demo.memory import (
    Memory,
    continue_text,
    features,
    make_memory,
    operands,
    predict,
    read_through,
    to_bytes,
)

REPETITIVE = b"the memory writes, the memory reads, and the memory forgets. " * 8


@pytest.fixture(scope="module")
def memory() -> Memory:
    return make_memory(contexts=(2, 4), key_width=128, value_width=64)


def test_keys_have_length_one_and_different_contexts_are_nearly_orthogonal(memory: Memory) -> None:
    phi = features(memory, to_bytes(b"abcdefghijklmnopqrstuvwxyz"))[4:, 1]
    products = phi @ phi.T
    torch.testing.assert_close(products.diagonal(), torch.ones(len(phi)))
    assert products.fill_diagonal_(0).abs().max() < 0.5
    same = features(memory, to_bytes(b"xxabcdyyabcd"))[:, 1]
    assert torch.equal(same[5], same[11])


def test_the_memory_beats_the_majority_on_a_text_that_repeats(memory: Memory) -> None:
    x = to_bytes(REPETITIVE)
    majority = measure.majority_accuracy(x)
    for rule, rate in measure.rule_accuracies(memory, x, operands(memory, x)):
        assert rate > majority + 0.3, f"{rule}: {rate:.2f}, majority {majority:.2f}"


def test_a_period_once_seen_is_predicted_without_error(memory: Memory) -> None:
    x = to_bytes(b"abcdefghij" * 6)
    o, _ = read_through(operands(memory, x))
    assert torch.equal(predict(memory, o)[0][13:-1], x[14:])


def test_nothing_is_predicted_from_what_comes_later(memory: Memory) -> None:
    x = to_bytes(REPETITIVE)
    other = x.clone()
    other[-1] = ord("#")
    o, _ = read_through(operands(memory, x))
    o_other, _ = read_through(operands(memory, other))
    assert torch.equal(o[:, :-1], o_other[:, :-1])
    assert not torch.equal(o[:, -1], o_other[:, -1])


def test_the_table_counts_what_came_last_after_a_context() -> None:
    # Of x[1:] = b a b a, the table of one byte knows "a then b" at the third, and the rest on.
    assert measure.table_accuracy(to_bytes(b"ababa"), (1,)) == pytest.approx(2 / 4)


def test_majority_is_the_share_of_the_commonest_byte() -> None:
    assert measure.majority_accuracy(to_bytes(b"baaab")) == pytest.approx(3 / 4)


def test_decode_equals_prefill(memory: Memory) -> None:
    for text in (REPETITIVE, b"abcdefghij" * 8):
        decoded = measure.decode(memory, to_bytes(text), 40)
        assert decoded.error < 1e-5
        assert decoded.same_bytes == 40
    assert decoded.added == b"abcdefghij" * 4


def test_a_decode_that_forgets_its_state_is_noticed(memory: Memory) -> None:
    x = to_bytes(REPETITIVE)
    _, state = read_through(operands(memory, x))
    _, right = continue_text(memory, x, state, ord("t"), 10)
    _, wrong = continue_text(memory, x, torch.zeros_like(state), ord("t"), 10)
    assert (right - wrong).abs().max() > 0.1


def test_a_reset_leaves_exactly_nothing_of_the_past(memory: Memory) -> None:
    text = REPETITIVE + b"\nChapter 2. " + REPETITIVE
    cuts = measure.boundaries(text)
    assert [text[cut : cut + 9] for cut in cuts] == [b"Chapter 2"]
    effect = measure.reset_effect(memory, to_bytes(text), cuts)
    assert effect.leak_cleared == 0.0
    assert effect.leak_kept > 0.01
    assert effect.kept > effect.cleared


def test_a_text_without_chapters_is_cut_in_the_middle() -> None:
    assert measure.boundaries(b"x" * 100) == (50,)


def test_backends_agree_with_the_definition_and_others_say_why_not(memory: Memory) -> None:
    given = operands(memory, to_bytes(REPETITIVE[:200]))
    exact = measure.definition(given)
    for name in ("torch", "naive"):
        assert measure.backend_row(name, given, exact).error < 1e-5
    wrong = exact.clone()
    wrong[:, :, 1] *= 1.1
    assert measure.backend_row("torch", given, wrong).error > 0.05


def test_everything_measured_is_printed(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    only_torch = [info for info in show.explain.list_backends() if info.name == "torch"]
    monkeypatch.setattr(show.explain, "list_backends", lambda: only_torch)
    stream = io.StringIO()
    findings = show.run(REPETITIVE, Console(file=stream, width=120), count=8, memory=memory)
    printed = stream.getvalue()
    for rule, rate in findings.rules:
        assert f'rule="{rule}"' in printed
        assert f"{rate:.1%}" in printed
    assert f"{findings.majority:.1%}" in printed
    assert "exactly nothing of the past is left" in printed
    assert "same next byte at 8 of 8 positions" in " ".join(printed.split())
    assert findings.decode.added.decode() in printed.replace(chr(10), " ")


def test_a_text_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="the text has 3 bytes, should have at least 64"):
        show.run(b"abc", Console(file=io.StringIO()))


def test_the_shipped_text_has_chapters() -> None:
    text = show.shipped_text()
    assert 8_000 < len(text) < 25_000
    assert len(measure.boundaries(text)) >= 5
