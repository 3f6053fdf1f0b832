// Routing: selection of rows, gates, and what routers learn from.
#include "cuda/collectives.cuh"
#include "cuda/expert.cuh"
#include "cuda/kernels.h"
#include "cuda/segments.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

// ---- The largest scores of a segment, by one block
//
// Radix selection from the highest byte of order-preserving keys down. The keys of a segment of up to kHeldRows rows
// stay in registers; of a longer one they are made again, tile by tile, from scores that the second-level cache holds.

constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / 32;
constexpr int kKeys = 8;                                // of a thread
constexpr int kWarpRows = 32 * kKeys;                   // consecutive
constexpr int kHeldRows = kSelectWarps * kWarpRows;     // a tile

struct Found {
  int digit, wanted, count;
};

struct SelectShared {
  alignas(16) int histogram[4][256];  // by pass and digit
  Found found;
  int selected[2][kSelectWarps];  // by parity of the tile: rows above the floor, and ties << 16
  bool faulted;
};
static_assert(kSelectThreads == 4 * 256 && kHeldRows < 1 << 15);

// Larger scores have larger keys, and 0 and -0 the same. No row has key 0.
constexpr uint32_t kNaNKey = 1;  // of no other score
DEVICE uint32_t keyOf(float score) {
  if (score != score) return kNaNKey;
  const uint32_t bits = score == 0.f ? 0 : asUint(score);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
DEVICE float scoreOf(uint32_t key) { return asFloat(key ^ (key >> 31 ? 0x80000000u : ~0u)); }

// The first of a thread's rows in the tile; the others follow 32 apart.
DEVICE int firstRow(int tile) { return tile + warpId() * kWarpRows + laneId(); }

// Keys of the rows of a tile, 0 past the segment's end.
DEVICE void loadKeys(const float* z, int length, int tile, uint32_t (&key)[kKeys]) {
  const int first = firstRow(tile);
  UNROLL
  for (int j = 0; j < kKeys; ++j) key[j] = first + 32 * j < length ? keyOf(ldGlobal(z + first + 32 * j)) : 0;
}

// What is chosen: keys that under `mask` are above `floor`, and the first `wanted` of the `ties` equal to it.
struct Choice {
  uint32_t floor = 0, mask = 0;
  int wanted = 0, ties = 0;
};

// The k largest of a segment of 0 < k < length rows. A segment of one tile has its keys in `key`.
DEVICE Choice chooseLargest(const float* z, int length, int k, uint32_t (&key)[kKeys], SelectShared& s) {
  const int lane = laneId();
  const bool first = warpId() == 0;
  (&s.histogram[0][0])[threadIdx.x] = 0;
  syncThreads();  // histograms are zero
  Choice c;
  c.wanted = k;
  for (int pass = 0; pass < 4; ++pass) {
    const int shift = 24 - 8 * pass;
    for (int tile = 0; tile < length; tile += kHeldRows) {
      if (length > kHeldRows) loadKeys(z, length, tile, key);
      UNROLL
      for (int j = 0; j < kKeys; ++j) {
        if (key[j] != 0 && (key[j] & c.mask) == c.floor) atomicAdd(&s.histogram[pass][key[j] >> shift & 255], 1);
      }
    }
    syncThreads();  // the histogram is complete
    if (first) {
      // Lane l has the digits 255 - 8 l and the seven below.
      const int lowest = 248 - 8 * lane;
      const int* bins = &s.histogram[pass][lowest];
      const int4 low = ldShared<int4>(bins), high = ldShared<int4>(bins + 4);
      const int counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
      int sum = 0;
      UNROLL
      for (int i = 0; i < 8; ++i) sum += counts[i];
      int above = warpScan(sum) - sum;
      UNROLL
      for (int i = 0; i < 8; ++i) {
        if (above < c.wanted && c.wanted <= above + counts[i]) s.found = {lowest + 7 - i, c.wanted - above, counts[i]};
        above += counts[i];
      }
    }
    syncThreads();  // the digit is found
    c.floor |= static_cast<uint32_t>(s.found.digit) << shift;
    c.mask |= 255u << shift;
    c.wanted = s.found.wanted;
    c.ties = s.found.count;
    if (c.wanted == c.ties) break;  // all of them: no need to tell them apart
  }
  return c;
}

// Writes the chosen rows, ascending, from rows[0] on, at most `room`; `first` is the index of the segment's first row.
DEVICE void writeRows(const float* z, int length, int first, const Choice& c, uint32_t (&key)[kKeys], int32_t* rows,
                      int64_t room, SelectShared& s) {
  const int lane = laneId(), warp = warpId();
  const uint32_t before = (1u << lane) - 1;
  int aboveSoFar = 0, tiesSoFar = 0, parity = 0;
  for (int tile = 0; tile < length; tile += kHeldRows, parity ^= 1) {
    if (length > kHeldRows) loadKeys(z, length, tile, key);
    uint32_t aboves[kKeys], ties[kKeys];
    int packed = 0;
    UNROLL
    for (int j = 0; j < kKeys; ++j) {
      aboves[j] = ballot((key[j] & c.mask) > c.floor);
      ties[j] = ballot((key[j] & c.mask) == c.floor);
      packed += popCount(aboves[j]) + (popCount(ties[j]) << 16);
    }
    if (lane == 0) s.selected[parity][warp] = packed;
    syncThreads();  // the counts of all warps are there
    const int own = s.selected[parity][lane], scan = warpScan(own);
    const int mine = shflIdx(scan - own, warp), all = shflIdx(scan, 31);
    int above = aboveSoFar + (mine & 0xffff), tie = tiesSoFar + (mine >> 16);
    UNROLL
    for (int j = 0; j < kKeys; ++j) {
      const int rank = tie + popCount(ties[j] & before);
      if ((aboves[j] >> lane & 1) != 0 || ((ties[j] >> lane & 1) != 0 && rank < c.wanted)) {
        const int at = above + popCount(aboves[j] & before) + min(rank, c.wanted);
        if (at < room) stGlobal(rows + at, first + firstRow(tile) + 32 * j);
      }
      above += popCount(aboves[j]);
      tie += popCount(ties[j]);
    }
    aboveSoFar += all & 0xffff;
    tiesSoFar += all >> 16;
  }
}

// 1e-6 forgives the rounding of a capacity such as 0.1 to f32.
DEVICE int rowsWanted(float capacity, int length) {
  const double wanted = ceil(static_cast<double>(capacity) * length - 1e-6);
  return wanted > 0 ? static_cast<int>(min(wanted, static_cast<double>(length))) : 0;
}

// A block takes every gridDim.x-th segment, and knows where its rows go: how many are chosen of a segment is a matter
// of its length and capacity alone.
__global__ void __launch_bounds__(kSelectThreads, 1)
    topkKernel(Operand scores, Operand offsets, Operand capacities, Operand rows, Operand rowOffsets, int32_t* produced,
               StepState state) {
  SHARED_MEMORY(SelectShared, s);
  // One answer for the block: another one may report while this begins.
  if (threadIdx.x == 0) s.faulted = state.faulted();
  syncThreads();
  if (s.faulted || !onePerSegment(offsets, capacities, 2, state)) return;
  const int segments = capacities.size(0);
  const int32_t* starts = offsets.i32();
  const float* capacity = capacities.f32();
  const int64_t bound = rows.bound[0];
  const bool writer = threadIdx.x == 0;
  const auto lengthOf = [&](int segment) { return ldGlobal(starts + segment + 1) - ldGlobal(starts + segment); };
  if (blockIdx.x == 0 && writer) {
    stGlobal(rowOffsets.i32(), 0);
    if (segments == 0) stGlobal(produced, 0);
  }
  int at = 0, counted = 0;  // rows chosen of the first `counted` segments
  for (int segment = blockIdx.x; segment < segments; segment += gridDim.x) {
    int more = 0;
    for (int i = counted + laneId(); i < segment; i += 32) more += rowsWanted(ldGlobal(capacity + i), lengthOf(i));
    at += warpTotal(more);
    counted = segment;
    const int first = ldGlobal(starts + segment), length = lengthOf(segment);
    const float share = ldGlobal(capacity + segment);
    const int k = rowsWanted(share, length);
    const int64_t end = int64_t{at} + k;
    if (writer) {
      if (!(share >= 0 && share <= 1)) {
        state.report(Fault::Range, 2, segment, 0, 1, share);
      } else if (end > bound) {
        state.report(Fault::Room, 0, 0, 0, static_cast<double>(bound), 0);
      }
      stGlobal(rowOffsets.i32() + segment + 1, static_cast<int32_t>(end));
      if (segment == segments - 1) stGlobal(produced, static_cast<int32_t>(min(end, bound)));
    }
    const float* z = scores.f32() + first;
    uint32_t key[kKeys];
    for (int tile = 0; tile < length; tile += kHeldRows) {
      loadKeys(z, length, tile, key);
      int bad = -1;
      UNROLL
      for (int j = 0; j < kKeys; ++j) {
        if (key[j] == kNaNKey) bad = firstRow(tile) + 32 * j;
      }
      if (bad >= 0) state.report(Fault::NaN, 0, first + bad, 0, 0, 0);
    }
    if (k == 0) continue;
    Choice choice;
    choice.mask = ~0u;  // every row is above the floor of 0
    if (k < length) choice = chooseLargest(z, length, k, key, s);
    writeRows(z, length, first, choice, key, rows.i32() + at, bound - at, s);
    syncThreads();  // the shared memory is free for the next segment
  }
}

// ---- Rows that pass by themselves, by a threshold or by choosing an expert
//
// In one launch: all blocks say which rows pass, a bit for each, and the last of them to be done, known by the ticket it
// draws, knows them all and says where they go. No block waits for another.

constexpr int kTileRows = 32 * kThreads;  // a word of bits for each thread of the last block

DEVICE int wordsOf(int rows) { return static_cast<int>((int64_t{rows} + 31) / 32); }

// Rows whose score is above their segment's threshold.
struct Above {
  Operand scores, offsets, thresholds;

  // Reports bad thresholds; by all threads of a grid. Whether there is one for each segment.
  DEVICE bool check(const StepState& state) const {
    if (!onePerSegment(offsets, thresholds, 2, state)) return false;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < thresholds.size(0); i += gridDim.x * kThreads) {
      const float limit = ldGlobal(thresholds.f32() + i);
      if (limit != limit) state.report(Fault::NaN, 2, i, 0, 0, 0);
    }
    return true;
  }
  DEVICE bool passes(int row, const StepState& state) const {
    const float z = ldGlobal(scores.f32() + row);
    if (z != z) state.report(Fault::NaN, 0, row, 0, 0, 0);
    const float limit = ldGlobal(thresholds.f32() + segmentOf(offsets.i32(), thresholds.size(0), row));
    return z > limit || limit == -INFINITY;  // even rows whose score is minus infinity
  }
};

