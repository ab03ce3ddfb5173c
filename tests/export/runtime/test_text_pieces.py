"""Pieces of text add up to the whole, are told early, and stop where they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gdn_ops.export.runtime.text_pieces import TextPieces
from gdn_ops.export.runtime.tokenizer import Tokenizer
from served_models import byte_tokenizer

TEXTS = ("plain text", "Grüße, 世界! 🙂🙃", "\ufffd is a character too", "tail: é")


class Counted(Tokenizer):
    """Count the tokens that are decoded."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer())
        self.most = 0

    def decode(self, tokens: list[int]) -> str:
        self.most = max(self.most, len(tokens))
        return super().decode(tokens)


def told(tokens: list[int], *stop: str, tokenizer: Any = None) -> list[str]:
    pieces = TextPieces(tokenizer or Counted(), stop)
    return [*(pieces.add(token) for token in tokens), pieces.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_is_told_with_its_last_byte(text: str) -> None:
    found = told(list(text.encode()))
    assert "".join(found) == text
    places = [len(text[:at].encode()) - 1 for at in range(1, len(text) + 1)]
    # A replacement character is told late: it reads as one that is not finished.
    expected = {place: x for place, x in zip(places, text, strict=True) if x != "\ufffd"}
    assert all(x in found[place] for place, x in expected.items())
    assert sum(map(bool, found)) == len(expected)


def test_drawn_bytes_add_up_to_what_the_tokenizer_makes_of_all() -> None:
    draw, tokenizer = np.random.default_rng(0), Counted()
    for _ in range(200):
        # Of valid text, of anything, and of the token that is not told.
        choices = (list("aé世🙂".encode()), list(range(256)), [128, 240, 159, 65, 256])
        tokens = draw.choice(choices[int(draw.integers(3))], draw.integers(0, 40)).tolist()
        assert "".join(told(tokens)) == tokenizer.decode(tokens)


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    tokenizer = Counted()
    told(list(("Grüße " * 500).encode()), tokenizer=tokenizer)
    # The bytes of two characters at most.
    assert tokenizer.most == 4


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one twitter", ("two",), "one twitter"),
        ("aaab", ("aab",), "a"),
        ("ends in tw", ("two",), "ends in tw"),
        ("x: 世界", ("界", "世界"), "x: "),
        ("first and second", ("second", "and"), "first "),
        ("two", ("two",), ""),
        ("nothing", ("", "zzz"), "nothing"),
        ("é", ("\ufffd",), "é"),
    ],
)
def test_nothing_of_a_stop_is_told(text: str, stop: tuple[str, ...], expected: str) -> None:
    tokens = list(text.encode())
    found = told(tokens, *stop)
    assert "".join(found) == expected
    pieces = TextPieces(Counted(), stop)
    for count, token in enumerate(tokens, start=1):
        pieces.add(token)
        is_there = any(x and x in text.encode()[:count].decode(errors="ignore") for x in stop)
        assert pieces.is_ended == is_there
    assert pieces.add(65) == "" or not pieces.is_ended


def test_a_text_may_stop_at_what_was_held_back_to_its_end() -> None:
    """A byte that begins a character reads as U+FFFD when none follows."""
    pieces = TextPieces(Counted(), ("\ufffd",))
    assert pieces.add(65) == "A"
    assert pieces.add(240) == ""
    assert not pieces.is_ended
    assert pieces.finish() == ""
    assert pieces.is_ended
    assert pieces.finish() == ""


def test_a_decoder_that_strips_the_first_space_keeps_those_between_words() -> None:
    """As SentencePiece does: only beside the token before it does a word keep its space."""
    words = ["", " Once", " upon", " a", " time"]

    class Stripping:
        def decode(self, tokens: list[int]) -> str:
            return "".join(words[token] for token in tokens).removeprefix(" ")

    assert told([1, 2, 3, 4], tokenizer=Stripping()) == ["Once", " upon", " a", " time", ""]
