// Tiles of bf16 in shared memory and their products on tensor cores, for attention in the manner of FlashAttention-2
// (Dao, arXiv 2307.08691): a warp has kBlocks x 16 rows of its block's tile to itself and goes through the other tiles
// with all of the block; scores and weights stay in the registers where the tensor cores leave and want them.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/four.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// With an absolute error of about 2^-23.
DEVICE float tanhOf(float x) { return fmaf(-2.0f, fastReciprocal(1.0f + fastExp2(2.0f * kLog2E * x)), 1.0f); }

// Query rows from `first` on, of a segment whose row 0 is head 0 of the kv head's group in query `start`.
struct QueryRows {
  const AttentionHeads& h;
  int kvHead, start, first;

  DEVICE int query(int row) const { return start + h.byGroup.quotient(first + row); }
  // Row of q as [R * heads, headDim].
  DEVICE int64_t headRow(int row) const {
    const int of = h.byGroup.quotient(first + row), head = first + row - of * h.group;
    return int64_t{start + of} * h.heads + kvHead * h.group + head;
  }
};

// What a block keeps of query rows.
template <int kRows>
struct QueryInfo {
  int64_t index[kRows];  // of q's rows as [R * heads, headDim]
  int seen[kRows];       // keys

  // Of the block's own rows. Behind their end the index is -1 and the keys are those of the last. Ends with a barrier.
  DEVICE void set(const AttentionSegments& g, int segment, const QueryRows& q, int rows) {
    static_assert(kRows <= kAttentionThreads);
    const int row = threadIdx.x;
    if (row < kRows) {
      index[row] = row < rows ? q.headRow(row) : -1;
      seen[row] = g.seen(segment, q.query(min(row, rows - 1)));
    }
    syncThreads();
  }
};

// Elements between the rows of a tile: eight neighbouring rows of 16 bytes at a feature lie in different banks.
template <int kDim>
constexpr int kPitch = kDim + 8;

// Threads share the pieces of eight elements of a tile's rows: a thread has one in every kRowsAtOnce-th row.
template <int kDim>
struct TileLoad {
  static constexpr int kPieces = kDim / 8, kRowsAtOnce = kAttentionThreads / kPieces;

  DEVICE static int firstRow() { return static_cast<int>(threadIdx.x) / kPieces; }
  DEVICE static int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
};

// Rows `stride` elements apart: those of this thread one after the other, the first of them at `next`.
template <int kDim>
struct EvenRows {
  const bf16* next;
  int stride;

  // Where this thread's first piece is when row 0 is at `origin`.
  DEVICE static int64_t firstOf(int64_t origin, int stride) {
    return origin + int64_t{TileLoad<kDim>::firstRow()} * stride + TileLoad<kDim>::piece() * 8;
  }
  DEVICE const bf16* operator()(int) {
    const bf16* row = next;
    next += int64_t{TileLoad<kDim>::kRowsAtOnce} * stride;
    return row;
  }
};

// tile[row] = headDim elements, of which this thread's are at pieceAt(row), and zeros to kDim; rows from `rows` on are
// zeros. Lands at cpAsyncWait. `vectors`: rows are aligned to 16 bytes, headDim to 8 elements. `any` is a valid address.
template <int kRows, int kDim, typename PieceAt>
DEVICE void loadTile(bf16* tile, const bf16* any, int rows, int headDim, bool vectors, PieceAt pieceAt) {
  using Load = TileLoad<kDim>;
  static_assert(kRows % Load::kRowsAtOnce == 0);
  const int column = Load::piece() * 8, present = column < headDim ? rows : 0;
  if (vectors) {
    UNROLL
    for (int i = 0; i < kRows; i += Load::kRowsAtOnce) {
      const int row = Load::firstRow() + i;
      const bf16* at = pieceAt(row);
      cpAsync16(tile + row * kPitch<kDim> + column, row < present ? at : any, row < present);
    }
  } else {
    for (int row = Load::firstRow(); row < kRows; row += Load::kRowsAtOnce) {
      const bf16* at = pieceAt(row);
      const int count = row < present ? headDim - column : 0;
      stShared(tile + row * kPitch<kDim> + column, loadEight(at, count));
    }
  }
}