// Rows that choose an expert.
struct Chooses {
  Experts experts;
  int expert;

  DEVICE bool check(const StepState& state) const { return experts.checkShares(state); }
  DEVICE bool passes(int row, const StepState& state) const {
    experts.check(row, state);
    return experts.row(row).chosen(expert);
  }
};

struct PassShared {
  uint32_t bits[kThreads + 1];
  int before[kThreads + 1];  // rows that pass, up to a word
  int sums[kThreads / 32];   // of the words of a warp
  bool last;
};

// passing: scratch for a bit for each row.
template <typename Which>
__global__ void __launch_bounds__(kThreads, 4)
    passKernel(Which which, Operand scores, Operand offsets, uint32_t* passing, Operand rows, Operand rowOffsets,
               int32_t* produced, uint32_t* ticket, StepState state) {
  SHARED_MEMORY(PassShared, s);
  if (!which.check(state)) return;
  const int all = scores.size(0), segments = offsets.size(0) - 1, words = wordsOf(all);
  const int lane = laneId(), warp = warpId(), thread = threadIdx.x;
  for (int word = blockIdx.x * (kThreads / 32) + warp; word < words; word += gridDim.x * (kThreads / 32)) {
    const int row = 32 * word + lane;
    const uint32_t bits = ballot(row < all && segments > 0 && which.passes(row, state));
    if (lane == 0) stGlobal(passing + word, bits);
  }
  threadFence();  // the words are there before the ticket is drawn
  syncThreads();  // by all warps
  if (thread == 0) s.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  syncThreads();  // it is known
  if (!s.last) return;
  threadFence();  // what the other blocks wrote before their tickets is seen
  if (thread == 0) stGlobal(ticket, 0u);
  const int64_t bound = rows.bound[0];
  int at = 0;  // rows that pass, of the tiles before
  // There is always a tile: row_offsets are written with those of the rows before.
  for (int tile = 0; tile == 0 || tile < words; tile += kThreads) {
    const uint32_t own = tile + thread < words ? ldGlobal(passing + tile + thread) : 0;
    const int scan = warpScan(popCount(own));
    if (lane == 31) s.sums[warp] = scan;
    syncThreads();  // the sums of all warps are there; the words of the tile before have been read
    int before = at;
    for (int i = 0; i < warp; ++i) before += s.sums[i];
    s.bits[thread] = own;
    s.before[thread] = before + scan - popCount(own);
    if (thread == kThreads - 1) {
      s.bits[kThreads] = 0;
      s.before[kThreads] = before + scan;
    }
    syncThreads();  // the words and their places are there
    const int first = 32 * tile;
    const auto placeOf = [&](int row) {
      return s.before[row >> 5] + popCount(s.bits[row >> 5] & ((1u << (row & 31)) - 1));
    };
    for (int row = thread; row < kTileRows; row += kThreads) {
      if ((s.bits[row >> 5] >> (row & 31) & 1) == 0) continue;
      const int place = placeOf(row);
      if (place < bound) stGlobal(rows.i32() + place, first + row);
    }
    const bool end = tile + kThreads >= words;
    for (int i = thread; i <= segments; i += kThreads) {
      const int64_t row = int64_t{ldGlobal(offsets.i32() + i)} - first;
      if (row >= 0 && row < kTileRows + end) stGlobal(rowOffsets.i32() + i, placeOf(static_cast<int>(row)));
    }
    at = s.before[kThreads];
  }
  if (thread == 0) {
    if (at > bound) state.report(Fault::Room, 0, 0, 0, static_cast<double>(bound), 0);
    stGlobal(produced, static_cast<int32_t>(min(int64_t{at}, bound)));
  }
}

