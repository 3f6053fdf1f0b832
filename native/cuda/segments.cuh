// Which segment a row is of, and values of segments.
#pragma once

#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

// The last s of `count` > 0 with starts[s] <= i, which is not empty when i is below starts[count].
DEVICE int segmentOf(const int32_t* starts, int count, int i) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (ldGlobal(starts + middle) <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Whether there is one of `values`, which are operand `input` of the op, for each segment; a fault if not.
DEVICE bool onePerSegment(const Operand& offsets, const Operand& values, int input, const StepState& state) {
  const int segments = offsets.size(0) - 1;
  if (segments == values.size(0)) return true;
  if (blockIdx.x == 0 && threadIdx.x == 0) state.report(Fault::Segments, input, 0, 0, segments, values.size(0));
  return false;
}

// The same of bounds, on the host, for ops whose kernels ask onePerSegment.
inline void checkPerSegment(const Launch& launch, const Operand& offsets, const Operand& values) {
  launch.alone();
  const int64_t segments = offsets.bound[0] - 1;
  if (values.bound[0] != segments) {
    fail(ErrorCode::InvalidProgram, "[%s] one value per segment wanted: %lld segments, got %lld values", launch.op,
         static_cast<long long>(segments), static_cast<long long>(values.bound[0]));
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
