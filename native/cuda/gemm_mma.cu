// Products on tensor cores by mma.sync: bf16 factors, f32 sums. What every GPU from sm_80 on runs.
#include "cuda/epilogue.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;  // warps of C's tile: 2 down, 4 across
constexpr int kLargeTile = kProductRows, kSmallTile = 64;
constexpr int kDepth = 32;  // of k in a stage
constexpr int kStages = 4;

template <int kSpan>
struct Stage {
  bf16 a[kSpan * kDepth], b[kSpan * kDepth];
};

// Eight neighbouring lanes store pairs of eight rows: a row is eight banks on.
template <int kSpan>
constexpr int kPitch = kSpan + 8;

template <int kSpan>
union TileShared {
  Stage<kSpan> stage[kStages];
  float c[kSpan * kPitch<kSpan>];
};

union MmaShared {
  TileShared<kLargeTile> large;
  TileShared<kSmallTile> small;
};

// One side of a block's tile, as it lies in memory: rows along k of kDepth elements, or rows across k of kSpan. Pieces of
// eight elements are permuted within rows so that ldmatrix reads from all banks. With two parts the first half of the
// tile comes from x[0], the second from x[1].
template <Layout kLayout, int kSpan, int kParts>
struct Side {
  static constexpr bool kAlong = kLayout == Layout::AlongK;
  static_assert(kParts == 1 || kAlong);
  static constexpr int kPieces = (kAlong ? kDepth : kSpan) / 8;  // of a row
  static constexpr int kRowsAtOnce = kThreads / kPieces, kPasses = (kAlong ? kSpan : kDepth) / kRowsAtOnce;

  const Matrix* x;
  int rowLength;                          // where x has no stride
  const bf16* row[kAlong ? kPasses : 1];  // rows of the tile in memory, null outside
  int first, width;                       // across k: columns of the tile, and of the matrix

  DEVICE Side(const Matrix* x, int rowLength) : x(x), rowLength(rowLength) {}
  DEVICE const bf16* rowIn(const Matrix& from, int i) const {
    return static_cast<const bf16*>(from.data) + int64_t{from.row(i)} * (from.stride ? from.stride : rowLength);
  }
  DEVICE static int rowOf(int i) { return static_cast<int>(threadIdx.x) / kPieces + i * kRowsAtOnce; }
  DEVICE static int pieceOf() { return static_cast<int>(threadIdx.x) % kPieces; }
  // Where piece `piece` of a row lies in the tile. Two rows along k share the 128 bytes of all banks.
  DEVICE static int place(int row, int piece) {
    return (row * kPieces + (piece ^ (kAlong ? row >> 1 & 3 : row & 7))) * 8;
  }

  // Starts the tile of rows (along k) or columns (across k) from `tile` of `count` of C's side.
  DEVICE void start(int tile, int count) {
    first = tile;
    width = count;
    if constexpr (kAlong) {
      constexpr int kPart = kSpan / kParts;
      UNROLL
      for (int i = 0; i < kPasses; ++i) {
        const int r = rowOf(i), at = tile + r % kPart;
        row[i] = at < count ? rowIn(x[r / kPart], at) : nullptr;
      }
    }
  }

  DEVICE void load(int step, int K, bf16* tile) const {
    UNROLL
    for (int i = 0; i < kPasses; ++i) {
      bf16* to = tile + place(rowOf(i), pieceOf());
      if constexpr (kAlong) {
        const int k = step * kDepth + pieceOf() * 8;
        copyEight(to, row[i] + k, row[i] ? K - k : 0, x->data);
      } else {
        const int k = step * kDepth + rowOf(i), column = first + pieceOf() * 8;
        const bool inside = k < K && column < width;
        copyEight(to, inside ? rowIn(*x, k) + column : nullptr, inside ? width - column : 0, x->data);
      }
    }
  }

