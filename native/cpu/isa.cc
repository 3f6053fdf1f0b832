// Chooses the instruction set once, from the processor and ELASTIFORM_ISA.
#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#if defined(_WIN32) && defined(__x86_64__)
#include <intrin.h>
#endif

namespace elastiform::cpu {

#if defined(_WIN32) && defined(__x86_64__)

// clang-cl links no runtime that __builtin_cpu_supports needs. Bits of CPUID leaves 1 (ecx) and 7 (ebx), and of XCR0:
// registers that the system saves.
__attribute__((target("xsave"))) Isa isaAvailable() {
  int leaf[4];
  __cpuid(leaf, 0);
  if (leaf[0] < 7) return Isa::Portable;
  __cpuid(leaf, 1);
  const auto features = static_cast<uint32_t>(leaf[2]);
  __cpuidex(leaf, 7, 0);
  const auto extended = static_cast<uint32_t>(leaf[1]);
  const auto all = [](uint64_t word, uint64_t bits) { return (word & bits) == bits; };
  constexpr uint32_t kFma = 1u << 12, kXsave = 1u << 27, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr uint64_t kXmmYmm = 0x6, kZmm = 0xe0;
  const uint64_t saved = all(features, kXsave) ? _xgetbv(0) : 0;
  if (!all(features, kFma | kF16c) || !all(extended, kAvx2) || !all(saved, kXmmYmm)) return Isa::Portable;
  return all(extended, kAvx512) && all(saved, kZmm) ? Isa::Avx512 : Isa::Avx2;
}

#else

Isa isaAvailable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Every processor with AVX2 converts half floats (F16C), which older compilers cannot ask for.
  if (avx2 && avx512) return Isa::Avx512;
  if (avx2) return Isa::Avx2;
#endif
  return Isa::Portable;
}

#endif

Isa isa() {
  static const Isa chosen = [] {
    Isa best = isaAvailable();
    if (const char* wanted = std::getenv("ELASTIFORM_ISA")) {
      for (const Isa candidate : {Isa::Portable, Isa::Avx2}) {
        if (!std::strcmp(wanted, isaName(candidate)) && candidate < best) best = candidate;
      }
    }
    return best;
  }();
  return chosen;
}

const char* isaName(Isa isa) {
  switch (isa) {
    case Isa::Portable: return "portable";
    case Isa::Avx2: return "avx2";
    case Isa::Avx512: return "avx512";
  }
  return "?";
}

const char* isaName() { return isaName(isa()); }

}  // namespace elastiform::cpu
