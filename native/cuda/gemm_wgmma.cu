// Products on tensor cores by wgmma, on sm_90a: bf16 factors, f32 sums. One block to a multiprocessor walks over tiles
// of C. A warpgroup fills a ring of stages in shared memory, running ahead into the next tile while two others, of 64
// rows each, empty it and take C through the epilogue. Two neighbouring blocks are a cluster, and may share what they
// load of B.
#include "cuda/epilogue.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kPair = 2;                          // blocks of a cluster
constexpr int kWarps = 2 * kGroup / 32;           // that multiply
constexpr int kRows = kProductRows;               // of a tile
constexpr int kWide = 256, kNarrow = 128;         // columns of a tile, those of both weights counted
constexpr int kDepth = 64;                        // of k in a stage: the 128 bytes of the swizzle
constexpr int kBox = 64;                          // rows (along k) or columns (across k) of a weight in one TMA copy
constexpr int kWarpRows = 16, kWarpColumns = 64;  // of C that a warp takes through shared memory at a time

// A stage is kRows rows of A, then kWidth rows of B or, across k, kWidth / kBox boxes of kDepth rows.
template <int kWidth>
constexpr int kStageElements = (kRows + kWidth) * kDepth;
constexpr int kRingElements = 4 * kStageElements<kWide>;
template <int kWidth>
constexpr int kStages = kRingElements / kStageElements<kWidth>;

struct WgmmaShared {
  alignas(1024) bf16 ring[kRingElements];
  alignas(16) float c[kWarps][kWarpRows * kWarpColumns];
  Mbarrier full[kStages<kNarrow>], empty[kStages<kNarrow>];
};

template <int kParts>
struct Weights {
  TensorMap part[kParts];
  int depth;  // of k that the maps cover; beyond it TMA reads zeros
};

struct Sizes {
  int m, n, k;
  int steps;  // through k and the columns of patches
};

// How a product is cut: into tiles for blocks, or into tiles one above the other for pairs of them, of which each block
// loads half of B for both.
struct Cut {
  Sizes size;
  bool wide, paired;
};

// Where one side, the producer or a consumer, is in the ring.
template <int kWidth>
struct Ring {
  WgmmaShared& s;
  int stage = 0;
  uint32_t round = 0;  // of the ring, its parity

  DEVICE explicit Ring(WgmmaShared& s) : s(s) {}
  DEVICE bf16* a() const { return s.ring + stage * kStageElements<kWidth>; }
  DEVICE bf16* b() const { return a() + kRows * kDepth; }
  DEVICE void advance() {
    if (++stage < kStages<kWidth>) return;
    stage = 0;
    round ^= 1;
  }
};

// Calls body(m, n) for the block's tiles. A pair has as many for each block, of which the last may lie below C.
template <int kParts, int kWidth, typename Body>
DEVICE void forTiles(const Cut& cut, const Body& body) {
  constexpr int kColumns = kWidth / kParts;
  const int blocks = cut.paired ? kPair : 1, rows = blocks * kRows, row = cut.paired ? clusterRank() * kRows : 0;
  const int tilesM = (cut.size.m + rows - 1) / rows, tilesN = (cut.size.n + kColumns - 1) / kColumns;
  for (int tile = blockIdx.x / blocks; tile < tilesM * tilesN; tile += gridDim.x / blocks) {
    const TilePlace place(tile, tilesM, tilesN, rows, kColumns, 16 / blocks);
    body(place.m + row, place.n);
  }
}

// `rows` rows of a stage in pieces of eight elements; of(row, piece, from, count) says where a piece comes from.
template <typename Of>
DEVICE void copyRows(bf16* to, int rows, const void* any, const Of& of) {
  const int piece = threadIdx.x % 8;
  for (int row = threadIdx.x / 8; row < rows; row += kGroup / 8) {
    const bf16* from;
    int count;
    of(row, piece, from, count);
    copyEight(to + swizzle128(row, piece) / 2, from, count, any);
  }
}

