// What host and kernels agree on: the namespace of a build, bf16 and f16 with their conversions, tensor maps.
#pragma once

#include <cstdint>

#include "core/dtype.h"

// Kernels and the host code that launches them live in elastiform::ELASTIFORM_DEVICE. One source is compiled by nvcc
// into elastiform::cuda and by the host compiler into elastiform::simt; both may be linked into one addon.
#ifdef __CUDACC__
#define ELASTIFORM_DEVICE cuda
#define ELASTIFORM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ELASTIFORM_DEVICE simt
#define ELASTIFORM_HOST_DEVICE inline
#endif

namespace elastiform {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A CUtensorMap, or what the emulation puts in its place. Passed to kernels as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Lives in shared memory; only the mbarrier functions may look inside.
struct Mbarrier {
  uint64_t state;
};

ELASTIFORM_HOST_DEVICE float toFloat(float value) { return value; }

ELASTIFORM_HOST_DEVICE float toFloat(bf16 value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return bf16ToFloat(value.bits);
#endif
}

ELASTIFORM_HOST_DEVICE float toFloat(f16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return f16ToFloat(value.bits);
#endif
}

// Round to nearest, ties to even. Every NaN becomes 0x7fff, as the hardware's conversion makes it.
ELASTIFORM_HOST_DEVICE bf16 toBf16(float value) {
#ifdef __CUDA_ARCH__
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  return value != value ? bf16{0x7fff} : bf16{floatToBf16(value)};
#endif
}

ELASTIFORM_HOST_DEVICE f16 toF16(float value) {
#ifdef __CUDA_ARCH__
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  return value != value ? f16{0x7fff} : f16{floatToF16(value)};
#endif
}

// Two bf16 in one register, `low` at the lower address; the operand format of the tensor cores.
ELASTIFORM_HOST_DEVICE uint32_t packBf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return toBf16(low).bits | static_cast<uint32_t>(toBf16(high).bits) << 16;
#endif
}
ELASTIFORM_HOST_DEVICE float lowBf16(uint32_t pair) { return toFloat(bf16{static_cast<uint16_t>(pair)}); }
ELASTIFORM_HOST_DEVICE float highBf16(uint32_t pair) { return toFloat(bf16{static_cast<uint16_t>(pair >> 16)}); }

}  // namespace elastiform
