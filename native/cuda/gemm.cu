// Chooses the kernel of a product, and converts a factor where the kernel wants it in the other precision.
#include "cuda/gemm.cuh"

#include "cuda/vector.cuh"

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

// A contiguous copy of the rows of x in another precision.
template <typename T>
Matrix converted(const Launch& launch, const Matrix& x, const Extent& rows, const Extent& columns) {
  T* data = launch.scratch<T>(rows.boundCount() * columns.boundCount());
  Matrix y(data);
  y.scale = x.scale;
  Conversion t{x, rows, columns, {}, {}};
  t.from.data = const_cast<void*>(x.data);
  t.from.dtype = x.dtype;
  t.to.data = data;
  t.to.dtype = y.dtype;
  LAUNCH(convertKernel, launch.blocks(rows.boundCount() * columns.boundCount(), 4 * kThreads), kThreads, 0,
         launch.stream, t, launch.state);
  return y;
}

// Few rows of C are bound by reading the weights, for which CUDA cores suffice.
constexpr int kFewRows = 32;

// A weight: rows of B are the same for all rows of A.
template <Layout kLayoutB, int kParts = 1>
void multiplyByWeight(const Launch& launch, Product p) {
  const bool narrow = p.a.dtype == DType::BF16 || p.out.dtype == DType::BF16;
  const bool few = kLayoutB == Layout::AlongK && p.m.boundCount() <= kFewRows;
  if (narrow && p.b[0].dtype == DType::BF16 && !few) {
    if (p.a.dtype != DType::BF16) p.a = converted<bf16>(launch, p.a, p.m, p.k);
    multiplyMma<Layout::AlongK, kLayoutB, kParts>(launch, p);
  } else {
    if (p.a.dtype != DType::F32) p.a = converted<float>(launch, p.a, p.m, p.k);
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
  if (p.a.dtype != DType::F32) q.a = converted<float>(launch, p.a, p.k, p.m);
  if (p.b[0].dtype != DType::F32) q.b[0] = converted<float>(launch, p.b[0], p.k, p.n);
  multiplyF32<Layout::AcrossK, Layout::AcrossK, 1>(launch, q);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
