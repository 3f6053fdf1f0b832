// Experts: by whose scores rows of a tile choose, which rows choose one, its gates, and the loss that balances the load of all.
#include "ops/expert.h"

#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

template <typename T>
struct Contiguous {
  const T* values;
  T operator()(int64_t i) const { return values[i]; }
};

// The rows of z [N, E] with the shares of their segments.
struct Experts {
  const float* z;
  int64_t rows, segments;
  int count;
  const int32_t* offsets;
  const float* share;
  ExpertRule rule;

  ExpertRow<Contiguous<float>> row(int64_t n, int64_t segment) const {
    return {{z + n * count}, count, rule, share[segment]};
  }
  int64_t segmentOf(int64_t n) const { return std::upper_bound(offsets, offsets + segments, n) - offsets - 1; }
};

// Inputs z, offsets and share stand together from `first`.
Experts checkedExperts(const KernelArgs& args, const char* op, int first, int ruleAttribute) {
  const TensorView &z = args.in[first], &offsets = args.in[first + 1], &share = args.in[first + 2];
  Experts e{z.f32(), z.dim(0), 0, static_cast<int>(z.dim(1)), offsets.i32(), share.f32(), {}};
  e.segments = checkOffsets(op, offsets, e.rows);
  e.rule = static_cast<ExpertRule>(intAttribute(args, op, ruleAttribute, "rule", 0, 1));
  checkPerSegment(op, share, e.segments);
  checkScores(op, e.z, e.rows * e.count);
  checkShares(op, "share", e.share, e.segments);
  return e;
}

int expertAttribute(const KernelArgs& args, const char* op, const Experts& e) {
  return static_cast<int>(intAttribute(args, op, 0, "expert", 0, e.count - 1));
}

// load[i] and weight[i]: the share of rows that choose expert i, and the mean of its softmax.
void measure(const Experts& e, const KernelArgs& args, double* load, double* weight) {
  forChunks(e.count, 1, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      load[i] = weight[i] = 0;
      for (int64_t s = 0; s < e.segments; ++s) {
        for (int64_t n = e.offsets[s]; n < e.offsets[s + 1]; ++n) {
          const auto row = e.row(n, s);
          load[i] += row.chosen(static_cast<int>(i));
          weight[i] += ExpertWeights(row).weight(static_cast<int>(i));
        }
      }
      load[i] /= static_cast<double>(std::max<int64_t>(e.rows, 1));
      weight[i] /= static_cast<double>(std::max<int64_t>(e.rows, 1));
    }
  });
}

// Rows of segments, and what tiles before them decided.
struct TiledRows {
  Tiles<Contiguous<int32_t>> tiles;
  int64_t rows, segments, count;
  const int32_t* offsets;
  const float* held;  // null: nothing

  int64_t segmentOf(int64_t n) const { return std::upper_bound(offsets, offsets + segments, n) - offsets - 1; }
  const float* heldOf(int64_t segment) const { return held + segment * heldWidth(count); }
  // The row whose scores hold for row n; -1: those that are held.
  int64_t deciding(int64_t n, int64_t segment) const {
    return held && tiles.holds(heldOf(segment)[count], n) ? -1 : tiles.first(offsets[segment], n);
  }
};

// Input 0 has a row for each of the positions, input 1; offsets and what is held follow.
TiledRows checkedTiles(const KernelArgs& args, const char* op) {
  const TensorView &z = args.in[0], &positions = args.in[1], &offsets = args.in[2], &held = args.in[3];
  const auto tile = static_cast<int32_t>(intAttribute(args, op, 0, "tile", 1, INT32_MAX));
  TiledRows t{{{positions.i32()}, tile}, z.dim(0), 0, z.dim(1), offsets.i32(), nullptr};
  t.segments = checkOffsets(op, offsets, t.rows);
  for (int64_t s = 0; s < t.segments; ++s) {
    int32_t previous = -1;
    for (int64_t n = t.offsets[s]; n < t.offsets[s + 1]; ++n) {
      const int32_t position = t.tiles.positions(n);
      if (position <= previous || position >= kPositions) {
        fail(ErrorCode::InvalidData, "[%s] positions[%lld] must be in [%d, %d) (ascending in a segment), got %d", op,
             static_cast<long long>(n), previous + 1, kPositions, position);
      }
      previous = position;
    }
  }
  if (!held) return t;
  checkPerSegment(op, held, t.segments);
  checkHeldWidth(op, held.dim(1), t.count);
  t.held = held.f32();
  return t;
}

}  // namespace