// The producer's steps through the columns of a patch to one part of the tile, 0 in the other.
template <int kParts, int kWidth>
DEVICE void producePatch(const Patch& patch, int part, Ring<kWidth>& ring, WgmmaShared& s, const Sizes& size, int tileM,
                         int tileN) {
  constexpr int kColumns = kWidth / kParts;
  if (!patch) return;
  const int P = patch.p.count();
  const bf16 *u = static_cast<const bf16*>(patch.u.data), *b = static_cast<const bf16*>(patch.b.data);
  const int strideB = patch.b.stride ? patch.b.stride : P;
  for (int k = 0; k < P; k += kDepth, ring.advance()) {
    mbarrierWait(s.empty[ring.stage], ring.round ^ 1);
    copyRows(ring.a(), kRows, u, [&](int row, int piece, const bf16*& from, int& count) {
      const int m = tileM + row, at = k + piece * 8;
      from = u + int64_t{m} * P + at;
      count = m < size.m ? P - at : 0;
    });
    copyRows(ring.b(), kWidth, u, [&](int row, int piece, const bf16*& from, int& count) {
      const int n = tileN + row % kColumns, at = k + piece * 8;
      from = b + int64_t{n} * strideB + at;
      count = row / kColumns == part && n < size.n ? P - at : 0;
    });
    cpAsyncCommit();
    cpAsyncWait<0>();
    fenceProxyAsync();
    mbarrierArrive(s.full[ring.stage]);
  }
}

// A thread for each row of the tile: a line of what the epilogue adds to, `step` steps before the main loop ends. All lines
// are then on their way when the epilogue reads them.
template <int kColumns>
DEVICE void prefetchAdded(const Product& p, int step, int m, int n, const Sizes& size) {
  static_assert(kGroup == kRows);
  if (!p.add) return;
  const int bytes = p.add.dtype == DType::F32 ? 4 : 2, line = 128 / bytes;
  const int row = m + static_cast<int>(threadIdx.x), column = n + step * line;
  if (step * line >= kColumns || row >= size.m || column >= size.n) return;
  const int64_t at = int64_t{p.rows ? ldGlobal(p.rows + row) : p.first + row} * size.n + column;
  prefetchGlobal(static_cast<const uint8_t*>(p.add.data) + at * bytes);
}

