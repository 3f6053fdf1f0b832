// Attention over variable-length segments, its gradient, and attention over key-value caches of pages, on CUDA cores in
// f32; and the plans of the kernels for bf16 activations (attention_mma.cu, attention_grad_mma.cu).
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao et al., "FlashAttention". What a query gets
// is a function of the query and of the keys it sees, to the bit: tiles of keys start at fixed keys of a segment, and
// scores, sums of weights and weighted sums are chains over ascending indices whichever thread computes them, in which
// keys out of sight are exact zeros.
#include "cuda/attention.cuh"

#include <climits>

#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

// ---- The plan: checks that need more than one operand, tables of tiles, FLOPs

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / 32;

struct PlanShared {
  double sums[kPlanWarps];
  uint32_t warps[kPlanWarps];
  bool faulted;
};

DEVICE int blockMax(PlanShared& s, uint32_t value) {
  value = warpMax(value);
  syncThreads();  // earlier results have been read
  if (laneId() == 0) s.warps[warpId()] = value;
  syncThreads();
  return static_cast<int>(warpMax(s.warps[laneId()]));
}

// before[s] = tilesOf(0) + ... + tilesOf(s - 1) for s <= count; returns the last.
template <typename TilesOf>
DEVICE int scanTiles(PlanShared& s, int count, int32_t* before, const TilesOf& tilesOf) {
  const int warp = warpId();
  uint32_t sum = 0;
  for (int first = 0; first < count; first += kPlanThreads) {
    const int i = first + threadIdx.x;
    const uint32_t tiles = i < count ? tilesOf(i) : 0, inWarp = warpScan(tiles);
    syncThreads();  // earlier results have been read
    if (laneId() == 31) s.warps[warp] = inWarp;
    syncThreads();
    const uint32_t warps = warpScan(s.warps[laneId()]), others = shflIdx(warps, max(warp - 1, 0));
    if (i < count) stGlobal(before + i, sum + (warp > 0 ? others : 0) + inWarp - tiles);
    sum += shflIdx(warps, 31);
  }
  if (threadIdx.x == 0) stGlobal(before + count, sum);
  return static_cast<int>(sum);
}

// min(1, window) + ... + min(n, window)
DEVICE double windowedSum(double n, double window) {
  const double inside = n < window ? n : window;
  return inside * (inside + 1) / 2 + (n - inside) * window;
}

DEVICE int tilesOf(int64_t count, int perTile) { return static_cast<int>((count + perTile - 1) / perTile); }

// One block.
__global__ void __launch_bounds__(kPlanThreads, 1) planKernel(Planning t) {
  SHARED_MEMORY(PlanShared, s);
  const AttentionSegments& g = t.segments;
  const StepState& state = t.state;
  if (blockFaulted(state, s.faulted)) return;
  const int tid = threadIdx.x, segments = g.count(), queries = t.q.size(0);
  // Offsets may be trusted and still be those of other rows.
  if (tid == 0) {
    const int keyEnd = segments > 0 ? g.first(segments) : 0, queryEnd = segments > 0 ? g.start(segments) : 0;
    if (t.k && keyEnd != t.k.size(0)) state.report(Fault::OffsetEnd, t.offsetsInput, segments, 0, t.k.size(0), keyEnd);
    if (queryEnd != queries) state.report(Fault::OffsetEnd, t.startsInput, segments, 0, queries, queryEnd);
  }
  if (blockFaulted(state, s.faulted)) return;
  if (g.cache) {
    const int capacity = g.cache.capacity();
    for (int i = tid; i < segments; i += kPlanThreads) {
      // Without k nothing else says how far the offsets may go.
      const int64_t first = i > 0 ? g.first(i) : 0, added = g.first(i + 1) - first;
      if (g.first(i) != first) state.report(Fault::Offset, t.offsetsInput, i, 0, 0, g.first(i));
      if (added < 0 || added > capacity) {
        state.report(Fault::Offset, t.offsetsInput, i + 1, first, first + capacity, g.first(i + 1));
      }
    }
    if (blockFaulted(state, s.faulted)) return;
    g.cache.check<kPlanThreads>(segments, true, [&](int s) { return g.added(s); });
  }
  if (g.rows) {
    for (int i = tid; i < queries; i += kPlanThreads) {
      const int segment = segmentOf(g.starts, segments, i), low = g.first(segment), high = low + g.added(segment);
      const int row = ldGlobal(g.rows + i), least = i > g.start(segment) ? max(low, ldGlobal(g.rows + i - 1) + 1) : low;
      if (row < least || row >= high) state.report(Fault::Segment, t.rowsInput, i, least, high, row);
    }
  }
  for (int i = tid; t.k && !g.rows && i < segments; i += kPlanThreads) {
    if (g.queries(i) > 0 && g.added(i) == 0) state.report(Fault::NoKeys, t.offsetsInput, i, 0, 0, g.queries(i));
  }
  if (blockFaulted(state, s.faulted)) return;

  int few = 0, splits = 1;
  if (t.fewRows > 0) {
    int most = 0, mostKeys = 0;
    for (int i = tid; i < segments; i += kPlanThreads) {
      most = max(most, g.queries(i) * t.group);
      mostKeys = max(mostKeys, g.queries(i) > 0 ? g.keys(i) : 0);
    }
    few = blockMax(s, most) <= t.most;
    splits = max(tilesOf(blockMax(s, mostKeys), t.splitKeys), 1);
  }
  const int perTile = few ? t.fewRows : t.rows;
  const int tiles = scanTiles(s, segments, t.tilesBefore,
                              [&](int i) { return tilesOf(int64_t{g.queries(i)} * t.group, perTile); });
  const int keyTiles =
      t.keys > 0 ? scanTiles(s, segments, t.keyTilesBefore, [&](int i) { return tilesOf(g.added(i), t.keys); }) : 0;
  const bool split = few && int64_t{tiles} * t.kvHeads < t.items &&
                     int64_t{queries} * t.group * t.kvHeads * splits <= t.parts;

  double pairs = 0;
  if (g.causal && g.rows) {
    for (int i = tid; i < queries; i += kPlanThreads) pairs += min(g.seen(segmentOf(g.starts, segments, i), i), g.window);
  } else {
    for (int i = tid; i < segments; i += kPlanThreads) {
      const double count = g.queries(i);
      const double before = g.before(i);
      pairs += g.causal ? windowedSum(before + count, g.window) - windowedSum(before, g.window) : count * g.added(i);
    }
  }
  pairs = blockTotal(pairs, s.sums);
  if (tid == 0) {
    stGlobal(t.plan, AttentionPlan{tiles, keyTiles, few, split ? splits : 1});
    state.count(t.flopsPerPair * pairs, 0);
  }
}

