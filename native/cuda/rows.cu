// Moving and summing rows: gathers, scatters, gated additions and sums, dot product.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/sums.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

unsigned cellBlocks(const Launch& launch, const Operand& cells) {
  return launch.blocks(cells.boundElements(), 4 * kThreads);
}

__global__ void __launch_bounds__(kThreads, 8) gatherKernel(Operand x, Operand rows, Operand y, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1);
  forCells(y.size(0), width, width % 4 == 0 && startsAligned(x, y), [&]<typename V>(int r, int c) {
    store(y, int64_t{r} * width + c, load<V>(x, int64_t{ldGlobal(rows.i32() + r)} * width + c));
  });
}

__global__ void __launch_bounds__(kThreads, 8) gatherIdsKernel(Operand x, Operand rows, Operand y, StepState state) {
  if (state.faulted()) return;
  const int count = y.size(0);
  for (int r = blockIdx.x * kThreads + threadIdx.x; r < count; r += gridDim.x * kThreads) {
    stGlobal(y.i32() + r, ldGlobal(x.i32() + ldGlobal(rows.i32() + r)));
  }
}

__global__ void __launch_bounds__(kThreads, 8) scatterAddKernel(Operand x, Operand rows, Operand y, StepState state) {
  if (state.faulted()) return;
  const int width = x.size(1);
  forCells(x.size(0), width, width % 4 == 0 && startsAligned(x, y), [&]<typename V>(int r, int c) {
    float* to = y.f32() + int64_t{ldGlobal(rows.i32() + r)} * width + c;
    stGlobal(to, each(Sum{}, ldGlobal<V>(to), load<V>(x, int64_t{r} * width + c)));
  });
}

// Counts the rows of x.
__global__ void __launch_bounds__(kThreads, 8)
    addRowsKernel(Operand x, Operand rows, Operand gate, Operand y, StepState state) {
  if (state.faulted()) return;
  const int count = x.size(0), width = x.size(1);
  if (blockIdx.x == 0 && threadIdx.x == 0) state.count(0, count);
  forCells(count, width, width % 4 == 0 && startsAligned(x, y), [&]<typename V>(int r, int c) {
    float* to = y.f32() + int64_t{rows ? ldGlobal(rows.i32() + r) : r} * width + c;
    const float factor = gate ? ldGlobal(gate.f32() + r) : 1.f;
    stGlobal(to, each([&](float sum, float v) { return fmaf(v, factor, sum); }, ldGlobal<V>(to),
                      load<V>(x, int64_t{r} * width + c)));
  });
}

// A warp has a row.
__global__ void __launch_bounds__(kThreads, 4)
    addRowsGradKernel(Operand dy, Operand x, Operand rows, Operand gate, Operand dx, Operand dgate, StepState state) {
  if (state.faulted()) return;
  const int count = dx.size(0), width = dx.size(1);
  const bool vectors = width % 4 == 0 && startsAligned(dy, x, dx);
  constexpr int kWarps = kThreads / 32;
  for (int r = blockIdx.x * kWarps + warpId(); r < count; r += gridDim.x * kWarps) {
    const int64_t from = int64_t{rows ? ldGlobal(rows.i32() + r) : r} * width, to = int64_t{r} * width;
    const float factor = gate ? ldGlobal(gate.f32() + r) : 1.f;
    float sum = 0;
    forColumns(width, vectors, laneId(), 32, [&]<typename V>(int c) {
      const V d = load<V>(dy, from + c);
      if (dgate) sum += sumOf(each(Times{}, d, load<V>(x, to + c)));
      store(dx, to + c, each([&](float v) { return v * factor; }, d));
    });
    if (!dgate) continue;
    sum = warpTotal(sum);
    if (laneId() == 0) stGlobal(dgate.f32() + r, sum);
  }
}

// A dot product is the sum of at most so many parts, one block each.
constexpr int kDotParts = 512;

struct DotShared {
  double partial[kDotParts / 32];
};

__global__ void __launch_bounds__(kThreads, 6) dotPartsKernel(Operand a, Operand b, double* part) {
  SHARED_MEMORY(DotShared, s);
  const int64_t count = a.elements();
  // Of whole rounds of the block, by the number of elements alone.
  const int64_t length = (count + int64_t{kDotParts} * kThreads - 1) / (int64_t{kDotParts} * kThreads) * kThreads;
  const int64_t first = blockIdx.x * length, end = min(first + length, count);
  double sum = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    sum += double{ldGlobal(a.f32() + i)} * double{ldGlobal(b.f32() + i)};
  }
  sum = blockTotal(sum, s.partial);
  if (threadIdx.x == 0) stGlobal(part + blockIdx.x, sum);
}

