// Sums over the rows of a matrix in an order that the number of rows alone decides.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

// Rows in parts of one length (the last may be shorter): at most `most` parts, of at least `least` rows.
struct Split {
  int least = 1, most = INT_MAX;

  __host__ __device__ int length(int count) const {
    const int even = (count - 1) / most + 1;
    return even > least ? even : least;
  }
  __host__ __device__ int parts(int count) const { return count > 0 ? (count - 1) / length(count) + 1 : 0; }
};

template <typename In>
struct ColumnSums {
  const In* x;         // [rows of x, width]
  Operand width;       // its first dim
  Operand counted;     // x has a row for every part
  Split given;         // of the first dim of `counted`
  Operand rows, gate;  // optional: which rows of x, and their factors
  double flops = 0;    // counted for every element
};

constexpr int kColumns = 32, kColumnWarps = 32;

DEVICE double wide(double x) { return x; }
DEVICE double wide(float x) { return x; }
DEVICE double wide(bf16 x) { return toFloat(x); }

struct ColumnSumsShared {
  double sum[kColumnWarps][kColumns];
};

// y[p, c] = sum of gate[r] x[rows[r], c] over the rows r of part p, in double; one part at least, zeros without rows.
// Lanes have a column each, warps take rows in turn, and the sums of warps are added in their order.
template <typename In, typename Out>
__global__ void __launch_bounds__(kColumnWarps * 32, 1)
    columnSumsKernel(ColumnSums<In> a, Split split, Out* y, StepState state) {
  SHARED_MEMORY(ColumnSumsShared, s);
  if (state.faulted()) return;
  const int lane = laneId(), warp = warpId(), width = a.width.size(0);
  const int count = a.given.parts(a.counted.size(0)), length = split.length(count), parts = max(1, split.parts(count));
  if (a.flops > 0 && blockIdx.x + blockIdx.y + threadIdx.x == 0) state.count(a.flops * count * width, 0);
  for (int p = blockIdx.y; p < parts; p += gridDim.y) {
    const int begin = p * length, end = begin + min(length, count - begin);
    for (int first = blockIdx.x * kColumns; first < width; first += gridDim.x * kColumns) {
      const int c = first + lane;
      double sum = 0;
      if (c < width) {
        for (int r = begin + warp; r < end; r += kColumnWarps) {
          const int64_t row = a.rows ? ldGlobal(a.rows.i32() + r) : r;
          sum += (a.gate ? double{load<float>(a.gate, r)} : 1.0) * wide(ldGlobal(a.x + row * width + c));
        }
      }
      s.sum[warp][lane] = sum;
      syncThreads();  // the sums of all warps are there
      if (warp == 0 && c < width) {
        for (int w = 1; w < kColumnWarps; ++w) sum += s.sum[w][lane];
        stGlobal(y + int64_t{p} * width + c, static_cast<Out>(sum));
      }
      syncThreads();  // they may be overwritten
    }
  }
}

// y: [split.parts(rows), width].
template <typename In, typename Out>
void sumColumns(const Launch& launch, const ColumnSums<In>& a, Split split, Out* y) {
  const int64_t tiles = std::max<int64_t>(1, (a.width.bound[0] + kColumns - 1) / kColumns);
  const int64_t parts = std::max(1, split.parts(a.given.parts(static_cast<int>(a.counted.bound[0]))));
  const int64_t high = std::clamp<int64_t>(launch.blocks(tiles * parts, 1) / tiles, 1, parts);
  LAUNCH((columnSumsKernel<In, Out>), dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(high)),
         kColumnWarps * 32, sizeof(ColumnSumsShared), launch.stream, a, split, y, launch.state);
}

// y = sum of gate[r] x[rows[r]] over all rows of f32 or bf16; `dim` of y is the width; `flops` are counted for every
// element (rows.cu).
void sumOfRows(const Launch& launch, const Operand& x, const Operand& rows, const Operand& gate, const Operand& y,
               int dim, double flops);

}  // namespace elastiform::ELASTIFORM_DEVICE