// ---- Forward

// A result over some of a query's keys is the largest score, the sum of the weights e^(score - largest), and the
// weighted sum of values. Two of them are put together by scaling both to the larger of their largest scores.
struct Joint {
  float keep, add;  // factors of the sums so far and of those that join
};

// The score that weights are relative to: with no key in sight every weight is e^-inf.
DEVICE float reference(float top) { return top == -INFINITY ? 0.0f : top; }

DEVICE Joint join(float& top, float& total, float otherTop, float otherTotal) {
  const float both = fmaxf(top, otherTop);
  const Joint joint{expf(top - reference(both)), expf(otherTop - reference(both))};
  total = fmaf(otherTotal, joint.add, total * joint.keep);
  top = both;
  return joint;
}

// Adding zero makes a zero positive: whether keys out of sight have entered the sum does not show in its sign.
DEVICE float normalised(float sum, float inverse) { return fmaf(sum, inverse, 0.0f); }

struct Attend : Attention<float> {
  int splitKeys;     // results over the keys of every split are joined in order
  float* partSums;   // [R, heads, splits, headDim]
  float2* parts;     // [R, heads, splits]: largest score and sum of weights
};

// How a block shares its work. Scores: kKeyWarps of the four warps side by side, a thread has kScoreRows x kScoreKeys.
// Results: kColumnWarps side by side, a thread has kOutRows rows of kQuads times four columns. Many rows: a warp has
// its own. Few (decoding, where memory is the limit): all warps work on each.
template <int kDimOf, bool kFewOf>
struct AttendTile {
  static constexpr int kDim = kDimOf;  // head_dim, rounded up
  static constexpr bool kFew = kFewOf, kBiased = false;
  static constexpr int kRows = kFew ? (kDim == 32 ? 16 : 8) : kDim <= 128 ? 64 : 32;
  static constexpr int kKeys = 32;
  static constexpr int kKeyWarps = kFew ? 4 : 1, kColumnWarps = kFew ? (kDim < 128 ? kDim / 32 : 4) : 1;
  static constexpr int kScoreRows = kRows * kKeyWarps / 16, kScoreKeys = kKeys / (8 * kKeyWarps);
  static constexpr int kOutRows = kRows * kColumnWarps / 16, kQuads = kDim / (32 * kColumnWarps);
  static constexpr int kBlocks = kFew && kDim > 32 && kDim <= 128 ? 4 : kDim == 32 ? 3 : 2;  // of a multiprocessor, without spills
};

constexpr int kSplitKeys = 128;    // of attention_cached; whole tiles of keys
constexpr int kNoSplit = 1 << 30;  // whole tiles too
constexpr int kFewRows = 16;       // of a segment and kv head
constexpr int64_t kParts = 1 << 16;

template <typename Tile>
struct AttendShared {
  float q[Tile::kRows * (Tile::kDim + kRowPadding)];
  float k[Tile::kKeys * (Tile::kDim + kRowPadding)];
  float v[Tile::kKeys * Tile::kDim];
  float weights[Tile::kRows * (Tile::kKeys + kWeightPadding)];
  float warpTops[Tile::kKeyWarps][Tile::kRows];
  float top[Tile::kRows], factor[Tile::kRows];  // largest score so far; of the sums so far
};

