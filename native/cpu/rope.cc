// Rotary positions.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

void rope(const KernelArgs& args) {
  const char* op = "rope";
  const float* x = args.in[0].f32();
  const int32_t* positions = args.in[1].i32();
  const int64_t rows = args.out[0].dim(0), width = args.out[0].dim(1), half = args.in[2].dim(0);
  float* y = args.out[0].f32();
  const int64_t headDim = intAttribute(args, op, 0, "head_dim", 1, std::max<int64_t>(width, 1));
  const float sign = static_cast<float>(finiteAttribute(args, op, 1, "sign"));
  const float magnitude = static_cast<float>(finiteAttribute(args, op, 2, "magnitude"));
  if (width % headDim != 0 || 2 * half > headDim) {
    fail(ErrorCode::InvalidProgram, "[%s] width %lld must be a multiple of head_dim %lld, and head_dim >= 2 x %lld", op,
         static_cast<long long>(width), static_cast<long long>(headDim), static_cast<long long>(half));
  }
  const float* frequencies = vectorF32(args, args.in[2]);
  const VectorOps& vector = vectorOps();
  const bool one = rows * width <= kParallelElements;
  float* angles = args.scratch<float>((one ? 1 : threadCount()) * 2 * std::max<int64_t>(half, 1));
  forChunks(rows, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int worker) {
    float* cosine = angles + worker * 2 * half;
    float* sine = cosine + half;
    for (int64_t r = begin; r < end; ++r) {
      vector.rotation(static_cast<float>(positions[r]), frequencies, sign, magnitude, cosine, sine, half);
      for (int64_t start = r * width; start < (r + 1) * width; start += headDim) {
        vector.rotate(x + start, cosine, sine, y + start, half);
        if (x != y) std::memcpy(y + start + 2 * half, x + start + 2 * half, (headDim - 2 * half) * sizeof(float));
      }
    }
  });
}

}  // namespace elastiform::cpu
