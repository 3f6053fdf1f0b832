// The gradient of attention of bf16 activations on tensor cores (mma.sync).
//
// FlashAttention-2's backward pass without its atomic sums: one kernel has tiles of query rows and goes through the keys
// they see, for dq; another has tiles of keys and goes through the rows that see them, for dk and dv. Both compute the
// weights anew from lse, and differ in which side of the scores is the block's own: its products are the same.
#include "cuda/attention_mma.cuh"
#include "cuda/collectives.cuh"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

// A block's own rows are queries, or keys; it goes through kOther of the others at a time.
template <int kDimOf, bool kOwnsKeysOf>
struct GradTile {
  static constexpr int kDim = kDimOf;  // head_dim, rounded up
  static constexpr bool kOwnsKeys = kOwnsKeysOf;
  static constexpr int kBlocks = kDim <= 64 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kOwn = kAttentionWarps * kBlocks * 16;
  static constexpr int kOther = kDim == 256 ? 16 : kDim == 128 ? 48 : kDim == 64 ? 32 : 64;
  static constexpr int kParts = kDim == 256 && kOwnsKeys ? 2 : 1;  // of features, whose gradients separate blocks have
  static constexpr int kColumns = kDim / kParts / 8;
  static constexpr int kQueries = kOwnsKeys ? kOther : kOwn;
};

template <typename Tile>
struct GradShared {
  bf16 own[2][Tile::kOwn * kPitch<Tile::kDim>];      // q and dy, or k and v; at last gradients
  bf16 first[2][Tile::kOther * kPitch<Tile::kDim>];  // k or q, by turns
  bf16 second[Tile::kOther * kPitch<Tile::kDim>];    // v or dy
  float lse[Tile::kQueries], deltas[Tile::kQueries];
  QueryInfo<Tile::kQueries> rows;  // where they are the others without indices, and keys are counted from the block's own
};

