// Products on CUDA cores, in f32: large and small tiles of C, and a way for few rows that is bound by reading weights.
#include "cuda/epilogue.cuh"
#include "cuda/four.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kProductThreads = 256;

// ---- Tiles of C: 64 or 128 rows and as many columns

constexpr int kLargeTile = kProductRows, kSmallTile = 64;
constexpr int kTileStages = 4;
template <int kSpan>
constexpr int kDepth = kSpan == kLargeTile ? 8 : 16;  // steps of k in a stage

// Floats between steps of k: eight steps of four rows, which a warp writes at once, have banks of their own.
template <int kSpan>
constexpr int kPitch = kSpan + 4;

constexpr int kStageFloats = std::max(kDepth<kSmallTile> * kPitch<kSmallTile>, kDepth<kLargeTile> * kPitch<kLargeTile>);

struct TileShared {
  union {
    struct {
      float a[kStageFloats], b[kStageFloats];  // [kDepth][kPitch]
    } stage[kTileStages];
    float c[kLargeTile * kLargeTile];
  };
  const void* rowA[kLargeTile];  // along k: rows of the tile in memory, null outside the matrix
  const void* rowB[kLargeTile];
  int m, n;  // where the tile begins: not in registers during the product
};

// One side of a block's tile, from memory to a stage, where rows along k come to lie across it. f32 is copied
// asynchronously, what must change on the way (16 bits widen, rows are scaled) goes through registers. With two parts
// the first half of the tile comes from x[0], the second from x[1].
template <typename T, Layout kLayout, int kSpan, int kParts, bool kScaled>
struct TileLoader {
  static constexpr bool kDirect = sizeof(T) == 4 && !kScaled;
  static constexpr int kWidth = kDirect && kLayout == Layout::AlongK ? 1 : 4;  // elements moved at once
  // Threads side by side along a row in memory, and rows that a thread has a part in.
  static constexpr int kInRow = kLayout == Layout::AcrossK ? kSpan / 4 : kDirect ? 8 : kDepth<kSpan> / 4;
  static constexpr int kRowsAtOnce = kProductThreads / kInRow;
  static constexpr int kRows = (kLayout == Layout::AlongK ? kSpan : kDepth<kSpan>) / kRowsAtOnce;
  static_assert(kParts == 1 || kLayout == Layout::AlongK);

  const Matrix* x;
  const void** row;  // along k, in shared memory
  int rowLength;     // where x has no stride
  int first, width;  // across k: columns of the tile, and of the matrix
  Four four[kDirect ? 1 : kRows] = {};
  float scale[kScaled ? kRows : 1] = {};

  DEVICE TileLoader(const Matrix* x, int rowLength, const void** row) : x(x), row(row), rowLength(rowLength) {}
  DEVICE static int rowOf(int i) { return static_cast<int>(threadIdx.x) / kInRow + i * kRowsAtOnce; }
  DEVICE static int columnOf() { return static_cast<int>(threadIdx.x) % kInRow * kWidth; }
  DEVICE const T* rowIn(const Matrix& from, int i) const {
    return static_cast<const T*>(from.data) + int64_t{from.row(i)} * (from.stride ? from.stride : rowLength);
  }

  // Starts the tile of rows (along k) or columns (across k) from `tile` of `count` of C's side. The block must meet
  // before anything is loaded.
  DEVICE void start(int tile, int count) {
    first = tile;
    width = count;
    if constexpr (kLayout == Layout::AlongK) {
      constexpr int kPart = kSpan / kParts;
      const int r = threadIdx.x, i = tile + r % kPart;
      if (r < kSpan) row[r] = i < count ? rowIn(r < kPart ? x[0] : x[kParts - 1], i) : nullptr;
    }
  }