void tileScores(const KernelArgs& args) {
  const char* op = "tile_scores";
  const TiledRows t = checkedTiles(args, op);
  const float* z = args.in[0].f32();
  float* y = args.out[0].f32();
  checkScores(op, z, t.rows * t.count);
  const size_t bytes = t.count * sizeof(float);
  forChunks(t.rows, rowsPerChunk(t.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = t.segmentOf(n), row = t.deciding(n, s);
      std::memcpy(y + n * t.count, row < 0 ? t.heldOf(s) : z + row * t.count, bytes);
    }
  });
  if (!t.held || !args.out[1]) return;
  for (int64_t s = 0; s < t.segments; ++s) {
    const int64_t decision = t.count + 1;
    float* next = args.out[1].f32() + s * heldWidth(t.count);
    int64_t kept = 0;
    // From the last row back.
    for (int64_t end = t.offsets[s + 1]; kept < 2 && end > t.offsets[s]; ++kept) {
      const int64_t row = t.deciding(end - 1, s);
      if (row < 0) break;
      std::memcpy(next + kept * decision, z + row * t.count, bytes);
      next[kept * decision + t.count] = static_cast<float>(t.tiles.positions(row));
      end = row;
    }
    std::memcpy(next + kept * decision, t.heldOf(s), (2 - kept) * decision * sizeof(float));
  }
}

void tileScoresGrad(const KernelArgs& args) {
  const TiledRows t = checkedTiles(args, "tile_scores_grad");
  const float* dy = args.in[0].f32();
  float* dz = args.out[0].f32();
  const VectorOps& vector = vectorOps();
  // A segment's rows of a tile are summed in their order.
  forChunks(t.segments, rowsPerChunk(t.rows * t.count / std::max<int64_t>(1, t.segments)), args,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t s = begin; s < end; ++s) {
                for (int64_t n = t.offsets[s]; n < t.offsets[s + 1]; ++n) {
                  float* to = dz + n * t.count;
                  std::memset(to, 0, t.count * sizeof(float));
                  const int64_t row = t.deciding(n, s);
                  if (row >= 0) vector.add(dz + row * t.count, dy + n * t.count, dz + row * t.count, t.count);
                }
              }
            });
}

void expertRows(const KernelArgs& args) {
  const char* op = "expert_rows";
  const Experts e = checkedExperts(args, op, 0, 1);
  const int expert = expertAttribute(args, op, e);
  int32_t *rows = args.out[0].i32(), *rowOffsets = args.out[1].i32();
  uint8_t* chosen = args.scratch<uint8_t>(std::max<int64_t>(e.rows, 1));
  forChunks(e.rows, rowsPerChunk(e.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin, s = e.segmentOf(begin); n < end; ++n) {
      while (n >= e.offsets[s + 1]) ++s;
      chosen[n] = e.row(n, s).chosen(expert);
    }
  });
  checkRoom(op, args.out[0], std::count(chosen, chosen + e.rows, 1));
  int32_t count = 0;
  rowOffsets[0] = 0;
  for (int64_t s = 0; s < e.segments; ++s) {
    for (int32_t n = e.offsets[s]; n < e.offsets[s + 1]; ++n) {
      if (chosen[n]) rows[count++] = n;
    }
    rowOffsets[s + 1] = count;
  }
  args.produced[0] = count;
}

void expertGate(const KernelArgs& args) {
  const char* op = "expert_gate";
  const Experts e = checkedExperts(args, op, 0, 1);
  const int expert = expertAttribute(args, op, e);
  const auto mode = static_cast<ExpertGate>(intAttribute(args, op, 2, "mode", 0, 2));
  const int32_t* rows = args.in[3].i32();
  const int64_t count = args.out[0].dim(0);
  float* g = args.out[0].f32();
  checkRows(op, rows, count, e.rows);
  forChunks(count, rowsPerChunk(e.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const auto row = e.row(rows[r], e.segmentOf(rows[r]));
      g[r] = static_cast<float>(ExpertWeights(row).gate(mode, expert));
    }
  });
}

