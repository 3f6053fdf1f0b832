// RMS and layer normalisation of (gathered) rows, and their gradients.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/sums.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

// A group of threads has a row: a warp up to a width, a block above it.
constexpr int kThreads = 256;
constexpr int kWarpWidth = 1024;

struct NormShared {
  float partial[kThreads / 32];
};

// The sum of the values of a group of kGroup threads, in all of them.
template <int kGroup>
DEVICE float groupSum(float value, NormShared& s) {
  static_assert(kGroup == 32 || kGroup == kThreads);
  return kGroup == 32 ? warpSum(value) : blockTotal(value, s.partial);
}

struct Norm {
  Operand x, weight, bias, rows;
  Operand y, mean, rstd;
};

// A row of x that a group of kGroup threads has. It is read once: what a thread has of it is in registers, but for the
// columns past kHeld steps of the group.
template <typename V, int kGroup>
struct Row {
  static constexpr int kHeld = 6, kLanes = sizeof(V) / sizeof(float), kStep = kGroup * kLanes;
  const float* x;
  int width, first = static_cast<int>(threadIdx.x) % kGroup * kLanes;
  V held[kHeld] = {};

  DEVICE Row(const float* x, int width) : x(x), width(width) {
    UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < width) held[i] = ldGlobal<V>(x + first + i * kStep);
    }
  }
  // Calls body(elements, column) on the elements of this thread.
  template <typename Body>
  DEVICE void each(const Body& body) const {
    UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < width) body(held[i], first + i * kStep);
    }
    for (int c = first + kHeld * kStep; c < width; c += kStep) body(ldGlobal<V>(x + c), c);
  }
};

template <typename V, bool kCentred, int kGroup>
DEVICE void normRows(const Norm& n, float eps, NormShared& s) {
  const int count = n.y.size(0), width = n.y.size(1);
  for (int r = (blockIdx.x * kThreads + threadIdx.x) / kGroup; r < count; r += gridDim.x * (kThreads / kGroup)) {
    const Row<V, kGroup> row(n.x.f32() + int64_t{n.rows ? ldGlobal(n.rows.i32() + r) : r} * width, width);
    float mean = 0;
    if constexpr (kCentred) {
      float sum = 0;
      row.each([&](const V& x, int) { sum += sumOf(x); });
      mean = groupSum<kGroup>(sum, s) / width;
    }
    const auto centred = [&](float v) { return kCentred ? v - mean : v; };
    float square = 0;
    row.each([&](const V& x, int) {
      square += sumOf(each([&](float v) { return centred(v) * centred(v); }, x));
    });
    const float rstd = 1.f / sqrtf(groupSum<kGroup>(square, s) / width + eps);
    row.each([&](const V& x, int c) {
      V value = each([&](float v, float w) { return centred(v) * rstd * w; }, x, load<V>(n.weight, c));
      if (n.bias) value = each(Sum{}, value, load<V>(n.bias, c));
      store(n.y, int64_t{r} * width + c, value);
    });
    if (row.first == 0 && n.mean) stGlobal(n.mean.f32() + r, mean);
    if (row.first == 0 && n.rstd) stGlobal(n.rstd.f32() + r, rstd);
  }
}

template <bool kCentred, int kGroup>
__global__ void __launch_bounds__(kThreads, 3) normKernel(Norm n, float eps, StepState state) {
  SHARED_MEMORY(NormShared, s);
  if (state.faulted()) return;
  if (n.y.size(1) % 4 == 0 && startsAligned(n.x, n.weight, n.bias, n.y)) {
    normRows<float4, kCentred, kGroup>(n, eps, s);
  } else {
    normRows<float, kCentred, kGroup>(n, eps, s);
  }
}

struct NormGrad {
  Operand dy, x, weight, mean, rstd, rows;
  Operand dx;
  float *dweight, *dbias;  // [parts of the rows, width] where wanted, or null
  Split split;
};