template <typename Tile>
DEVICE void attendTile(const Attend& t, AttendShared<Tile>& s, int splits, int64_t item) {
  constexpr int kStride = Tile::kDim + kRowPadding;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, warp = warpId();
  const int split = static_cast<int>(item % splits), kvHead = static_cast<int>(item / splits % t.h.kvHeads);
  const int tile = static_cast<int>(item / splits / t.h.kvHeads);
  const int segment = segmentOf(t.tilesBefore, g.count(), tile);
  const int firstRow = (tile - ldGlobal(t.tilesBefore + segment)) * Tile::kRows;
  const int rows = min(Tile::kRows, g.queries(segment) * t.h.group - firstRow);
  const auto queryOf = [&](int row) { return g.start(segment) + (firstRow + row) / t.h.group; };
  // Row of q and y as [R * heads, headDim].
  const auto headRow = [&](int row) {
    return int64_t{queryOf(row)} * t.h.heads + kvHead * t.h.group + (firstRow + row) % t.h.group;
  };
  const int seenByLast = g.seen(segment, queryOf(rows - 1));  // no row sees more
  const int hidden = g.hidden(g.seen(segment, queryOf(0)));     // from all rows
  const int firstOfSplit = split * t.splitKeys, begin = max(firstOfSplit, hidden / Tile::kKeys * Tile::kKeys);
  const int end = splits > 1 ? min(seenByLast, firstOfSplit + t.splitKeys) : seenByLast;
  if (begin >= end) return;

  const auto load = [&](auto stride, float* to, const float* from, int first) {
    // Looked up for every tile: there are no registers to keep it in.
    const int32_t* pages = g.cache ? g.cache.pagesOf(g.cache.slot(segment)) : nullptr;
    loadTiles<Tile::kKeys, Tile::kDim, stride.value>({{to, from}}, end - first, headDim, t.vectors, [&](int key) {
      const int64_t row = pages ? g.cache.poolRow(pages, first + key) : int64_t{g.first(segment)} + first + key;
      return (row * t.h.kvHeads + kvHead) * headDim;
    });
    cpAsyncCommit();
  };
  const auto loadK = [&](int first) { load(std::integral_constant<int, kStride>{}, s.k, t.k, first); };
  const auto loadV = [&](int first) { load(std::integral_constant<int, Tile::kDim>{}, s.v, t.v, first); };
  loadTiles<Tile::kRows, Tile::kDim, kStride>({{s.q, t.q}}, rows, headDim, t.vectors,
                                              [&](int row) { return headRow(row) * headDim; });
  loadK(begin);

  const int scoreRow = warp / Tile::kKeyWarps * (4 * Tile::kScoreRows) + laneRow();
  const int scoreKey = warp % Tile::kKeyWarps * (8 * Tile::kScoreKeys) + laneColumn();
  int seen[Tile::kScoreRows];
  float top[Tile::kScoreRows];
  UNROLL
  for (int i = 0; i < Tile::kScoreRows; ++i) {
    const int row = scoreRow + 4 * i;
    seen[i] = row < rows ? g.seen(segment, queryOf(row)) : 0;
    top[i] = -INFINITY;
  }
  const int outRow = warp / Tile::kColumnWarps * (4 * Tile::kOutRows) + laneRow();
  const int column = warp % Tile::kColumnWarps * (32 * Tile::kQuads) + 4 * laneColumn();
  float4 sum[Tile::kOutRows][Tile::kQuads] = {};
  float total[Tile::kOutRows] = {}, joinedTop[Tile::kOutRows] = {}, joinedTotal[Tile::kOutRows] = {};

  for (int first = begin; first < end; first += Tile::kKeys) {
    const int next = first + Tile::kKeys;
    cpAsyncWait<0>();
    syncThreads();  // q and k are complete; v and weights have been read
    loadV(first);
    float score[Tile::kScoreRows][Tile::kScoreKeys], best[Tile::kScoreRows];
    rowProducts<Tile::kDim>(score, s.q + scoreRow * kStride, s.k + scoreKey * kStride);
    UNROLL
    for (int i = 0; i < Tile::kScoreRows; ++i) {
      best[i] = -INFINITY;
      UNROLL
      for (int j = 0; j < Tile::kScoreKeys; ++j) {
        score[i][j] *= t.scale;
        if constexpr (Tile::kBiased) {
          const int row = min(scoreRow + 4 * i, rows - 1);
          score[i][j] += t.bias.at(kvHead * t.h.group + (firstRow + row) % t.h.group,
                                   first + scoreKey + 8 * j - g.stand(segment, queryOf(row)));
        }
        if (t.softcap > 0.0f) score[i][j] = t.softcap * tanhf(score[i][j] / t.softcap);
        if (!g.inSight(seen[i], first + scoreKey + 8 * j)) score[i][j] = -INFINITY;
        best[i] = fmaxf(best[i], score[i][j]);
      }
      UNROLL
      for (int lanes = 2; lanes <= 8; lanes *= 2) best[i] = fmaxf(best[i], shflXor(best[i], lanes));
      if (Tile::kKeyWarps > 1 && laneColumn() == 0) s.warpTops[warp % Tile::kKeyWarps][scoreRow + 4 * i] = best[i];
    }
    if (Tile::kKeyWarps > 1) syncThreads();  // warpTops is complete
    UNROLL
    for (int i = 0; i < Tile::kScoreRows; ++i) {
      const int row = scoreRow + 4 * i;
      if (Tile::kKeyWarps > 1) {
        UNROLL
        for (int w = 0; w < Tile::kKeyWarps; ++w) best[i] = fmaxf(best[i], s.warpTops[w][row]);
      }
      const float before = top[i];
      top[i] = fmaxf(before, best[i]);
      UNROLL
      for (int j = 0; j < Tile::kScoreKeys; ++j) {
        s.weights[row * (Tile::kKeys + kWeightPadding) + scoreKey + 8 * j] = expf(score[i][j] - reference(top[i]));
      }
      if (scoreKey == 0) {
        s.top[row] = top[i];
        s.factor[row] = expf(before - reference(top[i]));
      }
    }
    cpAsyncWait<0>();
    syncThreads();  // v, weights, top and factor are complete; k has been read
    if (next < end) loadK(next);
    UNROLL
    for (int i = 0; i < Tile::kOutRows; ++i) {
      const float factor = s.factor[outRow + 4 * i];
      total[i] *= factor;
      UNROLL
      for (int c = 0; c < Tile::kQuads; ++c) sum[i][c] = scaled(sum[i][c], factor);
    }
    addWeighted<Tile::kKeys, Tile::kDim>(sum, total, s.weights + outRow * (Tile::kKeys + kWeightPadding),
                                         s.v + column);
    if (next < end && next % t.splitKeys != 0) continue;

    // The end of a split, or of everything.
    UNROLL
    for (int i = 0; i < Tile::kOutRows; ++i) {
      const int row = outRow + 4 * i;
      if (row >= rows) continue;
      const int64_t at = headRow(row);
      float* y = t.y + at * headDim;
      if (splits > 1) {
        const int64_t part = at * splits + split;
        if (column == 0) stGlobal(t.parts + part, float2{s.top[row], total[i]});
        UNROLL
        for (int c = 0; c < Tile::kQuads; ++c) {
          storeQuad(t.partSums + part * headDim, column + 32 * c, headDim, t.vectors, sum[i][c]);
        }
        continue;
      }
      if (first / t.splitKeys == begin / t.splitKeys) {
        joinedTop[i] = s.top[row];
        joinedTotal[i] = total[i];
      } else {
        const Joint joint = join(joinedTop[i], joinedTotal[i], s.top[row], total[i]);
        UNROLL
        for (int c = 0; c < Tile::kQuads; ++c) {
          const float4 before = loadQuad(y, column + 32 * c, headDim, t.vectors);
          sum[i][c] = multiplyAdd(sum[i][c], joint.add, scaled(before, joint.keep));
        }
      }
      const float inverse = 1.0f / joinedTotal[i];
      UNROLL
      for (int c = 0; c < Tile::kQuads; ++c) {
        if (next >= end) {
          UNROLL
          for (int e = 0; e < 4; ++e) component(sum[i][c], e) = normalised(component(sum[i][c], e), inverse);
        }
        storeQuad(y, column + 32 * c, headDim, t.vectors, sum[i][c]);
        sum[i][c] = {};
      }
      total[i] = 0.0f;
      if (next >= end && t.lse && column == 0) stGlobal(t.lse + at, joinedTop[i] + logf(joinedTotal[i]));
    }
    UNROLL
    for (int i = 0; i < Tile::kScoreRows; ++i) top[i] = -INFINITY;
  }
  // The next tile of rows needs no barrier here: q and k were read before the last one, the rest is written after one.
}

template <typename Tile>
__global__ void __launch_bounds__(kAttentionThreads, Tile::kBlocks) attendKernel(Attend t) {
  SHARED_MEMORY(AttendShared<Tile>, s);
  if (t.state.faulted()) return;
  const AttentionPlan plan = ldGlobal(t.plan);
  if ((plan.few != 0) != Tile::kFew) return;
  const int64_t items = int64_t{plan.tiles} * t.h.kvHeads * plan.splits;
  // The last tiles first: under causal attention they see the most keys.
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) attendTile<Tile>(t, s, plan.splits, items - 1 - i);
}

constexpr int kCopyThreads = 256;