// Emits the rows that pass, of scores and offsets.
template <typename Which>
void selectRows(const Launch& launch, const Which& which) {
  const Operand &z = launch.in[0], &offsets = launch.in[1];
  checkOffsets(launch, 1, z, 0);
  uint32_t* passing = launch.scratch<uint32_t>(z.bound[0] / 32 + 1);
  LAUNCH(passKernel<Which>, launch.blocks(z.bound[0], kThreads), kThreads, sizeof(PassShared), launch.stream, which, z,
         offsets, passing, launch.out[0], launch.out[1], launch.produced[0], launch.ticket, launch.state);
}

// ---- Gates

DEVICE double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

// Where `row` stands in the ascending `rows`, or -1.
DEVICE int findRow(const int32_t* rows, int count, int row) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ldGlobal(rows + middle) < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && ldGlobal(rows + low) == row ? low : -1;
}

__global__ void __launch_bounds__(kThreads, 4)
    gateKernel(Operand z, Operand rows, Operand g, int mode, StepState state) {
  if (state.faulted()) return;
  const int count = rows.size(0);
  for (int r = blockIdx.x * kThreads + threadIdx.x; r < count; r += gridDim.x * kThreads) {
    const float x = mode == 0 ? 0.f : ldGlobal(z.f32() + ldGlobal(rows.i32() + r));
    stGlobal(g.f32() + r, mode == 0 ? 1.f : static_cast<float>(mode * sigmoid(x)));
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    gateGradKernel(Operand dg, Operand z, Operand rows, Operand dz, int mode, StepState state) {
  if (state.faulted()) return;
  const int total = z.size(0), count = rows.size(0);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const int r = findRow(rows.i32(), count, i);
    double slope = 0;
    if (r >= 0) {
      const double x = ldGlobal(z.f32() + i), rest = sigmoid(-x);
      slope = ldGlobal(dg.f32() + r) * (mode == 0 ? rest : mode * sigmoid(x) * rest);
    }
    stGlobal(dz.f32() + i, static_cast<float>(slope));
  }
}

// ---- Whether a row is selected, learnt from its score

constexpr int kBceRows = 1024;  // of one partial sum

struct SumShared {
  double partial[kThreads / 32];
};

__global__ void __launch_bounds__(kThreads, 4) bceKernel(Operand z, Operand rows, double* sums, StepState state) {
  SHARED_MEMORY(SumShared, s);
  if (state.faulted()) return;
  const int total = z.size(0), count = rows.size(0);
  for (int64_t first = int64_t{kBceRows} * blockIdx.x; first < total; first += int64_t{kBceRows} * gridDim.x) {
    double sum = 0;
    for (int j = threadIdx.x; j < kBceRows && first + j < total; j += kThreads) {
      const int i = static_cast<int>(first) + j;
      const double score = ldGlobal(z.f32() + i);
      const double x = findRow(rows.i32(), count, i) >= 0 ? -score : score;  // -log sigmoid(-x)
      sum += max(x, 0.0) + log1p(exp(-fabs(x)));
    }
    sum = blockTotal(sum, s.partial);
    if (threadIdx.x == 0) stGlobal(sums + first / kBceRows, sum);
  }
}

__global__ void __launch_bounds__(kThreads, 1) bceMeanKernel(Operand z, const double* sums, Operand loss) {
  SHARED_MEMORY(SumShared, s);
  const int total = z.size(0), count = static_cast<int>((int64_t{total} + kBceRows - 1) / kBceRows);
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += ldGlobal(sums + i);
  sum = blockTotal(sum, s.partial);
  if (threadIdx.x == 0) stGlobal(loss.f32(), total > 0 ? static_cast<float>(sum / total) : 0.f);
}

__global__ void __launch_bounds__(kThreads, 4)
    bceGradKernel(Operand dloss, Operand z, Operand rows, Operand dz, StepState state) {
  if (state.faulted()) return;
  const int total = z.size(0), count = rows.size(0);
  const float factor = ldGlobal(dloss.f32());
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const double x = ldGlobal(z.f32() + i);
    // sigmoid(x) - 1 = -sigmoid(-x) keeps small gradients exact.
    const double slope = findRow(rows.i32(), count, i) >= 0 ? -sigmoid(-x) : sigmoid(x);
    stGlobal(dz.f32() + i, static_cast<float>(factor * slope / total));
  }
}

