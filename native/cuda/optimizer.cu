// Gradient accumulation and AdamW over one flat vector of parameters.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

DEVICE int lastSize(const Operand& x) {
  int size = 1;
  UNROLL  // constant indices: the operand stays in the kernel's parameters
  for (int i = 0; i < kMaxRank; ++i) size = i < x.rank ? x.size(i) : size;
  return size;
}

__global__ void __launch_bounds__(kThreads, 8)
    accumulateKernel(Operand sum, Operand x, int64_t stride, StepState state) {
  if (state.faulted()) return;  // states keep what they hold when a step before has failed
  const auto add = [&]<typename V>(int64_t to, int64_t from) {
    stGlobal(sum.f32() + to, each(Sum{}, ldGlobal<V>(sum.f32() + to), ldGlobal<V>(x.f32() + from)));
  };
  const int64_t count = x.elements();
  const int width = lastSize(x);
  if (stride == width || count == width) {
    forElements(count, startsAligned(sum, x), [&]<typename V>(int64_t i) { add.template operator()<V>(i, i); });
    return;
  }
  const bool vectors = width % 4 == 0 && stride % 4 == 0 && startsAligned(sum, x);
  forCells(static_cast<int>(count / width), width, vectors, [&]<typename V>(int r, int c) {
    add.template operator()<V>(r * stride + c, int64_t{r} * width + c);
  });
}

// ---- AdamW: the norm in two steps, then the update
//
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2, with torch.optim.AdamW's placement of
// eps: p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

constexpr int kSquares = 8192;  // elements of one partial sum: with the order in a block it fixes the order of the norm
constexpr int kNormThreads = 1024;

struct SquaresShared {
  double partial[kThreads / 32];
};

__global__ void __launch_bounds__(kThreads, 4) squaresKernel(Operand g, double* squares) {
  SHARED_MEMORY(SquaresShared, s);
  const int64_t count = g.size(0);
  for (int64_t first = int64_t{kSquares} * blockIdx.x; first < count; first += int64_t{kSquares} * gridDim.x) {
    double sum = 0;
    UNROLL
    for (int j = 0; j < kSquares; j += kThreads) {
      const int64_t i = first + j + threadIdx.x;
      const double x = i < count ? ldGlobal(g.f32() + i) : 0.f;
      sum += x * x;
    }
    sum = blockTotal(sum, s.partial);
    if (threadIdx.x == 0) stGlobal(squares + first / kSquares, sum);
  }
}

struct AdamStep {
  float clip;                         // gradient factor
  float beta1Rest, beta2, beta2Rest;  // 1 - beta1, beta2, 1 - beta2
  float rate;                         // lr / (1 - beta1^t)
  float rootCorrection;               // sqrt(1 - beta2^t)
  float eps;
  float shrink;  // 1 - lr * weight decay, for the elements that decay
  bool apply;    // the norm is finite
};

struct StepShared {
  double partial[kNormThreads / 32];
};

__global__ void __launch_bounds__(kNormThreads, 1)
    stepKernel(Operand hyper, Operand g, const double* squares, Operand norm, AdamStep* step, StepState state) {
  SHARED_MEMORY(StepShared, s);
  const int blocks = (g.size(0) + int64_t{kSquares} - 1) / kSquares;
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += kNormThreads) sum += ldGlobal(squares + i);
  const double length = sqrt(blockTotal(sum, s.partial));
  if (threadIdx.x != 0) return;
  float h[8];
  UNROLL
  for (int i = 0; i < 8; ++i) h[i] = ldGlobal(hyper.f32() + i);
  UNROLL
  for (int i = 0; i < 8; ++i) {
    if (!(fabsf(h[i]) < INFINITY)) return state.report(Fault::NotFinite, 4, i, 0, 0, h[i]);
  }
  UNROLL
  for (int i = 6; i < 8; ++i) {
    if (!(h[i] > 0)) return state.report(Fault::NotPositive, 4, i, 0, 0, h[i]);
  }
  stGlobal(norm.f32(), static_cast<float>(length));
  const double lr = h[0], clip = h[5];
  AdamStep next;
  next.clip = static_cast<float>(clip > 0 && length > clip ? clip / (length + 1e-6) : 1.0);
  next.beta1Rest = static_cast<float>(1.0 - h[1]);
  next.beta2 = h[2];
  next.beta2Rest = static_cast<float>(1.0 - h[2]);
  next.rate = static_cast<float>(lr / h[6]);
  next.rootCorrection = static_cast<float>(sqrt(static_cast<double>(h[7])));
  next.eps = h[3];
  next.shrink = static_cast<float>(1.0 - lr * h[4]);
  next.apply = static_cast<float>(length) < INFINITY;
  *step = next;
}

