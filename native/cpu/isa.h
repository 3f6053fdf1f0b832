// The instruction set chosen at load, the same for every kernel of the process.
#pragma once

namespace elastiform::cpu {

enum class Isa : int { Portable = 0, Avx2 = 1, Avx512 = 2 };

// The widest the machine has; the environment variable ELASTIFORM_ISA=portable|avx2|avx512 forces a lower one.
Isa isa();
// The widest the machine has, whatever the environment says.
Isa isaAvailable();
const char* isaName(Isa isa);

// Picks one of three instantiations of a kernel, compiled in three files with the flags of their instruction sets
// (see simd.h). Where a compiler has no such files the wider ones are null.
template <typename F>
F* forIsa(F* portable, F* avx2, F* avx512) {
  if (isa() == Isa::Avx512 && avx512) return avx512;
  if (isa() >= Isa::Avx2 && avx2) return avx2;
  return portable;
}

}  // namespace elastiform::cpu