// 16 features from `feature` on of the rows at `rows` as the a of products.
template <int kDim, int kBlocks>
DEVICE void loadA(uint32_t (&a)[kBlocks][4], const bf16* rows, int feature) {
  const bf16* ofLane = rows + laneId() % 16 * kPitch<kDim> + laneId() / 16 * 8;
  UNROLL
  for (int i = 0; i < kBlocks; ++i) ldmatrix(a[i], ofLane + i * 16 * kPitch<kDim> + feature);
}

// sum[i][j] += a[i] times columns 8 j, ... of b, two blocks of which are in `both`.
template <int kBlocks, int kColumns>
DEVICE void multiplyPair(float (&sum)[kBlocks][kColumns][4], const uint32_t (&a)[kBlocks][4],
                         const uint32_t (&both)[4], int j) {
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t b[2] = {both[half * 2], both[half * 2 + 1]};
    UNROLL
    for (int i = 0; i < kBlocks; ++i) mmaBf16(sum[i][j + half], a[i], b);
  }
}

// sum = A B^T: A is what loadFragment(a, feature) gives, B the tile `b` of 8 kColumns rows.
template <int kDim, int kBlocks, int kColumns, typename LoadFragment>
DEVICE void multiplyRows(float (&sum)[kBlocks][kColumns][4], const LoadFragment& loadFragment, const bf16* b) {
  const bf16* ofLane = b + (laneId() / 16 * 8 + laneId() % 8) * kPitch<kDim> + laneId() / 8 % 2 * 8;
  UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
    }
  }
  UNROLL
  for (int feature = 0; feature < kDim; feature += 16) {
    uint32_t a[kBlocks][4];
    loadFragment(a, feature);
    UNROLL
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t both[4];
      ldmatrix(both, ofLane + j * 8 * kPitch<kDim> + feature);
      multiplyPair(sum, a, both, j);
    }
  }
}

// sum += W B: W is in bf16, the pairs of columns [2 h], [2 h + 1] of a product in weights[i][j][h]; B is the features at
// `b`, 8 kColumns of them, of a tile of 8 kWeights rows.
template <int kDim, int kBlocks, int kColumns, int kWeights>
DEVICE void addWeightedRows(float (&sum)[kBlocks][kColumns][4], const uint32_t (&weights)[kBlocks][kWeights][2],
                            const bf16* b) {
  const bf16* ofLane = b + laneId() % 16 * kPitch<kDim> + laneId() / 16 * 8;
  UNROLL
  for (int k = 0; k < kWeights; k += 2) {
    uint32_t a[kBlocks][4];
    UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) a[i][e] = weights[i][k + e / 2][e % 2];
    }
    UNROLL
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t both[4];
      ldmatrixTrans(both, ofLane + k * 8 * kPitch<kDim> + j * 8);
      multiplyPair(sum, a, both, j);
    }
  }
}

// The row and column of a warp's product that sum[i][j][2 h] is; sum[i][j][2 h + 1] is its right neighbour.
DEVICE int sumRow(int i, int h) { return i * 16 + h * 8 + laneId() / 4; }
DEVICE int sumColumn(int j) { return j * 8 + laneId() % 4 * 2; }

// Features from `feature` on, of the warp's rows from `row` on, to device memory through the rows' place in a tile that
// nobody else uses: rows of headDim elements at to + headDim indexOf(row), those whose index is not negative.
template <int kDim, int kBlocks, int kColumns, typename IndexOf>
DEVICE void storeRows(bf16* to, const float (&sum)[kBlocks][kColumns][4], bf16* tile, int row, int feature, int headDim,
                      bool vectors, const IndexOf& indexOf) {
  syncWarp();  // the tile has been read
  UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        bf16* at = tile + (row + sumRow(i, h)) * kPitch<kDim> + feature + sumColumn(j);
        stShared(at, packBf16(sum[i][j][2 * h], sum[i][j][2 * h + 1]));
      }
    }
  }
  syncWarp();  // the tile is complete
  for (int i = laneId(); i < kBlocks * 16 * kColumns; i += 32) {
    const int r = row + i / kColumns, column = feature + i % kColumns * 8, count = headDim - column;
    const int64_t index = indexOf(r);
    if (index < 0 || count <= 0) continue;
    const uint4 eight = ldShared<uint4>(tile + r * kPitch<kDim> + column);
    bf16* at = to + index * headDim + column;
    if (vectors) {
      stGlobal(at, eight);
    } else {
      storeEight(at, eight, count);
    }
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
