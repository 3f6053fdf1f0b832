// Activation codes, as ops carry them in their `act` attribute.
#pragma once

namespace elastiform::cpu {

enum class Act : int { None = 0, GeluTanh = 1, GeluErf = 2, Silu = 3, Relu = 4 };

}  // namespace elastiform::cpu
