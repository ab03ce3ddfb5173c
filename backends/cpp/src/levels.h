// The levels that a library holds, and the choice among them when it is first used.
#pragma once

#include <cstring>

#include "level.h"

extern const GdnLevel gdn_level_baseline;
#if defined(__x86_64__)
extern const GdnLevel gdn_level_avx2, gdn_level_avx512, gdn_level_avx512bf16;
#endif

namespace {

// Best first.
const GdnLevel* const kLevels[] = {
#if defined(__x86_64__)
    &gdn_level_avx512bf16,
    &gdn_level_avx512,
    &gdn_level_avx2,
#endif
    &gdn_level_baseline,
};

// The level of that name, the fastest one for null or ""; null where it is not there.
inline const GdnLevel* find_level(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const bool is_named = name && *name;
  for (const GdnLevel* level : kLevels) {
    if (is_named && std::strcmp(name, level->name)) continue;
    if (level->is_there() && (is_named || level->is_best())) return level;
  }
  return nullptr;
}

}  // namespace
