"""Build libraries of a few lines, which are loaded as the library of the kernels is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gdn_ops.backends.cpp import build, library

LEVELS = ("avx512bf16", "avx512", "avx2", "baseline")
"""Those for x86-64, the fastest first."""

HEADER = """
struct GdnLevel {
  const char* name;
  int (*is_there)();
  int lanes;
};
"""

LEVEL = """
#include "level.h"
#define GDN_NAME(level) gdn_level_##level
#define GDN_OF(level) GDN_NAME(level)
#define GDN_QUOTE(level) #level
#define GDN_TEXT(level) GDN_QUOTE(level)
extern const GdnLevel GDN_OF(GDN_LEVEL);
const GdnLevel GDN_OF(GDN_LEVEL) = {GDN_TEXT(GDN_LEVEL), [] { return 1; }, GDN_LANES};
"""

_LIBRARY = """
#include <atomic>
#include <cstring>
#include "level.h"
#define GDN_EXPORT extern "C" __attribute__((visibility("default")))
@levels@
static const GdnLevel* level = nullptr;
static void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

GDN_EXPORT const char* gdn_level() { return level->name; }
GDN_EXPORT int gdn_choose_level(const char* name) {
  for (const GdnLevel* one : levels) {
    if ((*name && std::strcmp(name, one->name)) || !one->is_there()) continue;
    level = one;
    return 1;
  }
  return 0;
}
GDN_EXPORT void gdn_set_parallel(void* function) {
  parallel = reinterpret_cast<decltype(parallel)>(function);
}
static void count(void* total) { ++*static_cast<std::atomic<int>*>(total); }
GDN_EXPORT int gdn_count(int threads) {
  std::atomic<int> total{0};
  if (parallel) parallel(count, &total, unsigned(threads), 0);
  return total;
}
"""


def _levels() -> str:
    """Return C++ that lists the levels of the machine it is compiled for."""
    names = [[level.name for level in levels] for levels in (build.LEVELS["x86_64"], build.OTHER)]
    on_x86, elsewhere = (
        "".join(f"extern const GdnLevel gdn_level_{name};\n" for name in own)
        + f"static const GdnLevel* const levels[] = {{&gdn_level_{', &gdn_level_'.join(own)}}};\n"
        for own in names
    )
    return f"#if defined(__x86_64__)\n{on_x86}#else\n{elsewhere}#endif\n"


LIBRARY = _LIBRARY.replace("@levels@\n", _levels())


def write_sources(folder: Path, *, level: str = LEVEL, doors: str = LIBRARY) -> Path:
    """Write sources with every door that is called to load a library; return their folder.

    `gdn_count(n)` runs n threads in parallel and returns how many ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("level.h", HEADER), ("level.cc", level), ("library.cc", doors)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def levels_here() -> tuple[str, ...]:
    """Return the levels that are compiled on this machine, best first."""
    return tuple(level.name for level in build.LEVELS.get(library._machine(), build.OTHER))


def script(path: Path, text: str) -> str:
    """Write a shell script; return its path."""
    path.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def compiler(path: Path, text: str) -> dict[str, str]:
    """Return an environment whose compiler does something else first; $real is the real one."""
    (real, *_), _ = build.find_compiler()
    return {**os.environ, "CXX": script(path, f'real={real}\n{text}\nexec $real "$@"\n')}


def compiler_without(level: str, path: Path) -> dict[str, str]:
    """Return an environment whose compiler does not know the flags of one level."""
    known = {one.name: one.flags for one in build.LEVELS["x86_64"]}
    refused = " ".join(known.pop(level))
    return compiler(
        path, f'case "$*" in *"{refused} -c"*) echo "error: what is {level}" >&2; exit 1;; esac'
    )


def _reason() -> str | None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(_reason() is not None, reason=str(_reason()))


def note_calls(monkeypatch: pytest.MonkeyPatch, *modules: str) -> list[str]:
    """Return a list that receives the names of the library's functions that modules call."""
    names: list[str] = []
    loaded = library.library()

    class Noting:
        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(loaded, name)

    for module in modules:
        monkeypatch.setattr(f"gdn_ops.backends.cpp.{module}.library", Noting)
    return names
