// Whole segments: sums and means over their rows, values handed to all rows, and what was decided of them before.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

// Which rows of a segment count, and what each of them weighs.
struct SegmentAttributes {
  int64_t most;  // rows of a segment; 0: all
  bool mean;

  SegmentAttributes(const KernelArgs& args, const char* op)
      : most(intAttribute(args, op, 0, "most", 0, INT32_MAX)), mean(intAttribute(args, op, 1, "mean", 0, 1) == 1) {}
  int64_t counted(int64_t length) const { return most > 0 ? std::min(length, most) : length; }
  float weight(int64_t rows) const { return mean && rows > 0 ? 1.0f / static_cast<float>(rows) : 1.0f; }
};

// Columns of a segment that one piece of work sums.
constexpr int64_t kSegmentColumns = 128;

}  // namespace

void segmentSum(const KernelArgs& args) {
  const char* op = "segment_sum";
  const float* x = args.in[0].f32();
  const int32_t* offsets = args.in[1].i32();
  float* y = args.out[0].f32();
  const int64_t total = args.in[0].dim(0), width = args.in[0].dim(1);
  const int64_t segments = checkOffsets(op, args.in[1], total);
  checkPerSegment(op, args.out[0], segments);
  const SegmentAttributes attributes(args, op);
  const VectorOps& vector = vectorOps();
  const int64_t parts = (width + kSegmentColumns - 1) / kSegmentColumns;
  const int64_t rows = total / std::max<int64_t>(1, segments);
  // Every sum runs over the rows in ascending order, whoever has it.
  forChunks(segments * parts, rowsPerChunk(rows * kSegmentColumns), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t s = piece / parts, first = piece % parts * kSegmentColumns;
      const int64_t columns = std::min(kSegmentColumns, width - first);
      const int64_t counted = attributes.counted(offsets[s + 1] - offsets[s]);
      float* sum = y + s * width + first;
      std::memset(sum, 0, columns * sizeof(float));
      for (int64_t r = 0; r < counted; ++r) vector.add(sum, x + (offsets[s] + r) * width + first, sum, columns);
      if (attributes.mean) vector.scale(sum, attributes.weight(counted), sum, columns);
    }
  });
}

void segmentBroadcast(const KernelArgs& args) {
  const char* op = "segment_broadcast";
  const float* x = args.in[0].f32();
  const int32_t* offsets = args.in[1].i32();
  float* y = args.out[0].f32();
  const int64_t total = args.out[0].dim(0), width = args.out[0].dim(1);
  const int64_t segments = checkOffsets(op, args.in[1], total);
  checkPerSegment(op, args.in[0], segments);
  const SegmentAttributes attributes(args, op);
  const VectorOps& vector = vectorOps();
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t start = offsets[s], length = offsets[s + 1] - start, counted = attributes.counted(length);
    const float weight = attributes.weight(counted);
    forChunks(length, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        float* to = y + (start + r) * width;
        if (r < counted) {
          vector.scale(x + s * width, weight, to, width);
        } else {
          std::memset(to, 0, width * sizeof(float));
        }
      }
    });
  }
}

void latch(const KernelArgs& args) {
  const float *x = args.in[0].f32(), *held = args.in[1].f32();
  float* y = args.out[0].f32();
  forChunks(args.out[0].elements(), kParallelElements, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) y[i] = std::isnan(held[i]) ? x[i] : held[i];
  });
}

}  // namespace elastiform::cpu
