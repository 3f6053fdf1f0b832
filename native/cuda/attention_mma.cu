// Attention of bf16 activations on tensor cores (mma.sync), forward.
//
// FlashAttention-2: a block has kRows query rows, goes through the keys they see in tiles of kKeys, and keeps the
// largest score, the sum of weights and the weighted sum of values of each row in registers. Keys and values take
// turns: one is on its way while the other is in use. What a query gets depends on it and the keys it sees alone: tiles
// of keys start at fixed keys of a segment, and keys out of sight have weights of exactly 0.
#include <cfloat>

#include "cuda/attention_mma.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

template <int kDimOf>
struct AttendTile {
  static constexpr int kDim = kDimOf;                  // head_dim, rounded up
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kRows = kAttentionWarps * kBlocks * 16, kKeys = kDim <= 128 ? 64 : 32;
  static constexpr bool kHoldsQueries = kDim <= 64;    // in registers
};

template <typename Tile>
struct AttendShared {
  bf16 q[Tile::kRows * kPitch<Tile::kDim>];  // at last y
  bf16 k[Tile::kKeys * kPitch<Tile::kDim>], v[Tile::kKeys * kPitch<Tile::kDim>];
  QueryInfo<Tile::kRows> rows;
};

// The rows' results so far.
template <int kBlocks, int kColumns>
struct Running {
  float sum[kBlocks][kColumns][4];  // of values
  float top[kBlocks][2];            // largest score
  float total[kBlocks][2];          // of weights, those in this lane's columns
};

// Weights 2^(factor (score - top)), rounded to bf16 for the sum of values; what there is so far becomes relative to the
// new top.
template <int kBlocks, int kKeyBlocks, int kColumns>
DEVICE void weigh(uint32_t (&weights)[kBlocks][kKeyBlocks][2], const float (&score)[kBlocks][kKeyBlocks][4],
                  Running<kBlocks, kColumns>& run, float factor) {
  UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      float& top = run.top[i][h];
      float best = fmaxf(score[i][0][2 * h], score[i][0][2 * h + 1]);
      UNROLL
      for (int j = 1; j < kKeyBlocks; ++j) best = fmaxf(best, fmaxf(score[i][j][2 * h], score[i][j][2 * h + 1]));
      best = fmaxf(best, shflXor(best, 1));
      best = fmaxf(top, fmaxf(best, shflXor(best, 2)));
      // With no key in sight yet all weights are 2^-inf.
      const float reference = best == -INFINITY ? 0.0f : best;
      const float keep = fastExp2((top - reference) * factor), shift = -reference * factor;
      top = best;
      float total = run.total[i][h] * keep;
      UNROLL
      for (int j = 0; j < kKeyBlocks; ++j) {
        const float low = fastExp2(fmaf(score[i][j][2 * h], factor, shift));
        const float high = fastExp2(fmaf(score[i][j][2 * h + 1], factor, shift));
        total += low + high;
        weights[i][j][h] = packBf16(low, high);
      }
      run.total[i][h] = total;
      UNROLL
      for (int j = 0; j < kColumns; ++j) {
        run.sum[i][j][2 * h] *= keep;
        run.sum[i][j][2 * h + 1] *= keep;
      }
    }
  }
}

