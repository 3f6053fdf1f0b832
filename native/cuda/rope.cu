// Rotary positions.
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 128;
// Heads that share one sine and cosine: few, so that the heads of a single row are work for a block.
constexpr int kHeads = 4;

struct Rope {
  Operand x, positions, frequencies, y;
  int headDim;
  float sign, magnitude;
  StepState state;
};

struct Rotation {
  float cosine, sine;
};

// The reference models round the angle to f32; its cosine and sine are taken in double, reduced to +-pi/4.
DEVICE Rotation rotation(float position, float frequency, float sign, float magnitude) {
  const float rounded = position * frequency;
  const double angle = rounded;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double turns = (angle * 0.63661977236758134308 + magic) - magic;
  const double r = (angle - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17;
  const double fourth = turns * 0.25;
  const double quadrant = turns - 4.0 * (((fourth - 0.375) + magic) - magic);  // 0..3
  const double s = r * r;
  const double sinR =
      r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 - s * (1.0 / 39916800)))));
  const double cosR =
      1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))));
  const bool odd = quadrant == 1.0 || quadrant == 3.0;
  const double c = odd ? sinR : cosR, t = odd ? cosR : sinR;
  return {magnitude * static_cast<float>(quadrant == 1.0 || quadrant == 2.0 ? -c : c),
          magnitude * sign * static_cast<float>(quadrant >= 2.0 ? -t : t)};
}

// A block takes one row at a time, a thread one pair of features of up to kHeads of its heads.
__global__ void __launch_bounds__(kThreads, 4) ropeKernel(Rope t) {
  if (t.state.faulted()) return;
  const int rows = t.y.size(0), width = t.y.size(1), pairs = t.frequencies.size(0), heads = width / t.headDim;
  const int items = (heads + kHeads - 1) / kHeads * pairs, rest = t.headDim - 2 * pairs;
  const bool inPlace = t.x.data == t.y.data;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = int64_t{row} * width;
    const float position = static_cast<float>(ldGlobal(t.positions.i32() + row));
    for (int i = threadIdx.x; i < items; i += kThreads) {
      const int pair = i % pairs, first = i / pairs * kHeads;
      const auto [cosine, sine] = rotation(position, load<float>(t.frequencies, pair), t.sign, t.magnitude);
      float a[kHeads], b[kHeads];
      UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const int64_t from = start + min(first + h, heads - 1) * t.headDim + pair;
        a[h] = load<float>(t.x, from);
        b[h] = load<float>(t.x, from + pairs);
      }
      UNROLL
      for (int h = 0; h < kHeads; ++h) {
        if (first + h >= heads) continue;
        const int64_t to = start + (first + h) * t.headDim + pair;
        store(t.y, to, a[h] * cosine - b[h] * sine);
        store(t.y, to + pairs, b[h] * cosine + a[h] * sine);
      }
    }
    for (int i = threadIdx.x; !inPlace && i < heads * rest; i += kThreads) {
      const int64_t at = start + i / rest * t.headDim + 2 * pairs + i % rest;
      store(t.y, at, load<float>(t.x, at));
    }
  }
}

}  // namespace

void rope(const Launch& launch) {
  const Operand& y = launch.out[0];
  const int64_t width = y.bound[1], pairs = launch.in[2].bound[0];
  const int64_t headDim = launch.intAttribute(0, "head_dim", 1, std::max<int64_t>(width, 1));
  const float sign = static_cast<float>(launch.finiteAttribute(1, "sign"));
  const float magnitude = static_cast<float>(launch.finiteAttribute(2, "magnitude"));
  if (width % headDim != 0 || 2 * pairs > headDim) {
    fail(ErrorCode::InvalidProgram, "[%s] width %lld must be a multiple of head_dim %lld, and head_dim >= 2 x %lld",
         launch.op, static_cast<long long>(width), static_cast<long long>(headDim), static_cast<long long>(pairs));
  }
  LAUNCH(ropeKernel, launch.blocks(y.bound[0], 1), kThreads, 0, launch.stream,
         Rope{launch.in[0], launch.in[1], launch.in[2], y, static_cast<int>(headDim), sign, magnitude, launch.state});
}

}  // namespace elastiform::ELASTIFORM_DEVICE
