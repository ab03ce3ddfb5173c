"""The rows of `gdn-ops bench decode` judge a custom-op library by its target."""

from __future__ import annotations

from gdn_ops.bench.decode_rows import decode_rows
from gdn_ops.bench.turns import Timing


def test_a_library_is_judged_by_the_floor_with_and_without_copies() -> None:
    timing = {
        "floor": Timing((1e-5, 1e-5, 1e-5)),
        "custom in place": Timing((1.7e-5, 1.7e-5, 1.5e-5)),
        "custom in place, own buffers": Timing((1.5e-5, 1.5e-5, 1.4e-5)),
    }
    judged = [row for row in decode_rows("1 MiB", 1.0, timing, {}) if row.target]
    assert [(row.comparator, row.target, row.reached) for row in judged] == [
        ("custom in place / floor", "<= 1.6x", False),
        ("custom in place, own buffers / floor", "<= 1.6x", True),
    ]
    assert [round(row.median, 6) for row in judged] == [1.7, 1.5]