template <typename Tile>
DEVICE void gradientTile(const AttentionGradient<bf16>& t, GradShared<Tile>& s, int64_t item) {
  constexpr int kDim = Tile::kDim, kOwn = Tile::kOwn, kOther = Tile::kOther, kBlocks = Tile::kBlocks;
  constexpr int kColumns = Tile::kColumns;
  constexpr bool kOwnsKeys = Tile::kOwnsKeys;
  const AttentionSegments& g = t.segments;
  const int headDim = t.h.headDim, tid = threadIdx.x, warpRow = warpId() * kBlocks * 16;
  const int part = static_cast<int>(item % Tile::kParts), kvHead = static_cast<int>(item / Tile::kParts % t.h.kvHeads);
  const int tile = static_cast<int>(item / Tile::kParts / t.h.kvHeads);
  const int32_t* before = kOwnsKeys ? t.keyTilesBefore : t.tilesBefore;
  const int segment = segmentOf(before, g.count(), tile);
  const int firstOwn = (tile - ldGlobal(before + segment)) * kOwn;
  // Keys are gone through from the first that a row of the block sees on, query rows from the first that sees a key of the
  // block. Tiles are masked that begin below, or end above, the rows that see all of the block's keys or the keys that all
  // of the block's rows see.
  const int start = kOwnsKeys ? g.firstToSee(segment, firstOwn) : g.start(segment);
  const QueryRows q{t.h, kvHead, start, kOwnsKeys ? 0 : firstOwn};
  int own, begin = 0, others, maskedBelow, maskedAbove;
  if constexpr (kOwnsKeys) {
    own = min(kOwn, g.added(segment) - firstOwn);
    const int last = firstOwn + own - 1;
    others = (g.firstBehind(segment, last) - start) * t.h.group;
    maskedBelow = (g.firstToSee(segment, last) - start) * t.h.group;
    maskedAbove = (g.firstBehind(segment, firstOwn) - start) * t.h.group;
  } else {
    own = min(kOwn, g.queries(segment) * t.h.group - firstOwn);
    s.rows.set(g, segment, q, own);
    others = s.rows.seen[kOwn - 1];  // no row sees more
    maskedBelow = g.hidden(others);
    maskedAbove = s.rows.seen[0];
    begin = g.hidden(maskedAbove) / kOther * kOther;
  }
  const int stride = t.h.kvHeads * headDim;
  const int firstKey = g.first(segment) + (kOwnsKeys ? firstOwn : 0), piece = TileLoad<kDim>::piece() * 8;
  const int64_t origin = EvenRows<kDim>::firstOf(int64_t{firstKey} * stride + kvHead * headDim, stride);

  const auto loadQueries = [&](auto count, bf16* to, const bf16* from, int first, int rows) {
    loadTile<count.value, kDim>(to, from, rows, headDim, t.vectors,
                                [&](int row) { return from + q.headRow(first + row) * headDim + piece; });
  };
  const auto loadKeys = [&](auto count, bf16* to, const bf16* from, int first, int keys) {
    loadTile<count.value, kDim>(to, from, keys, headDim, t.vectors,
                                EvenRows<kDim>{from + origin + int64_t{first} * stride, stride});
  };
  const std::integral_constant<int, kOwn> ownCount;
  const std::integral_constant<int, kOther> otherCount;
  const auto loadFirst = [&](int first) {
    bf16* to = s.first[first / kOther % 2];
    if constexpr (kOwnsKeys) {
      loadQueries(otherCount, to, t.q, first, others - first);
    } else {
      loadKeys(otherCount, to, t.k, first, others - first);
    }
    cpAsyncCommit();
  };
  const auto loadStatistics = [&](int first, int rows) {
    if (tid >= Tile::kQueries) return;
    const int64_t row = tid < rows ? q.headRow(first + tid) : 0;
    cpAsync4(s.lse + tid, t.lse + row, tid < rows);
    cpAsync4(s.deltas + tid, t.deltas + row, tid < rows);
  };
  const auto loadSecond = [&](int first) {
    if constexpr (kOwnsKeys) {
      loadQueries(otherCount, s.second, t.dy, first, others - first);
      loadStatistics(first, others - first);
      if ((first < maskedBelow || first + kOther > maskedAbove) && tid < kOther) {
        s.rows.seen[tid] = first + tid < others ? g.seen(segment, q.query(first + tid)) - firstOwn : 0;
      }
    } else {
      loadKeys(otherCount, s.second, t.v, first, others - first);
    }
    cpAsyncCommit();
  };
  if constexpr (kOwnsKeys) {
    loadKeys(ownCount, s.own[0], t.k, 0, own);
    loadKeys(ownCount, s.own[1], t.v, 0, own);
  } else {
    loadQueries(ownCount, s.own[0], t.q, 0, own);
    loadQueries(ownCount, s.own[1], t.dy, 0, own);
    loadStatistics(0, own);
  }
  cpAsyncCommit();
  if (begin < others) {
    loadFirst(begin);
    loadSecond(begin);
  }
  // Calls body(i, j, e, value of the query) for the lane's elements [i][j][e] of a product of own and other rows.
  const auto forScores = [&](const float* ofQueries, const auto& body) {
    UNROLL
    for (int j = 0; j < kOther / 8; ++j) {
      UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        UNROLL
        for (int e = 0; e < 4; ++e) {
          body(i, j, e, ofQueries[kOwnsKeys ? sumColumn(j) + e % 2 : warpRow + sumRow(i, e / 2)]);
        }
      }
    }
  };
  const float factor = t.softcap > 0.0f ? kLog2E : t.scale * kLog2E;
  float sum[kBlocks][kColumns][4] = {};                           // dq or dk
  float dv[kOwnsKeys ? kBlocks : 1][kOwnsKeys ? kColumns : 1][4] = {};
  for (int first = begin; first < others; first += kOther) {
    const int next = first + kOther;
    const bf16* firstTile = s.first[first / kOther % 2];
    cpAsyncWait<0>();
    syncThreads();  // all tiles are complete, the next of `first` has been read
    if (next < others) loadFirst(next);
    float weight[kBlocks][kOther / 8][4], ds[kBlocks][kOther / 8][4];
    const auto ownRows = [&](int side) {
      return [&s, warpRow, side](uint32_t(&a)[kBlocks][4], int feature) {
        loadA<kDim>(a, s.own[side] + warpRow * kPitch<kDim>, feature);
      };
    };
    multiplyRows<kDim>(weight, ownRows(0), firstTile);
    if (t.softcap > 0.0f) {  // products become scores
      forScores(s.lse, [&](int i, int j, int e, float) {
        weight[i][j][e] = t.softcap * tanhOf(weight[i][j][e] * (t.scale / t.softcap));
      });
    }
    forScores(s.lse, [&](int i, int j, int e, float lse) {
      weight[i][j][e] = fastExp2(fmaf(weight[i][j][e], factor, -lse * kLog2E));
    });
    if (first < maskedBelow || next > maskedAbove) {
      UNROLL
      for (int j = 0; j < kOther / 8; ++j) {
        UNROLL
        for (int i = 0; i < kBlocks; ++i) {
          UNROLL
          for (int e = 0; e < 4; ++e) {
            const int row = warpRow + sumRow(i, e / 2), column = sumColumn(j) + e % 2;
            const int seen = s.rows.seen[kOwnsKeys ? column : row], key = kOwnsKeys ? row : first + column;
            if (!g.inSight(seen, key)) weight[i][j][e] = 0.0f;
          }
        }
      }
    }
    multiplyRows<kDim>(ds, ownRows(1), s.second);
    forScores(s.deltas, [&](int i, int j, int e, float delta) { ds[i][j][e] = weight[i][j][e] * (ds[i][j][e] - delta); });
    if (t.softcap > 0.0f) {
      forScores(s.lse, [&](int i, int j, int e, float lse) {  // the capped score is the logarithm of weight e^lse
        const float score = fmaf(fmaxf(fastLog2(weight[i][j][e]), -1000.0f), kLn2, lse), tanhOf = score / t.softcap;
        ds[i][j][e] *= fmaf(-tanhOf, tanhOf, 1.0f);
      });
    }
    uint32_t weightPairs[kBlocks][kOther / 8][2], dsPairs[kBlocks][kOther / 8][2];
    UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      UNROLL
      for (int j = 0; j < kOther / 8; ++j) {
        UNROLL
        for (int h = 0; h < 2; ++h) {
          weightPairs[i][j][h] = packBf16(weight[i][j][2 * h], weight[i][j][2 * h + 1]);
          dsPairs[i][j][h] = packBf16(ds[i][j][2 * h], ds[i][j][2 * h + 1]);
        }
      }
    }
    const int feature = part * kColumns * 8;
    if constexpr (kOwnsKeys) addWeightedRows<kDim>(dv, weightPairs, s.second + feature);
    syncThreads();  // second, lse, deltas and seen have been read
    if (next < others) loadSecond(next);
    addWeightedRows<kDim>(sum, dsPairs, firstTile + feature);
  }
  cpAsyncWait<0>();
  syncThreads();  // the block's own rows are complete even where nobody sees them
  UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int e = 0; e < 4; ++e) sum[i][j][e] *= t.scale;
    }
  }
  const int feature = part * kColumns * 8;
  if constexpr (kOwnsKeys) {
    const auto keyIndex = [&](int key) {
      return key < own ? int64_t{g.first(segment) + firstOwn + key} * t.h.kvHeads + kvHead : -1;
    };
    storeRows<kDim>(t.dk, sum, s.own[0], warpRow, feature, headDim, t.vectors, keyIndex);
    storeRows<kDim>(t.dv, dv, s.own[1], warpRow, feature, headDim, t.vectors, keyIndex);
  } else {
    storeRows<kDim>(t.dq, sum, s.own[0], warpRow, feature, headDim, t.vectors,
                    [&](int row) { return s.rows.index[row]; });
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    gradientMmaKernel(const __grid_constant__ AttentionGradient<bf16> t) {
  SHARED_MEMORY(GradShared<Tile>, s);
  if (t.state.faulted()) return;
  const AttentionPlan plan = ldGlobal(t.plan);
  const int64_t items = int64_t{Tile::kOwnsKeys ? plan.keyTiles : plan.tiles} * t.h.kvHeads * Tile::kParts;
  // Under causal attention the first keys are seen by the most rows, and the last rows see the most keys.
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    gradientTile<Tile>(t, s, Tile::kOwnsKeys ? i : items - 1 - i);
    syncThreads();  // all of shared memory has been read
  }
}