// Joins the results over splits, element by element, as attendTile does when it goes through all of them.
__global__ void __launch_bounds__(kCopyThreads, 2) joinSplitsKernel(Attend t) {
  constexpr int kAhead = 8;  // splits read at once
  if (t.state.faulted()) return;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, splits = ldGlobal(t.plan).splits, segments = g.count();
  if (splits == 1) return;
  const int64_t elements = int64_t{g.start(segments)} * t.h.heads * headDim;
  for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kCopyThreads) {
    const int64_t at = i / headDim;
    const int query = static_cast<int>(at / t.h.heads), segment = segmentOf(g.starts, segments, query);
    const int seen = g.seen(segment, query), begin = g.hidden(seen) / t.splitKeys;
    const int count = (seen + t.splitKeys - 1) / t.splitKeys;
    float top = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int first = begin; first < count; first += kAhead) {
      float2 part[kAhead];
      float partSum[kAhead];
      UNROLL
      for (int j = 0; j < kAhead; ++j) {
        const int64_t index = at * splits + min(first + j, count - 1);
        part[j] = ldGlobal(t.parts + index);
        partSum[j] = ldGlobal(t.partSums + index * headDim + i % headDim);
      }
      UNROLL
      for (int j = 0; j < kAhead; ++j) {
        if (first + j >= count) continue;
        if (first + j == begin) {
          top = part[0].x;
          total = part[0].y;
          sum = partSum[0];
        } else {
          const Joint joint = join(top, total, part[j].x, part[j].y);
          sum = fmaf(partSum[j], joint.add, sum * joint.keep);
        }
      }
    }
    stGlobal(t.y + i, normalised(sum, 1.0f / total));
  }
}

// Pools of keys and values are f32 whatever the activations are.

__global__ void __launch_bounds__(kCopyThreads, 2) convertKernel(Operand from, Operand to, StepState state) {
  if (state.faulted()) return;
  forElements(from.elements(), startsAligned(from, to),
              [&]<typename V>(int64_t i) { store(to, i, load<V>(from, i)); });
}

// ---- Gradient

using AttendGrad = AttentionGradient<float>;

// dq: a block has kRows query rows and goes through the keys they see; a warp has its own rows.
template <int kDimOf>
struct QueryTile {
  static constexpr int kDim = kDimOf;
  static constexpr bool kBiased = false;
  static constexpr int kRows = kDim <= 128 ? 64 : 32, kKeys = 32;
  static constexpr int kThreadRows = kRows / 16, kThreadKeys = kKeys / 8, kQuads = kDim / 32;
  static constexpr int kBlocks = kDim <= 64 ? 3 : 2;
};

template <typename Tile>
struct QueryShared {
  float q[Tile::kRows * (Tile::kDim + kRowPadding)], dy[Tile::kRows * (Tile::kDim + kRowPadding)];
  float k[Tile::kKeys * (Tile::kDim + kRowPadding)], v[Tile::kKeys * (Tile::kDim + kRowPadding)];
  float ds[Tile::kRows * (Tile::kKeys + kWeightPadding)];
  float lse[Tile::kRows], deltas[Tile::kRows];
};

// P and dS of a thread's rows and keys, from S unscaled and dy V^T.
template <bool kBiased, int kRows, int kKeys, typename Visible, typename BiasAt>
DEVICE void weightsAndGradients(float (&s)[kRows][kKeys], float (&dp)[kRows][kKeys], float scale, float softcap,
                                const float* lse, const float* deltas, const Visible& visible, const BiasAt& biasAt) {
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int j = 0; j < kKeys; ++j) {
      float score = s[i][j] * scale, slope = 1.0f;
      if constexpr (kBiased) score += biasAt(i, j);
      if (softcap > 0.0f) {
        const float tanhOf = tanhf(score / softcap);
        score = softcap * tanhOf;
        slope = fmaf(-tanhOf, tanhOf, 1.0f);
      }
      const float weight = visible(i, j) ? expf(score - lse[4 * i]) : 0.0f;
      s[i][j] = weight;
      dp[i][j] = weight * (dp[i][j] - deltas[4 * i]) * slope;
    }
  }
}

template <typename Tile>
DEVICE void queryGradientTile(const AttendGrad& t, QueryShared<Tile>& s, int64_t item) {
  constexpr int kStride = Tile::kDim + kRowPadding;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, warp = warpId(), lane = laneId();
  const int kvHead = static_cast<int>(item % t.h.kvHeads), tile = static_cast<int>(item / t.h.kvHeads);
  const int segment = segmentOf(t.tilesBefore, g.count(), tile);
  const int firstRow = (tile - ldGlobal(t.tilesBefore + segment)) * Tile::kRows;
  const int rows = min(Tile::kRows, g.queries(segment) * t.h.group - firstRow);
  const auto queryOf = [&](int row) { return g.start(segment) + (firstRow + row) / t.h.group; };
  const auto headRow = [&](int row) {
    return int64_t{queryOf(row)} * t.h.heads + kvHead * t.h.group + (firstRow + row) % t.h.group;
  };
  const int begin = g.hidden(g.seen(segment, queryOf(0))) / Tile::kKeys * Tile::kKeys;  // no row sees keys before
  const int end = g.seen(segment, queryOf(rows - 1));                                   // or from there on
  const auto loadKeys = [&](float* to, const float* from, int first) {
    loadTiles<Tile::kKeys, Tile::kDim, kStride>({{to, from}}, end - first, headDim, t.vectors, [&](int key) {
      return (int64_t{g.first(segment) + first + key} * t.h.kvHeads + kvHead) * headDim;
    });
    cpAsyncCommit();
  };
  loadTiles<Tile::kRows, Tile::kDim, kStride>({{s.q, t.q}, {s.dy, t.dy}}, rows, headDim, t.vectors,
                                              [&](int row) { return headRow(row) * headDim; });
  loadKeys(s.v, t.v, begin);
  loadKeys(s.k, t.k, begin);
  for (int row = warp; row < Tile::kRows; row += 4) {
    const int64_t at = row < rows ? headRow(row) : 0;
    float delta = 0.0f;
    for (int d = lane; row < rows && d < headDim; d += 32) {
      delta = fmaf(ldGlobal(t.dy + at * headDim + d), ldGlobal(t.y + at * headDim + d), delta);
    }
    delta = warpSum(delta);
    if (lane != 0) continue;
    s.deltas[row] = delta;
    s.lse[row] = row < rows ? ldGlobal(t.lse + at) : 0.0f;
    if (row < rows) stGlobal(t.deltas + at, delta);
  }

  const int firstOfWarp = warp * (4 * Tile::kThreadRows) + laneRow(), column = 4 * laneColumn();
  int seen[Tile::kThreadRows];
  UNROLL
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    seen[i] = firstOfWarp + 4 * i < rows ? g.seen(segment, queryOf(firstOfWarp + 4 * i)) : 0;
  }
  float4 dq[Tile::kThreadRows][Tile::kQuads] = {};
  float total[Tile::kThreadRows] = {};
  for (int first = begin; first < end; first += Tile::kKeys) {
    const int next = first + Tile::kKeys;
    cpAsyncWait<0>();
    syncThreads();  // all tiles, lse and deltas are complete
    float score[Tile::kThreadRows][Tile::kThreadKeys], dp[Tile::kThreadRows][Tile::kThreadKeys];
    rowProducts<Tile::kDim>(score, s.q + firstOfWarp * kStride, s.k + laneColumn() * kStride);
    rowProducts<Tile::kDim>(dp, s.dy + firstOfWarp * kStride, s.v + laneColumn() * kStride);
    weightsAndGradients<Tile::kBiased>(
        score, dp, t.scale, t.softcap, s.lse + firstOfWarp, s.deltas + firstOfWarp,
        [&](int i, int j) { return g.inSight(seen[i], first + laneColumn() + 8 * j); },
        [&](int i, int j) {
          const int row = min(firstOfWarp + 4 * i, rows - 1);
          return t.bias.at(kvHead * t.h.group + (firstRow + row) % t.h.group,
                           first + laneColumn() + 8 * j - g.stand(segment, queryOf(row)));
        });
    UNROLL
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      UNROLL
      for (int j = 0; j < Tile::kThreadKeys; ++j) {
        s.ds[(firstOfWarp + 4 * i) * (Tile::kKeys + kWeightPadding) + laneColumn() + 8 * j] = dp[i][j];
      }
    }
    syncThreads();  // ds is complete, v has been read
    if (next < end) loadKeys(s.v, t.v, next);
    addWeighted<Tile::kKeys, kStride>(dq, total, s.ds + firstOfWarp * (Tile::kKeys + kWeightPadding), s.k + column);
    syncThreads();  // k and ds have been read
    if (next < end) loadKeys(s.k, t.k, next);
  }
  UNROLL
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    const int row = firstOfWarp + 4 * i;
    if (row >= rows) continue;
    float* to = t.dq + headRow(row) * headDim;
    UNROLL
    for (int c = 0; c < Tile::kQuads; ++c) {
      storeQuad(to, column + 32 * c, headDim, t.vectors, scaled(dq[i][c], t.scale));
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kAttentionThreads, Tile::kBlocks) queryGradientKernel(AttendGrad t) {
  SHARED_MEMORY(QueryShared<Tile>, s);
  if (t.state.faulted()) return;
  const int64_t items = int64_t{ldGlobal(t.plan).tiles} * t.h.kvHeads;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) queryGradientTile<Tile>(t, s, items - 1 - i);
}

