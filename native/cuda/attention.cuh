// What the kernels of attention share: who sees which keys, and the division of segments into tiles; for the kernels on
// CUDA cores products of tiles in shared memory.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/segments.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

// ---- Queries and keys

// n / d of 0 <= n < 2^31 and d <= 2^31 by a multiplication: n ceil(2^(31+p) / d) >> 31+p with 2^p >= d (Granlund and
// Montgomery, "Division by invariant integers using multiplication").
struct Divisor {
  uint32_t factor;
  int shift = 31;

  Divisor(int d = 1) {
    while (int64_t{1} << (shift - 31) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }
  DEVICE int quotient(int n) const { return static_cast<int>(uint64_t{factor} * static_cast<uint32_t>(n) >> shift); }
};

struct AttentionHeads {
  int heads, kvHeads, headDim, group;  // group: query heads of a kv head
  Divisor byGroup;
};

// Caches of sequences in slots: row t of slot z is row t % pageRows of page pages[z, t / pageRows] of the pools.
struct CacheSlots {
  Operand slots, lengths, pages, pool;  // pool: of keys or values; slots[s]: of segment s
  int input, poolInput;                 // where slots and pool are; lengths and pages come after slots
  int pageRows;
  Divisor byPageRows;
  int32_t* owners;                      // [slots]
  StepState state;

  __host__ __device__ explicit operator bool() const { return bool{slots}; }
  DEVICE int slot(int s) const { return ldGlobal(slots.i32() + s); }
  DEVICE int length(int s) const { return ldGlobal(lengths.i32() + slot(s)); }
  DEVICE int capacity() const {
    const int64_t rows = int64_t{pages.size(1)} * pageRows;
    return rows < INT32_MAX ? static_cast<int>(rows) : INT32_MAX;
  }
  DEVICE const int32_t* pagesOf(int slot) const { return pages.i32() + int64_t{slot} * pages.size(1); }
  // The row of the pools that is row `row` of the slot whose pages are given.
  DEVICE int64_t poolRow(const int32_t* pages, int row) const {
    const int page = byPageRows.quotient(row);
    return int64_t{ldGlobal(pages + page)} * pageRows + (row - page * pageRows);
  }
  // To be called by all threads of one block, whose faults others must wait for: every segment has a slot of its own, which
  // holds what it must and has pages for it: added(s) rows that come, or (`held`) that are there already with all others.
  template <int kThreads, typename Added>
  DEVICE void check(int segments, bool held, const Added& added) const;
};

// Segment s has new key rows [offsets[s], offsets[s + 1]), the last of those in its cache, and queries
// [starts[s], starts[s + 1]); query i stands at new key row rows[i]. The queries of one kv head are looked at as `rows` of a
// segment: row r is query r / group with head r % group of the group.
struct AttentionSegments {
  Operand offsets;
  const int32_t* starts = nullptr;   // offsets where all rows are queries
  const int32_t* rows = nullptr;     // null: query i stands at row i
  CacheSlots cache;                  // or none
  bool causal = true;
  int window = INT32_MAX;            // causal: keys that a query sees at most, the last ones

