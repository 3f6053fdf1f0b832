// Routing: which rows a sub-layer processes, their gates, the auxiliary loss that lets inference decide causally, and
// the gradient of scores through the choice itself.
#include <cstring>
#include <functional>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

struct Scored {
  float value;
  int32_t index;
};

// A strict order: larger first, then lower index.
bool before(const Scored& a, const Scored& b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

// row_offsets [segments + 1]: 0 first, at most all rows of every segment.
void checkRowOffsets(const char* op, const int32_t* rowOffsets, const int32_t* offsets, int64_t segments) {
  if (rowOffsets[0] != 0) {
    fail(ErrorCode::InvalidData, "[%s] row_offsets[0] must be 0, got %d", op, rowOffsets[0]);
  }
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t low = rowOffsets[s], high = low + offsets[s + 1] - offsets[s];
    if (rowOffsets[s + 1] < low || rowOffsets[s + 1] > high) {
      fail(ErrorCode::InvalidData, "[%s] row_offsets[%lld] must be in [%lld, %lld], got %d", op,
           static_cast<long long>(s + 1), static_cast<long long>(low), static_cast<long long>(high), rowOffsets[s + 1]);
    }
  }
}

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

// One segment of topk_credit, 0 < k < length. credit: first-order change of the loss when a row enters, overwritten;
// sorted: [length]. With e = credit / mean |credit| and tau halfway between the k-th and the next largest score, dz is
// the gradient of sum e sigmoid(z - tau) while tau moves with z so that sum sigmoid(z - tau) stays.
void creditSegment(const float* z, const float* weight, int64_t length, int64_t k, double* credit, float* sorted,
                   float* dz) {
  std::fill_n(dz, length, 0.0f);
  double magnitude = 0;
  for (int64_t i = 0; i < length; ++i) magnitude += std::fabs(credit[i]);
  magnitude /= static_cast<double>(length);
  std::copy_n(z, length, sorted);
  std::nth_element(sorted, sorted + (k - 1), sorted + length, std::greater<float>());
  const double next = *std::max_element(sorted + k, sorted + length);
  const double tau = (static_cast<double>(sorted[k - 1]) + next) / 2;
  if (magnitude == 0 || !std::isfinite(tau)) return;
  const auto slope = [&](int64_t i) { return sigmoid(z[i] - tau) * sigmoid(tau - z[i]); };
  double slopes = 0, sum = 0;
  for (int64_t i = 0; i < length; ++i) {
    const double g = slope(i);
    credit[i] /= magnitude;
    slopes += g;
    sum += credit[i] * g;
  }
  if (slopes == 0) return;
  const double mean = sum / slopes;
  for (int64_t i = 0; i < length; ++i) dz[i] = static_cast<float>(weight[i] * (credit[i] - mean) * slope(i));
}

}  // namespace

void routeTopk(const KernelArgs& args) {
  const char* op = "route_topk";
  const float* z = args.in[0].f32();
  const int64_t total = args.in[0].dim(0);
  const int64_t segments = checkOffsets(op, args.in[1], total);
  const int32_t* offsets = args.in[1].i32();
  checkPerSegment(op, args.in[2], segments);
  const float* capacity = args.in[2].f32();
  checkScores(op, z, total);
  checkShares(op, "capacity", capacity, segments);
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    longest = std::max<int64_t>(longest, offsets[s + 1] - offsets[s]);
  }
  Scored* scored = args.scratch<Scored>(std::max<int64_t>(longest, 1));
  int32_t* rows = args.out[0].i32();
  int32_t* rowOffsets = args.out[1].i32();
  int32_t count = 0;
  rowOffsets[0] = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int32_t start = offsets[s], length = offsets[s + 1] - start;
    // 1e-6 forgives the rounding of a capacity such as 0.1 to f32.
    const double wanted = std::ceil(static_cast<double>(capacity[s]) * length - 1e-6);
    const int32_t k = static_cast<int32_t>(std::clamp(wanted, 0.0, static_cast<double>(length)));
    checkRoom(op, args.out[0], int64_t{count} + k);
    if (k == length) {
      for (int32_t i = 0; i < length; ++i) rows[count++] = start + i;
    } else if (k > 0) {
      for (int32_t i = 0; i < length; ++i) scored[i] = {z[start + i], i};
      std::nth_element(scored, scored + (k - 1), scored + length, before);
      const Scored last = scored[k - 1];
      for (int32_t i = 0; i < length; ++i) {
        if (!before(last, {z[start + i], i})) rows[count++] = start + i;
      }
    }
    rowOffsets[s + 1] = count;
  }
  args.produced[0] = count;
}