// The producer. Rows of A are gathered, and may be as long as a dim that is set at run: they come by cp.async. Weights
// are what the recording knows: they come by TMA, for which one thread is enough.
template <Layout kLayoutB, int kParts, int kWidth>
DEVICE void produce(const Product& p, const Weights<kParts>& weights, WgmmaShared& s, const Cut& cut) {
  constexpr int kColumns = kWidth / kParts, kRowsAtOnce = kGroup / 8, kPasses = kRows / kRowsAtOnce;
  constexpr bool kAlong = kLayoutB == Layout::AlongK;
  const int tid = threadIdx.x, piece = tid % 8, M = cut.size.m, N = cut.size.n, K = cut.size.k;
  const bf16* a = static_cast<const bf16*>(p.a.data);
  const int64_t strideA = p.a.stride ? p.a.stride : K;
  const bool aligned = strideA % 8 == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0;
  Ring<kWidth> ring(s);
  forTiles<kParts, kWidth>(cut, [&](int tileM, int tileN) {
    int rows[kPasses];  // of A in memory, -1 outside
    UNROLL
    for (int i = 0; i < kPasses; ++i) {
      const int m = tileM + tid / 8 + i * kRowsAtOnce;
      rows[i] = m < M ? p.a.row(m) : -1;
    }
    for (int k = 0; k < K; k += kDepth, ring.advance()) {
      Mbarrier& full = s.full[ring.stage];
      mbarrierWait(s.empty[ring.stage], ring.round ^ 1);
      // The last step of a prefix of K must not see the weights beyond, which need not be finite.
      const bool byTma = k + kDepth <= K || K == weights.depth;
      const bool wholePieces = aligned && (k + kDepth <= K || K % 8 == 0);
      if (byTma && tid == 0) {
        mbarrierExpectTx(full, kWidth * kDepth * sizeof(bf16));
        UNROLL
        for (int box = 0; box < kWidth; box += kBox) {
          const int n = tileN + box % kColumns, x = kAlong ? k : n, y = kAlong ? n : k;
          if (!cut.paired) {
            tmaLoad2d(ring.b() + box * kDepth, weights.part[box / kColumns], full, x, y);
          } else if (box / (kWidth / kPair) == clusterRank()) {
            tmaLoad2dMulticast(ring.b() + box * kDepth, weights.part[box / kColumns], full, x, y, (1 << kPair) - 1);
          }
        }
      }
      if (!byTma) {
        copyRows(ring.b(), kWidth, a, [&](int row, int piece, const bf16*& from, int& count) {
          const Matrix& b = p.b[kAlong ? row / kColumns : 0];
          const int n = tileN + (kAlong ? row % kColumns : row / kDepth * kBox + piece * 8);
          const int at = k + (kAlong ? piece * 8 : row % kDepth);
          from = static_cast<const bf16*>(b.data) + (kAlong ? int64_t{n} * b.stride + at : int64_t{at} * b.stride + n);
          count = n < N && at < K ? (kAlong ? K - at : N - n) : 0;
        });
      }
      if (wholePieces) {
        const bool inside = k + piece * 8 < K;
        const bf16* from = a + k + piece * 8;
        UNROLL
        for (int i = 0; i < kPasses; ++i) {
          const bool present = inside && rows[i] >= 0;
          cpAsync16(ring.a() + swizzle128(tid / 8 + i * kRowsAtOnce, piece) / 2,
                    present ? from + rows[i] * strideA : a, present);
        }
      } else {
        copyRows(ring.a(), kRows, a, [&](int row, int piece, const bf16*& from, int& count) {
          const int m = tileM + row, at = k + piece * 8;
          from = m < M ? a + p.a.row(m) * strideA + at : a;
          count = m < M ? K - at : 0;
        });
      }
      if (byTma && wholePieces) {
        cpAsyncArrive(full);
      } else {  // some elements were written one by one
        cpAsyncCommit();
        cpAsyncWait<0>();
        fenceProxyAsync();
        mbarrierArrive(full);
      }
      if constexpr (kParts == 1) prefetchAdded<kColumns>(p, (K - 1 - k) / kDepth, tileM, tileN, cut.size);
    }
    if constexpr (kAlong) {
      for (int part = 0; part < kParts; ++part) producePatch<kParts>(p.patch[part], part, ring, s, cut.size, tileM, tileN);
    }
  });
}

// Where C's element lies in a warp's share of shared memory: permuted so that neither the lanes that write eight rows
// of pairs nor those that read fours of a row meet in a bank.
DEVICE int placeInC(int row, int column) { return row * kWarpColumns + (column ^ (row & 3) * 8); }

// The warp's rows, from m on, of a tile that begins at column n, through the epilogue.
template <int kParts, int kColumns, bool kDots>
DEVICE void finishRows(const Product& p, const float (&sum)[kParts][kColumns / 2], float* c, int m, int n,
                       const Sizes& size) {
  constexpr int kTogether = kWarpColumns / kParts, kFours = kTogether / 4;
  const int lane = laneId();
  for (int first = 0; first < kColumns; first += kTogether) {
    UNROLL  // a loop over constants, so that the accumulators stay in registers and the epilogue is there once
    for (int own = 0; own < kColumns; own += kTogether) {
      if (own != first) continue;
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        UNROLL
        for (int column = 0; column < kTogether; column += 8) {
          UNROLL
          for (int half = 0; half < 2; ++half) {
            const float* pair = &sum[part][(own + column) / 2 + half * 2];
            stShared(&c[placeInC(half * 8 + lane / 4, part * kTogether + column + lane % 4 * 2)],
                     float2{pair[0], pair[1]});
          }
        }
      }
    }
    syncWarp();  // c is complete
    for (int i = lane; i < kWarpRows * kFours; i += 32) {
      const int row = i / kFours, column = i % kFours * 4;
      const bool inside = m + row < size.m && n + first + column < size.n;
      float dot = 0;
      if (inside) {
        float y[kParts][4];
        UNROLL
        for (int part = 0; part < kParts; ++part) {
          spread(ldShared<float4>(&c[placeInC(row, part * kTogether + column)]), y[part]);
        }
        dot = finishFour<kParts, kDots>(p, y, m + row, n + first + column, size.n);
      }
      if constexpr (kDots) finishDot(p, dot, m + row, n + first + column, size.n, inside);
    }
    syncWarp();  // c has been read
  }
}

