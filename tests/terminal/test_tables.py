"""Tables fit their width, cut nothing off, and fall into blocks where columns have no room."""

from __future__ import annotations

import json

import pytest

from gdn_ops.spec.names import nearest, unknown
from gdn_ops.terminal.output import plain
from gdn_ops.terminal.tables import table, wrapped

HEAD = ("", "median", "against")
SECTIONS = [
    ("forward, in ms", [("  torch", "94.3", "transformers"), ("  compile", "99.4")]),
    ("", [("  eager one read", "269", "a sum over many words")]),
]


def test_a_table_has_columns_where_there_is_room() -> None:
    assert table(HEAD, SECTIONS, 60).splitlines() == [
        "                  median  against",
        "forward, in ms",
        "  torch           94.3    transformers",
        "  compile         99.4",
        "  eager one read  269     a sum over many words",
    ]


def test_texts_are_wrapped_between_words_where_few_rows_are() -> None:
    assert table(HEAD, SECTIONS, 40).splitlines() == [
        "                  median  against",
        "forward, in ms",
        "  torch           94.3    transformers",
        "  compile         99.4",
        "  eager one read  269     a sum over",
        "                          many words",
    ]


def test_rows_become_blocks_where_words_have_no_room() -> None:
    assert table(HEAD, SECTIONS, 26).splitlines() == [
        "forward, in ms",
        "  torch",
        "    median   94.3",
        "    against  transformers",
        "  compile",
        "    median   99.4",
        "  eager one read",
        "    median   269",
        "    against  a sum over",
        "             many words",
    ]


@pytest.mark.parametrize("limit", range(26, 60, 3))
def test_no_word_is_lost_and_no_line_is_too_long(limit: int) -> None:
    shown = table(HEAD, SECTIONS, limit)
    assert max(map(len, shown.splitlines())) <= limit
    for _, rows in SECTIONS:
        for row in rows:
            assert {word for cell in row for word in cell.split()} <= set(shown.split())


def test_a_long_word_stays_whole() -> None:
    path = "/a/very/long/path/that/has-a-hyphen/and/no/space"
    assert wrapped(f"written to {path}", 20) == f"written to\n{path}"


def test_the_nearest_name_is_offered_where_one_is_near() -> None:
    known = ("torch", "naive", "compile")
    assert unknown("backend", "Tohrch", known) == (
        "unknown backend 'Tohrch', known: torch, naive, compile; did you mean 'torch'?"
    )
    assert unknown("backend", "xyz", known) == "unknown backend 'xyz', known: torch, naive, compile"
    assert nearest("NAIVE", known) == "naive"


def test_json_has_no_numbers_that_it_does_not_know() -> None:
    data = {"a": float("nan"), "b": (float("inf"), 1.5), 3: None}
    assert json.loads(json.dumps(plain(data), allow_nan=False)) == {
        "a": None,
        "b": [None, 1.5],
        "3": None,
    }
