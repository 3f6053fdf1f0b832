// The matrix engine: C[M,N] = A[M,K] B[N,K]^T with gathers, weights of any dtype and fused epilogues (gemm.cu).
//
// Every element of C is one chain of fused multiply-adds over k = 0..K-1 in ascending order from 0, as on the CPU
// (cpu/gemm/gemm.h), whichever of the kernel's loops computes it: a row's result does not depend on the rows beside it,
// and a product over a prefix of K or N has the bits of the product of the extracted matrices.
#pragma once

#include "cuda/activation.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

// Of operands, on the host.
inline float* floats(const Operand& x) { return static_cast<float*>(x.data); }
inline const int32_t* indices(const Operand& x) { return static_cast<const int32_t*>(x.data); }

// Rows [first, first + most) of a dim.
struct Extent {
  const int32_t* size = nullptr;   // of the dim, on the device
  const int32_t* limit = nullptr;  // of a dim that must be as large, where that is another
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
    const int whole = limit ? min(ldGlobal(size), ldGlobal(limit)) : ldGlobal(size);
    return max(0, min(whole - first, most));
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
  explicit Matrix(const Operand& x, const Operand& gather = {})
      : data(x.data), dtype(x.dtype), rows(indices(gather)) {}

  DEVICE int row(int i) const { return rows ? ldGlobal(rows + i) : first + i; }
};

inline Matrix weight(const Operand& w) {
  Matrix m(w);
  m.stride = static_cast<int>(w.stride);
  return m;
}

// C[m, n] goes through, in this order: y = c + bias[n]; pre[m, n] = y; y = act(y); y *= rowScale[m]; y += add[row, n];
// out[row, n] = y, row = rows ? rows[m] : first + m. A product of two weights makes g and u of c and gives act(g) u.
struct Product {
  Extent m, n, k;
  Matrix a, b[2];
  Operand bias[2];
  float* pre[2] = {nullptr, nullptr};
  Act act = Act::None;
  const float* rowScale = nullptr;
  const float* add = nullptr;  // may be `out`
  float* out = nullptr;
  const int32_t* rows = nullptr;
  int first = 0;
  StepState state;
  bool countsFlops = true, countsRows = false;
  int multiprocessors = 0;

  Product(const Launch& launch, Extent m, Extent n, Extent k)
      : m(m), n(n), k(k), state(launch.state), multiprocessors(launch.multiprocessors) {}
};

// Rows of C that a block computes at most.
constexpr int kProductRows = 128;

// Launch a product: with the weight b[0] of [N, K]; with both weights, of one dtype; with the weight b[0] of [K, N];
// and over rows, of A [K, M] and B [K, N], both activations.
void multiplyWeight(const Launch& launch, const Product& p);
void multiplyWeights(const Launch& launch, const Product& p);
void multiplyTransposed(const Launch& launch, const Product& p);
void multiplyRows(const Launch& launch, const Product& p);

}  // namespace elastiform::ELASTIFORM_DEVICE
