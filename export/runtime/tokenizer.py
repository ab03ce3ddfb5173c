"""Find the tokenizer of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"


class Tokenizer:
    """Turn text into tokens and back, by the package tokenizers.

    Args:
        inner: its Tokenizer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that its template adds."""
        return [*self._inner.encode(text).ids]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._inner.decode(tokens, skip_special_tokens=True))


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder, or None without one or without the package tokenizers."""
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        import tokenizers
    except ModuleNotFoundError:
        return None
    return Tokenizer(tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)))
