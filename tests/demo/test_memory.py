"""The demo's memory sees only the past, beats the majority, and decodes as it reads."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor

from gdn_ops import SpecError
from gdn_ops.demo import measure, show
from gdn_ops.demo.memory import (
    Memory,
    Operands,
    continue_text,
    features,
    make_memory,
    operands,
    predict,
    read_through,
    to_bytes,
)
from gdn_ops.environment.text import shipped_text

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


def row_of(name: str, given: Operands, exact: Tensor) -> measure.BackendRow:
    (row,) = measure.backend_rows([name], given, exact)
    return row


def test_backends_agree_with_the_definition(memory: Memory) -> None:
    given = operands(memory, to_bytes(REPETITIVE[:200]))
    exact = measure.definition(given)
    for name in ("torch", "naive"):
        assert row_of(name, given, exact).error < 1e-5
    wrong = exact.clone()
    wrong[:, :, 1] *= 1.1
    assert row_of("torch", given, wrong).error > 0.05


def test_what_the_first_call_of_each_length_costs_is_kept_out_of_the_times(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[tuple[str, int]] = set()
    order: list[str] = []
    seconds = {"torch": 1.0, "compile": 0.25}

    def timed(name: str, given: Operands) -> tuple[float, Tensor]:
        key = name, given.q.shape[1]
        order.append(name)
        compiling = 0.0 if key in seen or name == "torch" else 30.0
        seen.add(key)
        return seconds[name] + compiling, exact

    given = operands(memory, to_bytes(REPETITIVE[:100] * 20))
    exact = torch.ones(1, measure.PREFIX, 1, 4, dtype=torch.float64)
    monkeypatch.setattr(measure, "_timed", timed)
    torch_row, compile_row = measure.backend_rows(["torch", "compile"], given, exact)
    assert (torch_row.prefix, torch_row.whole, torch_row.first) == (1.0, 1.0, 0.0)
    assert (compile_row.prefix, compile_row.whole, compile_row.first) == (0.25, 0.25, 60.0)
    # After the first calls, whoever begins a round is another one each time.
    rounds = order[4:]
    assert [rounds[i : i + 4] for i in range(0, 12, 4)] == [
        ["torch", "torch", "compile", "compile"],
        ["compile", "compile", "torch", "torch"],
        ["torch", "torch", "compile", "compile"],
    ]
    show._show_backends([torch_row, compile_row], given.q.shape[1])
    lines = capsys.readouterr().out.splitlines()
    line = "  ".join(next(re.split(" {2,}", x) for x in lines if x.startswith("compile")))
    assert line == "compile  250 ms  0.25  250 ms  0.25  60.0 s  0.0e+00"


def test_everything_measured_is_printed(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only_torch = [info for info in show.explain.list_backends() if info.name == "torch"]
    monkeypatch.setattr(show.explain, "list_backends", lambda: only_torch)
    findings = show.measure_all(REPETITIVE, count=8, memory=memory)
    show.show(findings)
    printed = capsys.readouterr().out
    for rule, rate in findings.rules:
        assert f'rule="{rule}"' in printed
        assert f"{rate:.1%}" in printed
    assert f"{findings.majority:.1%}" in printed
    assert "exactly nothing of the past is left" in " ".join(printed.split())
    assert "same next byte at 8 of 8 positions" in " ".join(printed.split())
    assert findings.decode.added.decode() in printed.replace(chr(10), " ")
    data = json.loads(json.dumps(show.as_data(findings)))
    assert data["decode"]["same_bytes"] == 8
    assert [row["name"] for row in data["backends"]] == ["torch"]


def test_a_text_too_short_is_an_error() -> None:
    with pytest.raises(SpecError, match="the text has 3 bytes, should have at least 64"):
        show.measure_all(b"abc")


def test_the_shipped_text_has_chapters() -> None:
    text = shipped_text()
    assert 8_000 < len(text) < 25_000
    assert len(measure.boundaries(text)) >= 5