// dk and dv: a block has kKeys keys and goes through the rows that see them, kRows at a time. Scores: a warp has its
// own rows. Gradients: a thread has four keys and kQuads times four columns, kColumnWarps warps side by side.
template <int kDimOf>
struct KeyTile {
  static constexpr int kDim = kDimOf;
  static constexpr bool kBiased = false;
  static constexpr int kRows = 32, kKeys = kDim == 32 ? 64 : kDim == 256 ? 16 : 32;
  static constexpr int kThreadRows = kRows / 16, kThreadKeys = kKeys / 8;
  static constexpr int kColumnWarps = 64 / kKeys, kQuads = kDim / (32 * kColumnWarps);
  static constexpr int kBlocks = kDim <= 64 ? 3 : 2;
};

template <typename Tile>
struct KeyShared {
  float k[Tile::kKeys * (Tile::kDim + kRowPadding)], v[Tile::kKeys * (Tile::kDim + kRowPadding)];
  float q[Tile::kRows * (Tile::kDim + kRowPadding)], dy[Tile::kRows * (Tile::kDim + kRowPadding)];
  float weights[Tile::kRows * (Tile::kKeys + kWeightPadding)], ds[Tile::kRows * (Tile::kKeys + kWeightPadding)];
  float lse[Tile::kRows], deltas[Tile::kRows];
};

