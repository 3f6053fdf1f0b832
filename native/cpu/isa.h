// The instruction set chosen at load, the same for every kernel of the process.
#pragma once

namespace elastiform::cpu {

enum class Isa : int { Portable = 0, Avx2 = 1, Avx512 = 2 };

// The widest the machine has; the environment variable ELASTIFORM_ISA=portable|avx2|avx512 forces a lower one.
Isa isa();
// The widest the machine has, whatever the environment says.
Isa isaAvailable();
const char* isaName(Isa isa);

}  // namespace elastiform::cpu
