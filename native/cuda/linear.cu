// Matrix products with gathers and fused epilogues.
#include "cuda/collectives.cuh"
#include "cuda/gemm.cuh"
#include "cuda/kernels.h"
#include "cuda/sums.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 8) widenKernel(Operand w, Operand y) {
  const int width = y.size(1);
  const bool vectors = width % 4 == 0 && w.stride % 4 == 0 && startsAligned(w, y);
  forCells(y.size(0), width, vectors, [&]<typename V>(int r, int c) {
    store(y, r * y.stride + c, load<V>(w, r * w.stride + c));
  });
}

// A copy of a weight as f32.
Operand widened(const Launch& launch, const Operand& w) {
  Operand y = w;
  y.data = launch.scratch<float>(w.boundElements());
  y.dtype = DType::F32;
  y.stride = w.bound[1];
  LAUNCH(widenKernel, launch.blocks(w.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, w, y);
  return y;
}

// The patch in operands `at` and `at + 1`, of which these are the names; none where both are absent.
Patch patchAt(const Launch& launch, int at, const char* uName, const char* bName) {
  const Operand &u = launch.in[at], &b = launch.in[at + 1];
  checkTogether(launch.op, uName, static_cast<bool>(u), bName, static_cast<bool>(b));
  Patch patch;
  if (u) patch = {{u, 1}, Matrix(u), weight(b)};
  return patch;
}

struct GateGradient {
  Operand dy, dx, bias, rows, dgate;
  const float* dots;  // [R, dotParts(K)]
};

// dgate[r] = the sum of dots[r] + dy[rows[r]] . bias; a warp has a row.
__global__ void __launch_bounds__(kThreads, 4) gateGradientKernel(GateGradient g, StepState state) {
  if (state.faulted()) return;
  const int R = g.dx.size(0), parts = dotParts(g.dx.size(1)), D = g.dy.size(1), lane = laneId();
  const bool vectors = D % 4 == 0 && startsAligned(g.dy, g.bias);
  for (int r = blockIdx.x * (kThreads / 32) + warpId(); r < R; r += gridDim.x * (kThreads / 32)) {
    float sum = 0;
    for (int i = lane; i < parts; i += 32) sum += ldGlobal(g.dots + int64_t{r} * parts + i);
    if (g.bias) {
      const int64_t row = int64_t{g.rows ? ldGlobal(g.rows.i32() + r) : r} * D;
      forColumns(D, vectors, lane, 32, [&]<typename V>(int c) {
        sum += sumOf(each(Times{}, load<V>(g.dy, row + c), load<V>(g.bias, c)));
      });
    }
    sum = warpTotal(sum);
    if (lane == 0) stGlobal(g.dgate.f32() + r, sum);
  }
}

}  // namespace

void linear(const Launch& launch) {
  const Operand &x = launch.in[0], &w = launch.in[1], &bias = launch.in[2], &rows = launch.in[3], &y = launch.out[0];
  const Act act = actAttribute(launch);
  if (rows) checkRows(launch, 3, x, 0);
  Product p(launch, {y, 0}, {y, 1}, {x, 1});
  p.a = Matrix(x, rows);
  p.b[0] = weight(w);
  p.patch[0] = patchAt(launch, 4, "u", "b");
  p.bias[0] = bias;
  p.pre[0] = launch.out[1];
  p.act = act;
  p.out = y;
  multiplyWeight(launch, p);
}

void linearGated(const Launch& launch) {
  const Operand &x = launch.in[0], &rows = launch.in[5], &y = launch.out[0];
  const Act act = actAttribute(launch);
  if (rows) checkRows(launch, 5, x, 0);
  Product p(launch, {y, 0}, {y, 1}, {x, 1});
  p.a = Matrix(x, rows);
  const bool mixed = launch.in[1].dtype != launch.in[2].dtype;
  for (int i = 0; i < 2; ++i) {
    const Operand& w = launch.in[1 + i];
    p.b[i] = weight(mixed && w.dtype != DType::F32 ? widened(launch, w) : w);
    p.bias[i] = launch.in[3 + i];
    p.pre[i] = launch.out[1 + i];
  }
  p.patch[0] = patchAt(launch, 6, "gate_u", "gate_b");
  p.patch[1] = patchAt(launch, 8, "up_u", "up_b");
  p.act = act;
  p.out = y;
  multiplyWeights(launch, p);
}

