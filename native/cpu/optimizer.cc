// Gradient accumulation and AdamW with clipping by the global norm.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

void accumulate(const KernelArgs& args) {
  float* state = args.in[0].f32();
  const float* x = args.in[1].f32();
  const TensorView& view = args.in[1];
  const int64_t width = view.dim(view.rank - 1), rows = width == 0 ? 0 : view.elements() / width, size = args.in[0].dim(0);
  const int64_t offset = intAttribute(args, "accumulate", 0, "offset", 0, size);
  const int64_t stride = intAttribute(args, "accumulate", 1, "stride", 0, size);
  if (rows > 0 && offset + (rows - 1) * stride + width > size) {
    fail(ErrorCode::InvalidProgram, "[accumulate] %lld rows of %lld, %lld apart, at offset %lld pass the state's end %lld",
         static_cast<long long>(rows), static_cast<long long>(width), static_cast<long long>(stride),
         static_cast<long long>(offset), static_cast<long long>(size));
  }
  if (rows > 1 && stride < width) {
    fail(ErrorCode::InvalidProgram, "[accumulate] rows of %lld must not overlap, got a stride of %lld",
         static_cast<long long>(width), static_cast<long long>(stride));
  }
  state += offset;
  const VectorOps& vector = vectorOps();
  if (rows <= 1 || stride == width) {
    forChunks(rows * width, kParallelElements, args, [&](int64_t begin, int64_t end, int) {
      vector.add(state + begin, x + begin, state + begin, end - begin);
    });
    return;
  }
  forChunks(rows, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) vector.add(state + r * stride, x + r * width, state + r * stride, width);
  });
}

// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2, with torch.optim.AdamW's placement of
// eps: p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
void adamw(const KernelArgs& args) {
  const char* op = "adamw";
  float *p = args.in[0].f32(), *g = args.in[1].f32(), *m = args.in[2].f32(), *v = args.in[3].f32();
  const int64_t count = args.in[0].dim(0);
  const int64_t decayCount = intAttribute(args, op, 0, "decay_count", 0, count);
  const float* hyper = args.in[4].f32();
  for (int i = 0; i < 8; ++i) {
    if (!std::isfinite(hyper[i])) {
      fail(ErrorCode::InvalidData, "[%s] hyper[%d] must be finite, got %g", op, i, static_cast<double>(hyper[i]));
    }
  }
  const double lr = hyper[0], clip = hyper[5];
  if (!(hyper[6] > 0) || !(hyper[7] > 0)) {
    fail(ErrorCode::InvalidData, "[%s] bias corrections hyper[6] and hyper[7] must be positive, got %g and %g", op,
         static_cast<double>(hyper[6]), static_cast<double>(hyper[7]));
  }
  const VectorOps& vector = vectorOps();
  const int64_t block = kParallelElements, blocks = (count + block - 1) / block;
  double* squares = args.scratch<double>(std::max<int64_t>(blocks, 1));
  forChunks(blocks, 1, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      squares[b] = vector.dot(g + b * block, g + b * block, std::min(block, count - b * block));
    }
  });
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += squares[b];
  const double norm = std::sqrt(sum);
  args.out[0].f32()[0] = static_cast<float>(norm);
  if (!std::isfinite(static_cast<float>(norm))) {
    forChunks(count, block, args, [&](int64_t begin, int64_t end, int) {
      std::memset(g + begin, 0, (end - begin) * sizeof(float));
    });
    return;
  }
  AdamStep step;
  step.clip = static_cast<float>(clip > 0 && norm > clip ? clip / (norm + 1e-6) : 1.0);
  step.beta1Rest = static_cast<float>(1.0 - hyper[1]);
  step.beta2 = hyper[2];
  step.beta2Rest = static_cast<float>(1.0 - hyper[2]);
  step.eps = hyper[3];
  step.rate = static_cast<float>(lr / hyper[6]);
  step.rootCorrection = static_cast<float>(std::sqrt(static_cast<double>(hyper[7])));
  const float shrink = static_cast<float>(1.0 - lr * hyper[4]);
  forChunks(count, block, args, [&](int64_t begin, int64_t end, int) {
    const int64_t split = std::clamp(decayCount, begin, end);
    AdamStep part = step;
    part.shrink = shrink;
    vector.adamw(p + begin, g + begin, m + begin, v + begin, part, split - begin);
    part.shrink = 1.0f;
    vector.adamw(p + split, g + split, m + split, v + split, part, end - split);
  });
}

}  // namespace elastiform::cpu
