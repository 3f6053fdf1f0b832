// Ops of models with several residual streams (AltUp, arXiv 2301.13310), and the sparsity of gates that comes with them.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Calls body(row) for the rows of this warp.
template <typename Body>
DEVICE void forRows(int count, const Body& body) {
  for (int r = blockIdx.x * kWarps + warpId(); r < count; r += gridDim.x * kWarps) body(r);
}

// The sum of f(elements of the row in x...) over its columns, in all lanes.
template <typename F, typename... X>
DEVICE float rowSum(int width, const F& f, const X*... x) {
  float sum = 0;
  for (int c = laneId(); c < width; c += 32) sum += f(ldGlobal(x + c)...);
  return warpTotal(sum);
}

// y[c] = f(x[c]...) over the columns of a row.
template <typename F, typename... X>
DEVICE void mapRow(int width, float* y, const F& f, const X*... x) {
  for (int c = laneId(); c < width; c += 32) stGlobal(y + c, f(ldGlobal(x + c)...));
}

DEVICE float* rowOf(const Operand& x, int r) { return x.f32() + int64_t{r} * x.size(1); }

__global__ void __launch_bounds__(kThreads, 8) scaleColumnsKernel(Operand x, Operand w, Operand y, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1);
  forCells(y.size(0), width, width % 4 == 0 && startsAligned(x, w, y), [&]<typename V>(int r, int c) {
    const int64_t at = int64_t{r} * width + c;
    store(y, at, each(Times{}, load<V>(x, at), load<V>(w, c)));
  });
}

__global__ void __launch_bounds__(kThreads, 8)
    addScaledKernel(Operand acc, Operand x, Operand c, Operand y, int column, float offset, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1), columns = c.size(1);
  if (column >= columns) return;
  forCells(y.size(0), width, width % 4 == 0 && startsAligned(acc, x, y), [&]<typename V>(int r, int i) {
    const int64_t at = int64_t{r} * width + i;
    const float factor = offset + ldGlobal(c.f32() + int64_t{r} * columns + column);
    store(y, at, each([&](float sum, float v) { return fmaf(factor, v, sum); }, load<V>(acc, at), load<V>(x, at)));
  });
}

__global__ void __launch_bounds__(kThreads, 4)
    addScaledGradKernel(Operand dy, Operand x, Operand c, Operand dx, Operand dc, int column, float offset,
                        StepState state) {
  if (state.faulted()) return;
  const int width = dx.size(1), columns = dc.size(1);
  if (column >= columns) return;
  forRows(dx.size(0), [&](int r) {
    const float factor = offset + ldGlobal(c.f32() + int64_t{r} * columns + column);
    const float sum = rowSum(width, Times{}, rowOf(dy, r), rowOf(x, r));
    mapRow(width, rowOf(dx, r), [&](float d) { return factor * d; }, rowOf(dy, r));
    for (int i = laneId(); i < columns; i += 32) {
      stGlobal(dc.f32() + int64_t{r} * columns + i, i == column ? sum : 0.f);
    }
  });
}

__global__ void __launch_bounds__(kThreads, 4)
    rescaleRowsKernel(Operand x, Operand like, Operand y, float least, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1);
  forRows(y.size(0), [&](int r) {
    const float own = rowSum(width, Times{}, rowOf(x, r), rowOf(x, r)) / width;
    const float wanted = rowSum(width, Times{}, rowOf(like, r), rowOf(like, r)) / width;
    const float factor = sqrtf(wanted / fmaxf(own, least));
    mapRow(width, rowOf(y, r), [&](float v) { return v * factor; }, rowOf(x, r));
  });
}

__global__ void __launch_bounds__(kThreads, 4)
    rescaleRowsGradKernel(Operand dy, Operand x, Operand like, Operand dx, Operand dlike, float least,
                          StepState state) {
  if (state.faulted()) return;
  const int width = dx.size(1);
  forRows(dx.size(0), [&](int r) {
    const float own = rowSum(width, Times{}, rowOf(x, r), rowOf(x, r)) / width, square = fmaxf(own, least);
    const float wanted = sqrtf(rowSum(width, Times{}, rowOf(like, r), rowOf(like, r)) / width);
    const float inner = rowSum(width, Times{}, rowOf(dy, r), rowOf(x, r)) / width, root = sqrtf(square);
    const float factor = wanted / root, pull = own > least ? factor * inner / square : 0.f;
    const float ofLike = wanted > 0.f ? inner / (root * wanted) : 0.f;
    mapRow(width, rowOf(dx, r), [&](float d, float v) { return factor * d - pull * v; }, rowOf(dy, r), rowOf(x, r));
    mapRow(width, rowOf(dlike, r), [&](float v) { return ofLike * v; }, rowOf(like, r));
  });
}