void routeThreshold(const KernelArgs& args) {
  const char* op = "route_threshold";
  const float* z = args.in[0].f32();
  const int64_t total = args.in[0].dim(0);
  const int64_t segments = checkOffsets(op, args.in[1], total);
  const int32_t* offsets = args.in[1].i32();
  checkPerSegment(op, args.in[2], segments);
  const float* threshold = args.in[2].f32();
  checkScores(op, z, total);
  for (int64_t s = 0; s < segments; ++s) {
    if (std::isnan(threshold[s])) {
      fail(ErrorCode::InvalidData, "[%s] threshold[%lld] is NaN", op, static_cast<long long>(s));
    }
  }
  int32_t* rows = args.out[0].i32();
  int32_t* rowOffsets = args.out[1].i32();
  int32_t count = 0;
  rowOffsets[0] = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const bool all = threshold[s] == -INFINITY;  // even rows whose score is minus infinity
    for (int32_t i = offsets[s]; i < offsets[s + 1]; ++i) {
      if (!all && !(z[i] > threshold[s])) continue;
      checkRoom(op, args.out[0], int64_t{count} + 1);
      rows[count++] = i;
    }
    rowOffsets[s + 1] = count;
  }
  args.produced[0] = count;
}

void gate(const KernelArgs& args) {
  const float* z = args.in[0].f32();
  const int32_t* rows = args.in[1].i32();
  const int64_t count = args.out[0].dim(0);
  float* g = args.out[0].f32();
  const int64_t mode = intAttribute(args, "gate", 0, "mode", 0, 2);
  checkRows("gate", rows, count, args.in[0].dim(0));
  for (int64_t r = 0; r < count; ++r) {
    g[r] = mode == 0 ? 1.0f : static_cast<float>((mode == 2 ? 2 : 1) * sigmoid(z[rows[r]]));
  }
}

void gateGrad(const KernelArgs& args) {
  const float* dg = args.in[0].f32();
  const float* z = args.in[1].f32();
  const int32_t* rows = args.in[2].i32();
  const int64_t count = args.in[0].dim(0), total = args.out[0].dim(0);
  float* dz = args.out[0].f32();
  const int64_t mode = intAttribute(args, "gate_grad", 0, "mode", 0, 2);
  checkRows("gate_grad", rows, count, total);
  std::fill_n(dz, total, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const double s = sigmoid(z[rows[r]]), rest = sigmoid(-static_cast<double>(z[rows[r]]));
    const double slope = mode == 0 ? rest : mode == 1 ? s * rest : 2 * s * rest;
    dz[rows[r]] = static_cast<float>(dg[r] * slope);
  }
}

void topkBce(const KernelArgs& args) {
  const float* z = args.in[0].f32();
  const int32_t* rows = args.in[1].i32();
  const int64_t total = args.in[0].dim(0), count = args.in[1].dim(0);
  checkRows("topk_bce", rows, count, total);
  double sum = 0;
  for (int64_t i = 0, r = 0; i < total; ++i) {
    const bool selected = r < count && rows[r] == i;
    const double x = selected ? -static_cast<double>(z[i]) : z[i];  // -log sigmoid(-x)
    sum += std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
    r += selected;
  }
  args.out[0].f32()[0] = total > 0 ? static_cast<float>(sum / total) : 0.0f;
}

void topkBceGrad(const KernelArgs& args) {
  const float dloss = args.in[0].f32()[0];
  const float* z = args.in[1].f32();
  const int32_t* rows = args.in[2].i32();
  const int64_t total = args.in[1].dim(0), count = args.in[2].dim(0);
  float* dz = args.out[0].f32();
  checkRows("topk_bce_grad", rows, count, total);
  for (int64_t i = 0, r = 0; i < total; ++i) {
    const bool selected = r < count && rows[r] == i;
    // sigmoid(z) - 1 = -sigmoid(-z) keeps small gradients exact.
    const double slope = selected ? -sigmoid(-static_cast<double>(z[i])) : sigmoid(z[i]);
    dz[i] = static_cast<float>(dloss * slope / static_cast<double>(total));
    r += selected;
  }
}

void topkCredit(const KernelArgs& args) {
  const char* op = "topk_credit";
  const int64_t total = args.in[0].dim(0), width = args.in[0].dim(1);
  const float *dy = args.in[0].f32(), *before = args.in[1].f32(), *after = args.in[2].f32();
  const float *z = args.in[3].f32(), *weight = args.in[6].f32();
  float* dz = args.out[0].f32();
  const int64_t segments = checkOffsets(op, args.in[4], total);
  const int32_t *offsets = args.in[4].i32(), *rowOffsets = args.in[5].i32();
  checkRowOffsets(op, rowOffsets, offsets, segments);
  checkScores(op, z, total);
  const VectorOps& vector = vectorOps();
  double* credit = args.scratch<double>(std::max<int64_t>(total, 1));
  forChunks(total, rowsPerChunk(3 * width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * width;
      credit[i] = vector.dot(dy + row, after + row, width) - vector.dot(dy + row, before + row, width);
    }
  });
  float* sorted = args.scratch<float>(std::max<int64_t>(total, 1));
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t start = offsets[s], length = offsets[s + 1] - start, k = rowOffsets[s + 1] - rowOffsets[s];
    if (k > 0 && k < length) {
      creditSegment(z + start, weight + start, length, k, credit + start, sorted, dz + start);
    } else {
      std::fill_n(dz + start, length, 0.0f);
    }
  }
}

}  // namespace elastiform::cpu