// ---- Credit of the choice itself

DEVICE double changeOf(float slope, float before, float after) {
  return static_cast<double>(slope) * (static_cast<double>(after) - before);
}
DEVICE double changeOf(const float4& slope, const float4& before, const float4& after) {
  return (changeOf(slope.x, before.x, after.x) + changeOf(slope.y, before.y, after.y)) +
         (changeOf(slope.z, before.z, after.z) + changeOf(slope.w, before.w, after.w));
}

// credit[row] = dy . (after - before), a warp a row. On the way checks scores and row_offsets.
__global__ void __launch_bounds__(kThreads, 4)
    creditKernel(Operand dy, Operand before, Operand after, Operand z, Operand offsets, Operand rowOffsets,
                 double* credit, StepState state) {
  const int tid = blockIdx.x * kThreads + threadIdx.x, lane = laneId();
  const int rows = dy.size(0), width = dy.size(1), ends = offsets.size(0);
  const int32_t *starts = rowOffsets.i32(), *all = offsets.i32();
  for (int i = tid; i < ends; i += gridDim.x * kThreads) {
    const int64_t low = i > 0 ? ldGlobal(starts + i - 1) : 0;
    const int64_t high = i > 0 ? low + ldGlobal(all + i) - ldGlobal(all + i - 1) : 0;
    const int start = ldGlobal(starts + i);
    if (start >= low && start <= high) continue;
    state.report(Fault::Offset, 5, i, static_cast<double>(low), static_cast<double>(high), start);
  }
  const bool vectors = width % 4 == 0 && startsAligned(dy, before, after);
  for (int row = tid / 32; row < rows; row += gridDim.x * (kThreads / 32)) {
    const int64_t at = int64_t{row} * width;
    double sum = 0;
    forColumns(width, vectors, lane, 32, [&]<typename V>(int c) {
      sum += changeOf(ldGlobal<V>(dy.f32() + at + c), ldGlobal<V>(before.f32() + at + c),
                      ldGlobal<V>(after.f32() + at + c));
    });
    sum = warpTotal(sum);
    if (lane != 0) continue;
    stGlobal(credit + row, sum);
    const float score = ldGlobal(z.f32() + row);
    if (score != score) state.report(Fault::NaN, 3, row, 0, 0, 0);
  }
}

