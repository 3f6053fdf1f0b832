// The largest logits of a head, and the divergence on them and a bucket for the rest; docs/ops.md has the equations.
#include "cuda/kernels.h"
#include "cuda/loss.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kWarps = kRowThreads / 32;
// Logarithm of the smallest normal float: no bucket has less.
constexpr double kLeastLog = -87.33654475055310;

struct TopkShared : LossShared {
  uint32_t count[256];  // logits by digit
  int digit, above;     // the digit where the last wanted logit is, and logits of higher ones
  int greater[kWarps], ties[kWarps];
};

// Greater for larger logits; NaN, like -inf, is below all others.
DEVICE uint32_t orderOf(float x) {
  if (x != x) x = -INFINITY;
  const uint32_t bits = x == 0.f ? 0u : asUint(x);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}

// The bits of orderOf that the last of the `wanted` largest logits has, and how many of those equal to it are wanted.
struct Least {
  uint32_t order;
  int ties;
};

DEVICE Least leastOf(const float* row, int V, int wanted, TopkShared& s) {
  const int tid = threadIdx.x, lane = laneId();
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (tid < 256) s.count[tid] = 0;
    syncThreads();  // counts are zero, and the previous digit has been read
    for (int c = tid; c < V; c += kRowThreads) {
      const uint32_t order = orderOf(ldGlobal(row + c));
      if ((order & mask) == prefix) atomicAdd(&s.count[order >> shift & 255], 1u);
    }
    syncThreads();  // counts are complete
    if (warpId() == 0) {
      // Lane l has the digits 255 - 8 l and the seven below.
      const int highest = 255 - 8 * lane;
      int own = 0;
      for (int i = 0; i < 8; ++i) own += static_cast<int>(s.count[highest - i]);
      const int upTo = warpScan(own);
      if (upTo >= wanted && upTo - own < wanted) {
        int above = upTo - own, i = 0;
        for (; above + static_cast<int>(s.count[highest - i]) < wanted; ++i) above += static_cast<int>(s.count[highest - i]);
        s.digit = highest - i;
        s.above = above;
      }
    }
    syncThreads();  // the digit is found
    prefix |= static_cast<uint32_t>(s.digit) << shift;
    mask |= 255u << shift;
    wanted -= s.above;
  }
  return {prefix, wanted};
}

// ids = the T largest logits of a row, of equal ones the first, ascending.
DEVICE void chooseIds(const float* row, int V, int T, int32_t* ids, TopkShared& s) {
  const Least least = leastOf(row, V, T, s);
  const int tid = threadIdx.x, lane = laneId(), warp = warpId();
  int greater = 0, ties = 0;  // before this round
  for (int first = 0; first < V; first += kRowThreads) {
    const int c = first + tid;
    const uint32_t order = c < V ? orderOf(ldGlobal(row + c)) : 0;
    const bool isGreater = c < V && order > least.order, isTie = c < V && order == least.order;
    const uint32_t warpGreater = ballot(isGreater), warpTies = ballot(isTie), before = (1u << lane) - 1;
    if (lane == 0) {
      s.greater[warp] = popCount(warpGreater);
      s.ties[warp] = popCount(warpTies);
    }
    syncThreads();  // those of all warps are there
    int roundGreater = 0, roundTies = 0, greaterBefore = greater, tiesBefore = ties;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) {
        greaterBefore += roundGreater;
        tiesBefore += roundTies;
      }
      roundGreater += s.greater[w];
      roundTies += s.ties[w];
    }
    greaterBefore += popCount(warpGreater & before);
    tiesBefore += popCount(warpTies & before);
    if (isGreater || (isTie && tiesBefore < least.ties)) {
      stGlobal(ids + greaterBefore + min(tiesBefore, least.ties), c);
    }
    greater += roundGreater;
    ties += roundTies;
    syncThreads();  // they may be overwritten; and in the end the ids are there
  }
}

// A row of logits of which T are set aside, in `chosen`, each by the thread that reads it later; in the row they become
// -inf.
struct Parted {
  RowSoftmax rest;
  double lse;  // of all logits

  // Logarithm of the share of the rest.
  DEVICE double restLog() const { return (rest.sum > 0 || rest.sum != rest.sum ? rest.logSum() : -INFINITY) - lse; }
};