  DEVICE void load(int step, int K, float* tile) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kLayout == Layout::AlongK) {
        const T* from = static_cast<const T*>(row[rowOf(i)]);
        UNROLL
        for (int h = 0; h < kDepth<kSpan>; h += kInRow * kWidth) {
          const int column = columnOf() + h, k = step * kDepth<kSpan> + column;
          move(from + k, from ? K - k : 0, i, tile + column * kPitch<kSpan> + rowOf(i));
        }
      } else {
        const int k = step * kDepth<kSpan> + rowOf(i), column = first + columnOf();
        const bool inside = k < K;
        move(rowIn(*x, inside ? k : 0) + column, inside ? width - column : 0, i,
             tile + rowOf(i) * kPitch<kSpan> + columnOf());
        if constexpr (kScaled) scale[i] = inside && x->scale ? ldGlobal(x->scale + k) : 1.f;
      }
    }
  }
  DEVICE void move(const T* from, int count, int i, float* to) {
    if constexpr (kWidth == 1) {
      cpAsync4(to, count > 0 ? from : x->data, count > 0);
    } else if constexpr (kDirect) {
      copyFour(to, from, count);
    } else {
      four[i] = loadFour(from, count);
    }
  }

  DEVICE void store(float* tile) const {
    if constexpr (!kDirect) {
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        float4 v = widened<T>(four[i]);
        if constexpr (kLayout == Layout::AlongK) {
          const float elements[4] = {v.x, v.y, v.z, v.w};
          UNROLL
          for (int e = 0; e < 4; ++e) tile[(columnOf() + e) * kPitch<kSpan> + rowOf(i)] = elements[e];
        } else {
          if constexpr (kScaled) v = {v.x * scale[i], v.y * scale[i], v.z * scale[i], v.w * scale[i]};
          stShared(&tile[rowOf(i) * kPitch<kSpan> + columnOf()], v);
        }
      }
    }
  }
};

// One step of k: sum[i][j] += a[i] b[j] for the thread's fours of rows and columns, which lie 64 apart.
template <int kSpan>
DEVICE void multiply(const float* a, const float* b, int k, int row, int column,
                     float (&sum)[kSpan / 16][kSpan / 16]) {
  float x[kSpan / 16], y[kSpan / 16];
  UNROLL
  for (int g = 0; g < kSpan / 64; ++g) {
    const float4 p = ldShared<float4>(&a[k * kPitch<kSpan> + g * 64 + row]);
    const float4 q = ldShared<float4>(&b[k * kPitch<kSpan> + g * 64 + column]);
    x[g * 4] = p.x, x[g * 4 + 1] = p.y, x[g * 4 + 2] = p.z, x[g * 4 + 3] = p.w;
    y[g * 4] = q.x, y[g * 4 + 1] = q.y, y[g * 4 + 2] = q.z, y[g * 4 + 3] = q.w;
  }
  UNROLL
  for (int i = 0; i < kSpan / 16; ++i) {
    UNROLL
    for (int j = 0; j < kSpan / 16; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
  }
}

// The columns of a patch to one part of the tile, 0 in the other; they lie in all stages at once.
template <int kParts, int kSpan>
DEVICE void multiplyPatch(const Patch& patch, int part, TileShared& s, int M, int N, int row, int column,
                          float (&sum)[kSpan / 16][kSpan / 16]) {
  constexpr int kColumns = kSpan / kParts, kSteps = kDepth<kSpan>;
  if (!patch) return;
  // By way of a shuffle, like the patch itself: what follows from it takes no registers during the product.
  const int tid = static_cast<int>(threadIdx.x) + shflIdx(0, 0);
  const float *u = static_cast<const float*>(patch.u.data), *b = static_cast<const float*>(patch.b.data);
  const int P = shflIdx(patch.p.count(), 0), strideB = patch.b.stride ? patch.b.stride : P;
  for (int first = 0; first < P; first += kTileStages * kSteps) {
    const int depth = min(P - first, kTileStages * kSteps);
    for (int i = tid; i < (depth + kSteps - 1) / kSteps * kSpan * kSteps; i += kProductThreads) {
      const int k = first + i / (kSpan * kSteps) * kSteps + i % kSteps, r = i / kSteps % kSpan;
      const int m = s.m + r, n = s.n + r % kColumns;
      auto& stage = s.stage[i / (kSpan * kSteps)];
      stage.a[i % kSteps * kPitch<kSpan> + r] = k < P && m < M ? ldGlobal(u + int64_t{m} * P + k) : 0.f;
      stage.b[i % kSteps * kPitch<kSpan> + r] =
          k < P && n < N && r / kColumns == part ? ldGlobal(b + int64_t{n} * strideB + k) : 0.f;
    }
    syncThreads();  // the stages are complete
    ROLLED
    for (int k = 0; k < depth; ++k) {
      const auto& stage = s.stage[k / kSteps];
      multiply<kSpan>(stage.a, stage.b, k % kSteps, row, column, sum);
    }
    syncThreads();  // the stages have been read
  }
}

template <typename T, Layout kLayoutA, Layout kLayoutB, int kParts, bool kPatched, int kSpan>
DEVICE void multiplyTiles(const Product& p, TileShared& s, int M, int N, int K) {
  constexpr int kColumns = kSpan / kParts, kSteps = kDepth<kSpan>, kTogether = 4;
  const int tid = threadIdx.x;
  const int row = (tid / 64 * 4 + tid / 8 % 4) * 4, column = (tid / 32 % 2 * 8 + tid % 8) * 4;  // warps of 16 x 32
  const int tilesM = (M + kSpan - 1) / kSpan, tilesN = (N + kColumns - 1) / kColumns;
  const int steps = (K + kSteps - 1) / kSteps;
  TileLoader<float, kLayoutA, kSpan, 1, kLayoutA == Layout::AcrossK> a(&p.a, kLayoutA == Layout::AlongK ? K : M,
                                                                       s.rowA);
  TileLoader<T, kLayoutB, kSpan, kParts, false> b(p.b, kLayoutB == Layout::AlongK ? K : N, s.rowB);

  for (int tile = blockIdx.x; tile < tilesM * tilesN; tile += gridDim.x) {
    const TilePlace place(tile, tilesM, tilesN, kSpan, kColumns);
    if (tid == 0) {
      s.m = place.m;
      s.n = place.n;
    }
    a.start(place.m, M);
    b.start(place.n, N);
    float sum[kSpan / 16][kSpan / 16] = {};
    for (int step = 1 - kTileStages; step < steps; ++step) {
      cpAsyncWait<kTileStages - 2>();
      syncThreads();  // this step's stage is complete, and the one before has been read
      auto& next = s.stage[(step + kTileStages - 1) % kTileStages];
      const bool more = step + kTileStages - 1 < steps;
      if (more) {
        a.load(step + kTileStages - 1, K, next.a);
        b.load(step + kTileStages - 1, K, next.b);
      }
      cpAsyncCommit();
      if (step >= 0) {
        const auto& stage = s.stage[step % kTileStages];
        const int depth = min(kSteps, K - step * kSteps);
        int k = 0;
        for (; k + kTogether <= depth; k += kTogether) {
          UNROLL
          for (int i = 0; i < kTogether; ++i) multiply<kSpan>(stage.a, stage.b, k + i, row, column, sum);
        }
        for (; k < depth; ++k) multiply<kSpan>(stage.a, stage.b, k, row, column, sum);
      }
      if (more) {
        a.store(next.a);
        b.store(next.b);
      }
    }
    cpAsyncWait<0>();
    syncThreads();  // the stages have been read
    if constexpr (kPatched) {
      for (int i = 0; i < kParts; ++i) multiplyPatch<kParts, kSpan>(p.patch[shflIdx(i, 0)], i, s, M, N, row, column, sum);
    }
    // By way of shared memory the epilogue is a loop, however many accumulators a thread has.
    UNROLL
    for (int i = 0; i < kSpan / 16; ++i) {
      UNROLL
      for (int j = 0; j < kSpan / 16; j += 4) {
        stShared(&s.c[(i / 4 * 64 + row + i % 4) * kSpan + j / 4 * 64 + column],
                 float4{sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]});
      }
    }
    syncThreads();  // c is complete
    finishTile<kSpan, kParts, kSpan, kProductThreads, kHasDots<kLayoutA, kLayoutB>>(p, s.c, s.m, min(kSpan, M - s.m), s.n, N);
    syncThreads();  // c has been read
  }
}