template <typename Tile>
DEVICE void keyGradientTile(const AttendGrad& t, KeyShared<Tile>& s, int64_t item) {
  constexpr int kStride = Tile::kDim + kRowPadding, kWeightStride = Tile::kKeys + kWeightPadding;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, warp = warpId(), tid = threadIdx.x;
  const int kvHead = static_cast<int>(item % t.h.kvHeads), tile = static_cast<int>(item / t.h.kvHeads);
  const int segment = segmentOf(t.keyTilesBefore, g.count(), tile);
  const int firstKey = (tile - ldGlobal(t.keyTilesBefore + segment)) * Tile::kKeys;
  const int keys = min(Tile::kKeys, g.added(segment) - firstKey);
  // Row of k, v, dk and dv as [N * kvHeads, headDim].
  const auto keyRow = [&](int key) { return int64_t{g.first(segment) + firstKey + key} * t.h.kvHeads + kvHead; };
  const int firstQuery = g.firstToSee(segment, firstKey);
  const int behind = g.firstBehind(segment, firstKey + keys - 1);
  const int allRows = (behind - firstQuery) * t.h.group;  // row r: query firstQuery + r / group
  const auto queryOf = [&](int row) { return firstQuery + row / t.h.group; };
  const auto headRow = [&](int row) {
    return int64_t{queryOf(row)} * t.h.heads + kvHead * t.h.group + row % t.h.group;
  };
  loadTiles<Tile::kKeys, Tile::kDim, kStride>({{s.k, t.k}, {s.v, t.v}}, keys, headDim, t.vectors,
                                              [&](int key) { return keyRow(key) * headDim; });
  cpAsyncCommit();

  const int scoreRow = warp * (4 * Tile::kThreadRows) + laneRow();
  const int gradKey = warp / Tile::kColumnWarps * 16 + laneRow() * 4;
  const int column = warp % Tile::kColumnWarps * (32 * Tile::kQuads) + 4 * laneColumn();
  float4 dk[4][Tile::kQuads] = {}, dv[4][Tile::kQuads] = {};
  for (int first = 0; first < allRows; first += Tile::kRows) {
    const int rows = min(Tile::kRows, allRows - first);
    loadTiles<Tile::kRows, Tile::kDim, kStride>({{s.q, t.q}, {s.dy, t.dy}}, rows, headDim, t.vectors,
                                                [&](int row) { return headRow(first + row) * headDim; });
    cpAsyncCommit();
    if (tid < Tile::kRows) {
      s.lse[tid] = tid < rows ? ldGlobal(t.lse + headRow(first + tid)) : 0.0f;
      s.deltas[tid] = tid < rows ? ldGlobal(t.deltas + headRow(first + tid)) : 0.0f;
    }
    int seen[Tile::kThreadRows];
    UNROLL
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      const int row = scoreRow + 4 * i;
      seen[i] = row < rows ? g.seen(segment, queryOf(first + row)) - firstKey : 0;
    }
    cpAsyncWait<0>();
    syncThreads();  // all tiles, lse and deltas are complete
    float score[Tile::kThreadRows][Tile::kThreadKeys], dp[Tile::kThreadRows][Tile::kThreadKeys];
    rowProducts<Tile::kDim>(score, s.q + scoreRow * kStride, s.k + laneColumn() * kStride);
    rowProducts<Tile::kDim>(dp, s.dy + scoreRow * kStride, s.v + laneColumn() * kStride);
    weightsAndGradients<Tile::kBiased>(
        score, dp, t.scale, t.softcap, s.lse + scoreRow, s.deltas + scoreRow,
        [&](int i, int j) { return g.inSight(seen[i], laneColumn() + 8 * j); },
        [&](int i, int j) {
          const int row = first + min(scoreRow + 4 * i, rows - 1);
          return t.bias.at(kvHead * t.h.group + row % t.h.group,
                           firstKey + laneColumn() + 8 * j - g.stand(segment, queryOf(row)));
        });
    UNROLL
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      UNROLL
      for (int j = 0; j < Tile::kThreadKeys; ++j) {
        const int at = (scoreRow + 4 * i) * kWeightStride + laneColumn() + 8 * j;
        s.weights[at] = score[i][j];
        s.ds[at] = dp[i][j];
      }
    }
    syncThreads();  // weights and ds are complete
    for (int row = 0; row < Tile::kRows; ++row) {
      const float4 weight = ldShared<float4>(s.weights + row * kWeightStride + gradKey);
      const float4 ds = ldShared<float4>(s.ds + row * kWeightStride + gradKey);
      UNROLL
      for (int c = 0; c < Tile::kQuads; ++c) {
        const float4 dy = ldShared<float4>(s.dy + row * kStride + column + 32 * c);
        const float4 q = ldShared<float4>(s.q + row * kStride + column + 32 * c);
        UNROLL
        for (int e = 0; e < 4; ++e) {
          dv[e][c] = multiplyAdd(dy, component(weight, e), dv[e][c]);
          dk[e][c] = multiplyAdd(q, component(ds, e), dk[e][c]);
        }
      }
    }
    syncThreads();  // q, dy, weights, ds, lse and deltas have been read
  }
  cpAsyncWait<0>();  // k and v are still on their way where no row sees them
  UNROLL
  for (int e = 0; e < 4; ++e) {
    if (gradKey + e >= keys) continue;
    const int64_t at = keyRow(gradKey + e) * headDim;
    UNROLL
    for (int c = 0; c < Tile::kQuads; ++c) {
      storeQuad(t.dk + at, column + 32 * c, headDim, t.vectors, scaled(dk[e][c], t.scale));
      storeQuad(t.dv + at, column + 32 * c, headDim, t.vectors, dv[e][c]);
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kAttentionThreads, Tile::kBlocks) keyGradientKernel(AttendGrad t) {
  SHARED_MEMORY(KeyShared<Tile>, s);
  if (t.state.faulted()) return;
  // The first keys first: under causal attention the most rows see them.
  const int64_t items = int64_t{ldGlobal(t.plan).keyTiles} * t.h.kvHeads;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) keyGradientTile<Tile>(t, s, i);
}

// ---- Host

float* floats(const Operand& operand) { return static_cast<float*>(operand.data); }
int32_t* ints(const Operand& operand) { return static_cast<int32_t*>(operand.data); }

AttentionHeads checkedHeads(const Launch& launch, const Operand& q, int64_t kvWidth) {
  const int64_t heads = launch.intAttribute(0, "heads", 1, 1 << 20), queryWidth = q.bound[1];
  const int64_t kvHeads = launch.intAttribute(1, "kv_heads", 1, 1 << 20);
  if (heads % kvHeads != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] heads must be a multiple of kv_heads, got %lld and %lld", launch.op,
         static_cast<long long>(heads), static_cast<long long>(kvHeads));
  }
  const int64_t headDim = queryWidth / heads;
  if (headDim < 1 || queryWidth % heads != 0 || kvWidth != headDim * kvHeads) {
    fail(ErrorCode::InvalidProgram,
         "[%s] widths must be heads x head_dim and kv_heads x head_dim, got %lld and %lld with %lld and %lld heads",
         launch.op, static_cast<long long>(queryWidth), static_cast<long long>(kvWidth), static_cast<long long>(heads),
         static_cast<long long>(kvHeads));
  }
  if (headDim > 256) {
    fail(ErrorCode::InvalidProgram, "[%s] head_dim must be at most 256 on this device, got %lld", launch.op,
         static_cast<long long>(headDim));
  }
  if (q.bound[0] * (heads / kvHeads) > INT_MAX) {
    fail(ErrorCode::InvalidProgram, "[%s] rows x heads / kv_heads must be below 2^31, got %lld x %lld", launch.op,
         static_cast<long long>(q.bound[0]), static_cast<long long>(heads / kvHeads));
  }
  const int group = static_cast<int>(heads / kvHeads);
  return {static_cast<int>(heads), static_cast<int>(kvHeads), static_cast<int>(headDim), group, Divisor(group)};
}

void checkStatistics(const Launch& launch, const Operand& lse, const AttentionHeads& h) {
  if (lse && lse.bound[1] != h.heads) {
    fail(ErrorCode::InvalidProgram, "[%s] lse must have one column per head: %d, got %lld", launch.op, h.heads,
         static_cast<long long>(lse.bound[1]));
  }
}

// What decides about scores besides queries and keys.
struct Scoring {
  bool causal;
  int window;
  float scale, softcap;
};

// From attribute i on: scale, window, softcap.
Scoring checkedScoring(const Launch& launch, int i, bool causal) {
  const float scale = static_cast<float>(launch.finiteAttribute(i, "scale"));
  const int window = static_cast<int>(launch.intAttribute(i + 1, "window", 0, INT32_MAX));
  if (window > 0 && !causal) fail(ErrorCode::InvalidProgram, "[%s] a window needs causal attention", launch.op);
  return {causal, window > 0 ? window : INT32_MAX, scale, checkedSoftcap(launch.op, "softcap", launch.attr[i + 2])};
}

DistanceBias checkedBias(const Launch& launch, const Operand& bias, const AttentionHeads& h, const Scoring& scoring,
                         bool placed) {
  if (!bias) return {};
  if (bias.bound[0] != h.heads || bias.bound[1] % 2 != 1 || scoring.softcap > 0 || !placed) {
    fail(ErrorCode::InvalidProgram,
         "[%s] bias must be [%d, an odd number], without a softcap and for queries that have a place among the keys, got "
         "[%lld, %lld]",
         launch.op, h.heads, static_cast<long long>(bias.bound[0]), static_cast<long long>(bias.bound[1]));
  }
  return {floats(bias), static_cast<int>(bias.bound[1] / 2)};
}

