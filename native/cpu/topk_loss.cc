// The largest logits of a head, and the divergence on them and a bucket for the rest; docs/ops.md has the equations.
#include <cmath>
#include <cstring>
#include <limits>

#include "core/pool.h"
#include "cpu/checks.h"
#include "cpu/gemm/gemm.h"
#include "cpu/kernels.h"
#include "cpu/loss.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

struct Candidate {
  float logit;  // NaN, like -inf, is below all others
  int32_t id;
};

// A strict order: larger first, then lower id.
bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The T largest of V logits, of equal ones the first, by ascending id; a heap whose front comes last keeps them.
void chooseIds(const float* row, int64_t V, int64_t T, Candidate* kept, int32_t* ids) {
  for (int64_t v = 0; v < V; ++v) {
    const Candidate candidate{std::isnan(row[v]) ? -INFINITY : row[v], static_cast<int32_t>(v)};
    if (v >= T) {
      if (!before(candidate, kept[0])) continue;
      std::pop_heap(kept, kept + T, before);
      kept[T - 1] = candidate;
      std::push_heap(kept, kept + T, before);
    } else {
      kept[v] = candidate;
      std::push_heap(kept, kept + v + 1, before);
    }
  }
  for (int64_t k = 0; k < T; ++k) ids[k] = kept[k].id;
  std::sort(ids, ids + T);
}

// A row of logits of which some are set aside; in the row they become -inf.
struct Parted {
  float top;         // of the rest, 0 where it is empty
  double sum;        // of e^(logit - top) over the rest
  double lse;        // of all logits
  double restLog;    // logarithm of the share of the rest
};

// The smallest normal float's at least: no bucket has less. NaN stays.
double clamped(double logarithm) {
  static const double least = std::log(double{std::numeric_limits<float>::min()});
  return logarithm < least ? least : logarithm;
}

Parted part(float* row, int64_t V, const int32_t* ids, int64_t T, float* chosen) {
  const VectorOps& vector = vectorOps();
  float top = -INFINITY;
  for (int64_t k = 0; k < T; ++k) {
    chosen[k] = row[ids[k]];
    row[ids[k]] = -INFINITY;
    top = std::max(top, chosen[k]);
  }
  bool hasNaN = false;
  const float restTop = vector.maximum(row, V, &hasNaN);
  Parted parted{restTop == -INFINITY ? 0 : restTop, 0, 0, 0};
  parted.sum = vector.expSum(row, parted.top, 1, row, V);
  const double reference = std::max(restTop, top) == -INFINITY ? 0 : std::max(restTop, top);
  double sum = parted.sum * std::exp(parted.top - reference);
  if (parted.sum == 0) sum = 0;
  for (int64_t k = 0; k < T; ++k) sum += std::exp(chosen[k] - reference);
  parted.lse = reference + std::log(sum);
  parted.restLog = parted.sum == 0 ? -INFINITY : parted.top + std::log(parted.sum) - parted.lse;
  return parted;
}

void checkWidth(const char* op, int64_t T, int64_t V) {
  if (T < 1 || T > V) {
    fail(ErrorCode::InvalidProgram, "[%s] ids must have 1 to %lld columns, as many as w has rows, got %lld", op,
         static_cast<long long>(V), static_cast<long long>(T));
  }
}

}  // namespace

void topLogits(const KernelArgs& args) {
  const TensorView &h = args.in[0], &w = args.in[1];
  const TensorView &ids = args.out[0], &logp = args.out[1], &rest = args.out[2];
  const int64_t R = h.dim(0), K = h.dim(1), V = w.dim(0), T = ids.dim(1);
  const float softcap = checkedSoftcap("top_logits", "softcap", args.attr[0]);
  checkWidth("top_logits", T, V);
  const MatrixB forward = weightB(w);
  const int64_t C = chunkRows(R, V, 1);
  float* logits = args.scratch<float>(C * V);
  Candidate* kept = args.scratch<Candidate>(C * T);
  float* chosen = args.scratch<float>(C * T);
  LoopScratch loop(args);
  for (int64_t r0 = 0; r0 < R; r0 += C) {
    const int64_t rows = std::min(C, R - r0);
    gemm(rows, V, K, {h.f32() + r0 * K, K, 1}, forward, {}, logits, V, loop.nextPass());
    parallelFor(rows,
                [&](int64_t i, int) {
                  const int64_t r = r0 + i;
                  int32_t* own = ids.i32() + r * T;
                  capLogits(softcap, logits + i * V, nullptr, V);
                  chooseIds(logits + i * V, V, T, kept + i * T, own);
                  const Parted parted = part(logits + i * V, V, own, T, chosen + i * T);
                  for (int64_t k = 0; k < T; ++k) {
                    logp.f32()[r * T + k] = static_cast<float>(clamped(chosen[i * T + k] - parted.lse));
                  }
                  rest.f32()[r] = static_cast<float>(clamped(parted.restLog));
                },
                args.abort);
  }
  args.counters->flops += productFlops(R, V, K);
}