// ---- Few rows: 32 columns of C a block, a lane each, whose weights stream through shared memory in 16-byte pieces

constexpr int kFewColumns = 32;
constexpr int kFewDepth = 128;
constexpr int kProductWarps = kProductThreads / 32;

// kRows rows of C to a warp.
template <typename T, int kRows>
struct FewShared {
  static constexpr int kStages = kRows == 1 ? 3 : 2;
  // An odd number of 16-byte pieces apart, so that lanes read their rows without bank conflicts.
  unsigned char w[kStages][kFewColumns][kFewDepth * sizeof(T) + 16];
  float x[kStages][kRows * kProductWarps][kFewDepth];
};

constexpr int kFewRowsMost = 4 * kProductWarps;

// One 16-byte piece of a weight's row as f32.
template <typename T>
DEVICE void widenPiece(const unsigned char* piece, float (&w)[16 / sizeof(T)]) {
  const uint4 v = ldShared<uint4>(piece);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      w[i] = asFloat(words[i]);
    } else {
      w[2 * i] = toFloat(T{static_cast<uint16_t>(words[i])});
      w[2 * i + 1] = toFloat(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

template <typename T, int kParts, bool kPatched, int kRows>
DEVICE void multiplyFew(const Product& p, FewShared<T, kRows>& s, float* c, int M, int N, int K) {
  constexpr int kStages = FewShared<T, kRows>::kStages, kPiece = 16 / sizeof(T), kPieces = kFewDepth / kPiece;
  constexpr int kRowsAtOnce = kProductThreads / kPieces, kPasses = kFewColumns / kRowsAtOnce;
  constexpr int kColumns = kFewColumns / kParts;
  const int tid = threadIdx.x, lane = laneId(), warp = warpId();
  const int steps = (K + kFewDepth - 1) / kFewDepth, tiles = (N + kColumns - 1) / kColumns;
  const int k = tid % kPieces * kPiece;  // of the thread's pieces of w in a step

  const float* x[kRows];  // null outside A
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int m = warp + i * kProductWarps;
    x[i] = m < M ? static_cast<const float*>(p.a.data) + int64_t{p.a.row(m)} * K + lane * 4 : nullptr;
  }

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const T* w[kPasses];
    UNROLL
    for (int i = 0; i < kPasses; ++i) {
      const int row = tid / kPieces + i * kRowsAtOnce, n = tile * kColumns + row % kColumns;
      const Matrix& b = kParts == 2 && row >= kColumns ? p.b[kParts - 1] : p.b[0];
      w[i] = n < N ? static_cast<const T*>(b.data) + int64_t{n} * b.stride + k : nullptr;
    }
    const auto load = [&](int step) {
      const int stage = step % kStages, at = step * kFewDepth;
      UNROLL
      for (int i = 0; i < kPasses; ++i) {
        const bool inside = w[i] != nullptr && at + k < K;
        unsigned char* to = &s.w[stage][tid / kPieces + i * kRowsAtOnce][k * sizeof(T)];
        cpAsync16(to, inside ? w[i] + at : p.b[0].data, inside);
      }
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        const bool inside = x[i] != nullptr && at + lane * 4 < K;
        cpAsync16(&s.x[stage][warp + i * kProductWarps][lane * 4], inside ? x[i] + at : p.a.data, inside);
      }
    };

    UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      cpAsyncCommit();
    }
    float sum[kRows] = {};
    for (int step = 0; step < steps; ++step) {
      cpAsyncWait<kStages - 2>();
      syncThreads();  // the stage is complete, and the one before has been read
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cpAsyncCommit();
      if (warp >= M) continue;
      const int stage = step % kStages;
      const auto multiplyPiece = [&](int piece) {
        float weights[kPiece];
        widenPiece<T>(&s.w[stage][lane][piece * 16], weights);
        UNROLL
        for (int i = 0; i < kRows; ++i) {
          UNROLL
          for (int e = 0; e < kPiece; e += 4) {
            const float4 v = ldShared<float4>(&s.x[stage][warp + i * kProductWarps][piece * kPiece + e]);
            sum[i] = fmaf(v.x, weights[e], sum[i]);
            sum[i] = fmaf(v.y, weights[e + 1], sum[i]);
            sum[i] = fmaf(v.z, weights[e + 2], sum[i]);
            sum[i] = fmaf(v.w, weights[e + 3], sum[i]);
          }
        }
      };
      const int pieces = min(kFewDepth, K - step * kFewDepth) / kPiece;
      if (pieces == kPieces) {
        constexpr int kTogether = 8 / kRows * 4 / kPiece;  // enough to read ahead of the chains
        for (int piece = 0; piece < kPieces; piece += kTogether) {
          UNROLL
          for (int i = 0; i < kTogether; ++i) multiplyPiece(piece + i);
        }
      } else {
        for (int piece = 0; piece < pieces; ++piece) multiplyPiece(piece);
      }
    }
    const int n = tile * kColumns + lane % kColumns;
    const Patch& patch = p.patch[lane / kColumns];
    if (kPatched && patch && n < N) {
      const int P = patch.p.count();
      const float* u = static_cast<const float*>(patch.u.data);
      const float* b = static_cast<const float*>(patch.b.data) + int64_t{n} * (patch.b.stride ? patch.b.stride : P);
      for (int j = 0; j < P; ++j) {
        const float weight = ldGlobal(b + j);
        UNROLL
        for (int i = 0; i < kRows; ++i) {
          const int m = warp + i * kProductWarps;
          if (m < M) sum[i] = fmaf(ldGlobal(u + int64_t{m} * P + j), weight, sum[i]);
        }
      }
    }
    cpAsyncWait<0>();
    syncThreads();  // all stages have been read
    UNROLL
    for (int i = 0; i < kRows; ++i) c[(warp + i * kProductWarps) * kFewColumns + lane] = sum[i];
    syncThreads();  // c is complete
    finishTile<kFewColumns, kParts, kFewColumns, kProductThreads, false>(p, c, 0, M, tile * kColumns, N);
    syncThreads();  // c has been read
  }
}