__global__ void __launch_bounds__(kThreads, 4)
    updateKernel(Operand parameters, Operand gradients, Operand first, Operand second, const AdamStep* step,
                 int64_t decayCount, StepState state) {
  if (state.faulted()) return;
  float *p = parameters.f32(), *g = gradients.f32(), *m = first.f32(), *v = second.f32();
  const AdamStep k = *step;
  const bool vectors = startsAligned(parameters, gradients, first, second);
  forElements(parameters.size(0), vectors, [&]<typename V>(int64_t i) {
    if (k.apply) {
      const V grad = each([&](float g) { return g * k.clip; }, ldGlobal<V>(g + i));
      const V mean = each([&](float m, float g) { return m + (g - m) * k.beta1Rest; }, ldGlobal<V>(m + i), grad);
      const V square =
          each([&](float v, float g) { return v * k.beta2 + g * g * k.beta2Rest; }, ldGlobal<V>(v + i), grad);
      const auto shrinkAt = [&](int64_t at) { return at < decayCount ? k.shrink : 1.f; };
      V shrink;
      if constexpr (sizeof(V) == sizeof(float)) {
        shrink = shrinkAt(i);
      } else {
        shrink = {shrinkAt(i), shrinkAt(i + 1), shrinkAt(i + 2), shrinkAt(i + 3)};
      }
      const auto move = [&](float p, float m, float v, float shrink) {
        return p * shrink - k.rate * (m / (sqrtf(v) / k.rootCorrection + k.eps));
      };
      stGlobal(p + i, each(move, ldGlobal<V>(p + i), mean, square, shrink));
      stGlobal(m + i, mean);
      stGlobal(v + i, square);
    }
    stGlobal(g + i, V{});
  });
}

}  // namespace

void accumulate(const Launch& launch) {
  const Operand &state = launch.in[0], &x = launch.in[1];
  const int64_t count = x.boundElements(), width = x.bound[x.rank - 1], rows = count / width, size = state.bound[0];
  const int64_t offset = launch.intAttribute(0, "offset", 0, size);
  const int64_t stride = launch.intAttribute(1, "stride", 0, size);
  if (offset + (rows - 1) * stride + width > size) {
    fail(ErrorCode::InvalidProgram, "[accumulate] %lld rows of %lld, %lld apart, at offset %lld pass the state's end %lld",
         static_cast<long long>(rows), static_cast<long long>(width), static_cast<long long>(stride),
         static_cast<long long>(offset), static_cast<long long>(size));
  }
  if (rows > 1 && stride < width) {
    fail(ErrorCode::InvalidProgram, "[accumulate] rows of %lld must not overlap, got a stride of %lld",
         static_cast<long long>(width), static_cast<long long>(stride));
  }
  Operand sum = state;
  sum.data = static_cast<float*>(state.data) + offset;
  LAUNCH(accumulateKernel, launch.blocks(count, 4 * kThreads), kThreads, 0, launch.stream, sum, x, stride,
         launch.state);
}

void adamw(const Launch& launch) {
  const Operand &p = launch.in[0], &g = launch.in[1], &m = launch.in[2], &v = launch.in[3], &hyper = launch.in[4];
  const int64_t count = p.bound[0];
  const int64_t decayCount = launch.intAttribute(0, "decay_count", 0, count);
  double* squares = launch.scratch<double>((count + kSquares - 1) / kSquares);
  AdamStep* step = launch.scratch<AdamStep>(1);
  LAUNCH(squaresKernel, launch.blocks(count, kSquares), kThreads, sizeof(SquaresShared), launch.stream, g, squares);
  LAUNCH(stepKernel, 1, kNormThreads, sizeof(StepShared), launch.stream, hyper, g, squares, launch.out[0], step,
         launch.state);
  LAUNCH(updateKernel, launch.blocks(count, 4 * kThreads), kThreads, 0, launch.stream, p, g, m, v, step, decayCount,
         launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