  DEVICE int count() const { return max(offsets.size(0) - 1, 0); }
  DEVICE int first(int s) const { return ldGlobal(offsets.i32() + s); }
  DEVICE int added(int s) const { return first(s + 1) - first(s); }
  DEVICE int keys(int s) const { return cache ? cache.length(s) : added(s); }
  DEVICE int before(int s) const { return cache ? cache.length(s) - added(s) : 0; }
  DEVICE int start(int s) const { return ldGlobal(starts + s); }
  DEVICE int queries(int s) const { return start(s + 1) - start(s); }
  // Where a query stands among the keys of its segment.
  DEVICE int stand(int s, int query) const { return before(s) + (rows ? ldGlobal(rows + query) : query) - first(s); }
  // Keys that a query sees, but for those before its window: the first so many of its segment.
  DEVICE int seen(int s, int query) const { return causal ? stand(s, query) + 1 : keys(s); }
  // Of these, those before its window; and whether a key is in sight.
  DEVICE int hidden(int seen) const { return max(seen - window, 0); }
  DEVICE bool inSight(int seen, int key) const {
    return static_cast<uint32_t>(seen - 1 - key) < static_cast<uint32_t>(window);
  }
  // The first query of a segment that stands at a key or behind it; the end of the segment's queries when none does.
  DEVICE int firstToSee(int s, int key) const {
    int low = start(s), high = start(s + 1);
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (seen(s, middle) > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
  // The first query of a segment whose window is behind a key; the end of the segment's queries when none's is.
  DEVICE int firstBehind(int s, int key) const {
    return window > INT32_MAX - key ? start(s + 1) : firstToSee(s, key + window);
  }
};

// Whether a fault has been reported: one answer for all threads of a block, which meet here. While some of them ask for
// themselves others may have gone on to report, and those that leave are missed at the next barrier. `answer` is shared.
DEVICE bool blockFaulted(const StepState& state, bool& answer) {
  syncThreads();
  if (threadIdx.x == 0) answer = state.faulted();
  syncThreads();
  return answer;
}

template <int kThreads, typename Added>
DEVICE void CacheSlots::check(int segments, bool held, const Added& added) const {
  const int tid = threadIdx.x, count = lengths.size(0);
  if (tid == 0 && slots.size(0) != segments) state.report(Fault::Segments, input, 0, 0, segments, slots.size(0));
  if (tid == 0 && pool.size(1) != pageRows) state.report(Fault::Rows, poolInput, 0, 0, pageRows, pool.size(1));
  syncThreads();  // nobody leaves: all meet at the barriers
  for (int s = tid; s < segments && !state.faulted(); s += kThreads) {
    if (slot(s) < 0 || slot(s) >= count) {
      state.report(Fault::Id, input, s, 0, count, slot(s));
    } else {
      stGlobal(owners + slot(s), s);
    }
  }
  syncThreads();
  for (int s = tid; s < segments && !state.faulted(); s += kThreads) {
    const int least = held ? added(s) : 0, most = held ? capacity() : capacity() - added(s);
    if (ldGlobal(owners + slot(s)) != s) state.report(Fault::Slot, input, s, 0, 0, slot(s));
    if (length(s) < least || length(s) > most) state.report(Fault::Length, input + 1, slot(s), least, most, length(s));
  }
  syncThreads();
  for (int s = warpId(); s < segments && !state.faulted(); s += kThreads / 32) {
    const int first = held ? 0 : length(s), end = length(s) + (held ? 0 : added(s));
    for (int page = byPageRows.quotient(first) + laneId(); int64_t{page} * pageRows < end; page += 32) {
      const int got = ldGlobal(pagesOf(slot(s)) + page);
      if (got >= 0 && got < pool.size(0)) continue;
      state.report(Fault::Page, input + 2, slot(s), max(first, page * pageRows), pool.size(0), got);
    }
  }
}

// The slots of an op that has slots, lengths and pages as inputs from number `input` on, and a pool (cache.cu).
CacheSlots cacheSlots(const Launch& launch, int input, int poolInput);

// Blocks take tiles of rows, and in the gradient of keys, from a table that a kernel makes (attention.cu).
struct AttentionPlan {
  int32_t tiles, keyTiles;
  int32_t few;     // whether tiles are those of the kernels for few rows
  int32_t splits;  // more than 1: so many blocks share the keys of a tile
};

// What a plan is made of.
struct Planning {
  AttentionSegments segments;
  Operand q, k;                                       // k absent: keys are in the cache
  int offsetsInput, rowsInput, startsInput;
  int group, kvHeads;
  int rows, fewRows, keys;                            // of a tile; 0: no such kernels
  int most;                                           // rows of a segment up to which they are few
  int splitKeys;                                      // keys of a split; 0: never split
  int64_t items;                                      // blocks from which on the device is full without splitting
  int64_t parts;                                      // rows of results of splits that there is memory for
  double flopsPerPair;
  AttentionPlan* plan;
  int32_t *tilesBefore, *keyTilesBefore;              // [segments + 1]
  StepState state;
};

void launchPlan(const Launch& launch, const Planning& planning);

// Calls launchFor with the head_dim that kernels are made for as a constant.
template <typename LaunchFor>
void forHeadDim(int headDim, const LaunchFor& launchFor) {
  if (headDim <= 32) {
    launchFor(std::integral_constant<int, 32>{});
  } else if (headDim <= 64) {
    launchFor(std::integral_constant<int, 64>{});
  } else if (headDim <= 128) {
    launchFor(std::integral_constant<int, 128>{});
  } else {
    launchFor(std::integral_constant<int, 256>{});
  }
}

// The most tiles there can be: all but the last of every segment are whole.
inline int64_t mostTiles(const Operand& offsets, int64_t rows, int perTile) {
  return rows / perTile + std::min<int64_t>(std::max<int64_t>(offsets.bound[0] - 1, 0), rows);
}

// ---- What kernels get; T: of activations

// Added to scores by the distance from a query to a key, [heads, 2 reach + 1]. In f32 alone: wider activations are converted.
struct DistanceBias {
  const float* values = nullptr;
  int reach = 0;

  DEVICE float at(int head, int distance) const {
    return ldGlobal(values + int64_t{head} * (2 * reach + 1) + reach + min(max(distance, -reach), reach));
  }
};

// A tile of kernels that add one, which takes registers.
template <typename Tile>
struct WithBias : Tile {
  static constexpr bool kBiased = true;
  static constexpr int kBlocks = Tile::kBlocks > 1 ? Tile::kBlocks - 1 : 1;
};

template <typename T>
struct Attention {
  AttentionSegments segments;
  AttentionHeads h;
  const T *q, *k, *v;
  T* y;
  float* lse;    // may be null
  float scale, softcap;  // softcap c > 0: scores s become c tanh(s / c)
  DistanceBias bias;
  bool vectors;  // heads are a multiple of 16 bytes and start at one
  const AttentionPlan* plan;
  const int32_t* tilesBefore;
  StepState state;
};

// With P = exp(S - lse) and D = rowsum(dy . y): dV = P^T dy, dS = P (dy V^T - D), dQ = scale dS K, dK = scale dS^T Q; where
// scores are capped dS gets the derivative of that, 1 - (S / softcap)^2.
template <typename T>
struct AttentionGradient {
  AttentionSegments segments;
  AttentionHeads h;
  const T *dy, *q, *k, *v, *y;
  const float* lse;
  T *dq, *dk, *dv;
  float* deltas;  // [R, heads]: D
  float scale, softcap;
  DistanceBias bias;
  bool vectors;
  const AttentionPlan* plan;
  const int32_t *tilesBefore, *keyTilesBefore;
  StepState state;
};

// On tensor cores (attention_mma.cu, attention_grad_mma.cu). They set what of the plan concerns them and launch it.
void attendMma(const Launch& launch, Planning planning, const Attention<bf16>& attention);
void attendGradMma(const Launch& launch, Planning planning, const AttentionGradient<bf16>& gradient);

// ---- Tiles in shared memory
//
// A block is four warps, a warp 4 x 8 lanes: neighbouring lanes differ in the row, so that a half-warp asks for at most
// 128 bytes of either operand of a product and its 16-byte reads take the fewest passes.

constexpr int kAttentionThreads = 128;
constexpr int kRowPadding = 4;     // floats behind a row of features: eight rows at one feature lie in different banks
constexpr int kWeightPadding = 8;  // behind a row of weights

DEVICE int laneRow() { return (laneId() & 1) | (laneId() >> 4 << 1); }
DEVICE int laneColumn() { return laneId() >> 1 & 7; }

DEVICE float component(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE float& component(float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE float4 scaled(const float4& v, float factor) {
  return {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}
DEVICE float4 multiplyAdd(const float4& v, float factor, const float4& sum) {
  return {fmaf(v.x, factor, sum.x), fmaf(v.y, factor, sum.y), fmaf(v.z, factor, sum.z), fmaf(v.w, factor, sum.w)};
}

struct TileCopy {
  float* to;          // a tile
  const float* from;  // rows in device memory
};

// For every copy: to[row] = from + offsetOf(row), `width` elements and zeros to kDim; rows from `rows` on are zeros.
// Lands at cpAsyncWait. `vectors`: rows are aligned to 16 bytes and width is a multiple of 4.
template <int kRows, int kDim, int kStride, int kCopies, typename OffsetOf>
DEVICE void loadTiles(const TileCopy (&copies)[kCopies], int rows, int width, bool vectors, const OffsetOf& offsetOf) {
  constexpr int kLanes = kDim / 4, kRowsAtOnce = kAttentionThreads / kLanes;
  const int tid = threadIdx.x;
  if (vectors) {
    const int d = tid % kLanes * 4;
    for (int row = tid / kLanes; row < kRows; row += kRowsAtOnce) {
      const bool inside = row < rows && d < width;
      const int64_t offset = inside ? offsetOf(row) + d : 0;
      UNROLL
      for (int i = 0; i < kCopies; ++i) cpAsync16(copies[i].to + row * kStride + d, copies[i].from + offset, inside);
    }
  } else {
    for (int i = tid; i < kRows * kDim; i += kAttentionThreads) {
      const int row = i / kDim, d = i % kDim;
      const bool inside = row < rows && d < width;
      const int64_t offset = inside ? offsetOf(row) + d : 0;
      UNROLL
      for (int c = 0; c < kCopies; ++c) cpAsync4(copies[c].to + row * kStride + d, copies[c].from + offset, inside);
    }
  }
}

// sum[i][j] = a row 4 i . b row 8 j: chains of fused multiply-adds over ascending features.
template <int kDim, int kRows, int kKeys>
DEVICE void rowProducts(float (&sum)[kRows][kKeys], const float* a, const float* b) {
  constexpr int kStride = kDim + kRowPadding;
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int j = 0; j < kKeys; ++j) sum[i][j] = 0.0f;
  }
  for (int block = 0; block < kDim; block += 16) {
    UNROLL
    for (int d = block; d < block + 16; d += 4) {
      float4 x[kRows], y[kKeys];
      UNROLL
      for (int i = 0; i < kRows; ++i) x[i] = ldShared<float4>(a + 4 * i * kStride + d);
      UNROLL
      for (int j = 0; j < kKeys; ++j) y[j] = ldShared<float4>(b + 8 * j * kStride + d);
      UNROLL
      for (int e = 0; e < 4; ++e) {
        UNROLL
        for (int i = 0; i < kRows; ++i) {
          UNROLL
          for (int j = 0; j < kKeys; ++j) sum[i][j] = fmaf(component(x[i], e), component(y[j], e), sum[i][j]);
        }
      }
    }
  }
}

// sum[i][c] += weights[row 4 i] . four columns of values from 32 c on, total[i] += the sum of the weights: chains over
// ascending keys. Rows of weights are kKeys + kWeightPadding floats apart, those of values kStride.
template <int kKeys, int kStride, int kRows, int kQuads>
DEVICE void addWeighted(float4 (&sum)[kRows][kQuads], float (&total)[kRows], const float* weights,
                        const float* values) {
  for (int key = 0; key < kKeys; key += 4) {
    float4 weight[kRows];
    UNROLL
    for (int i = 0; i < kRows; ++i) weight[i] = ldShared<float4>(weights + 4 * i * (kKeys + kWeightPadding) + key);
    UNROLL
    for (int e = 0; e < 4; ++e) {
      UNROLL
      for (int i = 0; i < kRows; ++i) total[i] += component(weight[i], e);
      UNROLL
      for (int c = 0; c < kQuads; ++c) {
        const float4 value = ldShared<float4>(values + (key + e) * kStride + 32 * c);
        UNROLL
        for (int i = 0; i < kRows; ++i) sum[i][c] = multiplyAdd(value, component(weight[i], e), sum[i][c]);
      }
    }
  }
}

// Columns [column, column + 4) of a row of `width` floats in device memory, those there are.
DEVICE float4 loadQuad(const float* row, int column, int width, bool vectors) {
  if (vectors) return column < width ? ldGlobal<float4>(row + column) : float4{};
  float4 v{};
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < width) component(v, i) = ldGlobal(row + column + i);
  }
  return v;
}
DEVICE void storeQuad(float* row, int column, int width, bool vectors, const float4& v) {
  if (vectors) {
    if (column < width) stGlobal(row + column, v);
    return;
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < width) stGlobal(row + column + i, component(v, i));
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
