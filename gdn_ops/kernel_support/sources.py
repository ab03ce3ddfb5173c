"""Hold the lock under which kernels' sources are read and rewritten.

The standard library's cache of source lines is not safe for threads: while one of them fills in a
file, another one may not find it. So the first launches of two threads read one after the other.
"""

from __future__ import annotations

import threading
from typing import Final

reading: Final = threading.RLock()
"""Held by a thread while it reads the source of a function."""