constexpr int kDeltaThreads = 256;

// A warp has a head of a row.
__global__ void __launch_bounds__(kDeltaThreads, 4)
    deltaKernel(Operand dy, Operand y, AttentionHeads h, float* deltas, StepState state) {
  if (state.faulted()) return;
  const int64_t headRows = int64_t{y.size(0)} * h.heads;
  const bool vectors = h.headDim % 4 == 0 && startsAligned(dy, y);
  constexpr int kWarps = kDeltaThreads / 32;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warpId(); row < headRows; row += int64_t{gridDim.x} * kWarps) {
    float sum = 0.0f;
    forColumns(h.headDim, vectors, laneId(), 32, [&]<typename V>(int c) {
      sum += sumOf(each([](float a, float b) { return a * b; }, load<V>(dy, row * h.headDim + c),
                        load<V>(y, row * h.headDim + c)));
    });
    sum = warpTotal(sum);
    if (laneId() == 0) stGlobal(deltas + row, sum);
  }
}

}  // namespace

void attendGradMma(const Launch& launch, Planning planning, const AttentionGradient<bf16>& gradient) {
  const Operand &dy = launch.in[0], &y = launch.in[4];
  const AttentionHeads& h = gradient.h;
  forHeadDim(h.headDim, [&](auto dim) {
    using Rows = GradTile<dim.value, false>;
    using Keys = GradTile<dim.value, true>;
    planning.rows = Rows::kOwn;
    planning.keys = Keys::kOwn;
    launchPlan(launch, planning);
    LAUNCH(deltaKernel, launch.blocks(y.bound[0] * h.heads, kDeltaThreads / 32), kDeltaThreads, 0, launch.stream, dy, y,
           h, gradient.deltas, launch.state);
    const Operand& offsets = planning.segments.offsets;
    const int64_t rowItems = mostTiles(offsets, planning.q.bound[0] * h.group, Rows::kOwn) * h.kvHeads;
    LAUNCH(gradientMmaKernel<Rows>, launch.blocks(rowItems, 1), kAttentionThreads, sizeof(GradShared<Rows>),
           launch.stream, gradient);
    const int64_t keyItems = mostTiles(offsets, planning.k.bound[0], Keys::kOwn) * h.kvHeads * Keys::kParts;
    LAUNCH(gradientMmaKernel<Keys>, launch.blocks(keyItems, 1), kAttentionThreads, sizeof(GradShared<Keys>),
           launch.stream, gradient);
  });
}

}  // namespace elastiform::ELASTIFORM_DEVICE