__global__ void __launch_bounds__(kDotParts, 1) dotKernel(const double* part, int parts, Operand y) {
  SHARED_MEMORY(DotShared, s);
  const int thread = threadIdx.x;
  const double sum = blockTotal(thread < parts ? ldGlobal(part + thread) : 0.0, s.partial);
  if (thread == 0) stGlobal(y.f32(), static_cast<float>(sum));
}

}  // namespace

void gatherRows(const Launch& launch) {
  const Operand &x = launch.in[0], &rows = launch.in[1], &y = launch.out[0];
  checkRows(launch, 1, x, 0);
  LAUNCH(gatherKernel, cellBlocks(launch, y), kThreads, 0, launch.stream, x, rows, y, launch.state);
}

void gatherIds(const Launch& launch) {
  const Operand &x = launch.in[0], &rows = launch.in[1], &y = launch.out[0];
  checkRows(launch, 1, x, 0);
  LAUNCH(gatherIdsKernel, launch.blocks(y.bound[0], kThreads), kThreads, 0, launch.stream, x, rows, y, launch.state);
}

void scatterAdd(const Launch& launch) {
  const Operand &acc = launch.in[0], &x = launch.in[1], &rows = launch.in[2], &y = launch.out[0];
  checkRows(launch, 2, y, 0);
  copy(launch, acc, y);
  LAUNCH(scatterAddKernel, cellBlocks(launch, x), kThreads, 0, launch.stream, x, rows, y, launch.state);
}

void addRows(const Launch& launch) {
  const Operand &residual = launch.in[0], &x = launch.in[1], &rows = launch.in[2], &y = launch.out[0];
  if (rows) checkRows(launch, 2, y, 0);
  copy(launch, residual, y);
  LAUNCH(addRowsKernel, cellBlocks(launch, x), kThreads, 0, launch.stream, x, rows, launch.in[3], y, launch.state);
}

void addRowsGrad(const Launch& launch) {
  const Operand &dy = launch.in[0], &x = launch.in[1], &rows = launch.in[2], &dx = launch.out[0], &dgate = launch.out[1];
  if (dgate && !x) fail(ErrorCode::InvalidProgram, "[add_rows_grad] x must be given where dgate is wanted");
  if (rows) checkRows(launch, 2, dy, 0);
  LAUNCH(addRowsGradKernel, launch.blocks(dx.bound[0], kThreads / 32), kThreads, 0, launch.stream, dy, x, rows,
         launch.in[3], dx, dgate, launch.state);
}

void sumOfRows(const Launch& launch, const Operand& x, const Operand& rows, const Operand& gate, const Operand& y,
               int dim, double flops) {
  Operand width = y;
  width.dim[0] = y.dim[dim];
  width.bound[0] = y.bound[dim];
  const Operand& counted = rows ? rows : x;
  const Split split{4 * kColumnWarps, 64};  // some rows for every warp, and parts to fill a device
  double* part = launch.scratch<double>(std::max<int64_t>(1, split.parts(counted.bound[0])) * width.bound[0]);
  const auto sum = [&]<typename T>() {
    sumColumns<T, double>(launch, {static_cast<const T*>(x.data), width, counted, Split{}, rows, gate, flops}, split,
                          part);
  };
  if (x.dtype == DType::BF16) {
    sum.template operator()<bf16>();
  } else {
    sum.template operator()<float>();
  }
  sumColumns<double, float>(launch, {part, width, counted, split, {}, {}}, Split{1, 1}, static_cast<float*>(y.data));
}

void sumRows(const Launch& launch) {
  const Operand &x = launch.in[0], &rows = launch.in[1], &gate = launch.in[2], &y = launch.out[0];
  if (rows) checkRows(launch, 1, x, 0);
  sumOfRows(launch, x, rows, gate, y, 0, 0);
}

void dot(const Launch& launch) {
  const Operand &a = launch.in[0], &b = launch.in[1], &y = launch.out[0];
  const int parts = static_cast<int>(std::clamp<int64_t>((a.boundElements() + kThreads - 1) / kThreads, 1, kDotParts));
  double* part = launch.scratch<double>(parts);
  LAUNCH(dotPartsKernel, parts, kThreads, sizeof(DotShared), launch.stream, a, b, part);
  LAUNCH(dotKernel, 1, kDotParts, sizeof(DotShared), launch.stream, part, parts, y);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
