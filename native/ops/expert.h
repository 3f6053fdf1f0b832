// Which experts (attention heads, blocks of a feed-forward layer) a row chooses by its scores, and by whose scores rows choose
// that do so together, for the kernels of every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/error.h"

#ifdef __CUDACC__
#define ELASTIFORM_EXPERT __host__ __device__ __forceinline__
#else
#define ELASTIFORM_EXPERT inline
#endif

namespace elastiform {

// How a share becomes a number of experts: so many of all, or until so much of the softmax is covered (XMoE,
// arXiv 2403.18926).
enum class ExpertRule { TopK = 0, Mass = 1 };

// The value of an expert's gate, w being the softmax of the row's E scores: 1, with the gradient of log w; E w; or
// E w / (sum of w over the chosen).
enum class ExpertGate { StraightThrough = 0, Softmax = 1, Renormalised = 2 };

// Positions below this are exact as floats, which decisions are kept in.
constexpr int32_t kPositions = 1 << 24;

// Rows of a segment, of ascending positions(row), of which those within a tile, `tile` consecutive positions, choose together.
template <typename Positions>
struct Tiles {
  Positions positions;
  int32_t tile;

  // The first row from `begin` on of the tile that `row` is in.
  ELASTIFORM_EXPERT int64_t first(int64_t begin, int64_t row) const {
    const int32_t start = positions(row) / tile * tile;
    int64_t low = begin, high = row;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (positions(middle) < start) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // Whether `row` is in the tile that was decided about at a position; negative or NaN: none was.
  ELASTIFORM_EXPERT bool holds(float position, int64_t row) const {
    return position >= 0 && floor(static_cast<double>(position) / tile) == positions(row) / tile;
  }
};

// The last two decisions of every segment: scores of all experts, and the position of the row that had them; the newest
// first. f32 [S, 2 (E + 1)]
ELASTIFORM_EXPERT int64_t heldWidth(int64_t experts) { return 2 * (experts + 1); }
inline void checkHeldWidth(const char* op, int64_t width, int64_t experts) {
  if (width == heldWidth(experts)) return;
  fail(ErrorCode::InvalidProgram, "[%s] two decisions about %lld experts are %lld values, got %lld", op,
       static_cast<long long>(experts), static_cast<long long>(heldWidth(experts)), static_cast<long long>(width));
}

// One row of scores. scores(i) is the i-th of `count`, none NaN. Experts come in the order of falling scores, ties to the
// lower index.
template <typename Scores>
struct ExpertRow {
  Scores scores;
  int count;
  ExpertRule rule;
  float share;  // in [0, 1]

  ELASTIFORM_EXPERT double top() const {
    float best = scores(0);
    for (int i = 1; i < count; ++i) best = scores(i) > best ? scores(i) : best;
    return best;
  }
  // Of the softmax, relative to the largest; equal scores of minus infinity are alike.
  ELASTIFORM_EXPERT double exponential(int i, double top) const {
    const double score = scores(i);
    return score == top ? 1.0 : exp(score - top);
  }
  ELASTIFORM_EXPERT double total(double top) const {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += exponential(i, top);
    return sum;
  }

  ELASTIFORM_EXPERT bool chosen(int expert) const {
    const float own = scores(expert);
    const auto before = [&](int i) { return scores(i) > own || (scores(i) == own && i < expert); };
    if (rule == ExpertRule::TopK) {
      int rank = 0;
      for (int i = 0; i < count; ++i) rank += before(i);
      return rank < ceil(static_cast<double>(share) * count - 1e-6);  // forgives the rounding of 0.1 to f32
    }
    if (share >= 1) return true;
    const double highest = top();
    double mass = 0;
    for (int i = 0; i < count; ++i) mass += before(i) ? exponential(i, highest) : 0;
    return mass < share * total(highest);
  }
};

// The gradient of `sum credit(i) sigmoid(scores(i) - tau)` by the scores, with tau halfway between the lowest score of a row
// that is chosen and the highest that is not, while tau keeps `sum sigmoid(scores(i) - tau)`. Calls store(i, gradient) for
// every i; zeros where none or all are chosen, where tau is infinite, and where every slope underflows.
template <typename Scores, typename Credit, typename Store>
ELASTIFORM_EXPERT void choiceSlopes(const ExpertRow<Scores>& row, const Credit& credit, const Store& store) {
  double lowest = INFINITY, highest = -INFINITY;
  int chosen = 0;
  for (int i = 0; i < row.count; ++i) {
    const double score = row.scores(i);
    if (row.chosen(i)) {
      ++chosen;
      lowest = score < lowest ? score : lowest;
    } else {
      highest = score > highest ? score : highest;
    }
  }
  const double tau = (lowest + highest) / 2;
  const bool learns = chosen > 0 && chosen < row.count && fabs(tau) < INFINITY;
  const auto slope = [&](int i) {
    const double e = exp(-fabs(row.scores(i) - tau));
    return learns ? e / ((1 + e) * (1 + e)) : 0;
  };
  double slopes = 0, sum = 0;
  for (int i = 0; i < row.count; ++i) {
    slopes += slope(i);
    sum += credit(i) * slope(i);
  }
  for (int i = 0; i < row.count; ++i) store(i, slopes == 0 ? 0.0 : (credit(i) - sum / slopes) * slope(i));
}

// The softmax of a row, and what gates make of it.
template <typename Scores>
struct ExpertWeights {
  const ExpertRow<Scores>& row;
  double top, total;

  ELASTIFORM_EXPERT explicit ExpertWeights(const ExpertRow<Scores>& row)
      : row(row), top(row.top()), total(row.total(top)) {}
  ELASTIFORM_EXPERT double weight(int i) const { return row.exponential(i, top) / total; }

  // The sum over those that are chosen.
  ELASTIFORM_EXPERT double chosen() const {
    double sum = 0;
    for (int i = 0; i < row.count; ++i) sum += row.chosen(i) ? weight(i) : 0;
    return sum;
  }
  ELASTIFORM_EXPERT double gate(ExpertGate mode, int expert) const {
    if (mode == ExpertGate::StraightThrough) return 1;
    return row.count * weight(expert) / (mode == ExpertGate::Renormalised ? chosen() : 1);
  }
  // Calls store(i, d gate / d scores(i)) for every i; of log w where the gate is straight-through. `expert` is chosen.
  template <typename Store>
  ELASTIFORM_EXPERT void gateSlopes(ExpertGate mode, int expert, const Store& store) const {
    const bool renormalised = mode == ExpertGate::Renormalised;
    const double all = renormalised ? chosen() : 1;
    const double scale = mode == ExpertGate::StraightThrough ? 1 : row.count * weight(expert) / all;
    for (int i = 0; i < row.count; ++i) {
      const double other = renormalised && !row.chosen(i) ? 0 : weight(i) / all;
      store(i, scale * ((i == expert) - other));
    }
  }
};

}  // namespace elastiform