DEVICE Parted part(float* row, int V, const int32_t* ids, int T, float* chosen, LossShared& s) {
  const int tid = threadIdx.x, steps = (V + kStep - 1) / kStep;
  Top own;
  for (int k = tid; k < T; k += kRowThreads) {
    float* at = row + ldGlobal(ids + k);
    const float x = ldGlobal(at);
    stGlobal(chosen + k, x);
    stGlobal(at, -INFINITY);
    if (x > own.value) own = {x, k};
  }
  syncThreads();  // the row is without them
  Softmax others;
  for (int step = 0; step < steps; ++step) {
    const int c = step * kStep + tid * 4;
    Taken x, e;
    take(row, c, V, x);
    others.add(x, c, e);
  }
  const RowSoftmax rest(others, s);
  const Top largest{fmaxf(blockTop(own, s).value, rest.top.value), 0};
  const double top = largest.reference();
  double sum = 0;
  for (int k = tid; k < T; k += kRowThreads) sum += exp(ldGlobal(chosen + k) - top);
  sum = blockTotal(sum, s.partial);
  return {rest, top + log(sum + rest.sum * exp(rest.top.value - top))};
}

// The smallest normal float's at least; NaN stays.
DEVICE double clamped(double logarithm) { return logarithm < kLeastLog ? kLeastLog : logarithm; }

__global__ void __launch_bounds__(kRowThreads, 2)
    topLogitsKernel(Rows rows, Operand w, Operand ids, Operand logp, Operand rest, float* chosen, StepState state) {
  SHARED_MEMORY(TopkShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), T = ids.size(1), count = rows.count(), tid = threadIdx.x;
  chosen += int64_t{blockIdx.x} * T;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i;
    float* row = rows.logits + int64_t{i} * V;
    int32_t* own = ids.i32() + int64_t{r} * T;
    chooseIds(row, V, T, own, s);
    const Parted parted = part(row, V, own, T, chosen, s);
    for (int k = tid; k < T; k += kRowThreads) {
      stGlobal(logp.f32() + int64_t{r} * T + k, static_cast<float>(clamped(ldGlobal(chosen + k) - parted.lse)));
    }
    if (tid == 0) stGlobal(rest.f32() + r, static_cast<float>(clamped(parted.restLog())));
  }
}

// What topk_divergence compares with.
struct Given {
  Operand ids, logp, rest;
};

// row = the divergence of the student's buckets from those given; gradient = weight d row / d student. One block a row.
template <bool reverse>
__global__ void __launch_bounds__(kRowThreads, 1)
    topkDivergenceKernel(Rows rows, Operand w, Given given, float* chosen, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), T = given.ids.size(1), count = rows.count(), tid = threadIdx.x;
  chosen += int64_t{blockIdx.x} * T;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i;
    float* row = rows.logits + int64_t{i} * V;
    const int32_t* ids = given.ids.i32() + int64_t{r} * T;
    const float* logp = given.logp.f32() + int64_t{r} * T;
    const Parted parted = part(row, V, ids, T, chosen, s);
    const double restP = clamped(ldGlobal(given.rest.f32() + r)), restQ = clamped(parted.restLog());
    // sum p (log p - log q) and sum p, or sum q (log q - log p).
    double value = 0, mass = 0;
    for (int k = tid; k < T; k += kRowThreads) {
      const double p = clamped(ldGlobal(logp + k)), q = clamped(ldGlobal(chosen + k) - parted.lse);
      value += reverse ? exp(q) * (q - p) : exp(p) * (p - q);
      mass += exp(p);
    }
    value = blockTotal(value, s.partial) + (reverse ? exp(restQ) * (restQ - restP) : exp(restP) * (restP - restQ));
    mass = blockTotal(mass, s.partial) + exp(restP);
    if (tid == 0) {
      stGlobal(rows.value + r, value);
      if (rows.row) stGlobal(rows.row.f32() + r, static_cast<float>(value));
    }
    if (!rows.gradient) continue;
    const float weight = ldGlobal(rows.weight.f32() + r);
    for (int k = tid; k < T; k += kRowThreads) {
      const float logit = ldGlobal(chosen + k);
      const double p = clamped(ldGlobal(logp + k)), q = clamped(logit - parted.lse);
      const double g = reverse ? exp(q) * (q - p - value) : exp(q) * mass - exp(p);
      stGlobal(chosen + k, static_cast<float>(weight * g) * slopeOf(logit, rows.softcap));
    }
    const double ofRest = reverse ? exp(restQ) * (restQ - restP - value) : exp(restQ) * mass - exp(restP);
    const float factor = parted.rest.sum == 0 ? 0.f : static_cast<float>(weight * ofRest / parted.rest.sum);
    const float reference = parted.rest.top.reference();
    for (int step = (V + kStep - 1) / kStep - 1; step >= 0; --step) {
      const int c = step * kStep + tid * 4;
      Taken x;
      take(row, c, V, x);
      UNROLL
      for (int k = 0; k < kPieces; ++k) {
        float g[4];
        UNROLL
        for (int j = 0; j < 4; ++j) {
          // What was set aside is -inf here, and has no slope.
          const float slope = x[k][j] == -INFINITY ? 0.f : slopeOf(x[k][j], rows.softcap);
          g[j] = factor * fastExp(x[k][j] - reference) * slope;
        }
        rows.gradient.store(r, c + k * kStride, V, gathered(g));
      }
    }
    syncThreads();  // before the zeros of what was chosen are replaced
    for (int k = tid; k < T; k += kRowThreads) rows.gradient.storeOne(r, ldGlobal(ids + k), ldGlobal(chosen + k));
  }
}

