"""Hold what a language model remembers of texts: a value that can be kept, forked and saved."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdn_ops.spec.errors import SpecError

Array = np.ndarray[Any, Any]

_MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class TextState:
    """Hold what a model remembers of the tokens that it has read, one text a row.

    No call changes a state: each returns a new one. So the state of a shared beginning is read
    once and continued as often as wanted, and what was drafted in vain is forgotten by going back
    to the state before it.

    Attributes:
        mask: (B, tokens) int64, 1 for tokens and 0 for the padding before a text.
        values: every state of the graph by the name of its input.
    """

    mask: Array
    values: Mapping[str, Array]

    @property
    def rows(self) -> int:
        """Return how many texts there are."""
        return int(self.mask.shape[0])

    @property
    def tokens(self) -> int:
        """Return how many tokens were read, padding included."""
        return int(self.mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Return the bytes of all states."""
        return sum(x.nbytes for x in self.values.values())

    def select(self, rows: Sequence[int]) -> TextState:
        """Return the state of some rows, or of one several times: to branch a text.

        Raises:
            SpecError: a row is not there.
        """
        for row in rows:
            if not 0 <= row < self.rows:
                raise SpecError(
                    f"TextState.select: rows has {row}, should have numbers in [0, {self.rows - 1}]"
                )
        index = list(rows)
        return TextState(self.mask[index], {k: x[index] for k, x in self.values.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file of numpy, `.npz`."""
        with Path(path).open("wb") as file:
            arrays: dict[str, Any] = {_MASK: self.mask, **self.values}
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextState:
        """Read a state that `save` has written.

        Raises:
            SpecError: the file is missing, or holds something else.
        """
        try:
            with Path(path).open("rb") as stream, np.lib.npyio.NpzFile(stream) as file:
                values = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise SpecError(
                f"TextState.load: path is {os.fspath(path)!r}, should be a file that "
                f"TextState.save wrote: {error}"
            ) from error
        mask = values.pop(_MASK, None)
        if mask is None or mask.ndim != 2:
            raise SpecError(
                f"TextState.load: path is {os.fspath(path)!r}, which has no {_MASK}: should be a "
                f"file that TextState.save wrote"
            )
        return cls(mask, values)
