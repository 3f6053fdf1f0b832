// Whole segments: sums and means over their rows, values handed to all rows, and what was decided of them before.
#include "cuda/kernels.h"
#include "cuda/segments.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

// Which rows of a segment count, and what each of them weighs.
struct SegmentAttributes {
  int most;  // rows of a segment; 0: all
  bool mean;

  explicit SegmentAttributes(const Launch& launch)
      : most(static_cast<int>(launch.intAttribute(0, "most", 0, INT32_MAX))),
        mean(launch.intAttribute(1, "mean", 0, 1) == 1) {}
  DEVICE int counted(int length) const { return most > 0 ? min(length, most) : length; }
  DEVICE float weight(int rows) const { return mean && rows > 0 ? 1.f / static_cast<float>(rows) : 1.f; }
};

// A thread sums columns of a segment over its rows, in their order.
__global__ void __launch_bounds__(kThreads, 4)
    segmentSumKernel(Operand x, Operand offsets, Operand y, SegmentAttributes attributes, StepState state) {
  if (state.faulted() || !onePerSegment(offsets, y, 1, state)) return;
  const int width = y.size(1);
  forCells(y.size(0), width, width % 4 == 0 && startsAligned(x, y), [&]<typename V>(int s, int c) {
    const int start = ldGlobal(offsets.i32() + s);
    const int counted = attributes.counted(ldGlobal(offsets.i32() + s + 1) - start);
    const float weight = attributes.weight(counted);
    V sum{};
    for (int r = 0; r < counted; ++r) sum = each(Sum{}, sum, load<V>(x, int64_t{start + r} * width + c));
    store(y, int64_t{s} * width + c, each([&](float v) { return v * weight; }, sum));
  });
}

__global__ void __launch_bounds__(kThreads, 8)
    segmentBroadcastKernel(Operand x, Operand offsets, Operand y, SegmentAttributes attributes, StepState state) {
  if (state.faulted() || !onePerSegment(offsets, x, 0, state)) return;
  const int width = y.size(1), segments = x.size(0);
  if (segments == 0) return;
  forCells(y.size(0), width, width % 4 == 0 && startsAligned(x, y), [&]<typename V>(int n, int c) {
    const int s = segmentOf(offsets.i32(), segments, n);
    const int start = ldGlobal(offsets.i32() + s);
    const int counted = attributes.counted(ldGlobal(offsets.i32() + s + 1) - start);
    const float weight = n - start < counted ? attributes.weight(counted) : 0.f;
    store(y, int64_t{n} * width + c, each([&](float v) { return v * weight; }, load<V>(x, int64_t{s} * width + c)));
  });
}

// What is held, and x where that is NaN.
__global__ void __launch_bounds__(kThreads, 8) latchKernel(Operand x, Operand held, Operand y, StepState state) {
  if (state.faulted()) return;
  forElements(y.elements(), startsAligned(x, held, y), [&]<typename V>(int64_t i) {
    store(y, i, each([](float v, float h) { return h != h ? v : h; }, load<V>(x, i), load<V>(held, i)));
  });
}

}  // namespace

void segmentSum(const Launch& launch) {
  const Operand &x = launch.in[0], &offsets = launch.in[1], &y = launch.out[0];
  checkOffsets(launch, 1, x, 0);
  checkPerSegment(launch, offsets, y);
  LAUNCH(segmentSumKernel, launch.blocks(y.boundElements(), kThreads), kThreads, 0, launch.stream, x, offsets, y,
         SegmentAttributes(launch), launch.state);
}

void segmentBroadcast(const Launch& launch) {
  const Operand &x = launch.in[0], &offsets = launch.in[1], &y = launch.out[0];
  checkOffsets(launch, 1, y, 0);
  checkPerSegment(launch, offsets, x);
  LAUNCH(segmentBroadcastKernel, launch.blocks(y.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, x, offsets, y,
         SegmentAttributes(launch), launch.state);
}

void latch(const Launch& launch) {
  const Operand& y = launch.out[0];
  LAUNCH(latchKernel, launch.blocks(y.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, launch.in[0],
         launch.in[1], y, launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