// A group has a part of the rows, and its threads have the same columns in all of them. A row is read again after the
// sums over it: it is in the cache by then.
template <bool kCentred, int kGroup>
__global__ void __launch_bounds__(kThreads, 4) normGradKernel(NormGrad n, StepState state) {
  SHARED_MEMORY(NormShared, s);
  if (state.faulted()) return;
  const int count = n.dx.size(0), width = n.dx.size(1), member = threadIdx.x % kGroup;
  const int length = n.split.length(count), parts = n.split.parts(count);
  const bool vectors = width % 4 == 0 && startsAligned(n.dy, n.x, n.weight, n.dx);
  const auto forRow = [&](const auto& body) { forColumns(width, vectors, member, kGroup, body); };
  for (int p = (blockIdx.x * kThreads + threadIdx.x) / kGroup; p < parts; p += gridDim.x * (kThreads / kGroup)) {
    const int begin = p * length, end = begin + min(length, count - begin);
    for (int r = begin; r < end; ++r) {
      const int64_t row = int64_t{r} * width;
      const float* x = n.x.f32() + int64_t{n.rows ? ldGlobal(n.rows.i32() + r) : r} * width;
      float* dx = n.dx.f32() + int64_t{r} * width;
      const float mean = kCentred ? ldGlobal(n.mean.f32() + r) : 0.f, rstd = ldGlobal(n.rstd.f32() + r);
      const auto centred = [&](float v) { return kCentred ? v - mean : v; };
      float plain = 0, inner = 0;
      forRow([&]<typename V>(int c) {
        const V dyw = each([](float d, float w) { return d * w; }, load<V>(n.dy, row + c), load<V>(n.weight, c));
        inner += sumOf(each([&](float d, float v) { return d * centred(v); }, dyw, ldGlobal<V>(x + c)));
        if constexpr (kCentred) plain += sumOf(dyw);
      });
      const float pull = rstd * rstd * (groupSum<kGroup>(inner, s) / width);
      if constexpr (kCentred) plain = groupSum<kGroup>(plain, s) / width;
      forRow([&]<typename V>(int c) {
        const V d = load<V>(n.dy, row + c), v = ldGlobal<V>(x + c);
        stGlobal(dx + c, each([&](float d, float v, float w) { return rstd * (d * w - plain - centred(v) * pull); }, d,
                              v, load<V>(n.weight, c)));
        if (n.dweight) {
          float* sum = n.dweight + int64_t{p} * width + c;
          stGlobal(sum, each([&](float d, float v, float sum) { return fmaf(d, centred(v) * rstd, sum); }, d, v,
                             r > begin ? ldGlobal<V>(sum) : V{}));
        }
        if (n.dbias) {
          float* sum = n.dbias + int64_t{p} * width + c;
          stGlobal(sum, each(Sum{}, d, r > begin ? ldGlobal<V>(sum) : V{}));
        }
      });
    }
  }
}

template <bool kCentred>
void norm(const Launch& launch, int rows, const Norm& n) {
  const double eps = launch.finiteAttribute(0, "eps");
  if (eps < 0) fail(ErrorCode::InvalidProgram, "[%s] attribute eps must not be negative, got %g", launch.op, eps);
  if (n.rows) checkRows(launch, rows, n.x, 0);
  const bool warps = n.y.bound[1] <= kWarpWidth;
  LAUNCH((warps ? normKernel<kCentred, 32> : normKernel<kCentred, kThreads>),
         launch.blocks(n.y.bound[0], warps ? kThreads / 32 : 1), kThreads, sizeof(NormShared), launch.stream, n,
         static_cast<float>(eps), launch.state);
}

// rows: the input that is n.rows. Gradients that are not wanted are absent.
template <bool kCentred>
void normGrad(const Launch& launch, int rows, NormGrad n, const Operand& dweight, const Operand& dbias) {
  if (n.rows) checkRows(launch, rows, n.x, 0);
  // Longer parts leave fewer sums to write and to add up.
  if (dweight || dbias) n.split = Split{4, 1024};
  const int64_t parts = n.split.parts(static_cast<int>(n.dx.bound[0]));
  if (dweight) n.dweight = launch.scratch<float>(parts * n.dx.bound[1]);
  if (dbias) n.dbias = launch.scratch<float>(parts * n.dx.bound[1]);
  const bool warps = n.dx.bound[1] <= kWarpWidth;
  LAUNCH((warps ? normGradKernel<kCentred, 32> : normGradKernel<kCentred, kThreads>),
         launch.blocks(parts, warps ? kThreads / 32 : 1), kThreads, sizeof(NormShared), launch.stream, n,
         launch.state);
  const auto sum = [&](const float* part, const Operand& y) {
    sumColumns<float, float>(launch, {part, y, n.dx, n.split, {}, {}}, Split{1, 1}, static_cast<float*>(y.data));
  };
  if (dweight) sum(n.dweight, dweight);
  if (dbias) sum(n.dbias, dbias);
}

}  // namespace

void rmsNorm(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  norm<false>(launch, 2, {in[0], in[1], {}, in[2], out[0], {}, out[1]});
}

void rmsNormGrad(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  normGrad<false>(launch, 4, {in[0], in[1], in[2], {}, in[3], in[4], out[0], nullptr, nullptr, {}}, out[1], {});
}

void layerNorm(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  norm<true>(launch, 3, {in[0], in[1], in[2], in[3], out[0], out[1], out[2]});
}

void layerNormGrad(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  normGrad<true>(launch, 5, {in[0], in[1], in[2], in[3], in[4], in[5], out[0], nullptr, nullptr, {}}, out[1], out[2]);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
