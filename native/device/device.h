// The one include of kernels and of the host code that launches them: CUDA under nvcc, the emulation elsewhere.
#pragma once

#include "device/runtime.h"
#include "device/types.h"

#ifdef __CUDACC__
#include "device/ptx.h"
#else
#include "device/emulated.h"
#endif

namespace elastiform::ELASTIFORM_DEVICE {

// Sums and maxima over the 32 lanes of a warp; every lane gets the result, the same bits in each.
template <typename T>
DEVICE T warpSum(T value) {
  UNROLL
  for (int offset = 16; offset > 0; offset >>= 1) value += shflXor(value, offset);
  return value;
}
DEVICE float warpMax(float value) {
  UNROLL
  for (int offset = 16; offset > 0; offset >>= 1) value = fmaxf(value, shflXor(value, offset));
  return value;
}

// A tile in shared memory of rows of 128 bytes, as TMA writes it and wgmma reads it with the 128-byte swizzle: the byte
// offset of 16-byte chunk `chunk` (0..7) of row `row`, from a base aligned to 1024.
DEVICE int swizzle128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

}  // namespace elastiform::ELASTIFORM_DEVICE
