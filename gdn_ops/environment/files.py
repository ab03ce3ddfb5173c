"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".gdn_ops-"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path in a new folder beside a file; what is written there is moved when all is done.

    An error or Ctrl-C before that leaves what was there, and nothing else. Files that are written
    beside the yielded path, such as weights, come along.

    Raises:
        OSError: the file cannot be written; the error names it, not the folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=path.parent) as folder:
            yield Path(folder, path.name)
            # Move the file last: it refers to those beside it.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        if error.errno is None or _PREFIX not in str(error.filename or _PREFIX):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
