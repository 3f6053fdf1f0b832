// The matrix engine: C[M,N] = A[M,K] B[N,K]^T with gathers, weights of any dtype and fused epilogues. gemm.cu chooses
// between f32 on CUDA cores (gemm_f32.cu) and bf16 on tensor cores (gemm_mma.cu, gemm_wgmma.cu).
//
// Every element of C is one chain over k = 0..K-1 in ascending order from 0, then over the columns of a patch: a row's
// result does not depend on the rows beside it, and a product over a prefix of K or N has the bits of the product of the
// extracted matrices. On CUDA cores it is the chain of fused multiply-adds of the CPU (cpu/gemm/gemm.h), on tensor cores
// one of sums of 16 products.
#pragma once

#include "cuda/activation.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

// Of operands, on the host.
inline float* floats(const Operand& x) { return static_cast<float*>(x.data); }
inline const int32_t* indices(const Operand& x) { return static_cast<const int32_t*>(x.data); }

// Rows [first, first + most) of a dim.
struct Extent {
  const int32_t* size = nullptr;  // of the dim, on the device
  int64_t bound = 0;
  int first = 0, most = INT32_MAX;

  Extent() = default;
  Extent(const Operand& x, int i) : size(x.sizes + x.dim[i]), bound(x.bound[i]) {}
  Extent part(int from, int count) const {
    Extent e = *this;
    e.first = from;
    e.most = count;
    return e;
  }
  DEVICE int count() const {
    return max(0, min(ldGlobal(size) - first, most));
  }
  int64_t boundCount() const { return std::clamp<int64_t>(bound - first, 0, most); }
};

// Activations, or a weight.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::F32;
  int stride = 0;                 // elements between rows; 0: rows are as long as the product is wide
  const int32_t* rows = nullptr;  // row i is row rows[i] in memory, else first + i
  int first = 0;
  const float* scale = nullptr;  // of A in a product over rows: multiplies row i by scale[i]

  Matrix() = default;
  explicit Matrix(const float* activations) : data(activations) {}
  explicit Matrix(const bf16* activations) : data(activations), dtype(DType::BF16) {}
  explicit Matrix(const Operand& x, const Operand& gather = {})
      : data(x.data), dtype(x.dtype), rows(indices(gather)) {}

  DEVICE int row(int i) const { return rows ? ldGlobal(rows + i) : first + i; }
};

inline Matrix weight(const Operand& w) {
  Matrix m(w);
  m.stride = static_cast<int>(w.stride);
  return m;
}

// More columns of A and B, both along k (LoRA): C += u b^T, u [M, P], b [N, P].
struct Patch {
  Extent p;
  Matrix u, b;

  __host__ __device__ explicit operator bool() const { return u.data != nullptr; }
};

// Elements in f32 or bf16 that a product reads or writes beside its factors; null where there are none.
struct Cells {
  void* data = nullptr;
  DType dtype = DType::F32;

  Cells() = default;
  Cells(float* data) : data(data) {}
  Cells(bf16* data) : data(data), dtype(DType::BF16) {}
  Cells(const Operand& x) : data(x.data), dtype(x.dtype) {}
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// C[m, n] goes through, in this order: y = c + bias[n]; pre[m, n] = y; y = act(y); y *= rowScale[m]; y += add[row, n];
// out[row, n] = y, row = rows ? rows[m] : first + m. A product of two weights makes g and u of c and gives act(g) u.
struct Product {
  Extent m, n, k;
  Matrix a, b[2];
  Patch patch[2];  // to the products with b[0] and b[1]; of multiplyWeight and multiplyWeights alone
  Operand bias[2];
  Cells pre[2];
  Act act = Act::None;
  const float* rowScale = nullptr;
  Cells add;      // may be `out`
  Cells dotWith;  // [M, N]: dots[m, i] = the dot product of its columns [64 i, 64 i + 64) with act(..) before rowScale
  float* dots = nullptr;
  Cells out;
  const int32_t* rows = nullptr;
  int first = 0;
  StepState state;
  bool countsFlops = true, countsRows = false;
  int multiprocessors = 0;

  __host__ __device__ bool patched() const { return patch[0] || patch[1]; }

  Product(const Launch& launch, Extent m, Extent n, Extent k)
      : m(m), n(n), k(k), state(launch.state), multiprocessors(launch.multiprocessors) {}
};

// Columns of C that make one of `dots`, and how many there are.
constexpr int kDotColumns = 64;
inline __host__ __device__ int dotParts(int64_t N) { return static_cast<int>((N + kDotColumns - 1) / kDotColumns); }

// Rows of C that a block computes at most.
constexpr int kProductRows = 128;

// How an operand lies in memory: its rows run along k, as activations and weights of [N, K] do, or each is one k.
enum class Layout { AlongK, AcrossK };
// Products that may have patches, and those that may be asked for dots: gradients of inputs.
template <Layout kLayoutA, Layout kLayoutB>
constexpr bool kHasPatches = kLayoutA == Layout::AlongK && kLayoutB == Layout::AlongK;
template <Layout kLayoutA, Layout kLayoutB>
constexpr bool kHasDots = kLayoutA == Layout::AlongK && kLayoutB == Layout::AcrossK;

// Launch a product: with the weight b[0] of [N, K]; with both weights, of one dtype; with the weight b[0] of [K, N];
// and over rows, of A [K, M] and B [K, N], both activations. In bf16, with sums in f32, where both factors are bf16, or
// the weight and the result are; else in f32. Patches are converted to what A and B are multiplied in.
void multiplyWeight(const Launch& launch, const Product& p);
void multiplyWeights(const Launch& launch, const Product& p);
void multiplyTransposed(const Launch& launch, const Product& p);
void multiplyRows(const Launch& launch, const Product& p);

// The kernels. A and B lie as the layouts say, and there are kParts weights. Patches are f32.
template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyF32(const Launch& launch, const Product& p);
// A, B and patches are bf16.
template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyMma(const Launch& launch, const Product& p);
// The same on launch.hopper, where the rows of weights begin at multiples of 16 bytes.
template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyWgmma(const Launch& launch, const Product& p);

}  // namespace elastiform::ELASTIFORM_DEVICE
