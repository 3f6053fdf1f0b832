// The matrix engine: C[M,N] = A[M,K] B[N,K]^T with gathers, packed weights and fused epilogues.
//
// Every element of C is one chain of fused multiply-adds over k = 0..K-1 in ascending order, then over the columns of a
// patch, whatever M, the blocking or the number of threads: a row's result does not depend on the rows beside it, and a
// product over a prefix of K or N equals the product of the extracted matrices, bit for bit.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/tensor.h"
#include "cpu/act.h"
#include "ops/op.h"

namespace elastiform::cpu {

// Element (i, k) is data[row(i) * rowStride + col(k) * colStride], row(i) = rows ? rows[i] : i, col likewise:
// a gather of rows, or (in weight gradients, where the reduction runs over rows) of the reduction index.
struct MatrixA {
  const float* data;
  int64_t rowStride, colStride;
  const int32_t* rows = nullptr;
  const int32_t* cols = nullptr;
  const float* colScale = nullptr;  // multiplies element (i, k) by colScale[k]
};

// Element (n, k) is data[n(n) * nStride + k(k) * kStride] of `dtype`, n(n) = ns ? ns[n] : n, and k likewise. With
// `packed`, that copy is read instead, from its element (packedN, packedK) on (prefixes of N and K of it are fine);
// without, blocks are packed while they are needed. `transposed`: B is the transpose of what is read of the packed copy;
// A must then have no colScale.
struct MatrixB {
  const void* data;
  DType dtype;
  int64_t nStride, kStride;
  const PackedWeight* packed = nullptr;
  const int32_t* ks = nullptr;
  const int32_t* ns = nullptr;
  bool transposed = false;
  int64_t packedN = 0, packedK = 0;  // packedN begins a panel
};

// More columns of A and B (LoRA): C += u b^T, u [M, P] contiguous, b [N, P]. None where u is null.
struct Patch {
  const float* u = nullptr;
  int64_t P = 0;
  MatrixB b{};
};

// What happens to a finished tile of C, in this order: y = c + bias[n]; pre[m,n] = y; y = act(y);
// y *= rowScale[m]; out[row(m), n] (+)= y, row(m) = rows ? rows[m] : m. `out` must not be read by A or B.
struct Epilogue {
  const void* bias = nullptr;
  DType biasDtype = DType::F32;
  int64_t biasStride = 1;
  float* pre = nullptr;  // [M, ldOut]
  Act act = Act::None;
  const float* rowScale = nullptr;
  const int32_t* rows = nullptr;
  bool accumulate = false;
};

// Two products with the same A: g = c1 + bias, u = c2 + bias, out = act(g) * u; g and u [M, ldOut] when wanted.
struct GatedEpilogue {
  const void* bias[2] = {nullptr, nullptr};
  DType biasDtype[2] = {DType::F32, DType::F32};
  int64_t biasStride[2] = {1, 1};
  float* g = nullptr;
  float* u = nullptr;
  Act act = Act::None;
};

void gemm(int64_t M, int64_t N, int64_t K, const MatrixA& a, const MatrixB& b, const Epilogue& epilogue, float* out,
          int64_t ldOut, const KernelArgs& args);

// A product with one weight and its `plain` epilogue, or a gated one with two, none of them transposed.
struct GemmCall {
  int64_t M, N, K;
  MatrixA a;
  int weights = 1;
  MatrixB b[2]{};
  Patch patch[2]{};
  Epilogue plain{};
  GatedEpilogue gated{};
  float* out = nullptr;
  int64_t ldOut = 0;
};

// Products of which none reads what another writes, each with the bits it has alone: with rows that several read packed
// once, and without waiting for one product before the next begins.
void gemmTogether(const std::vector<GemmCall>& calls, const KernelArgs& args);
// Products of the same N, each of which adds to what those before it have left in the same `out`. A thread takes some columns
// through all of them, while its caches hold what it adds to.
void gemmSum(const std::vector<GemmCall>& calls, const KernelArgs& args);

// The weight operand as matrix B ([out, in]); packs read-only weights once, under their lock. A part of a weight reads the
// copy of the whole, unless its rows begin within a panel.
MatrixB weightB(const TensorView& w);
// The same weight as B of the input gradient: n runs over inputs, k over outputs. Reads the same packed copy.
MatrixB weightTransposedB(const TensorView& w);

// The packed copy, when there is one that holds what table look-ups of the weight give: row n is then read from it, and
// a mapped checkpoint does not come back into memory beside it.
const PackedWeight* packedTable(const TensorView& table);
void readPackedRow(const PackedWeight& packed, int64_t n, int64_t width, float* to);

// Bytes held by a packed weight, and by all of them.
int64_t packedBytes(const PackedWeight&);
int64_t packedBytesTotal();

}  // namespace elastiform::cpu