struct CreditShared {
  SelectShared select;
  double partial[kSelectWarps];
  uint32_t lowest[kSelectWarps], highest[kSelectWarps];
};

// Halfway between the k-th and the next largest score of a segment.
DEVICE double thresholdOf(const float* z, int length, int k, CreditShared& s) {
  uint32_t key[kKeys];
  loadKeys(z, length, 0, key);
  const Choice c = chooseLargest(z, length, k, key, s.select);
  uint32_t lowest = 0, highest = 0;  // ~ of the lowest key that is chosen, and the highest that is not
  for (int tile = 0; tile < length; tile += kHeldRows) {
    if (length > kHeldRows) loadKeys(z, length, tile, key);
    UNROLL
    for (int j = 0; j < kKeys; ++j) {
      if (key[j] != 0 && (key[j] & c.mask) >= c.floor) {
        lowest = max(lowest, ~key[j]);
      } else {
        highest = max(highest, key[j]);
      }
    }
  }
  lowest = warpMax(lowest);
  highest = warpMax(highest);
  if (laneId() == 0) {
    s.lowest[warpId()] = lowest;
    s.highest[warpId()] = highest;
  }
  syncThreads();  // those of all warps are there
  lowest = ~warpMax(s.lowest[laneId()]);
  // Equal scores that were not all wanted have the same key in full.
  highest = c.ties > c.wanted ? lowest : warpMax(s.highest[laneId()]);
  return (static_cast<double>(scoreOf(lowest)) + scoreOf(highest)) / 2;
}