void convert(const Launch& launch, const Operand& from, const Operand& to) {
  LAUNCH(convertKernel, launch.blocks(from.boundElements(), 4 * kCopyThreads), kCopyThreads, 0, launch.stream, from, to,
         launch.state);
}

// The same op with its first operands in f32, and what it writes in bf16 again.
template <int kInputs, int kOutputs>
void inF32(const Launch& launch, std::initializer_list<int> inputs, std::initializer_list<int> outputs, Emitter emit) {
  std::array<Operand, kInputs> in;
  std::array<Operand, kOutputs> out;
  std::copy_n(launch.in, kInputs, in.begin());
  std::copy_n(launch.out, kOutputs, out.begin());
  const auto widen = [&](Operand& x) {
    x.data = launch.scratch<float>(x.boundElements());
    x.dtype = DType::F32;
  };
  for (const int i : inputs) {
    widen(in[i]);
    convert(launch, launch.in[i], in[i]);
  }
  for (const int i : outputs) widen(out[i]);
  Launch wide = launch;
  wide.in = in.data();
  wide.out = out.data();
  emit(wide);
  for (const int i : outputs) convert(launch, out[i], launch.out[i]);
}

// The segments of an op and its plan, of which the caller sets what concerns its kernels. k: absent where keys are in a
// cache. Inputs: where q, offsets, and rows are, which row_offsets follows.
Planning plan(const Launch& launch, const AttentionHeads& h, const Operand& k, int qInput, int offsetsInput,
              int rowsInput, const Scoring& scoring) {
  const Operand &q = launch.in[qInput], &offsets = launch.in[offsetsInput];
  const Operand &rows = launch.in[rowsInput], &rowOffsets = launch.in[rowsInput + 1];
  const bool cross = rowOffsets && !rows && !scoring.causal;  // queries of other sequences
  if (!rows != !rowOffsets && !cross) {
    fail(ErrorCode::InvalidProgram, "[%s] rows and row_offsets must be given together, got %s alone", launch.op,
         rows ? "rows" : "row_offsets");
  }
  if (k && !rowOffsets && q.bound[0] != k.bound[0]) {
    fail(ErrorCode::InvalidProgram, "[%s] without rows q and k must have as many rows, got %lld and %lld", launch.op,
         static_cast<long long>(q.bound[0]), static_cast<long long>(k.bound[0]));
  }
  if (k) checkOffsets(launch, offsetsInput, k, 0);
  if (k && rows) checkRows(launch, rowsInput, k, 0);
  if (rowOffsets) checkOffsets(launch, rowsInput + 1, q, 0);
  Planning p{};
  p.segments.offsets = offsets;
  p.segments.starts = rowOffsets ? ints(rowOffsets) : ints(offsets);
  p.segments.rows = ints(rows);
  p.segments.causal = scoring.causal;
  p.segments.window = scoring.window;
  p.q = q;
  p.k = k;
  p.offsetsInput = offsetsInput;
  p.rowsInput = rowsInput;
  p.startsInput = rowOffsets ? rowsInput + 1 : offsetsInput;
  p.group = h.group;
  p.kvHeads = h.kvHeads;
  p.plan = launch.scratch<AttentionPlan>(1);
  p.tilesBefore = launch.scratch<int32_t>(offsets.bound[0]);
  p.state = launch.state;
  return p;
}

bool aligned(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <typename Tile>
void launchAttend(const Launch& launch, const Attend& attend, int64_t rows, int64_t splits) {
  const int64_t items = mostTiles(attend.segments.offsets, rows, Tile::kRows) * attend.h.kvHeads * splits;
  if (attend.bias.values) {
    LAUNCH(attendKernel<WithBias<Tile>>, launch.blocks(items, 1), kAttentionThreads, sizeof(AttendShared<WithBias<Tile>>),
           launch.stream, attend);
  } else {
    LAUNCH(attendKernel<Tile>, launch.blocks(items, 1), kAttentionThreads, sizeof(AttendShared<Tile>), launch.stream,
           attend);
  }
}

template <typename T>
T* elements(const Operand& operand) {
  return static_cast<T*>(operand.data);
}

template <typename T>
Attention<T> attentionOf(const Launch& launch, const AttentionHeads& h, const Planning& planning,
                         const Scoring& scoring) {
  const Operand &q = launch.in[0], &k = launch.in[1], &v = launch.in[2], &y = launch.out[0];
  Attention<T> a{};
  a.segments = planning.segments;
  a.h = h;
  a.q = elements<T>(q);
  a.k = elements<T>(k);
  a.v = elements<T>(v);
  a.y = elements<T>(y);
  a.lse = floats(launch.out[1]);
  a.scale = scoring.scale;
  a.softcap = scoring.softcap;
  a.vectors = h.headDim * sizeof(T) % 16 == 0 && aligned({q.data, k.data, v.data, y.data});
  a.plan = planning.plan;
  a.tilesBefore = planning.tilesBefore;
  a.state = launch.state;
  return a;
}

template <typename T>
AttentionGradient<T> gradientOf(const Launch& launch, const AttentionHeads& h, const Planning& planning,
                                const Scoring& scoring) {
  const Operand &dy = launch.in[0], &q = launch.in[1], &k = launch.in[2], &v = launch.in[3], &y = launch.in[4];
  const Operand &dq = launch.out[0], &dk = launch.out[1], &dv = launch.out[2];
  AttentionGradient<T> grad{};
  grad.segments = planning.segments;
  grad.h = h;
  grad.dy = elements<T>(dy);
  grad.q = elements<T>(q);
  grad.k = elements<T>(k);
  grad.v = elements<T>(v);
  grad.y = elements<T>(y);
  grad.lse = floats(launch.in[5]);
  grad.dq = elements<T>(dq);
  grad.dk = elements<T>(dk);
  grad.dv = elements<T>(dv);
  grad.deltas = launch.scratch<float>(q.bound[0] * h.heads);
  grad.scale = scoring.scale;
  grad.softcap = scoring.softcap;
  grad.vectors = h.headDim * sizeof(T) % 16 == 0 &&
                 aligned({dy.data, q.data, k.data, v.data, y.data, dq.data, dk.data, dv.data});
  grad.plan = planning.plan;
  grad.tilesBefore = planning.tilesBefore;
  grad.keyTilesBefore = planning.keyTilesBefore;
  grad.state = launch.state;
  return grad;
}

}  // namespace

void launchPlan(const Launch& launch, const Planning& planning) {
  LAUNCH(planKernel, 1, kPlanThreads, sizeof(PlanShared), launch.stream, planning);
}

