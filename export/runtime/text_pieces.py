"""Decode tokens as they come into pieces of text that are never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from gdn_ops.export.runtime.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""Stand for the bytes of a character before the last of them is there."""


class TextPieces:
    """Turn tokens into pieces of text, each told as soon as nothing can change it any more.

    The pieces add up to what the tokenizer makes of all tokens, up to the first text that ends it.
    Each token is decoded beside the piece before it alone, so a long text takes no longer.

    Args:
        tokenizer: of the model.
        stop: texts that end it and are not told. What may be the beginning of one is held back.

    Attributes:
        is_ended: whether one of them has come; nothing is told any more.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        # The tokens of the last piece, for decoders that look at what is before a token, and new
        # ones; what the first of these read as; text that is not told yet.
        self._tokens: list[int] = []
        self._count, self._known, self._held = 0, "", ""
        self.is_ended = False

    def add(self, token: int) -> str:
        """Return the piece of text that a token completes, often an empty one."""
        if self.is_ended:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_UNFINISHED) or not text.startswith(self._known):
            return ""
        new = text[len(self._known) :]
        if not new:
            return ""
        self._tokens = self._tokens[self._count :]
        self._count, self._known = len(self._tokens), self._tokenizer.decode(self._tokens)
        return self._released(new)

    def finish(self) -> str:
        """Return the text that was held back, when no token follows."""
        if self.is_ended:
            return ""
        text = self._tokenizer.decode(self._tokens)
        new = text[len(self._known) :] if text.startswith(self._known) else ""
        piece = self._released(new) + self._held
        self._tokens, self._count, self._known, self._held = [], 0, "", ""
        return piece

    def _released(self, new: str) -> str:
        """Return what can be told of the text that is held and of new text."""
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.is_ended, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text are the first of another, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