void topkDivergence(const KernelArgs& args) {
  const TensorView &hs = args.in[0], &w = args.in[1], &ids = args.in[2], &logp = args.in[3], &rest = args.in[4];
  const TensorView &weight = args.in[5], &loss = args.out[0], &row = args.out[1], &dh = args.out[2];
  const int64_t R = hs.dim(0), K = hs.dim(1), V = w.dim(0), T = ids.dim(1);
  const bool reverse = intAttribute(args, "topk_divergence", 0, "kind", 0, 1) == 1;
  const float softcap = checkedSoftcap("topk_divergence", "softcap", args.attr[1]);
  checkWidth("topk_divergence", T, V);
  for (int64_t i = 0; i < R * T; ++i) {
    const int32_t id = ids.i32()[i], low = i % T == 0 ? 0 : ids.i32()[i - 1] + 1;
    if (id < low || id >= V) {
      fail(ErrorCode::InvalidData, "[topk_divergence] ids[%lld] must be in [%d, %lld) (ascending, unique), got %d",
           static_cast<long long>(i), low, static_cast<long long>(V), id);
    }
  }
  const MatrixB forward = weightB(w), backward = weightTransposedB(w);
  const int64_t C = chunkRows(R, V, 1);
  double* values = args.scratch<double>(R);
  float* logits = args.scratch<float>(C * V);
  float* allChosen = args.scratch<float>(C * T);
  float* slopes = dh && softcap > 0 ? args.scratch<float>(threadCount() * V) : nullptr;
  LoopScratch loop(args);
  const VectorOps& vector = vectorOps();
  const auto lossOfRow = [&](int64_t r, float* student, float* chosen, float* slope) {
    capLogits(softcap, student, slope, V);
    const int32_t* own = ids.i32() + r * T;
    const float* given = logp.f32() + r * T;
    const Parted parted = part(student, V, own, T, chosen);
    const double restP = clamped(rest.f32()[r]), restQ = clamped(parted.restLog);
    // sum p (log p - log q) and sum p, or sum q (log q - log p).
    double value = reverse ? std::exp(restQ) * (restQ - restP) : std::exp(restP) * (restP - restQ);
    double mass = std::exp(restP);
    for (int64_t k = 0; k < T; ++k) {
      const double p = clamped(given[k]), q = clamped(chosen[k] - parted.lse);
      value += reverse ? std::exp(q) * (q - p) : std::exp(p) * (p - q);
      mass += std::exp(p);
    }
    values[r] = value;
    if (row) row.f32()[r] = static_cast<float>(value);
    if (!dh) return;
    const double ofRest = reverse ? std::exp(restQ) * (restQ - restP - value) : std::exp(restQ) * mass - std::exp(restP);
    const float wanted = weight.f32()[r];
    vector.scale(student, parted.sum == 0 ? 0 : static_cast<float>(wanted * ofRest / parted.sum), student, V);
    for (int64_t k = 0; k < T; ++k) {
      const double p = clamped(given[k]), q = clamped(chosen[k] - parted.lse);
      const double g = reverse ? std::exp(q) * (q - p - value) : std::exp(q) * mass - std::exp(p);
      student[own[k]] = static_cast<float>(wanted * g);
    }
    if (slope) vector.multiply(student, slope, student, V);
  };
  for (int64_t r0 = 0; r0 < R; r0 += C) {
    const int64_t rows = std::min(C, R - r0);
    gemm(rows, V, K, {hs.f32() + r0 * K, K, 1}, forward, {}, logits, V, loop.nextPass());
    parallelFor(rows,
                [&](int64_t i, int worker) {
                  lossOfRow(r0 + i, logits + i * V, allChosen + i * T, slopes ? slopes + worker * V : nullptr);
                },
                args.abort);
    if (dh) gemm(rows, K, V, {logits, V, 1}, backward, {}, dh.f32() + r0 * K, K, loop.nextPass());
  }
  loss.f32()[0] = weightedSum(weight.f32(), values, R);
  args.counters->flops += productFlops(R, V, K) * (dh ? 2 : 1);
}

}  // namespace elastiform::cpu
