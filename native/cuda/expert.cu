// Experts: by whose scores rows of a tile choose, gates of one, what trains the choice, and the loss that balances the load of
// all. A thread has a row, or a warp.
#include "cuda/expert.cuh"

#include "cuda/attention.cuh"
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

DEVICE double productOf(float a, float b) { return static_cast<double>(a) * b; }
DEVICE double productOf(const float4& a, const float4& b) {
  return (productOf(a.x, b.x) + productOf(a.y, b.y)) + (productOf(a.z, b.z) + productOf(a.w, b.w));
}

// Before kernels that believe the data.
__global__ void __launch_bounds__(kThreads, 4) checkKernel(Experts e, StepState state) {
  if (state.faulted()) return;
  if (!e.checkShares(state)) return;
  const int first = blockIdx.x * kThreads + threadIdx.x;
  for (int n = first; n < e.rows(); n += gridDim.x * kThreads) e.check(n, state);
}

__global__ void __launch_bounds__(kThreads, 2)
    gateKernel(Experts e, int expert, ExpertGate mode, Operand rows, Operand g, StepState state) {
  if (state.faulted()) return;
  for (int r = blockIdx.x * kThreads + threadIdx.x; r < rows.size(0); r += gridDim.x * kThreads) {
    const auto row = e.row(ldGlobal(rows.i32() + r));
    stGlobal(g.f32() + r, static_cast<float>(ExpertWeights(row).gate(mode, expert)));
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    gateGradKernel(Experts e, int expert, ExpertGate mode, Operand dg, Operand rows, Operand dz, StepState state) {
  if (state.faulted()) return;
  for (int r = blockIdx.x * kThreads + threadIdx.x; r < rows.size(0); r += gridDim.x * kThreads) {
    const int n = ldGlobal(rows.i32() + r);
    const auto row = e.row(n);
    const float slope = ldGlobal(dg.f32() + r);
    float* to = dz.f32() + int64_t{n} * e.count();
    ExpertWeights(row).gateSlopes(mode, expert, [&](int i, double s) { stGlobal(to + i, static_cast<float>(slope * s)); });
  }
}

// credit[r, i]: h . dh over the units of expert i, a warp each.
__global__ void __launch_bounds__(kThreads, 4)
    creditKernel(Experts e, Operand h, Operand dh, Operand rows, double* credit, StepState state) {
  if (state.faulted()) return;
  const int lane = laneId(), count = e.count(), units = h.size(1), width = units / count;
  const bool vectors = width % 4 == 0 && startsAligned(h, dh);
  const int64_t all = int64_t{e.rows()} * count;
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; at < all; at += gridDim.x * (kThreads / 32)) {
    const int r = static_cast<int>(at / count), i = static_cast<int>(at % count);
    const int64_t first = int64_t{rows ? ldGlobal(rows.i32() + r) : r} * units + int64_t{i} * width;
    double sum = 0;
    forColumns(width, vectors, lane, 32, [&]<typename V>(int c) {
      sum += productOf(ldGlobal<V>(h.f32() + first + c), ldGlobal<V>(dh.f32() + first + c));
    });
    sum = warpTotal(sum);
    if (lane == 0) stGlobal(credit + at, sum);
  }
}

struct GlobalPositions {
  const int32_t* positions;
  DEVICE int32_t operator()(int64_t i) const { return ldGlobal(positions + i); }
};

// Rows of segments with scores, or gradients of them, and what tiles before them decided.
struct TiledRows {
  Operand scores, positions, offsets, held;
  int tile;

  DEVICE int rows() const { return scores.size(0); }
  DEVICE int count() const { return scores.size(1); }
  DEVICE int segments() const { return offsets.size(0) - 1; }
  DEVICE int start(int segment) const { return ldGlobal(offsets.i32() + segment); }
  DEVICE int segment(int n) const { return segmentOf(offsets.i32(), segments(), n); }
  DEVICE Tiles<GlobalPositions> tiles() const { return {{positions.i32()}, tile}; }
  DEVICE const float* heldOf(int segment) const { return held.f32() + segment * heldWidth(count()); }
  // The row whose scores hold for row n; -1: those that are held.
  DEVICE int deciding(int n, int segment) const {
    if (held && tiles().holds(ldGlobal(heldOf(segment) + count()), n)) return -1;
    return static_cast<int>(tiles().first(start(segment), n));
  }
};

// Before kernels that believe the data.
__global__ void __launch_bounds__(kThreads, 4) checkTilesKernel(TiledRows t, StepState state) {
  if (state.faulted() || (t.held && !onePerSegment(t.offsets, t.held, 3, state))) return;
  for (int n = blockIdx.x * kThreads + threadIdx.x; n < t.rows(); n += gridDim.x * kThreads) {
    const int64_t low = n > t.start(t.segment(n)) ? int64_t{ldGlobal(t.positions.i32() + n - 1)} + 1 : 0;
    const int position = ldGlobal(t.positions.i32() + n);
    if (position >= low && position < kPositions) continue;
    state.report(Fault::Row, 1, n, static_cast<double>(low), kPositions, position);
  }
}

// Copies scores by a warp.
DEVICE void copyScores(const float* from, float* to, int64_t count, int lane) {
  for (int64_t i = lane; i < count; i += 32) stGlobal(to + i, ldGlobal(from + i));
}

// A warp has a row.
__global__ void __launch_bounds__(kThreads, 4) tileScoresKernel(TiledRows t, Operand y, StepState state) {
  if (state.faulted()) return;
  const int lane = laneId();
  for (int n = blockIdx.x * (kThreads / 32) + warpId(); n < t.rows(); n += gridDim.x * (kThreads / 32)) {
    for (int i = lane; i < t.count(); i += 32) {
      const int64_t at = int64_t{n} * t.count() + i;
      const float score = ldGlobal(t.scores.f32() + at);
      if (score != score) state.report(Fault::NaN, 0, static_cast<double>(at), 0, 0, 0);
    }
    const int s = t.segment(n), row = t.deciding(n, s);
    const float* from = row < 0 ? t.heldOf(s) : t.scores.f32() + int64_t{row} * t.count();
    copyScores(from, y.f32() + int64_t{n} * t.count(), t.count(), lane);
  }
}

// The last decisions of every segment, from its last row back. A warp has a segment.
__global__ void __launch_bounds__(kThreads, 4) nextHeldKernel(TiledRows t, Operand next, StepState state) {
  if (state.faulted()) return;
  const int lane = laneId(), decision = t.count() + 1;
  for (int s = blockIdx.x * (kThreads / 32) + warpId(); s < t.segments(); s += gridDim.x * (kThreads / 32)) {
    float* to = next.f32() + s * heldWidth(t.count());
    int kept = 0;
    for (int end = t.start(s + 1); kept < 2 && end > t.start(s); ++kept) {
      const int row = t.deciding(end - 1, s);
      if (row < 0) break;
      copyScores(t.scores.f32() + int64_t{row} * t.count(), to + kept * decision, t.count(), lane);
      if (lane == 0) stGlobal(to + kept * decision + t.count(), static_cast<float>(t.tiles().positions(row)));
      end = row;
    }
    copyScores(t.heldOf(s), to + kept * decision, (2 - kept) * decision, lane);
  }
}

// The sum over the rows that a row decided about, in their order; zeros of the others. A warp has a row.
__global__ void __launch_bounds__(kThreads, 4) tileScoresGradKernel(TiledRows t, Operand dz, StepState state) {
  if (state.faulted()) return;
  const int lane = laneId();
  for (int n = blockIdx.x * (kThreads / 32) + warpId(); n < t.rows(); n += gridDim.x * (kThreads / 32)) {
    const int s = t.segment(n), limit = t.start(s + 1), own = t.tiles().positions(n) / t.tile;
    int end = n;
    if (t.deciding(n, s) == n) {
      while (end < limit && t.tiles().positions(end) / t.tile == own) ++end;
    }
    for (int i = lane; i < t.count(); i += 32) {
      float sum = 0;
      for (int m = n; m < end; ++m) sum += ldGlobal(t.scores.f32() + int64_t{m} * t.count() + i);
      stGlobal(dz.f32() + int64_t{n} * t.count() + i, sum);
    }
  }
}

struct MeasureShared {
  double partial[kThreads / 32];
};

// magnitude[s]: the mean of |credit| in a segment. A block has a segment.
__global__ void __launch_bounds__(kThreads, 2)
    magnitudeKernel(Experts e, const double* credit, double* magnitude, StepState state) {
  SHARED_MEMORY(MeasureShared, s);
  if (state.faulted()) return;
  for (int segment = blockIdx.x; segment < e.offsets.size(0) - 1; segment += gridDim.x) {
    const int64_t begin = int64_t{ldGlobal(e.offsets.i32() + segment)} * e.count();
    const int64_t end = int64_t{ldGlobal(e.offsets.i32() + segment + 1)} * e.count();
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += fabs(ldGlobal(credit + i));
    sum = blockTotal(sum, s.partial);
    if (threadIdx.x == 0) stGlobal(magnitude + segment, sum / static_cast<double>(max(end - begin, int64_t{1})));
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    choiceSlopesKernel(Experts e, const double* credit, const double* magnitude, Operand weight, Operand rows, Operand dz,
                       StepState state) {
  if (state.faulted()) return;
  for (int r = blockIdx.x * kThreads + threadIdx.x; r < e.rows(); r += gridDim.x * kThreads) {
    const double size = ldGlobal(magnitude + segmentOf(e.offsets.i32(), e.offsets.size(0) - 1, r));
    const double scale = size == 0 ? 0 : ldGlobal(weight.f32() + (rows ? ldGlobal(rows.i32() + r) : r)) / size;
    const int64_t first = int64_t{r} * e.count();
    choiceSlopes(
        e.row(r), [&](int i) { return ldGlobal(credit + first + i); },
        [&](int i, double slope) { stGlobal(dz.f32() + first + i, static_cast<float>(scale * slope)); });
  }
}

// load[i] and weight[i]: the share of rows that choose expert i, and the mean of its softmax. A block has an expert.
__global__ void __launch_bounds__(kThreads, 2)
    measureKernel(Experts e, double* load, double* weight, StepState state) {
  SHARED_MEMORY(MeasureShared, s);
  if (state.faulted()) return;
  const double rows = max(e.rows(), 1);
  for (int i = blockIdx.x; i < e.count(); i += gridDim.x) {
    double chosen = 0, sum = 0;
    for (int n = threadIdx.x; n < e.rows(); n += kThreads) {
      const auto row = e.row(n);
      chosen += row.chosen(i);
      sum += ExpertWeights(row).weight(i);
    }
    chosen = blockTotal(chosen, s.partial);
    sum = blockTotal(sum, s.partial);
    if (threadIdx.x > 0) continue;
    stGlobal(load + i, chosen / rows);
    stGlobal(weight + i, sum / rows);
  }
}

__global__ void __launch_bounds__(32, 1)
    balanceKernel(Experts e, const double* load, const double* weight, Operand loss, StepState state) {
  if (state.faulted()) return;
  double product = 0, chosen = 0;
  for (int i = laneId(); i < e.count(); i += 32) {
    product += ldGlobal(load + i) * ldGlobal(weight + i);
    chosen += ldGlobal(load + i);
  }
  product = warpTotal(product);
  chosen = warpTotal(chosen);
  if (laneId() == 0) stGlobal(loss.f32(), static_cast<float>(e.count() * product - chosen));
}

__global__ void __launch_bounds__(kThreads, 2)
    balanceGradKernel(Experts e, const double* load, Operand dloss, Operand dz, StepState state) {
  if (state.faulted()) return;
  const double factor = ldGlobal(dloss.f32()) * static_cast<double>(e.count()) / max(e.rows(), 1);
  for (int n = blockIdx.x * kThreads + threadIdx.x; n < e.rows(); n += gridDim.x * kThreads) {
    const auto row = e.row(n);
    const ExpertWeights weights(row);
    double mean = 0;
    for (int i = 0; i < e.count(); ++i) mean += ldGlobal(load + i) * weights.weight(i);
    for (int i = 0; i < e.count(); ++i) {
      stGlobal(dz.f32() + int64_t{n} * e.count() + i,
               static_cast<float>(factor * weights.weight(i) * (ldGlobal(load + i) - mean)));
    }
  }
}

// Checks the inputs, which stand from `input`.
Experts checkedExperts(const Launch& launch, int input, int ruleAttribute) {
  const Experts e(launch, input, ruleAttribute);
  checkOffsets(launch, input + 1, e.z, 0);
  launch.alone();
  LAUNCH(checkKernel, launch.blocks(e.z.bound[0], kThreads), kThreads, 0, launch.stream, e, launch.state);
  return e;
}

int expertAttribute(const Launch& launch, const Experts& e) {
  return static_cast<int>(launch.intAttribute(0, "expert", 0, e.z.bound[1] - 1));
}
ExpertGate modeAttribute(const Launch& launch) { return static_cast<ExpertGate>(launch.intAttribute(2, "mode", 0, 2)); }

struct Measured {
  double *load, *weight;
};
Measured measure(const Launch& launch, const Experts& e) {
  const int64_t count = e.z.bound[1];
  const Measured m{launch.scratch<double>(count), launch.scratch<double>(count)};
  LAUNCH(measureKernel, launch.blocks(count, 1), kThreads, sizeof(MeasureShared), launch.stream, e, m.load, m.weight,
         launch.state);
  return m;
}

// Input 0 has a row for each of the positions, input 1; offsets and what is held follow.
TiledRows checkedTiles(const Launch& launch) {
  const Operand &z = launch.in[0], &positions = launch.in[1], &offsets = launch.in[2], &held = launch.in[3];
  const auto tile = static_cast<int>(launch.intAttribute(0, "tile", 1, INT32_MAX));
  const TiledRows t{z, positions, offsets, held, tile};
  checkOffsets(launch, 2, z, 0);
  if (held) {
    checkPerSegment(launch, offsets, held);
    checkHeldWidth(launch.op, held.bound[1], z.bound[1]);
  }
  LAUNCH(checkTilesKernel, launch.blocks(positions.bound[0], kThreads), kThreads, 0, launch.stream, t, launch.state);
  return t;
}

}  // namespace

void tileScores(const Launch& launch) {
  const TiledRows t = checkedTiles(launch);
  const Operand& next = launch.out[1];
  LAUNCH(tileScoresKernel, launch.blocks(t.scores.bound[0], kThreads / 32), kThreads, 0, launch.stream, t, launch.out[0],
         launch.state);
  if (!t.held || !next) return;
  LAUNCH(nextHeldKernel, launch.blocks(next.bound[0], kThreads / 32), kThreads, 0, launch.stream, t, next, launch.state);
}

void tileScoresGrad(const Launch& launch) {
  const TiledRows t = checkedTiles(launch);
  LAUNCH(tileScoresGradKernel, launch.blocks(t.positions.bound[0], kThreads / 32), kThreads, 0, launch.stream, t,
         launch.out[0], launch.state);
}

void expertGate(const Launch& launch) {
  const Experts e = checkedExperts(launch, 0, 1);
  const Operand& rows = launch.in[3];
  checkRows(launch, 3, e.z, 0);
  LAUNCH(gateKernel, launch.blocks(rows.bound[0], kThreads), kThreads, 0, launch.stream, e, expertAttribute(launch, e),
         modeAttribute(launch), rows, launch.out[0], launch.state);
}

void expertGateGrad(const Launch& launch) {
  const Experts e = checkedExperts(launch, 1, 1);
  const Operand &dg = launch.in[0], &rows = launch.in[4], &dz = launch.out[0];
  checkRows(launch, 4, e.z, 0);
  clear(launch, dz);
  LAUNCH(gateGradKernel, launch.blocks(rows.bound[0], kThreads), kThreads, 0, launch.stream, e,
         expertAttribute(launch, e), modeAttribute(launch), dg, rows, dz, launch.state);
}

void expertCredit(const Launch& launch) {
  const Operand &h = launch.in[0], &dh = launch.in[1], &weight = launch.in[5], &rows = launch.in[6];
  const int64_t units = h.bound[1], count = launch.in[2].bound[1];
  if (count == 0 || units % count != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] %lld units cannot be cut into %lld experts", launch.op,
         static_cast<long long>(units), static_cast<long long>(count));
  }
  const Experts e = checkedExperts(launch, 2, 0);
  if (rows) checkRows(launch, 6, h, 0);
  const int64_t bound = e.z.bound[0];
  double *credit = launch.scratch<double>(bound * count), *magnitude = launch.scratch<double>(e.offsets.bound[0]);
  LAUNCH(creditKernel, launch.blocks(bound * count, kThreads / 32), kThreads, 0, launch.stream, e, h, dh, rows, credit,
         launch.state);
  LAUNCH(magnitudeKernel, launch.blocks(e.offsets.bound[0] - 1, 1), kThreads, sizeof(MeasureShared), launch.stream, e,
         credit, magnitude, launch.state);
  LAUNCH(choiceSlopesKernel, launch.blocks(bound, kThreads), kThreads, 0, launch.stream, e, credit, magnitude, weight,
         rows, launch.out[0], launch.state);
}

void expertBalance(const Launch& launch) {
  const Experts e = checkedExperts(launch, 0, 0);
  const Measured m = measure(launch, e);
  LAUNCH(balanceKernel, 1, 32, 0, launch.stream, e, m.load, m.weight, launch.out[0], launch.state);
}

void expertBalanceGrad(const Launch& launch) {
  const Experts e = checkedExperts(launch, 1, 0);
  const Measured m = measure(launch, e);
  LAUNCH(balanceGradKernel, launch.blocks(e.z.bound[0], kThreads), kThreads, 0, launch.stream, e, m.load, launch.in[0],
         launch.out[0], launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
