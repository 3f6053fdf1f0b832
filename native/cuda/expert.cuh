// Rows with scores of their experts, as kernels read them.
#pragma once

#include "cuda/segments.cuh"
#include "ops/expert.h"

namespace elastiform::ELASTIFORM_DEVICE {

struct GlobalScores {
  const float* z;
  DEVICE float operator()(int i) const { return ldGlobal(z + i); }
};

struct Experts {
  Operand z, offsets, share;
  int input;  // where z stands among the op's inputs; offsets and share follow
  ExpertRule rule;

  Experts(const Launch& launch, int input, int ruleAttribute)
      : z(launch.in[input]),
        offsets(launch.in[input + 1]),
        share(launch.in[input + 2]),
        input(input),
        rule(static_cast<ExpertRule>(launch.intAttribute(ruleAttribute, "rule", 0, 1))) {}

  DEVICE int rows() const { return z.size(0); }
  DEVICE int count() const { return z.size(1); }
  DEVICE ExpertRow<GlobalScores> row(int n) const {
    const int segment = segmentOf(offsets.i32(), offsets.size(0) - 1, n);
    return {{z.f32() + int64_t{n} * count()}, count(), rule, ldGlobal(share.f32() + segment)};
  }
  // Reports shares out of range; by all threads of a grid. Whether there is one for each segment.
  DEVICE bool checkShares(const StepState& state) const {
    if (!onePerSegment(offsets, share, input + 2, state)) return false;
    for (int s = blockIdx.x * blockDim.x + threadIdx.x; s < share.size(0); s += gridDim.x * blockDim.x) {
      const float value = ldGlobal(share.f32() + s);
      if (!(value >= 0 && value <= 1)) state.report(Fault::Range, input + 2, s, 0, 1, value);
    }
    return true;
  }
  DEVICE void check(int n, const StepState& state) const {
    for (int i = 0; i < count(); ++i) {
      const int64_t at = int64_t{n} * count() + i;
      const float score = ldGlobal(z.f32() + at);
      if (score != score) state.report(Fault::NaN, input, static_cast<double>(at), 0, 0, 0);
    }
  }
};

}  // namespace elastiform::ELASTIFORM_DEVICE
