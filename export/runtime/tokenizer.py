"""Find the tokenizer of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdn_ops.spec.errors import SpecError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
"""Files of a tokenizer: what it does, and what transformers and onnxruntime-genai call it."""


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


def find_tokenizer(label: str, folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder, or None without one or without the package tokenizers.

    Args:
        label: who asks, for errors.
        folder: of an exported model.

    Raises:
        SpecError: the file holds no tokenizer that the package reads.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    try:
        import tokenizers
    except ModuleNotFoundError:
        return None
    # It raises Exception itself.
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:
        raise SpecError(
            f"{label}: path is {str(folder)!r}, whose {TOKENIZER} tokenizers "
            f"{tokenizers.__version__} cannot read: {error}"
        ) from error