__global__ void __launch_bounds__(kSelectThreads, 1)
    creditGradKernel(Operand scores, Operand offsets, Operand rowOffsets, Operand weights, const double* credits,
                     Operand grads, StepState state) {
  SHARED_MEMORY(CreditShared, s);
  if (state.faulted()) return;
  const int segments = offsets.size(0) - 1;
  for (int segment = blockIdx.x; segment < segments; segment += gridDim.x) {
    const int first = ldGlobal(offsets.i32() + segment), length = ldGlobal(offsets.i32() + segment + 1) - first;
    const int k = ldGlobal(rowOffsets.i32() + segment + 1) - ldGlobal(rowOffsets.i32() + segment);
    const float *z = scores.f32() + first, *weight = weights.f32() + first;
    const double* credit = credits + first;
    float* dz = grads.f32() + first;
    double magnitude = 0, tau = 0, slopes = 0, mean = 0;
    const auto slope = [&](int i) {  // sigmoid(z - tau) sigmoid(tau - z)
      const double e = exp(-fabs(ldGlobal(z + i) - tau));
      return e / ((1 + e) * (1 + e));
    };
    if (k > 0 && k < length) {
      tau = thresholdOf(z, length, k, s);
      for (int i = threadIdx.x; i < length; i += kSelectThreads) magnitude += fabs(ldGlobal(credit + i));
      magnitude = blockTotal(magnitude, s.partial) / length;
      if (magnitude != 0 && fabs(tau) < INFINITY) {
        double sum = 0;
        for (int i = threadIdx.x; i < length; i += kSelectThreads) {
          const double g = slope(i);
          slopes += g;
          sum += ldGlobal(credit + i) / magnitude * g;
        }
        slopes = blockTotal(slopes, s.partial);
        mean = blockTotal(sum, s.partial) / slopes;
      }
    }
    for (int i = threadIdx.x; i < length; i += kSelectThreads) {
      const auto gradient = [&] { return ldGlobal(weight + i) * (ldGlobal(credit + i) / magnitude - mean) * slope(i); };
      stGlobal(dz + i, slopes == 0 ? 0.f : static_cast<float>(gradient()));
    }
  }
}

