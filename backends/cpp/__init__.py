"""Run the chunkwise form in C++ on CPUs: forward, backward and decoding, one parallel region each.

Map: `src/` holds the kernels, compiled once per level of the processor by `build`; `library` loads
them and chooses the level, `calls` packs a call for them, and `backend` runs it. See docs/cpp.md.
"""

from gdn_ops.backends.cpp.backend import Cpp as Cpp

BACKEND = Cpp