__global__ void __launch_bounds__(kRowThreads, 2) ascendingKernel(Operand ids, Operand w, StepState state) {
  const int R = ids.size(0), T = ids.size(1), V = w.size(0);
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; i < int64_t{R} * T; i += gridDim.x * kRowThreads) {
    const int low = i % T == 0 ? 0 : ldGlobal(ids.i32() + i - 1) + 1, id = ldGlobal(ids.i32() + i);
    if (id < low || id >= V) state.report(Fault::Row, 2, static_cast<double>(i), low, V, id);
  }
}

void checkWidth(const char* op, const Operand& ids, const Operand& w) {
  if (ids.bound[1] < 1 || ids.bound[1] > w.bound[0]) {
    fail(ErrorCode::InvalidProgram, "[%s] ids must have 1 to %lld columns, as many as w has rows, got %lld", op,
         static_cast<long long>(w.bound[0]), static_cast<long long>(ids.bound[1]));
  }
}

}  // namespace

void topLogits(const Launch& launch) {
  const Operand &h = launch.in[0], &w = launch.in[1];
  const Operand &ids = launch.out[0], &logp = launch.out[1], &rest = launch.out[2];
  checkWidth("top_logits", ids, w);
  float* chosen = launch.scratch<float>(launch.blocks(h.bound[0], 1) * ids.bound[1]);
  const auto launchRows = [&](const Rows& rows) {
    LAUNCH(topLogitsKernel, launch.blocks(rows.most, 1), kRowThreads, sizeof(TopkShared), launch.stream, rows, w, ids,
           logp, rest, chosen, launch.state);
  };
  Rows rows;
  rows.softcap = checkedSoftcap("top_logits", "softcap", launch.attr[0]);
  rows.weight = rest;  // of as many rows
  vocabularyLoss(launch, launchRows, h, {}, w, {}, rows, {}, {}, {});
}

void topkDivergence(const Launch& launch) {
  const Operand &hs = launch.in[0], &w = launch.in[1];
  const Given given{launch.in[2], launch.in[3], launch.in[4]};
  const bool reverse = launch.intAttribute(0, "kind", 0, 1) == 1;
  checkWidth("topk_divergence", given.ids, w);
  LAUNCH(ascendingKernel, launch.blocks(given.ids.boundElements(), kRowThreads), kRowThreads, 0, launch.stream,
         given.ids, w, launch.state);
  float* chosen = launch.scratch<float>(launch.blocks(hs.bound[0], 1) * given.ids.bound[1]);
  Rows rows;
  rows.softcap = checkedSoftcap("topk_divergence", "softcap", launch.attr[1]);
  rows.weight = launch.in[5];
  rows.row = launch.out[1];
  const auto launchRows = [&](const Rows& chunk) {
    const auto with = [&](const auto& kernel) {
      LAUNCH(kernel, launch.blocks(chunk.most, 1), kRowThreads, sizeof(LossShared), launch.stream, chunk, w, given,
             chosen, launch.state);
    };
    if (reverse) {
      with(topkDivergenceKernel<true>);
    } else {
      with(topkDivergenceKernel<false>);
    }
  };
  vocabularyLoss(launch, launchRows, hs, {}, w, {}, rows, launch.out[0], launch.out[2], {});
}

}  // namespace elastiform::ELASTIFORM_DEVICE