void linearAdd(const Launch& launch) {
  const Operand &residual = launch.in[0], &x = launch.in[1], &w = launch.in[2], &bias = launch.in[3];
  const Operand &rows = launch.in[4], &gate = launch.in[5], &y = launch.out[0];
  if (rows) checkRows(launch, 4, y, 0);
  Product p(launch, {x, 0}, {y, 1}, {x, 1});
  p.a = Matrix(x);
  p.b[0] = weight(w);
  p.patch[0] = patchAt(launch, 6, "u", "b");
  p.bias[0] = bias;
  p.rowScale = floats(gate);
  p.add = residual;
  p.out = y;
  p.rows = indices(rows);
  p.countsRows = true;
  if (rows) {  // which the product adds to in place; it does not reach the others
    copy(launch, residual, y);
    p.add = y;
  }
  multiplyWeight(launch, p);
}

void linearDx(const Launch& launch) {
  const Operand &dy = launch.in[0], &w = launch.in[1], &acc = launch.in[2], &dx = launch.out[0];
  Product p(launch, {dx, 0}, {dx, 1}, {dy, 1});
  p.a = Matrix(dy);
  p.b[0] = weight(w);
  p.add = acc;
  p.out = dx;
  multiplyTransposed(launch, p);
}

void linearAddGrad(const Launch& launch) {
  const Operand &dy = launch.in[0], &x = launch.in[1], &w = launch.in[2], &bias = launch.in[3], &rows = launch.in[4];
  const Operand &gate = launch.in[5], &dx = launch.out[0], &dgate = launch.out[1];
  if (dgate && !x) fail(ErrorCode::InvalidProgram, "[linear_add_grad] x must be given where dgate is wanted");
  if (rows) checkRows(launch, 4, dy, 0);
  Product p(launch, {dx, 0}, {dx, 1}, {dy, 1});
  p.a = Matrix(dy, rows);
  p.b[0] = weight(w);
  p.rowScale = floats(gate);
  p.out = dx;
  if (dgate) {
    p.dotWith = x;
    p.dots = launch.scratch<float>(dx.bound[0] * dotParts(dx.bound[1]));
  }
  multiplyTransposed(launch, p);
  if (!dgate) return;
  const GateGradient g{dy, dx, bias, rows, dgate, p.dots};
  LAUNCH(gateGradientKernel, launch.blocks(dx.bound[0], kThreads / 32), kThreads, 0, launch.stream, g, launch.state);
}

void linearDw(const Launch& launch) {
  const Operand &dy = launch.in[0], &x = launch.in[1], &dyRows = launch.in[2], &xRows = launch.in[3];
  const Operand &gate = launch.in[4], &dw = launch.out[0];
  const Operand& reduced = dyRows ? dyRows : dy;
  checkRowCount(launch, xRows ? 3 : 1, reduced);
  if (dyRows) checkRows(launch, 2, dy, 0);
  if (xRows) checkRows(launch, 3, x, 0);
  if (x.dtype == DType::BF16 && dw.bound[0] == 1 && !dyRows && !gate) {
    sumOfRows(launch, x, xRows, dy, dw, 1, 2);  // of a router
    return;
  }
  Product p(launch, {dw, 0}, {dw, 1}, {reduced, 0});
  p.a = Matrix(dy, dyRows);
  p.a.scale = floats(gate);
  p.b[0] = Matrix(x, xRows);
  p.out = dw;
  multiplyRows(launch, p);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