// Blocks of kSelectThreads for so many segments: one fits on a multiprocessor, and most of a bound may be absent.
unsigned selectBlocks(const Launch& launch, int64_t segments) {
  return static_cast<unsigned>(std::clamp<int64_t>(segments, 1, launch.multiprocessors));
}

}  // namespace

void routeTopk(const Launch& launch) {
  const Operand &z = launch.in[0], &offsets = launch.in[1], &capacity = launch.in[2];
  checkOffsets(launch, 1, z, 0);
  checkPerSegment(launch, offsets, capacity);
  LAUNCH(topkKernel, selectBlocks(launch, capacity.bound[0]), kSelectThreads, sizeof(SelectShared), launch.stream, z,
         offsets, capacity, launch.out[0], launch.out[1], launch.produced[0], launch.state);
}

void routeThreshold(const Launch& launch) {
  checkPerSegment(launch, launch.in[1], launch.in[2]);
  selectRows(launch, Above{launch.in[0], launch.in[1], launch.in[2]});
}

void expertRows(const Launch& launch) {
  const int64_t expert = launch.intAttribute(0, "expert", 0, launch.in[0].bound[1] - 1);
  selectRows(launch, Chooses{Experts(launch, 0, 1), static_cast<int>(expert)});
}

void gate(const Launch& launch) {
  const Operand &z = launch.in[0], &rows = launch.in[1];
  const int mode = static_cast<int>(launch.intAttribute(0, "mode", 0, 2));
  checkRows(launch, 1, z, 0);
  LAUNCH(gateKernel, launch.blocks(rows.bound[0], kThreads), kThreads, 0, launch.stream, z, rows, launch.out[0], mode,
         launch.state);
}

void gateGrad(const Launch& launch) {
  const Operand &z = launch.in[1], &rows = launch.in[2];
  const int mode = static_cast<int>(launch.intAttribute(0, "mode", 0, 2));
  checkRows(launch, 2, z, 0);
  LAUNCH(gateGradKernel, launch.blocks(z.bound[0], kThreads), kThreads, 0, launch.stream, launch.in[0], z, rows,
         launch.out[0], mode, launch.state);
}

void topkBce(const Launch& launch) {
  const Operand &z = launch.in[0], &rows = launch.in[1];
  checkRows(launch, 1, z, 0);
  double* sums = launch.scratch<double>((z.bound[0] + kBceRows - 1) / kBceRows);
  LAUNCH(bceKernel, launch.blocks(z.bound[0], kBceRows), kThreads, sizeof(SumShared), launch.stream, z, rows, sums,
         launch.state);
  LAUNCH(bceMeanKernel, 1, kThreads, sizeof(SumShared), launch.stream, z, sums, launch.out[0]);
}

void topkBceGrad(const Launch& launch) {
  const Operand &z = launch.in[1], &rows = launch.in[2];
  checkRows(launch, 2, z, 0);
  LAUNCH(bceGradKernel, launch.blocks(z.bound[0], kThreads), kThreads, 0, launch.stream, launch.in[0], z, rows,
         launch.out[0], launch.state);
}

void topkCredit(const Launch& launch) {
  const Operand &dy = launch.in[0], &z = launch.in[3], &offsets = launch.in[4], &rowOffsets = launch.in[5];
  checkOffsets(launch, 4, dy, 0);
  double* credit = launch.scratch<double>(dy.bound[0]);
  LAUNCH(creditKernel, launch.blocks(dy.bound[0], kThreads / 32), kThreads, 0, launch.stream, dy, launch.in[1],
         launch.in[2], z, offsets, rowOffsets, credit, launch.state);
  LAUNCH(creditGradKernel, selectBlocks(launch, offsets.bound[0] - 1), kSelectThreads, sizeof(CreditShared),
         launch.stream, z, offsets, rowOffsets, launch.in[6], credit, launch.out[0], launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