void attention(const Launch& launch) {
  const Operand &q = launch.in[0], &k = launch.in[1], &lse = launch.out[1];
  const AttentionHeads h = checkedHeads(launch, q, k.bound[1]);
  const Scoring scoring = checkedScoring(launch, 3, launch.intAttribute(2, "causal", 0, 1) != 0);
  checkStatistics(launch, lse, h);
  const DistanceBias bias = checkedBias(launch, launch.in[6], h, scoring, !launch.in[5] || launch.in[4]);
  if (bias.values && q.dtype == DType::BF16) return inF32<7, 2>(launch, {0, 1, 2}, {0}, attention);
  Planning planning = plan(launch, h, k, 0, 3, 4, scoring);
  planning.flopsPerPair = 4.0 * h.headDim * h.heads;
  if (q.dtype == DType::BF16) {
    attendMma(launch, planning, attentionOf<bf16>(launch, h, planning, scoring));
    return;
  }
  Attend attend{attentionOf<float>(launch, h, planning, scoring), kNoSplit, nullptr, nullptr};
  attend.bias = bias;
  forHeadDim(h.headDim, [&](auto dim) {
    using Tile = AttendTile<dim.value, false>;
    planning.rows = Tile::kRows;
    launchPlan(launch, planning);
    launchAttend<Tile>(launch, attend, q.bound[0] * h.group, 1);
  });
}

void attentionGrad(const Launch& launch) {
  const Operand &q = launch.in[1], &k = launch.in[2], &lse = launch.in[5], &offsets = launch.in[6];
  const AttentionHeads h = checkedHeads(launch, q, k.bound[1]);
  const Scoring scoring = checkedScoring(launch, 3, launch.intAttribute(2, "causal", 0, 1) != 0);
  checkStatistics(launch, lse, h);
  const DistanceBias bias = checkedBias(launch, launch.in[9], h, scoring, !launch.in[8] || launch.in[7]);
  if (bias.values && q.dtype == DType::BF16) return inF32<10, 3>(launch, {0, 1, 2, 3, 4}, {0, 1, 2}, attentionGrad);
  Planning planning = plan(launch, h, k, 1, 6, 7, scoring);
  planning.flopsPerPair = 10.0 * h.headDim * h.heads;
  planning.keyTilesBefore = launch.scratch<int32_t>(offsets.bound[0]);
  if (q.dtype == DType::BF16) {
    attendGradMma(launch, planning, gradientOf<bf16>(launch, h, planning, scoring));
    return;
  }
  AttendGrad grad = gradientOf<float>(launch, h, planning, scoring);
  grad.bias = bias;
  const auto launchFor = [&]<typename Rows, typename Keys>() {
    planning.rows = Rows::kRows;
    planning.keys = Keys::kKeys;
    launchPlan(launch, planning);
    const int64_t rowItems = mostTiles(offsets, q.bound[0] * h.group, Rows::kRows) * h.kvHeads;
    LAUNCH(queryGradientKernel<Rows>, launch.blocks(rowItems, 1), kAttentionThreads, sizeof(QueryShared<Rows>),
           launch.stream, grad);
    const int64_t keyItems = mostTiles(offsets, k.bound[0], Keys::kKeys) * h.kvHeads;
    LAUNCH(keyGradientKernel<Keys>, launch.blocks(keyItems, 1), kAttentionThreads, sizeof(KeyShared<Keys>),
           launch.stream, grad);
  };
  forHeadDim(h.headDim, [&](auto dim) {
    using Rows = QueryTile<dim.value>;
    using Keys = KeyTile<dim.value>;
    if (bias.values) {
      launchFor.template operator()<WithBias<Rows>, WithBias<Keys>>();
    } else {
      launchFor.template operator()<Rows, Keys>();
    }
  });
}

void attentionCached(const Launch& launch) {
  const Operand &poolK = launch.in[5], &poolV = launch.in[6];
  Operand q = launch.in[0], y = launch.out[0];
  const bool narrow = q.dtype == DType::BF16;
  if (narrow) {
    for (Operand* x : {&q, &y}) {
      x->data = launch.scratch<float>(x->boundElements());
      x->dtype = DType::F32;
    }
  }
  const AttentionHeads h = checkedHeads(launch, q, poolK.bound[2]);
  const Scoring scoring = checkedScoring(launch, 2, true);
  Planning planning = plan(launch, h, {}, 0, 1, 7, scoring);
  planning.segments.cache = cacheSlots(launch, 2, 5);
  const int64_t capacity = launch.in[4].bound[1] * poolK.bound[1];
  const int64_t mostSplits = std::clamp<int64_t>((capacity + kSplitKeys - 1) / kSplitKeys, 1, INT_MAX / kSplitKeys);
  const int64_t rows = q.bound[0] * h.group, headRows = q.bound[0] * h.heads;
  planning.flopsPerPair = 4.0 * h.headDim * h.heads;
  planning.most = kFewRows;
  planning.splitKeys = kSplitKeys;
  planning.items = int64_t{4} * launch.multiprocessors;
  planning.parts = std::min(kParts, headRows * mostSplits);
  Attend attend{};
  attend.segments = planning.segments;
  attend.h = h;
  attend.q = floats(q);
  attend.k = floats(poolK);
  attend.v = floats(poolV);
  attend.y = floats(y);
  attend.scale = scoring.scale;
  attend.softcap = scoring.softcap;
  attend.bias = checkedBias(launch, launch.in[9], h, scoring, true);
  attend.vectors = h.headDim % 4 == 0 && aligned({q.data, poolK.data, poolV.data, y.data});
  attend.splitKeys = kSplitKeys;
  attend.partSums = launch.scratch<float>(planning.parts * h.headDim);
  attend.parts = launch.scratch<float2>(planning.parts);
  attend.plan = planning.plan;
  attend.tilesBefore = planning.tilesBefore;
  attend.state = launch.state;
  forHeadDim(h.headDim, [&](auto dim) {
    using Few = AttendTile<dim.value, true>;
    using Many = AttendTile<dim.value, false>;
    planning.rows = Many::kRows;
    planning.fewRows = Few::kRows;
    launchPlan(launch, planning);
    if (narrow) convert(launch, launch.in[0], q);
    launchAttend<Few>(launch, attend, rows, mostSplits);
    if (rows > kFewRows) launchAttend<Many>(launch, attend, rows, 1);
  });
  LAUNCH(joinSplitsKernel, launch.blocks(headRows * h.headDim, kCopyThreads), kCopyThreads, 0, launch.stream, attend);
  if (narrow) convert(launch, y, launch.out[0]);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
