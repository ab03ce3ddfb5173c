"""Let a forked process compute: end the threads of GNU OpenMP before the fork.

GNU's OpenMP, which torch computes with on Linux, keeps the threads of a parallel region for the
next one. A fork copies its record of them and none of them, so that the first parallel region of
the child waits for ever. Ended before, they are started anew by whoever computes next, parent or
child, with as many threads as torch has. Other OpenMPs see to forks themselves.

Importing this module registers it, once and for the whole process.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

SOFT = 1
"""OpenMP's omp_pause_soft: keep the settings, give back the threads."""

LIBRARY = re.compile(r"/\S*/libgomp[^/\s]*$", re.MULTILINE)
"""The path of a GNU OpenMP at the end of a line of /proc/self/maps; there may be several."""


def end_openmp_threads() -> list[str]:
    """End the OpenMP threads that wait for this thread; return the libraries they belonged to.

    A library older than OpenMP 5 (GCC 9) has no such function and is left out. On other systems
    than Linux nothing is ended.
    """
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = sorted(set(LIBRARY.findall(maps.read())))
    ended = []
    for path in paths:
        try:
            pause = ctypes.CDLL(path).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        if pause(SOFT) == 0:
            ended.append(path)
    return ended


if sys.platform == "linux":
    os.register_at_fork(before=end_openmp_threads)