// ---- The kernel, which chooses

template <typename T, Layout kLayoutB>
union ProductShared {
  TileShared tiles;
};
template <typename T>
union ProductShared<T, Layout::AlongK> {
  TileShared tiles;
  FewShared<T, 1> few;
  FewShared<T, 4> several;
};

DEVICE bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Few rows are for pieces of 16 bytes alone.
template <typename T, int kParts>
DEVICE bool inPieces(const Product& p, int K) {
  bool yes = K * sizeof(T) % 16 == 0 && K % 4 == 0 && aligned16(p.a.data);
  UNROLL
  for (int i = 0; i < kParts; ++i) yes = yes && p.b[i].stride * sizeof(T) % 16 == 0 && aligned16(p.b[i].data);
  return yes;
}

// Patches are in kernels of their own: the others spend no registers on them. Two beside f32 weights take more than half
// of the registers on sm_80.
template <typename T, Layout kLayoutA, Layout kLayoutB, int kParts, bool kPatched>
__global__ void __launch_bounds__(kProductThreads, kPatched && kParts == 2 && sizeof(T) == 4 ? 1 : 2)
    productKernel(const __grid_constant__ Product p) {
  using Shared = ProductShared<T, kLayoutB>;
  SHARED_MEMORY(Shared, s);
  if (p.state.faulted()) return;
  // By way of a shuffle the compiler knows that they are the same in all lanes, and spends no registers of threads.
  const int M = shflIdx(p.m.count(), 0), N = shflIdx(p.n.count(), 0), K = shflIdx(p.k.count(), 0);
  if (!begin<kParts>(p, M, N, K)) return;
  if constexpr (kLayoutB == Layout::AlongK) {
    if (M <= kFewRowsMost && inPieces<T, kParts>(p, K)) {
      if (M <= kProductWarps) {
        multiplyFew<T, kParts, kPatched>(p, s.few, s.tiles.c, M, N, K);
      } else {
        multiplyFew<T, kParts, kPatched>(p, s.several, s.tiles.c, M, N, K);
      }
      return;
    }
  }
  constexpr int kColumns = kLargeTile / kParts;
  const int64_t largeTiles = int64_t{(M + kLargeTile - 1) / kLargeTile} * ((N + kColumns - 1) / kColumns);
  if (largeTiles >= p.multiprocessors) {
    multiplyTiles<T, kLayoutA, kLayoutB, kParts, kPatched, kLargeTile>(p, s.tiles, M, N, K);
  } else {
    multiplyTiles<T, kLayoutA, kLayoutB, kParts, kPatched, kSmallTile>(p, s.tiles, M, N, K);
  }
}

}  // namespace