// Mean and deviation of a row, and what lies above the mean by so many deviations.
struct Cutoff {
  float mean, deviation, value;
};

DEVICE Cutoff cutoffOf(const float* x, int width, float factor) {
  const float mean = rowSum(width, [](float v) { return v; }, x) / width;
  const float deviation = sqrtf(rowSum(width, [=](float v) { return (v - mean) * (v - mean); }, x) / width);
  return {mean, deviation, fmaf(factor, deviation, mean)};
}

__global__ void __launch_bounds__(kThreads, 4) gaussianTopkKernel(Operand x, Operand y, float factor, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1);
  forRows(y.size(0), [&](int r) {
    const Cutoff cutoff = cutoffOf(rowOf(x, r), width, factor);
    mapRow(width, rowOf(y, r), [&](float v) { return v <= cutoff.value ? 0.f : v - cutoff.value; }, rowOf(x, r));
  });
}

__global__ void __launch_bounds__(kThreads, 4)
    gaussianTopkGradKernel(Operand dy, Operand x, Operand dx, float factor, StepState state) {
  if (state.faulted()) return;
  const int width = dx.size(1);
  forRows(dx.size(0), [&](int r) {
    const Cutoff cutoff = cutoffOf(rowOf(x, r), width, factor);
    const auto kept = [&](float d, float v) { return v > cutoff.value ? d : 0.f; };
    const float above = rowSum(width, kept, rowOf(dy, r), rowOf(x, r)) / width;  // gradient of the cutoff, negative
    const float slope = cutoff.deviation > 0.f ? factor * above / cutoff.deviation : 0.f;
    mapRow(width, rowOf(dx, r), [&](float d, float v) { return kept(d, v) - above - slope * (v - cutoff.mean); },
           rowOf(dy, r), rowOf(x, r));
  });
}

unsigned rowBlocks(const Launch& launch, const Operand& x) { return launch.blocks(x.bound[0], kWarps); }
unsigned cellBlocks(const Launch& launch, const Operand& x) { return launch.blocks(x.boundElements(), 4 * kThreads); }

int columnAttribute(const Launch& launch, const Operand& c) {
  const int64_t column = launch.intAttribute(0, "column", 0, INT32_MAX);
  if (column >= c.bound[1]) {
    fail(ErrorCode::InvalidProgram, "[%s] attribute column must be below the %lld columns of c, got %lld", launch.op,
         static_cast<long long>(c.bound[1]), static_cast<long long>(column));
  }
  return static_cast<int>(column);
}

}  // namespace

void scaleColumns(const Launch& launch) {
  LAUNCH(scaleColumnsKernel, cellBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0], launch.in[1],
         launch.out[0], launch.state);
}

void addScaled(const Launch& launch) {
  const int column = columnAttribute(launch, launch.in[2]);
  const float offset = static_cast<float>(launch.finiteAttribute(1, "offset"));
  LAUNCH(addScaledKernel, cellBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0], launch.in[1],
         launch.in[2], launch.out[0], column, offset, launch.state);
}

void addScaledGrad(const Launch& launch) {
  const int column = columnAttribute(launch, launch.in[2]);
  const float offset = static_cast<float>(launch.finiteAttribute(1, "offset"));
  LAUNCH(addScaledGradKernel, rowBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0], launch.in[1],
         launch.in[2], launch.out[0], launch.out[1], column, offset, launch.state);
}

void rescaleRows(const Launch& launch) {
  LAUNCH(rescaleRowsKernel, rowBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0], launch.in[1],
         launch.out[0], checkedPositive(launch.op, "floor", launch.attr[0]), launch.state);
}

void rescaleRowsGrad(const Launch& launch) {
  LAUNCH(rescaleRowsGradKernel, rowBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0],
         launch.in[1], launch.in[2], launch.out[0], launch.out[1], checkedPositive(launch.op, "floor", launch.attr[0]),
         launch.state);
}

void gaussianTopk(const Launch& launch) {
  const float factor = static_cast<float>(launch.finiteAttribute(0, "factor"));
  LAUNCH(gaussianTopkKernel, rowBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0], launch.out[0],
         factor, launch.state);
}

void gaussianTopkGrad(const Launch& launch) {
  const float factor = static_cast<float>(launch.finiteAttribute(0, "factor"));
  LAUNCH(gaussianTopkGradKernel, rowBlocks(launch, launch.out[0]), kThreads, 0, launch.stream, launch.in[0],
         launch.in[1], launch.out[0], factor, launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
