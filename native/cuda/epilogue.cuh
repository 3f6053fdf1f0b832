// What the kernels of products share: where tiles lie, and what becomes of an element of C.
#pragma once

#include "cuda/four.cuh"
#include "cuda/gemm.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

// Counts the product; whether there is anything to compute.
template <int kParts>
DEVICE bool begin(const Product& p, int M, int N, int K) {
  if (p.countsFlops && blockIdx.x == 0 && threadIdx.x == 0) {
    double depth = double{kParts} * K;
    for (const Patch& patch : p.patch) depth += patch ? patch.p.count() : 0;
    p.state.count(2. * M * N * depth, p.countsRows ? M : 0);
  }
  return M > 0 && N > 0 && (K > 0 || p.add.data != p.out.data || p.bias[0] || p.patched());
}

// Where tile `index` begins. Tiles come in bands of some rows of them, which share what the caches hold of B.
struct TilePlace {
  int m, n;

  DEVICE TilePlace(int index, int tilesM, int tilesN, int rows, int columns, int bandRows = 16) {
    const int band = index / (bandRows * tilesN) * bandRows, height = min(bandRows, tilesM - band);
    const int inBand = index - band * tilesN;
    m = (band + inBand % height) * rows;
    n = inBand / height * columns;
  }
};

DEVICE float activated(Act act, float x) {
  switch (act) {
    case Act::None: return x;
    case Act::GeluTanh: return activate<Act::GeluTanh>(x);
    case Act::GeluErf: return activate<Act::GeluErf>(x);
    case Act::Silu: return activate<Act::Silu>(x);
    case Act::Relu: return activate<Act::Relu>(x);
  }
  return x;
}

// Elements [at, at + 4) of cells, of which there are `count`.
DEVICE float4 loadCells(const Cells& x, int64_t at, int count) {
  if (x.dtype == DType::F32) return widened<float>(loadFour(static_cast<const float*>(x.data) + at, count));
  return widened<bf16>(loadFour(static_cast<const bf16*>(x.data) + at, count));
}
DEVICE void storeCells(const Cells& x, int64_t at, const float4& v, int count) {
  if (x.dtype == DType::F32) {
    storeFour(static_cast<float*>(x.data) + at, v, count);
  } else {
    storeFour(static_cast<bf16*>(x.data) + at, v, count);
  }
}

// Columns n .. n+3 of row m of C, of which N - n exist, through the epilogue (gemm.cuh); y: a product for each weight.
// Returns their part of the dot product, for finishDot, where kHasDots of the layouts.
template <int kParts, bool kDots>
DEVICE float finishFour(const Product& p, float (&y)[kParts][4], int m, int n, int N) {
  const int left = N - n;
  UNROLL
  for (int part = 0; part < kParts; ++part) {
    if (p.bias[part]) {
      UNROLL
      for (int j = 0; j < 4; ++j) y[part][j] += j < left ? load<float>(p.bias[part], n + j) : 0.f;
    }
    if (p.pre[part]) storeCells(p.pre[part], int64_t{m} * N + n, gathered(y[part]), left);
  }
  UNROLL
  for (int j = 0; j < 4; ++j) y[0][j] = activated(p.act, y[0][j]);
  if constexpr (kParts == 2) {
    UNROLL
    for (int j = 0; j < 4; ++j) y[0][j] *= y[1][j];
  }
  float dot = 0;
  if (kDots && p.dots) {
    float with[4];
    spread(loadCells(p.dotWith, int64_t{m} * N + n, left), with);
    UNROLL
    for (int j = 0; j < 4; ++j) dot += j < left ? y[0][j] * with[j] : 0.f;
  }
  if (p.rowScale) {
    const float scale = ldGlobal(p.rowScale + m);
    UNROLL
    for (int j = 0; j < 4; ++j) y[0][j] *= scale;
  }
  const int64_t at = int64_t{p.rows ? ldGlobal(p.rows + m) : p.first + m} * N + n;
  if (p.add) {
    float added[4];
    spread(loadCells(p.add, at, left), added);
    UNROLL
    for (int j = 0; j < 4; ++j) y[0][j] += added[j];
  }
  storeCells(p.out, at, gathered(y[0]), left);
  return dot;
}

// The part of 64 columns from n of row m, of which 16 neighbouring lanes have four each; all lanes of the warp call.
DEVICE void finishDot(const Product& p, float dot, int m, int n, int N, bool inside) {
  if (!p.dots) return;
  UNROLL
  for (int lanes = 8; lanes > 0; lanes /= 2) dot += shflXor(dot, lanes);
  if (inside && n % kDotColumns == 0) stGlobal(p.dots + int64_t{m} * dotParts(N) + n / kDotColumns, dot);
}

// `rows` rows from m and kSpan / kParts columns from n of C through the epilogue; c is [rows][kPitch] in shared memory,
// the parts side by side.
template <int kSpan, int kParts, int kPitch, int kThreads, bool kDots>
DEVICE void finishTile(const Product& p, const float* c, int m, int rows, int n, int N) {
  constexpr int kPart = kSpan / kParts, kFours = kPart / 4;
  const int count = rows * kFours;
  for (int i = threadIdx.x; i / 32 * 32 < count; i += kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const bool inside = i < count && n + column < N;
    float dot = 0;
    if (inside) {
      float y[kParts][4];
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        spread(ldShared<float4>(c + row * kPitch + part * kPart + column), y[part]);
      }
      dot = finishFour<kParts, kDots>(p, y, m + row, n + column, N);
    }
    if constexpr (kDots) finishDot(p, dot, m + row, n + column, N, inside);
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