template <Layout kLayoutA, Layout kLayoutB, int kParts>
void multiplyF32(const Launch& launch, const Product& p) {
  const auto ceilDiv = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t M = p.m.boundCount(), N = p.n.boundCount() * kParts;
  const unsigned blocks =
      launch.blocks(std::max(ceilDiv(M, kSmallTile) * ceilDiv(N, kSmallTile), ceilDiv(N, kFewColumns)), 1);
  const auto launchKernel = [&]<typename T, bool kPatched>() {
    LAUNCH((productKernel<T, kLayoutA, kLayoutB, kParts, kPatched>), blocks, kProductThreads,
           sizeof(ProductShared<T, kLayoutB>), launch.stream, p);
  };
  const auto of = [&]<typename T>() {
    if constexpr (kHasPatches<kLayoutA, kLayoutB>) {
      if (p.patched()) return launchKernel.template operator()<T, true>();
    }
    launchKernel.template operator()<T, false>();
  };
  if constexpr (kLayoutA == Layout::AlongK) {
    if (p.b[0].dtype == DType::BF16) return of.template operator()<bf16>();
    if (p.b[0].dtype == DType::F16) return of.template operator()<f16>();
  }
  of.template operator()<float>();
}

template void multiplyF32<Layout::AlongK, Layout::AlongK, 1>(const Launch&, const Product&);
template void multiplyF32<Layout::AlongK, Layout::AlongK, 2>(const Launch&, const Product&);
template void multiplyF32<Layout::AlongK, Layout::AcrossK, 1>(const Launch&, const Product&);
template void multiplyF32<Layout::AcrossK, Layout::AcrossK, 1>(const Launch&, const Product&);

}  // namespace elastiform::ELASTIFORM_DEVICE
