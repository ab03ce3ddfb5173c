"""Name the layers of a language model by the letters of a pattern."""

from __future__ import annotations

from typing import Any, NoReturn

from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.kimi_delta_attention import KimiDeltaAttention
from gdn_ops.spec.errors import SpecError, SpecTypeError

LETTERS = {
    "G": "GatedDeltaNet with the rule that is asked for",
    "M": "GatedDeltaNet with the decay-only rule `gated`, in the place of Mamba2",
    "K": "KimiDeltaAttention",
    "E": "KimiDeltaAttention with erase and write gates, as Gated DeltaNet-2",
    "A": "SlidingWindowAttention",
}
"""The letters of a pattern, bottom layer first: "G", "GA" (H1), "MGA" (H2), "KKKA", "A"."""


def recurrent(letter: str, rule: str) -> tuple[type[GatedDeltaNet], dict[str, Any]]:
    """Return the class of a recurrent layer, and the options that make it what its letter says.

    Args:
        letter: G, M, K or E.
        rule: of the layers G.
    """
    kinds: dict[str, tuple[type[GatedDeltaNet], dict[str, Any]]] = {
        "G": (GatedDeltaNet, {"rule": rule}),
        "M": (GatedDeltaNet, {"rule": "gated"}),
        "K": (KimiDeltaAttention, {"channel_decay": True, "erase_write": False}),
        "E": (KimiDeltaAttention, {"erase_write": True}),
    }
    return kinds[letter]


def check_pattern(pattern: Any) -> None:
    """Check the pattern of a model.

    Raises:
        SpecError: it is no string, empty, or has an unknown letter.
    """
    if not isinstance(pattern, str):
        raise SpecTypeError(f"HybridLM: pattern is {pattern!r}, should be a string of letters")
    known = ", ".join(f"{letter} ({what})" for letter, what in LETTERS.items())
    if not pattern:
        _fail(f"pattern is empty, should be letters of {known}")
    for letter in pattern:
        if letter not in LETTERS:
            _fail(f"pattern {pattern!r} has the letter {letter!r}, should have only {known}")


def _fail(message: str) -> NoReturn:
    raise SpecError(f"HybridLM: {message}")