  // Rows [row, row + 16) and 16 steps of k from `k` as the a of mmaBf16.
  DEVICE static void fragmentA(uint32_t (&a)[4], const bf16* tile, int row, int k) {
    const int lane = laneId();
    if constexpr (kAlong) {
      ldmatrix(a, tile + place(row + lane % 16, k / 8 + lane / 16));
    } else {
      ldmatrixTrans(a, tile + place(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
    }
  }
  // Rows of B [row, row + 16) as the b of two mmaBf16.
  DEVICE static void fragmentB(uint32_t (&b)[4], const bf16* tile, int row, int k) {
    const int lane = laneId();
    if constexpr (kAlong) {
      ldmatrix(b, tile + place(row + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
    } else {
      ldmatrixTrans(b, tile + place(k + lane % 16, row / 8 + lane / 16));
    }
  }
};

// One stage: sum[i][j] += rows [row + 16 i, ...) of A times rows [column + 8 j, ...) of B.
template <typename SideA, typename SideB, int kSpan, int kA, int kB>
DEVICE void multiplyStage(const Stage<kSpan>& stage, int row, int column, float (&sum)[kA][kB][4]) {
  UNROLL
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fragmentA[kA][4], fragmentB[kB / 2][4];
    UNROLL
    for (int i = 0; i < kA; ++i) SideA::fragmentA(fragmentA[i], stage.a, row + i * 16, k);
    UNROLL
    for (int j = 0; j < kB / 2; ++j) SideB::fragmentB(fragmentB[j], stage.b, column + j * 16, k);
    UNROLL
    for (int i = 0; i < kA; ++i) {
      UNROLL
      for (int j = 0; j < kB; ++j) {
        const uint32_t half[2] = {fragmentB[j / 2][j % 2 * 2], fragmentB[j / 2][j % 2 * 2 + 1]};
        mmaBf16(sum[i][j], fragmentA[i], half);
      }
    }
  }
}

// The columns of a patch to one part of the tile at (m, n), 0 in the other; they lie in all stages at once.
template <int kParts, int kSpan, int kA, int kB>
DEVICE void multiplyPatch(const Patch& patch, int part, TileShared<kSpan>& s, int m, int n, int M, int N, int row,
                          int column, float (&sum)[kA][kB][4]) {
  using Along = Side<Layout::AlongK, kSpan, 1>;
  constexpr int kColumns = kSpan / kParts, kPieces = Along::kPieces, kStagePieces = kSpan * kPieces;
  if (!patch) return;
  const bf16 *u = static_cast<const bf16*>(patch.u.data), *b = static_cast<const bf16*>(patch.b.data);
  const int P = shflIdx(patch.p.count(), 0), strideB = patch.b.stride ? patch.b.stride : P;
  for (int first = 0; first < P; first += kStages * kDepth) {
    const int steps = (min(P - first, kStages * kDepth) + kDepth - 1) / kDepth;
    for (int i = threadIdx.x; i < steps * kStagePieces; i += kThreads) {
      const int step = i / kStagePieces, r = i / kPieces % kSpan, piece = i % kPieces;
      const int k = first + step * kDepth + piece * 8, c = n + r % kColumns;
      const int place = Along::place(r, piece);
      copyEight(s.stage[step].a + place, u + int64_t{m + r} * P + k, m + r < M ? P - k : 0, u);
      copyEight(s.stage[step].b + place, b + int64_t{c} * strideB + k, c < N && r / kColumns == part ? P - k : 0, u);
    }
    cpAsyncCommit();
    cpAsyncWait<0>();
    syncThreads();  // the stages are complete
    ROLLED
    for (int step = 0; step < steps; ++step) multiplyStage<Along, Along>(s.stage[step], row, column, sum);
    syncThreads();  // the stages of the patch have been read
  }
}

template <Layout kLayoutA, Layout kLayoutB, int kParts, bool kPatched, int kSpan>
DEVICE void multiplyTiles(const Product& p, TileShared<kSpan>& s, int M, int N, int K) {
  using SideA = Side<kLayoutA, kSpan, 1>;
  using SideB = Side<kLayoutB, kSpan, kParts>;
  constexpr int kColumns = kSpan / kParts;
  constexpr int kWarpRows = kSpan / 2, kWarpColumns = kSpan / 4, kA = kWarpRows / 16, kB = kWarpColumns / 8;
  const int lane = laneId(), warp = warpId();
  const int warpRow = warp / 4 * kWarpRows, warpColumn = warp % 4 * kWarpColumns;
  const int tilesM = (M + kSpan - 1) / kSpan, tilesN = (N + kColumns - 1) / kColumns;
  const int steps = (K + kDepth - 1) / kDepth;
  SideA a(&p.a, kLayoutA == Layout::AlongK ? K : M);
  SideB b(p.b, kLayoutB == Layout::AlongK ? K : N);

  for (int tile = blockIdx.x; tile < tilesM * tilesN; tile += gridDim.x) {
    const TilePlace place(tile, tilesM, tilesN, kSpan, kColumns);
    a.start(place.m, M);
    b.start(place.n, N);
    float sum[kA][kB][4] = {};
    for (int step = 1 - kStages; step < steps; ++step) {
      cpAsyncWait<kStages - 2>();
      syncThreads();  // this step's stage is complete, and the one before has been read
      if (step + kStages - 1 < steps) {
        auto& next = s.stage[(step + kStages - 1) % kStages];
        a.load(step + kStages - 1, K, next.a);
        b.load(step + kStages - 1, K, next.b);
      }
      cpAsyncCommit();
      if (step < 0) continue;
      multiplyStage<SideA, SideB>(s.stage[step % kStages], warpRow, warpColumn, sum);
    }
    cpAsyncWait<0>();
    syncThreads();  // the stages have been read
    if constexpr (kPatched) {
      for (int i = 0; i < kParts; ++i) {
        multiplyPatch<kParts>(p.patch[i], i, s, place.m, place.n, M, N, warpRow, warpColumn, sum);
      }
    }
    UNROLL
    for (int i = 0; i < kA; ++i) {
      UNROLL
      for (int j = 0; j < kB; ++j) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = warpRow + i * 16 + half * 8 + lane / 4, column = warpColumn + j * 8 + lane % 4 * 2;
          stShared(&s.c[row * kPitch<kSpan> + column], float2{sum[i][j][half * 2], sum[i][j][half * 2 + 1]});
        }
      }
    }
    syncThreads();  // c is complete
    finishTile<kSpan, kParts, kPitch<kSpan>, kThreads, kHasDots<kLayoutA, kLayoutB>>(p, s.c, place.m, min(kSpan, M - place.m), place.n, N);
    syncThreads();  // c has been read
  }
}

// Patches are in kernels of their own: the others spend no registers on them.
template <Layout kLayoutA, Layout kLayoutB, int kParts, bool kPatched>
__global__ void __launch_bounds__(kThreads, 2) mmaKernel(const __grid_constant__ Product p) {
  SHARED_MEMORY(MmaShared, s);
  if (p.state.faulted()) return;
  const int M = shflIdx(p.m.count(), 0), N = shflIdx(p.n.count(), 0), K = shflIdx(p.k.count(), 0);
  if (!begin<kParts>(p, M, N, K)) return;
  constexpr int kColumns = kLargeTile / kParts;
  const int64_t largeTiles = int64_t{(M + kLargeTile - 1) / kLargeTile} * ((N + kColumns - 1) / kColumns);
  if (largeTiles >= p.multiprocessors) {
    multiplyTiles<kLayoutA, kLayoutB, kParts, kPatched>(p, s.large, M, N, K);
  } else {
    multiplyTiles<kLayoutA, kLayoutB, kParts, kPatched>(p, s.small, M, N, K);
  }
}

}  // namespace

template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyMma(const Launch& launch, const Product& p) {
  const auto tiles = [](int64_t size) { return (size + kSmallTile - 1) / kSmallTile; };
  const unsigned blocks = launch.blocks(tiles(p.m.boundCount()) * tiles(p.n.boundCount() * kParts), 1);
  if constexpr (kHasPatches<kLayoutA, kLayoutB>) {
    if (p.patched()) {
      LAUNCH((mmaKernel<kLayoutA, kLayoutB, kParts, true>), blocks, kThreads, sizeof(MmaShared), launch.stream, p);
      return;
    }
  }
  LAUNCH((mmaKernel<kLayoutA, kLayoutB, kParts, false>), blocks, kThreads, sizeof(MmaShared), launch.stream, p);
}

template void multiplyMma<Layout::AlongK, Layout::AlongK, 1>(const Launch&, const Product&);
template void multiplyMma<Layout::AlongK, Layout::AlongK, 2>(const Launch&, const Product&);
template void multiplyMma<Layout::AlongK, Layout::AcrossK, 1>(const Launch&, const Product&);
template void multiplyMma<Layout::AcrossK, Layout::AcrossK, 1>(const Launch&, const Product&);

}  // namespace elastiform::ELASTIFORM_DEVICE