void expertGateGrad(const KernelArgs& args) {
  const char* op = "expert_gate_grad";
  const Experts e = checkedExperts(args, op, 1, 1);
  const int expert = expertAttribute(args, op, e);
  const auto mode = static_cast<ExpertGate>(intAttribute(args, op, 2, "mode", 0, 2));
  const float* dg = args.in[0].f32();
  const int32_t* rows = args.in[4].i32();
  const int64_t count = args.in[0].dim(0);
  float* dz = args.out[0].f32();
  checkRows(op, rows, count, e.rows);
  std::fill_n(dz, e.rows * e.count, 0.0f);
  forChunks(count, rowsPerChunk(int64_t{e.count} * e.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const auto row = e.row(rows[r], e.segmentOf(rows[r]));
      float* to = dz + int64_t{rows[r]} * e.count;
      ExpertWeights(row).gateSlopes(mode, expert, [&](int i, double slope) { to[i] = static_cast<float>(dg[r] * slope); });
    }
  });
}

void expertCredit(const KernelArgs& args) {
  const char* op = "expert_credit";
  const Experts e = checkedExperts(args, op, 2, 0);
  const TensorView &h = args.in[0], &dh = args.in[1], &rows = args.in[6];
  const float* weight = args.in[5].f32();
  float* dz = args.out[0].f32();
  const int64_t units = h.dim(1);
  if (e.count == 0 || units % e.count != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] %lld units cannot be cut into %d experts", op, static_cast<long long>(units),
         e.count);
  }
  const int64_t width = units / e.count;
  if (rows) checkRows(op, rows.i32(), e.rows, h.dim(0));
  const auto rowOf = [&](int64_t r) { return rows ? rows.i32()[r] : r; };
  const VectorOps& vector = vectorOps();
  double* credit = args.scratch<double>(std::max<int64_t>(e.rows * e.count, 1));
  forChunks(e.rows, rowsPerChunk(2 * units), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      for (int i = 0; i < e.count; ++i) {
        const int64_t at = rowOf(r) * units + i * width;
        credit[r * e.count + i] = vector.dot(h.f32() + at, dh.f32() + at, width);
      }
    }
  });
  double* magnitude = args.scratch<double>(std::max<int64_t>(e.segments, 1));
  for (int64_t s = 0; s < e.segments; ++s) {
    magnitude[s] = 0;
    for (int64_t i = e.offsets[s] * e.count; i < e.offsets[s + 1] * e.count; ++i) magnitude[s] += std::fabs(credit[i]);
    magnitude[s] /= static_cast<double>(std::max<int64_t>((e.offsets[s + 1] - e.offsets[s]) * e.count, 1));
  }
  forChunks(e.rows, rowsPerChunk(int64_t{e.count} * e.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t s = e.segmentOf(r);
      const double scale = magnitude[s] == 0 ? 0 : weight[rowOf(r)] / magnitude[s];
      const double* own = credit + r * e.count;
      choiceSlopes(
          e.row(r, s), [&](int i) { return own[i]; },
          [&](int i, double slope) { dz[r * e.count + i] = static_cast<float>(scale * slope); });
    }
  });
}

void expertBalance(const KernelArgs& args) {
  const Experts e = checkedExperts(args, "expert_balance", 0, 0);
  double *load = args.scratch<double>(e.count), *weight = args.scratch<double>(e.count);
  measure(e, args, load, weight);
  double product = 0, chosen = 0;
  for (int i = 0; i < e.count; ++i) {
    product += load[i] * weight[i];
    chosen += load[i];
  }
  args.out[0].f32()[0] = static_cast<float>(e.count * product - chosen);
}

void expertBalanceGrad(const KernelArgs& args) {
  const Experts e = checkedExperts(args, "expert_balance_grad", 1, 0);
  double *load = args.scratch<double>(e.count), *weight = args.scratch<double>(e.count);
  measure(e, args, load, weight);
  const double factor = args.in[0].f32()[0] * static_cast<double>(e.count) / static_cast<double>(std::max<int64_t>(e.rows, 1));
  float* dz = args.out[0].f32();
  forChunks(e.rows, rowsPerChunk(int64_t{e.count} * e.count), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      const auto row = e.row(n, e.segmentOf(n));
      const ExpertWeights weights(row);
      double mean = 0;
      for (int i = 0; i < e.count; ++i) mean += load[i] * weights.weight(i);
      for (int i = 0; i < e.count; ++i) {
        dz[n * e.count + i] = static_cast<float>(factor * weights.weight(i) * (load[i] - mean));
      }
    }
  });
}

}  // namespace elastiform::cpu
