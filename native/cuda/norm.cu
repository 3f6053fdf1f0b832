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
  float offset = 0;  // added to the weights
};

// The parts of a row that are normalised by themselves, of as many features as there are weights: part i is group
// i % count of row i / count.
struct Groups {
  int width, count;

  // No more than `rstd`, where it is, has columns for: dims that the host saw the bounds of may not fit each other.
  DEVICE Groups(const Operand& y, const Operand& weight, const Operand& rstd)
      : width(max(weight.size(0), 1)), count(y.size(1) / width) {
    if (rstd && rstd.rank == 2) count = min(count, rstd.size(1));
  }
  DEVICE int64_t start(const Operand& rows, int i) const {
    if (!rows) return int64_t{i} * width;
    const int row = i / count;
    return (int64_t{ldGlobal(rows.i32() + row)} * count + (i - row * count)) * width;
  }
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
  const Groups groups(n.y, n.weight, n.rstd);
  const int count = n.y.size(0) * groups.count, width = groups.width;
  for (int r = (blockIdx.x * kThreads + threadIdx.x) / kGroup; r < count; r += gridDim.x * (kThreads / kGroup)) {
    const Row<V, kGroup> row(n.x.f32() + groups.start(n.rows, r), width);
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
      V value = each([&](float v, float w) { return centred(v) * rstd * (n.offset + w); }, x, load<V>(n.weight, c));
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
  if (n.weight.size(0) % 4 == 0 && startsAligned(n.x, n.weight, n.bias, n.y)) {
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
  float offset = 0;
};

// A group has a part of the rows, and its threads have the same columns in all of them. A row is read again after the
// sums over it: it is in the cache by then.
template <bool kCentred, int kGroup>
__global__ void __launch_bounds__(kThreads, 4) normGradKernel(NormGrad n, StepState state) {
  SHARED_MEMORY(NormShared, s);
  if (state.faulted()) return;
  const Groups groups(n.dx, n.weight, n.rstd);
  const int count = n.dx.size(0), width = groups.width, member = threadIdx.x % kGroup;
  const int length = n.split.length(count), parts = n.split.parts(count);
  const bool vectors = width % 4 == 0 && startsAligned(n.dy, n.x, n.weight, n.dx);
  const auto forRow = [&](const auto& body) { forColumns(width, vectors, member, kGroup, body); };
  for (int p = (blockIdx.x * kThreads + threadIdx.x) / kGroup; p < parts; p += gridDim.x * (kThreads / kGroup)) {
    const int begin = p * length * groups.count, end = begin + min(length, count - p * length) * groups.count;
    for (int r = begin; r < end; ++r) {
      const int64_t row = int64_t{r} * width;
      const float* x = n.x.f32() + groups.start(n.rows, r);
      float* dx = n.dx.f32() + int64_t{r} * width;
      const float mean = kCentred ? ldGlobal(n.mean.f32() + r) : 0.f, rstd = ldGlobal(n.rstd.f32() + r);
      const auto centred = [&](float v) { return kCentred ? v - mean : v; };
      float plain = 0, inner = 0;
      forRow([&]<typename V>(int c) {
        const V dyw = each([&](float d, float w) { return d * (n.offset + w); }, load<V>(n.dy, row + c),
                           load<V>(n.weight, c));
        inner += sumOf(each([&](float d, float v) { return d * centred(v); }, dyw, ldGlobal<V>(x + c)));
        if constexpr (kCentred) plain += sumOf(dyw);
      });
      const float pull = rstd * rstd * (groupSum<kGroup>(inner, s) / width);
      if constexpr (kCentred) plain = groupSum<kGroup>(plain, s) / width;
      forRow([&]<typename V>(int c) {
        const V d = load<V>(n.dy, row + c), v = ldGlobal<V>(x + c);
        stGlobal(dx + c, each([&](float d, float v, float w) {
                   return rstd * (d * (n.offset + w) - plain - centred(v) * pull);
                 }, d, v, load<V>(n.weight, c)));
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
  const int64_t width = n.weight.bound[0], count = n.y.bound[0] * (n.y.bound[1] / width);
  const bool warps = width <= kWarpWidth;
  LAUNCH((warps ? normKernel<kCentred, 32> : normKernel<kCentred, kThreads>),
         launch.blocks(count, warps ? kThreads / 32 : 1), kThreads, sizeof(NormShared), launch.stream, n,
         static_cast<float>(eps), launch.state);
}

// rows: the input that is n.rows. Gradients that are not wanted are absent.
template <bool kCentred>
void normGrad(const Launch& launch, int rows, NormGrad n, const Operand& dweight, const Operand& dbias) {
  if (n.rows) checkRows(launch, rows, n.x, 0);
  // Longer parts leave fewer sums to write and to add up.
  if (dweight || dbias) n.split = Split{4, 1024};
  const int64_t parts = n.split.parts(static_cast<int>(n.dx.bound[0]));
  if (dweight) n.dweight = launch.scratch<float>(parts * n.weight.bound[0]);
  if (dbias) n.dbias = launch.scratch<float>(parts * n.weight.bound[0]);
  const bool warps = n.weight.bound[0] <= kWarpWidth;
  LAUNCH((warps ? normGradKernel<kCentred, 32> : normGradKernel<kCentred, kThreads>),
         launch.blocks(parts, warps ? kThreads / 32 : 1), kThreads, sizeof(NormShared), launch.stream, n,
         launch.state);
  const auto sum = [&](const float* part, const Operand& y) {
    sumColumns<float, float>(launch, {part, y, n.dx, n.split, {}, {}}, Split{1, 1}, static_cast<float*>(y.data));
  };
  if (dweight) sum(n.dweight, dweight);
  if (dbias) sum(n.dbias, dbias);
}

void checkGroups(const Launch& launch, const Operand& weight, const Operand& rstd, int64_t width) {
  const int64_t features = weight.bound[0];
  if (features < 1 || width % features != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] weight must be as wide as x, %lld, or a part of it, got %lld", launch.op,
         static_cast<long long>(width), static_cast<long long>(features));
  }
  if (rstd && rstd.bound[1] != width / features) {
    fail(ErrorCode::InvalidProgram, "[%s] rstd must have %lld columns, one for every group, got %lld", launch.op,
         static_cast<long long>(width / features), static_cast<long long>(rstd.bound[1]));
  }
}

}  // namespace

void rmsNorm(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  checkGroups(launch, in[1], out[1], out[0].bound[1]);
  const float offset = static_cast<float>(launch.finiteAttribute(1, "offset"));
  norm<false>(launch, 2, {in[0], in[1], {}, in[2], out[0], {}, out[1], offset});
}

void rmsNormGrad(const Launch& launch) {
  const Operand *in = launch.in, *out = launch.out;
  checkGroups(launch, in[2], in[3], out[0].bound[1]);
  const float offset = static_cast<float>(launch.finiteAttribute(0, "offset"));
  normGrad<false>(launch, 4, {in[0], in[1], in[2], {}, in[3], in[4], out[0], nullptr, nullptr, {}, offset}, out[1], {});
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
