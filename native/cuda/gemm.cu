// Chooses the kernel of a product, and converts a factor where the kernel wants it in the other precision.
#include "cuda/collectives.cuh"
#include "cuda/epilogue.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

struct Conversion {
  Matrix x;
  Extent rows, columns;
  Operand from;  // x
  Operand to;    // contiguous, the gathered rows of x
};

__global__ void __launch_bounds__(kThreads, 6) convertKernel(Conversion t, StepState state) {
  if (state.faulted()) return;
  const int width = t.columns.count(), stride = t.x.stride ? t.x.stride : width;
  const bool vectors = width % 4 == 0 && stride % 4 == 0 && startsAligned(t.from, t.to);
  forCells(t.rows.count(), width, vectors, [&]<typename V>(int r, int c) {
    store(t.to, int64_t{r} * width + c, load<V>(t.from, int64_t{t.x.row(r)} * stride + c));
  });
}

Operand elements(const Matrix& x) {
  Operand y;
  y.data = const_cast<void*>(x.data);
  y.dtype = x.dtype;
  return y;
}

// A contiguous copy of the rows of x in another precision.
template <typename T>
Matrix converted(const Launch& launch, const Matrix& x, const Extent& rows, const Extent& columns) {
  Matrix y(launch.scratch<T>(rows.boundCount() * columns.boundCount()));
  y.scale = x.scale;
  const Conversion t{x, rows, columns, elements(x), elements(y)};
  LAUNCH(convertKernel, launch.blocks(rows.boundCount() * columns.boundCount(), 4 * kThreads), kThreads, 0,
         launch.stream, t, launch.state);
  return y;
}

// The same where x has that precision.
template <typename T>
Matrix inPrecision(const Launch& launch, const Matrix& x, const Extent& rows, const Extent& columns) {
  return x.dtype == Matrix(static_cast<const T*>(nullptr)).dtype ? x : converted<T>(launch, x, rows, columns);
}

// Both factors of a product, and of its patches.
template <typename T>
void convertFactors(const Launch& launch, Product& p) {
  p.a = inPrecision<T>(launch, p.a, p.m, p.k);
  for (Patch& patch : p.patch) {
    if (!patch) continue;
    patch.u = inPrecision<T>(launch, patch.u, p.m, patch.p);
    patch.b = inPrecision<T>(launch, patch.b, p.n, patch.p);
  }
}

// Routers: few columns of C are bound by reading A, once; a warp has a row.
constexpr int kFewColumns = 4;

__global__ void __launch_bounds__(kThreads, 4)
    fewColumnsKernel(const __grid_constant__ Product p, const __grid_constant__ Operand a,
                     const __grid_constant__ Operand b) {
  if (p.state.faulted()) return;
  const int M = p.m.count(), N = p.n.count(), K = p.k.count(), lane = laneId();
  if (!begin<1>(p, M, N, K)) return;
  const bool vectors = K % 4 == 0 && p.b[0].stride % 4 == 0 && startsAligned(a, b);
  for (int m = blockIdx.x * (kThreads / 32) + warpId(); m < M; m += gridDim.x * (kThreads / 32)) {
    const int64_t row = int64_t{p.a.row(m)} * K;
    float sum[1][kFewColumns] = {};
    forColumns(K, vectors, lane, 32, [&]<typename V>(int k) {
      const V x = load<V>(a, row + k);
      UNROLL
      for (int n = 0; n < kFewColumns; ++n) {
        if (n < N) sum[0][n] += sumOf(each(Times{}, x, load<V>(b, int64_t{n} * p.b[0].stride + k)));
      }
    });
    UNROLL
    for (int n = 0; n < kFewColumns; ++n) sum[0][n] = warpTotal(sum[0][n]);
    if (lane == 0) finishFour<1, false>(p, sum, m, 0, N);
  }
}

// Few rows of C are bound by reading the weights, for which CUDA cores suffice.
constexpr int kFewRows = 32;

// Whether wgmma is to compute a product in bf16: where its tiles of 128 x 128 take no longer than tiles of 64 x 64 by
// mma.sync, a quarter of the work at about half the rate, counted in rounds of all multiprocessors. By bounds, so that a
// row has the same bits at whatever sizes a recording runs.
bool suitsWgmma(const Launch& launch, const Product& p, int parts) {
  if (!launch.hopper) return false;
  for (int i = 0; i < parts; ++i) {
    if (reinterpret_cast<uintptr_t>(p.b[i].data) % 16 != 0 || p.b[i].stride % 8 != 0) return false;
  }
  const auto rounds = [&](int64_t tile) {
    const auto tiles = [&](int64_t size) { return (size + tile - 1) / tile; };
    return (tiles(p.m.boundCount()) * tiles(p.n.boundCount() * parts) + launch.multiprocessors - 1) /
           launch.multiprocessors;
  };
  return 2 * rounds(128) <= rounds(64);
}

// A weight: rows of B are the same for all rows of A.
template <Layout kLayoutB, int kParts = 1>
void multiplyByWeight(const Launch& launch, Product p) {
  const bool narrow = p.a.dtype == DType::BF16 || p.out.dtype == DType::BF16;
  const bool few = kLayoutB == Layout::AlongK && p.m.boundCount() <= kFewRows;
  if (kLayoutB == Layout::AlongK && kParts == 1 && p.a.dtype == DType::BF16 && p.n.boundCount() <= kFewColumns &&
      !p.patched()) {
    LAUNCH(fewColumnsKernel, launch.blocks(p.m.boundCount(), kThreads / 32), kThreads, 0, launch.stream, p,
           elements(p.a), elements(p.b[0]));
    return;
  }
  if (narrow && p.b[0].dtype == DType::BF16 && !few) {
    convertFactors<bf16>(launch, p);
    if (suitsWgmma(launch, p, kParts)) {
      multiplyWgmma<Layout::AlongK, kLayoutB, kParts>(launch, p);
    } else {
      multiplyMma<Layout::AlongK, kLayoutB, kParts>(launch, p);
    }
  } else {
    convertFactors<float>(launch, p);
    multiplyF32<Layout::AlongK, kLayoutB, kParts>(launch, p);
  }
}

}  // namespace

void multiplyWeight(const Launch& launch, const Product& p) { multiplyByWeight<Layout::AlongK>(launch, p); }
void multiplyWeights(const Launch& launch, const Product& p) { multiplyByWeight<Layout::AlongK, 2>(launch, p); }
void multiplyTransposed(const Launch& launch, const Product& p) { multiplyByWeight<Layout::AcrossK>(launch, p); }

void multiplyRows(const Launch& launch, const Product& p) {
  Product q = p;
  if (p.a.dtype == DType::BF16 && p.b[0].dtype == DType::BF16 && !p.a.scale) {
    multiplyMma<Layout::AcrossK, Layout::AcrossK, 1>(launch, p);
    return;
  }
  q.a = inPrecision<float>(launch, p.a, p.k, p.m);
  q.b[0] = inPrecision<float>(launch, p.b[0], p.k, p.n);
  multiplyF32<Layout::AcrossK, Layout::AcrossK, 1>(launch, q);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
