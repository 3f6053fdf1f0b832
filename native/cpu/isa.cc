// Chooses the instruction set once, from the processor and ELASTIFORM_ISA.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace elastiform::cpu {

Isa isaAvailable() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
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