template <typename Tile>
DEVICE void attendTile(const Attention<bf16>& t, AttendShared<Tile>& s, int64_t item) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys, kBlocks = Tile::kBlocks, kColumns = kDim / 8;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, warpRow = warpId() * kBlocks * 16;
  const int kvHead = static_cast<int>(item % t.h.kvHeads), tile = static_cast<int>(item / t.h.kvHeads);
  const int segment = segmentOf(t.tilesBefore, g.count(), tile);
  const QueryRows q{t.h, kvHead, g.start(segment), (tile - ldGlobal(t.tilesBefore + segment)) * Tile::kRows};
  const int rows = min(Tile::kRows, g.queries(segment) * t.h.group - q.first);
  s.rows.set(g, segment, q, rows);
  const int seenByAll = s.rows.seen[0], end = s.rows.seen[Tile::kRows - 1];  // no row sees more
  const int hiddenFromSome = g.hidden(end), begin = g.hidden(seenByAll) / kKeys * kKeys;  // nor keys before `begin`
  const int stride = t.h.kvHeads * headDim;
  const int64_t origin = EvenRows<kDim>::firstOf(int64_t{g.first(segment)} * stride + kvHead * headDim, stride);

  const auto load = [&](bf16* to, const bf16* from, int first) {
    loadTile<kKeys, kDim>(to, from, end - first, headDim, t.vectors,
                          EvenRows<kDim>{from + origin + int64_t{first} * stride, stride});
    cpAsyncCommit();
  };
  loadTile<Tile::kRows, kDim>(s.q, t.q, rows, headDim, t.vectors,
                              [&](int row) { return t.q + s.rows.index[row] * headDim + TileLoad<kDim>::piece() * 8; });
  cpAsyncCommit();
  load(s.k, t.k, begin);
  cpAsyncWait<1>();
  syncThreads();  // q is complete
  // The largest score is that of the largest product: the sign of the scale goes into the queries, and a scale of 0 is
  // made so small that all weights are 1. Where scores are capped products become scores first.
  const bool capped = t.softcap > 0.0f;
  const float factor = capped ? kLog2E : fmaxf(fabsf(t.scale) * kLog2E, FLT_MIN);
  if (t.scale < 0.0f && !capped) {
    for (int i = laneId(); i < kBlocks * 16 * kPitch<kDim> / 2; i += 32) {
      uint32_t* pair = reinterpret_cast<uint32_t*>(s.q + warpRow * kPitch<kDim>) + i;
      stShared(pair, ldShared<uint32_t>(pair) ^ 0x80008000);
    }
    syncWarp();
  }

  uint32_t held[Tile::kHoldsQueries ? kDim / 16 : 1][kBlocks][4];
  if constexpr (Tile::kHoldsQueries) {
    UNROLL
    for (int d = 0; d < kDim; d += 16) loadA<kDim>(held[d / 16], s.q + warpRow * kPitch<kDim>, d);
  }
  const auto queries = [&](uint32_t (&a)[kBlocks][4], int feature) {
    if constexpr (Tile::kHoldsQueries) {
      UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = held[feature / 16][i][e];
      }
    } else {
      loadA<kDim>(a, s.q + warpRow * kPitch<kDim>, feature);
    }
  };
  Running<kBlocks, kColumns> run{};
  UNROLL
  for (int i = 0; i < kBlocks; ++i) run.top[i][0] = run.top[i][1] = -INFINITY;

  for (int first = begin; first < end; first += kKeys) {
    cpAsyncWait<0>();
    syncThreads();  // k is complete, v has been read
    load(s.v, t.v, first);
    float score[kBlocks][kKeys / 8][4];
    multiplyRows<kDim>(score, queries, s.k);
    if (capped) {
      const float perCap = t.scale / t.softcap;
      UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        UNROLL
        for (int j = 0; j < kKeys / 8; ++j) {
          UNROLL
          for (int e = 0; e < 4; ++e) score[i][j][e] = t.softcap * tanhOf(score[i][j][e] * perCap);
        }
      }
    }
    if (first + kKeys > seenByAll || first < hiddenFromSome) {
      UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        UNROLL
        for (int h = 0; h < 2; ++h) {
          const int seen = s.rows.seen[warpRow + sumRow(i, h)] - first;
          UNROLL
          for (int j = 0; j < kKeys / 8; ++j) {
            UNROLL
            for (int e = 0; e < 2; ++e) {
              if (!g.inSight(seen, sumColumn(j) + e)) score[i][j][2 * h + e] = -INFINITY;
            }
          }
        }
      }
    }
    uint32_t weights[kBlocks][kKeys / 8][2];
    weigh(weights, score, run, factor);
    cpAsyncWait<0>();
    syncThreads();  // v is complete, k has been read
    if (first + kKeys < end) load(s.k, t.k, first + kKeys);
    addWeightedRows<kDim>(run.sum, weights, s.v);
  }

  UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      float total = run.total[i][h];
      total += shflXor(total, 1);
      total += shflXor(total, 2);
      const float inverse = 1.0f / total;
      UNROLL
      for (int j = 0; j < kColumns; ++j) {
        // Adding zero makes a zero positive: whether keys out of sight have entered the sum does not show in its sign.
        UNROLL
        for (int e = 2 * h; e < 2 * h + 2; ++e) run.sum[i][j][e] = fmaf(run.sum[i][j][e], inverse, 0.0f);
      }
      const int64_t index = s.rows.index[warpRow + sumRow(i, h)];
      if (t.lse && laneId() % 4 == 0 && index >= 0) {
        stGlobal(t.lse + index, (run.top[i][h] * factor + fastLog2(total)) * kLn2);
      }
    }
  }
  storeRows<kDim>(t.y, run.sum, s.q, warpRow, 0, headDim, t.vectors, [&](int row) { return s.rows.index[row]; });
}

template <typename Tile>
__global__ void __launch_bounds__(kAttentionThreads, 2) attendMmaKernel(const __grid_constant__ Attention<bf16> t) {
  SHARED_MEMORY(AttendShared<Tile>, s);
  if (t.state.faulted()) return;
  const int64_t items = int64_t{ldGlobal(t.plan).tiles} * t.h.kvHeads;
  // The last tiles first: under causal attention they see the most keys.
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    attendTile<Tile>(t, s, items - 1 - i);
    syncThreads();  // all of shared memory has been read
  }
}

}  // namespace

void attendMma(const Launch& launch, Planning planning, const Attention<bf16>& attention) {
  forHeadDim(attention.h.headDim, [&](auto dim) {
    using Tile = AttendTile<dim.value>;
    planning.rows = Tile::kRows;
    launchPlan(launch, planning);
    const int64_t rows = planning.q.bound[0] * attention.h.group;
    const int64_t items = mostTiles(planning.segments.offsets, rows, Tile::kRows) * attention.h.kvHeads;
    LAUNCH(attendMmaKernel<Tile>, launch.blocks(items, 1), kAttentionThreads, sizeof(AttendShared<Tile>),
           launch.stream, attention);
  });
}

}  // namespace elastiform::ELASTIFORM_DEVICE
