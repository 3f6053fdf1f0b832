// Distances between rows of two residual streams, and their gradients.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

struct HiddenShared {
  double partial[kThreads / 32];
};

enum class Distance { Mse, Cosine };

struct Hidden {
  Operand x, y, weight;
  double* value;  // of every row
  Operand row, dx;
};

// value = mean (x - y)^2, or 1 - x . y / (|x| |y|), 1 where a norm is 0; dx = weight d value / dx. One warp a row.
template <Distance kind>
__global__ void __launch_bounds__(kThreads, 4) hiddenKernel(Hidden h, StepState state) {
  if (state.faulted()) return;
  const int R = h.x.size(0), D = h.x.size(1), lane = laneId();
  for (int r = (blockIdx.x * kThreads + threadIdx.x) / 32; r < R; r += gridDim.x * (kThreads / 32)) {
    const float *x = h.x.f32() + int64_t{r} * D, *y = h.y.f32() + int64_t{r} * D;
    double xx = 0, yy = 0, xy = 0;  // for Mse: of the difference, unused, unused
    for (int c = lane; c < D; c += 32) {
      const double a = ldGlobal(x + c), b = ldGlobal(y + c);
      if constexpr (kind == Distance::Mse) {
        xx += (a - b) * (a - b);
      } else {
        xx += a * a;
        yy += b * b;
        xy += a * b;
      }
    }
    xx = warpTotal(xx);
    yy = warpTotal(yy);
    xy = warpTotal(xy);
    const double norms = sqrt(xx) * sqrt(yy), cosine = norms == 0 ? 0 : xy / norms;
    const double value = kind == Distance::Mse ? xx / D : 1 - cosine;
    if (lane == 0) {
      stGlobal(h.value + r, value);
      if (h.row) stGlobal(h.row.f32() + r, static_cast<float>(value));
    }
    if (!h.dx) continue;
    // dx = ofX x + ofY y
    const double weight = ldGlobal(h.weight.f32() + r);
    const double ofX = kind == Distance::Mse ? 2 * weight / D : norms == 0 ? 0 : weight * cosine / xx;
    const double ofY = kind == Distance::Mse ? -ofX : norms == 0 ? 0 : -weight / norms;
    for (int c = lane; c < D; c += 32) {
      const double a = ldGlobal(x + c), b = ldGlobal(y + c);
      stGlobal(h.dx.f32() + int64_t{r} * D + c,
               static_cast<float>(kind == Distance::Mse ? ofX * (a - b) : ofX * a + ofY * b));
    }
  }
}

// loss = sum of weight[r] value[r], in an order that the number of rows decides.
__global__ void __launch_bounds__(kThreads, 4) hiddenSumKernel(Hidden h, Operand loss, StepState state) {
  SHARED_MEMORY(HiddenShared, s);
  if (state.faulted()) return;
  const int R = h.x.size(0);
  double sum = 0;
  for (int r = threadIdx.x; r < R; r += kThreads) sum += ldGlobal(h.weight.f32() + r) * ldGlobal(h.value + r);
  sum = blockTotal(sum, s.partial);
  if (threadIdx.x == 0) stGlobal(loss.f32(), static_cast<float>(sum));
}

}  // namespace

void hiddenDistance(const Launch& launch) {
  const Operand &x = launch.in[0], &loss = launch.out[0];
  const auto kind = static_cast<Distance>(launch.intAttribute(0, "kind", 0, 1));
  const Hidden h{x, launch.in[1], launch.in[2], launch.scratch<double>(x.bound[0]), launch.out[1], launch.out[2]};
  const auto with = [&](const auto& kernel) {
    LAUNCH(kernel, launch.blocks(x.bound[0], kThreads / 32), kThreads, 0, launch.stream, h, launch.state);
  };
  if (kind == Distance::Mse) {
    with(hiddenKernel<Distance::Mse>);
  } else {
    with(hiddenKernel<Distance::Cosine>);
  }
  LAUNCH(hiddenSumKernel, 1, kThreads, sizeof(HiddenShared), launch.stream, h, loss, launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