template <Layout kLayoutB, int kParts, int kWidth>
DEVICE void consume(const Product& p, WgmmaShared& s, const Cut& cut) {
  constexpr int kColumns = kWidth / kParts;
  constexpr bool kAlong = kLayoutB == Layout::AlongK;
  constexpr Major kMajor = kAlong ? Major::K : Major::MN;
  const int lane = laneId(), warp = warpId() - kGroup / 32;
  Ring<kWidth> ring(s);
  forTiles<kParts, kWidth>(cut, [&](int tileM, int tileN) {
    float sum[kParts][kColumns / 2] = {};
    int before = 0;  // the stage of the previous step
    const auto release = [&] {  // to both blocks that write it
      if (cut.paired) {
        if (lane < kPair) mbarrierArriveAt(s.empty[before], lane);
      } else if (lane == 0) {
        mbarrierArrive(s.empty[before]);
      }
    };
    for (int step = 0; step < cut.size.steps; ++step, ring.advance()) {
      mbarrierWait(s.full[ring.stage], ring.round);
      fenceProxyAsync();  // rows that cp.async wrote, for wgmma
      const uint64_t a = descriptorK(ring.a() + warp / 4 * 64 * kDepth);
      wgmmaFence();
      UNROLL
      for (int i = 0; i < kDepth; i += 16) {
        UNROLL
        for (int part = 0; part < kParts; ++part) {
          const bf16* b = ring.b() + part * kColumns * kDepth;
          // 16 more of k: 32 bytes within the rows of a K-major tile, 16 rows of an MN-major one.
          wgmmaBf16<kMajor>(sum[part], descriptorAdvance(a, i * 2),
                            kAlong ? descriptorAdvance(descriptorK(b), i * 2)
                                   : descriptorMN(b + i * kBox, kBox * kDepth * sizeof(bf16)),
                            true);
        }
      }
      wgmmaCommit();
      if constexpr (kParts == 1) {
        wgmmaWait<1>(sum[0]);
      } else {
        wgmmaWait<1>(sum[0], sum[1]);
      }
      if (step > 0) release();
      before = ring.stage;
    }
    if constexpr (kParts == 1) {
      wgmmaWait<0>(sum[0]);
    } else {
      wgmmaWait<0>(sum[0], sum[1]);
    }
    if (cut.size.steps > 0) release();
    finishRows<kParts, kColumns, kHasDots<Layout::AlongK, kLayoutB>>(p, sum, s.c[warp], tileM + warp * kWarpRows, tileN, cut.size);
  });
}

// The fastest way to cut a product. A block's step costs the rows that it loads, of A and its share of B, and the
// columns of C, since loading one and multiplying by one take about as long; and blocks work in rounds.
template <int kParts>
DEVICE Cut cutOf(const Sizes& size) {
  Cut best{size, false, false};
  int least = INT32_MAX;
  UNROLL
  for (int blocks = kPair; blocks > 0; --blocks) {
    UNROLL
    for (int width = kWide; width >= kNarrow; width -= kNarrow) {
      const int rows = blocks * kRows, columns = width / kParts, atOnce = static_cast<int>(gridDim.x) / blocks;
      const int tiles = (size.m + rows - 1) / rows * ((size.n + columns - 1) / columns);
      const int cost = (tiles + atOnce - 1) / atOnce * (kRows + width / blocks + width);
      if (cost >= least) continue;
      least = cost;
      best.wide = width == kWide;
      best.paired = blocks == kPair;
    }
  }
  return best;
}

