// What a level asks of a processor.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// What the compiler was allowed to use the processor has to have, more flags of the build included.
int is_there() {
  int found = 1;
#if defined(__AVX__)
  found &= !!__builtin_cpu_supports("avx");
#endif
#if defined(__AVX2__)
  found &= !!__builtin_cpu_supports("avx2");
#endif
#if defined(__FMA__)
  found &= !!__builtin_cpu_supports("fma");
#endif
#if defined(__F16C__)
  // Not every compiler knows it as a name for __builtin_cpu_supports.
  unsigned a, b, c = 0, d;
  found &= __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
#endif
#if defined(__BMI2__)
  found &= !!__builtin_cpu_supports("bmi2");
#endif
#if defined(__AVX512F__)
  found &= !!__builtin_cpu_supports("avx512f");
#endif
#if defined(__AVX512BW__)
  found &= !!__builtin_cpu_supports("avx512bw");
#endif
#if defined(__AVX512DQ__)
  found &= !!__builtin_cpu_supports("avx512dq");
#endif
#if defined(__AVX512VL__)
  found &= !!__builtin_cpu_supports("avx512vl");
#endif
#if defined(__AVX512BF16__)
  found &= !!__builtin_cpu_supports("avx512bf16");
#endif
  return found;
}

// A VDPBF16PS does the work of two FMA. On AMD's processors it takes as long as one, on Intel's as
// long as two: there making the pairs only costs time.
int is_best() {
#if GDN_FEATURES == 4
  return __builtin_cpu_is("amd");
#else
  return 1;
#endif
}

}  // namespace