template <Layout kLayoutB, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    wgmmaKernel(const __grid_constant__ Product p, const __grid_constant__ Weights<kParts> weights) {
  SHARED_MEMORY(WgmmaShared, s);
  if (p.state.faulted()) return;
  Sizes size{shflIdx(p.m.count(), 0), shflIdx(p.n.count(), 0), shflIdx(p.k.count(), 0), 0};
  const auto steps = [](int k) { return (k + kDepth - 1) / kDepth; };
  size.steps = steps(size.k);
  for (const Patch& patch : p.patch) size.steps += patch ? steps(shflIdx(patch.p.count(), 0)) : 0;
  if (!begin<kParts>(p, size.m, size.n, size.k)) return;
  const Cut cut = cutOf<kParts>(size);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<kNarrow>; ++i) {
      mbarrierInit(s.full[i], kGroup);  // the producers; one of them announces TMA's bytes as well
      mbarrierInit(s.empty[i], cut.paired ? kPair * kWarps : kWarps);
    }
    fenceMbarrierInit();
  }
  clusterSync();  // the barriers are there, in both blocks
  if (threadIdx.x < kGroup) {
    registersDecrease<72>();
    if (cut.wide) {
      produce<kLayoutB, kParts, kWide>(p, weights, s, cut);
    } else {
      produce<kLayoutB, kParts, kNarrow>(p, weights, s, cut);
    }
  } else {
    registersIncrease<216>();
    if (cut.wide) {
      consume<kLayoutB, kParts, kWide>(p, s, cut);
    } else {
      consume<kLayoutB, kParts, kNarrow>(p, s, cut);
    }
  }
  clusterSync();  // the other block reaches for this one's stages and barriers no more
}

}  // namespace

template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyWgmma(const Launch& launch, const Product& p) {
  static_assert(kLayoutA == Layout::AlongK);
  constexpr bool kAlong = kLayoutB == Layout::AlongK;
  const int atOnce = clustersAtOnce(wgmmaKernel<kLayoutB, kParts>, kPair, kThreads, sizeof(WgmmaShared));
  if (atOnce == 0) {  // a part of a GPU (MIG) may have no two multiprocessors that are neighbours
    multiplyMma<kLayoutA, kLayoutB, kParts>(launch, p);
    return;
  }
  const int64_t M = p.m.boundCount(), N = p.n.boundCount(), K = p.k.boundCount();
  Weights<kParts> weights{};
  weights.depth = static_cast<int>(K);
  for (int i = 0; i < kParts; ++i) {
    TensorMapDesc desc;
    desc.base = p.b[i].data;
    desc.columns = static_cast<uint64_t>(kAlong ? K : N);
    desc.rows = static_cast<uint64_t>(kAlong ? N : K);
    desc.rowBytes = static_cast<uint64_t>(p.b[i].stride) * sizeof(bf16);
    desc.boxColumns = kAlong ? kDepth : kBox;
    desc.boxRows = kAlong ? kBox : kDepth;
    weights.part[i] = encodeTensorMap(desc);
  }
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  const int64_t most = tiles(tiles(M, kRows) * tiles(N * kParts, kNarrow), kPair);
  const int64_t clusters = std::min<int64_t>(most, atOnce);
  LAUNCH_CLUSTERS((wgmmaKernel<kLayoutB, kParts>), kPair, static_cast<unsigned>(clusters * kPair), kThreads,
                  sizeof(WgmmaShared), launch.stream, p, weights);
}

template void multiplyWgmma<Layout::AlongK, Layout::AlongK, 1>(const Launch&, const Product&);
template void multiplyWgmma<Layout::AlongK, Layout::AlongK, 2>(const Launch&, const Product&);
template void multiplyWgmma<Layout::AlongK, Layout::AcrossK, 1>(const Launch&, const Product&);

}  // namespace elastiform::ELASTIFORM_DEVICE
