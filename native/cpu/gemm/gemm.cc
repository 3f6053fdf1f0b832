// Blocking, packing and scheduling of the matrix engine; the arithmetic is in kernel_body.h.
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "core/pool.h"
#include "cpu/gemm/kernel.h"
#include "cpu/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace elastiform {

// Panels of a whole weight [N, K] (kernel.h) as f32, bf16 or f16.
struct PackedWeight {
  DType dtype;
  int64_t N, K;
  int columns;
  size_t bytes;
  std::align_val_t alignment;
  void* data;
  ~PackedWeight();
};

namespace {
std::atomic<int64_t> packedTotal{0};
}

PackedWeight::~PackedWeight() {
  ::operator delete(data, alignment);
  packedTotal -= static_cast<int64_t>(bytes);
}

namespace cpu {

namespace {

const KernelTable* tableOf(Isa wanted) {
#if defined(__x86_64__) || defined(_M_X64)
  if (wanted == Isa::Avx512) return &avx512::kernelTable;
  if (wanted == Isa::Avx2) return &avx2::kernelTable;
#else
  static_cast<void>(wanted);
#endif
  return &portable::kernelTable;
}

const KernelTable*& activeTable() {
  static const KernelTable* active = tableOf(isa());
  return active;
}

}  // namespace

const KernelTable& kernels() { return *activeTable(); }

bool useKernels(Isa wanted) {
  if (wanted > isaAvailable()) return false;
  activeTable() = tableOf(wanted);
  return true;
}

namespace {

constexpr int64_t kBlockK = 1024;            // steps of k between visits to a tile
constexpr int64_t kBlockRows = 128;          // rows of A that stay in the second-level cache, packed B
constexpr int64_t kBlockRowsUnpacked = 512;  // B packed on the way: more rows to each packing
constexpr int64_t kBlockColumns = 256;
constexpr int64_t kPackedElements = int64_t{1} << 20;  // of A, at a time: they are read again before they leave caches
constexpr int64_t kRowsInPlace = 256;  // rows of A from which on copies of them cost more than they gain
constexpr int64_t kColumnsInPlace = 384;  // columns of C up to which they do, too
constexpr int64_t kShortInPlace = 128;   // steps of k up to which they do where C has more columns
constexpr int64_t kSetStride = 1024;   // elements: rows so far apart share one set of the first-level cache
constexpr int64_t kDepth = 8192;             // steps of k at a time where A and the blocks of C are far larger than caches
constexpr int64_t kPackInParallel = int64_t{1} << 15;  // elements of A
constexpr int64_t kWidenInRegisters = 16;   // rows up to which 16-bit panels are widened in the micro-kernel
constexpr int64_t kChunksPerThread = 6;
constexpr int64_t kChunkFlops = int64_t{1} << 21;
constexpr int64_t kNarrowElements = int64_t{1} << 19;  // of weights that a core's second-level cache holds most of
constexpr int64_t kNarrowRows = 64;   // at least, for each reading of such weights from memory
constexpr int64_t kSumBlocksPerThread = 2;  // of columns: each reads all rows that are added up

int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

RowTiles rowTiles(int64_t M, int64_t most) {
  const int64_t count = ceilDiv(M, most);
  return {count, M / count, M % count};
}
int64_t tileStart(const RowTiles& tiles, int64_t t) { return t * tiles.size + std::min(t, tiles.longer); }

// A bias as contiguous f32.
const float* biasF32(const void* bias, DType dtype, int64_t stride, int64_t N, const KernelArgs& args) {
  if (!bias) return nullptr;
  if (dtype == DType::F32 && stride == 1) return static_cast<const float*>(bias);
  float* copy = args.scratch<float>(N);
  for (int64_t n = 0; n < N; ++n) copy[n] = loadAsFloat(bias, dtype, n * stride);
  return copy;
}

struct Product {
  int64_t M, N, K;
  const MatrixA* a;
  const MatrixB* b[2];
  int count;  // 1, or 2 when gated
  const float* bias[2];
  const Epilogue* plain;
  const GatedEpilogue* gated;
  float* out;
  int64_t ldOut;
  const Patch* patch[2] = {nullptr, nullptr};  // to each of b; null where it has none
  // The product is computed as C^T = W^T A^T: M and N are exchanged, the tiles are rows of the transposed weight, read
  // where its panels lie, and b[0] is A, packed on the way.
  const MatrixB* transposed = nullptr;
};

// A block of C: rows of tiles [tile0, tile1), panels [panel0, panel1).
struct Block {
  int64_t tile0, tile1, panel0, panel1;
};

struct Buffers {
  float* acc;     // tiles of the block between blocks of k
  float* panels;  // B packed or widened here; of a transposed weight: a tile widened, and a finished tile transposed
  float* patch[2];  // panels of patches
};

// Memory that chunks of several products take turns with; without an address it only counts.
struct Bump {
  char* base = nullptr;
  size_t used = 0;

  static void* take(void* self, size_t bytes) {
    auto& bump = *static_cast<Bump*>(self);
    char* at = bump.base + bump.used;
    bump.used += (bytes + 63) / 64 * 64;
    return at;
  }
};

class Run {
 public:
  enum class Threads { Pool, Own };  // its own: on the calling thread alone, which may be a worker of the pool

  // `columns`: that rows of A meet, in products that share them.
  Run(const Product& p, const KernelArgs& args, Threads threads = Threads::Pool, int64_t columns = 0)
      : p_(p), args_(args), table_(kernels()), pool_(threads == Threads::Pool), threads_(pool_ ? threadCount() : 1) {
    packed_ = p_.transposed || (p_.b[0]->packed && (p_.count == 1 || p_.b[1]->packed));
    contiguous_ = !p_.transposed && p_.a->colStride == 1 && !p_.a->cols && !p_.a->colScale;
    direct_ = contiguous_ && p_.M == 1;
    const int64_t few = std::max<int64_t>(table_.rows, kWidenInRegisters) + 1;
    inPlace_ = contiguous_ && packed_ && p_.a->rowStride % kSetStride != 0 &&
               (std::max(columns, p_.N * p_.count) <= kColumnsInPlace
                    ? p_.M >= few
                    : p_.M >= (p_.K <= kShortInPlace ? few : kRowsInPlace) && !p_.a->rows);
    adds_ = inPlace_ && p_.plain && p_.plain->accumulate && !p_.plain->pre && p_.plain->act == Act::None && !p_.patch[0];
    depth_ = packed_ && !p_.transposed ? p_.K : std::min(p_.K, kDepth);
    rowsAtOnce_ = p_.transposed || inPlace_
                      ? p_.M
                      : std::min(p_.M, std::max<int64_t>(kBlockRowsUnpacked,
                                                         kPackedElements / std::max<int64_t>(depth_, 1)));
  }

  void operator()() {
    allocate();
    for (base_ = 0; base_ < p_.M; base_ += rowsAtOnce_) {
      start();
      packPatchRows();
      do {
        end_ = std::min(p_.K, begin_ + depth_);
        packFactor();
        multiply();
        begin_ = end_;
      } while (begin_ < p_.K);
    }
  }

  // Whether all rows and all of K are there at once, as what follows needs.
  bool atOnce() const { return packed_ && contiguous_ && rowsAtOnce_ == p_.M; }

  // Gets memory, for packed rows of A if it `packs` them, and cuts C, into so many blocks if that is given.
  void prepare(bool packs, int64_t rowBlocks = 0, int64_t columnBlocks = 0) {
    allocate(packs);
    rowBlocks_ = rowBlocks;
    columnBlocks_ = columnBlocks;
    start();
    end_ = p_.K;
  }
  // The rows of A and of patches, or of patches alone, where another run has packed the same A.
  void pack(const Run* other = nullptr) {
    packPatchRows();
    if (other) {
      packedA_ = other->packedA_;
    } else {
      packFactor();
    }
  }
  int64_t chunks() const { return mBlocks_ * nBlocks_; }
  void multiplyChunk(int64_t chunk, int worker) const {
    const int64_t n = chunk / mBlocks_, m = chunk % mBlocks_;
    const Block block{m * tiles_.count / mBlocks_, (m + 1) * tiles_.count / mBlocks_, panelOf(n), panelOf(n + 1)};
    float* patches = worker_ + patchesAt_ + worker * patchBuffer_ * p_.count;
    multiplyBlock(block, {worker_ + (accOfChunk_ ? chunk : worker) * accBlock_ * p_.count,
                          worker_ + panelsAt_ + worker * panelBuffer_ * p_.count,
                          {patches, patches + patchBuffer_}});
  }

 private:
  template <typename Body>
  void forAll(int64_t count, const Body& body) const {
    if (count > 1 && pool_) return parallelFor(count, body, args_.abort);
    for (int64_t i = 0; i < count; ++i) body(i, 0);
  }

  void allocate(bool packs = true) {
    const int64_t stored = p_.transposed ? ceilDiv(p_.N, table_.columns) * table_.columns : rowsAtOnce_;
    store_ = direct_ || inPlace_ || !packs ? nullptr : args_.scratch<float>(stored * depth_);
    for (int i = 0; i < 2; ++i) {
      if (p_.patch[i]) packedU_[i] = patchRows_[i] = args_.scratch<float>(rowsAtOnce_ * p_.patch[i]->P);
    }
  }

  // The rows from base_ on.
  void start() {
    const int64_t rows = std::min(rowsAtOnce_, p_.M - base_);
    tiles_ = rowTiles(rows, table_.rows);
    plan(rows, depth_);
    begin_ = 0;
  }

  void packPatchRows() {
    const int64_t rows = std::min(rowsAtOnce_, p_.M - base_);
    for (int i = 0; i < 2; ++i) {
      if (p_.patch[i]) packRows({p_.patch[i]->u, p_.patch[i]->P, 1}, rows, 0, p_.patch[i]->P, patchRows_[i]);
    }
  }

  // Packs steps [begin_, end_) of A, or of a transposed product's rows.
  void packFactor() {
    const int64_t rows = std::min(rowsAtOnce_, p_.M - base_);
    if (p_.transposed) {
      packPanels(store_);
      packedB_ = store_;
    } else if (direct_) {
      packedA_ = p_.a->data + (p_.a->rows ? p_.a->rows[0] : 0) * p_.a->rowStride + begin_;
    } else if (!inPlace_) {
      packRows(*p_.a, rows, begin_, end_ - begin_, store_);
      packedA_ = store_;
    }
  }

  // Steps [begin, begin + depth) of the rows at hand.
  void packRows(MatrixA part, int64_t rows, int64_t begin, int64_t depth, float* store) {
    if (part.rows) {
      part.rows += base_;
    } else {
      part.data += base_ * part.rowStride;
    }
    if (part.cols) {
      part.cols += begin;
    } else {
      part.data += begin * part.colStride;
    }
    if (part.colScale) part.colScale += begin;
    if (rows * depth <= kPackInParallel) {
      table_.packA(part, tiles_, 0, tiles_.count, depth, store);
      return;
    }
    const int64_t perChunk = std::max<int64_t>(1, kPackInParallel / ((tiles_.size + 1) * depth));
    forAll(ceilDiv(tiles_.count, perChunk), [&](int64_t chunk, int) {
      table_.packA(part, tiles_, chunk * perChunk, std::min(tiles_.count, (chunk + 1) * perChunk), depth, store);
    });
  }

  // Steps [begin_, end_) of all panels.
  void packPanels(float* store) {
    const int64_t panelElements = (end_ - begin_) * table_.columns;
    const auto body = [&](int64_t panel, int) {
      table_.packB(*p_.b[0], p_.N, panel * table_.columns, 1, begin_, end_ - begin_, store + panel * panelElements);
    };
    if (panels_ * panelElements <= kPackInParallel) {
      for (int64_t panel = 0; panel < panels_; ++panel) body(panel, 0);
    } else {
      forAll(panels_, body);
    }
  }

  // Cuts C into blocks and gets memory for what workers keep.
  void plan(int64_t rows, int64_t depth) {
    panels_ = ceilDiv(p_.N, table_.columns);
    strip_ = 1;
    if (packed_ && !p_.transposed && tiles_.count == 1) strip_ = p_.count == 1 ? table_.stripPanels[rows] : 1;
    widen_ = p_.transposed ? p_.transposed->packed->dtype != DType::F32
                           : packed_ && rows > kWidenInRegisters && (narrow(0) || (p_.count == 2 && narrow(1)));
    // One tile needs each panel once: no reason to leave it before the end of K.
    const int64_t kMost = packed_ && !p_.transposed && tiles_.count == 1 ? std::max<int64_t>(p_.K, 1) : kBlockK;
    kc_ = ceilDiv(depth, std::max<int64_t>(1, ceilDiv(depth, kMost)));
    if (p_.transposed) kc_ = ceilDiv(kc_, table_.columns) * table_.columns;  // whole panels of the weight

    // The grid of blocks: over N first (each panel is then read once), over M where rows or chunks demand it.
    const int64_t flops = 2 * rows * p_.N * std::max<int64_t>(depth, 1) * p_.count;
    const int64_t wanted =
        std::clamp<int64_t>(flops / kChunkFlops, 1, threads_ == 1 ? 1 : threads_ * kChunksPerThread);
    mBlocks_ = std::min(tiles_.count, ceilDiv(rows, packed_ ? kBlockRows : kBlockRowsUnpacked));
    units_ = ceilDiv(panels_, strip_);
    nBlocks_ = std::clamp<int64_t>(ceilDiv(wanted, mBlocks_),
                                   std::min(units_, ceilDiv(panels_ * table_.columns, kBlockColumns)), units_);
    if (mBlocks_ * nBlocks_ < wanted) {
      mBlocks_ = std::clamp<int64_t>(ceilDiv(wanted, nBlocks_), mBlocks_, tiles_.count);
    }
    if (columnBlocks_ > 0) {
      mBlocks_ = rowBlocks_;
      nBlocks_ = columnBlocks_;
    }
    const int64_t mostTiles = ceilDiv(tiles_.count, mBlocks_);
    const int64_t mostPanels = columnBlocks_ > 0 ? ceilDiv(panels_, nBlocks_) : ceilDiv(units_, nBlocks_) * strip_;
    const int64_t mostRows = mostTiles * (tiles_.size + (tiles_.longer ? 1 : 0));

    accBlock_ = kc_ >= p_.K ? int64_t{strip_} * table_.rows * table_.columns : mostRows * mostPanels * table_.columns;
    panelElements_ = kc_ * table_.columns;
    panelBuffer_ = packed_ ? (widen_ ? panelElements_ : 0) : mostPanels * panelElements_;
    if (p_.transposed) panelBuffer_ += table_.columns * table_.columns;
    patchBuffer_ = 0;
    for (const Patch* patch : p_.patch) {
      if (patch && !patch->b.packed) patchBuffer_ = std::max(patchBuffer_, mostPanels * patch->P * table_.columns);
    }
    // Unfinished blocks of C stay with their chunk from one depth to the next; else they are the worker's.
    const bool kept = depth < p_.K;
    const int64_t accs = kept ? mBlocks_ * nBlocks_ : threads_;
    accOfChunk_ = kept;
    const int64_t elements = (accs * accBlock_ + threads_ * (panelBuffer_ + patchBuffer_)) * p_.count;
    if (workerElements_ < elements) {
      workerElements_ = elements;
      worker_ = args_.scratch<float>(workerElements_);
    }
    panelsAt_ = accs * accBlock_ * p_.count;
    patchesAt_ = panelsAt_ + threads_ * panelBuffer_ * p_.count;
  }

  // Where block n of the columns begins: with a strip, but where the blocks are not its own.
  int64_t panelOf(int64_t n) const {
    return columnBlocks_ > 0 ? n * panels_ / nBlocks_ : std::min(panels_, n * units_ / nBlocks_ * strip_);
  }

  void multiply() const {
    forAll(chunks(), [&](int64_t chunk, int worker) { multiplyChunk(chunk, worker); });
  }

  bool narrow(int product) const { return p_.b[product]->packed->dtype != DType::F32; }

  void multiplyBlock(const Block& block, const Buffers& buffers) const {
    if (end_ == p_.K) packPatches(block, buffers);
    int64_t k0 = begin_;
    do {
      const int64_t kc = std::min(kc_, end_ - k0);
      if (!packed_) packBlock(block, k0, kc, buffers.panels);
      for (int64_t panel = block.panel0; panel < block.panel1;) {
        const int together = panel + strip_ <= block.panel1 ? strip_ : 1;
        multiplyPanel(block, buffers, k0, kc, panel, together);
        panel += together;
      }
      k0 += kc;
    } while (k0 < end_);
  }

  void packBlock(const Block& block, int64_t k0, int64_t kc, float* to) const {
    const int64_t panels = block.panel1 - block.panel0, size = panels * kc * table_.columns;
    for (int i = 0; i < p_.count; ++i, to += size) {
      const MatrixB& b = *p_.b[i];
      if (!b.packed) {
        table_.packB(b, p_.N, block.panel0 * table_.columns, panels, k0, kc, to);
        continue;
      }
      for (int64_t panel = 0; panel < panels; ++panel) {  // a gated product whose other weight is not packed
        unpack(b, block.panel0 + panel, k0, kc, to + panel * kc * table_.columns);
      }
    }
  }

  void packPatches(const Block& block, const Buffers& buffers) const {
    for (int i = 0; i < p_.count; ++i) {
      const Patch* patch = p_.patch[i];
      if (!patch || patch->b.packed) continue;
      table_.packB(patch->b, p_.N, block.panel0 * table_.columns, block.panel1 - block.panel0, 0, patch->P,
                   buffers.patch[i]);
    }
  }

  // Goes on with the chains in `acc` of a tile and `together` panels, over the columns of patch i.
  void multiplyPatch(int i, const Block& block, const Buffers& buffers, int64_t m0, int64_t rows, int64_t panel,
                     int together, float* acc) const {
    const Patch& patch = *p_.patch[i];
    const PackedWeight* packed = patch.b.packed;
    const int64_t stride = (packed ? packed->K : patch.P) * table_.columns;
    const void* source = packed ? static_cast<const void*>(panelAt(patch.b, panel, 0))
                                : buffers.patch[i] + (panel - block.panel0) * stride;
    const TileFunction function =
        (together > 1 ? table_.strip : table_.tile)[packed ? static_cast<int>(packed->dtype) : 0][rows];
    function(patch.P, packedU_[i] + m0 * patch.P, source, stride, acc, true, nullptr, 0);
  }

  void unpack(const MatrixB& b, int64_t panel, int64_t k0, int64_t kc, float* to) const {
    const int64_t count = kc * table_.columns;
    const char* from = panelAt(b, panel, k0);
    if (b.packed->dtype == DType::F32) {
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    } else {
      table_.widen(from, b.packed->dtype, count, to);
    }
  }

  // Step k of a panel of B in the packed copy.
  const char* panelAt(const MatrixB& b, int64_t panel, int64_t k) const {
    const PackedWeight& w = *b.packed;
    const int64_t at = (b.packedN / table_.columns + panel) * w.K + b.packedK + k;
    return static_cast<const char*>(w.data) + at * table_.columns * static_cast<int64_t>(dtypeSize(w.dtype));
  }

  const char* panelOfRows(int64_t panel, int64_t k) const {
    return reinterpret_cast<const char*>(packedB_ + (panel * (end_ - begin_) + k - begin_) * table_.columns);
  }

  // All tiles of the block against one panel (or a strip of them) and one block of k.
  void multiplyPanel(const Block& block, const Buffers& buffers, int64_t k0, int64_t kc, int64_t panel,
                     int together) const {
    const int64_t columns = table_.columns;
    const char* source[2];
    const char* next[2] = {nullptr, nullptr};
    int type[2];
    int64_t panelStride[2] = {0, 0};
    for (int i = 0; i < p_.count; ++i) {
      if (p_.transposed) {
        source[i] = panelOfRows(panel, k0);
        type[i] = 0;
        if (panel + 1 < block.panel1) {
          next[i] = panelOfRows(panel + 1, k0);
        } else if (k0 + kc < end_) {
          next[i] = panelOfRows(block.panel0, k0 + kc);
        }
        continue;
      }
      if (!packed_) {
        const int64_t at = i * (block.panel1 - block.panel0) + (panel - block.panel0);
        source[i] = reinterpret_cast<const char*>(buffers.panels + at * kc * columns);
        type[i] = 0;
        continue;
      }
      const PackedWeight& w = *p_.b[i]->packed;
      source[i] = panelAt(*p_.b[i], panel, k0);
      type[i] = static_cast<int>(w.dtype);
      panelStride[i] = w.K * columns;
      if (widen_ && w.dtype != DType::F32) {
        float* wide = buffers.panels + i * panelElements_;
        table_.widen(source[i], w.dtype, kc * columns, wide);
        source[i] = reinterpret_cast<const char*>(wide);
        type[i] = 0;
      } else if (together == 1) {
        if (panel + 1 < block.panel1) {
          next[i] = panelAt(*p_.b[i], panel + 1, k0);
        } else if (k0 + kc < end_) {
          next[i] = panelAt(*p_.b[i], block.panel0, k0 + kc);
        }
      }
    }

    const int64_t firstRow = tileStart(tiles_, block.tile0);
    const int64_t blockRows = tileStart(tiles_, block.tile1) - firstRow;
    const int64_t sharers = std::min<int64_t>(8, block.tile1 - block.tile0), share = ceilDiv(kc, sharers);
    const bool last = k0 + kc == p_.K;
    for (int64_t t = block.tile0; t < block.tile1; ++t) {
      const int64_t m0 = tileStart(tiles_, t), rows = tileStart(tiles_, t + 1) - m0;
      const float* inPlace[kMaxTileRows];
      for (int64_t i = 0; inPlace_ && i < rows; ++i) {
        const int64_t row = base_ + m0 + i;
        inPlace[i] = p_.a->data + (p_.a->rows ? p_.a->rows[row] : row) * p_.a->rowStride + k0;
      }
      const bool adds = adds_ && last && (panel + 1) * columns <= p_.N;
      float* added[kMaxTileRows];
      if (last && p_.plain && p_.plain->accumulate && !p_.transposed) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t m = base_ + m0 + i;
          added[i] = p_.out + (p_.plain->rows ? p_.plain->rows[m] : m) * p_.ldOut + panel * columns;
          for (int64_t n = 0; n < columns * together && !adds; n += 16) __builtin_prefetch(added[i] + n, 1, 3);
        }
      }
      FinishTile done{};
      for (int i = 0; i < p_.count; ++i) {
        float* acc = buffers.acc + i * accBlock_;
        if (kc_ < p_.K) acc += ((panel - block.panel0) * blockRows + (m0 - firstRow)) * columns;
        const int64_t order = t - block.tile0;
        const bool ahead = next[i] && order < sharers;
        const int64_t from = order * share;
        const int64_t prefetched = ahead ? std::max<int64_t>(0, std::min(share, kc - from)) : 0;
        const char* nextPart = ahead ? next[i] + from * columns * (type[i] == 0 ? 4 : 2) : nullptr;
        done.acc[i] = acc;
        done.bias[i] = p_.bias[i];
        if (p_.transposed) {
          multiplyTransposed(m0, rows, k0, kc, source[i], acc, nextPart, prefetched, buffers.panels);
          continue;
        }
        if (adds) {
          const AddedTile to{added, p_.bias[0] ? p_.bias[0] + panel * columns : nullptr,
                             p_.plain->rowScale ? p_.plain->rowScale + base_ + m0 : nullptr};
          table_.addingTile[rows](kc, inPlace, source[0], acc, k0 > 0, to, nextPart, prefetched);
          continue;
        }
        if (inPlace_) {
          table_.tileInPlace[rows](kc, inPlace, source[i], acc, k0 > 0, nextPart, prefetched);
        } else {
          const float* a = packedA_ + m0 * (end_ - begin_) + (k0 - begin_) * rows;
          const TileFunction function = (together > 1 ? table_.strip : table_.tile)[type[i]][rows];
          function(kc, a, source[i], panelStride[i], acc, k0 > 0, nextPart, prefetched);
        }
        if (last && p_.patch[i]) multiplyPatch(i, block, buffers, m0, rows, panel, together, acc);
      }
      if (!last || adds) continue;
      if (p_.transposed) {
        finishTransposed(done, m0, rows, panel, buffers.panels + (widen_ ? panelElements_ : 0));
        continue;
      }
      done.m0 = base_ + m0;
      done.rows = rows;
      for (int s = 0; s < together; ++s) {
        done.n0 = (panel + s) * columns;
        done.n = std::min(columns, p_.N - done.n0);
        if (p_.gated) {
          table_.finishGated(done, *p_.gated, p_.out, p_.ldOut);
        } else {
          table_.finish(done, *p_.plain, p_.out, p_.ldOut);
        }
        done.acc[0] += rows * columns;
      }
    }
  }

  // One tile of the transposed weight against one panel of rows.
  void multiplyTransposed(int64_t m0, int64_t rows, int64_t k0, int64_t kc, const char* panel, float* acc,
                          const char* next, int64_t prefetched, float* wide) const {
    const PackedWeight& w = *p_.transposed->packed;
    const int64_t columns = table_.columns, size = static_cast<int64_t>(dtypeSize(w.dtype));
    const char* first = panelAt(*p_.transposed, k0 / columns, m0);
    const float* a = reinterpret_cast<const float*>(first);
    int64_t stride = w.K * columns;
    if (widen_) {
      for (int64_t k = 0; k < kc; k += columns) {
        table_.widen(first + k * w.K * size, w.dtype, rows * columns, wide + k * rows);
      }
      a = wide;
      stride = rows * columns;
    }
    table_.transposedTile[rows](kc, a, stride, reinterpret_cast<const float*>(panel), acc, k0 > 0, next, prefetched);
  }

  void finishTransposed(FinishTile done, int64_t m0, int64_t rows, int64_t panel, float* tile) const {
    table_.transposeTile(done.acc[0], rows, tile);
    done.acc[0] = tile;
    done.m0 = panel * table_.columns;
    done.rows = std::min<int64_t>(table_.columns, p_.N - done.m0);
    done.n0 = m0;
    done.n = rows;
    table_.finish(done, *p_.plain, p_.out, p_.ldOut);
  }

  const Product& p_;
  const KernelArgs& args_;
  const KernelTable& table_;
  const bool pool_;
  const int64_t threads_;
  bool packed_ = false, widen_ = false;
  bool contiguous_ = false;       // rows of A lie along k
  bool direct_ = false;           // one row is as it is packed
  bool inPlace_ = false;          // tiles read A where it lies
  bool adds_ = false;             // and add to C where that lies
  int64_t depth_ = 0, rowsAtOnce_ = 0;
  float* store_ = nullptr;        // what is packed of A
  float* patchRows_[2] = {};
  int64_t rowBlocks_ = 0, columnBlocks_ = 0;
  int64_t base_ = 0;              // first row of the rows packed now
  int64_t begin_ = 0, end_ = 0;   // steps of k packed now
  RowTiles tiles_{};
  const float* packedA_ = nullptr;
  const float* packedB_ = nullptr;  // panels of rows against a transposed weight
  const float* packedU_[2] = {};    // of patches
  int64_t panels_ = 0;            // of all of N
  int strip_ = 1;                 // panels multiplied together
  int64_t units_ = 0;             // strips of all of N
  int64_t mBlocks_ = 1, nBlocks_ = 1, kc_ = 0;
  int64_t accBlock_ = 0, panelElements_ = 0, panelBuffer_ = 0, panelsAt_ = 0;
  int64_t patchBuffer_ = 0, patchesAt_ = 0;
  bool accOfChunk_ = false;
  float* worker_ = nullptr;
  int64_t workerElements_ = 0;
};

std::shared_ptr<const PackedWeight> pack(const Tensor& w) {
  const KernelTable& table = kernels();
  auto result = std::make_shared<PackedWeight>();
  PackedWeight& packed = *result;
  packed.dtype = w.packAs;
  packed.N = w.shape[0];
  packed.K = w.shape[1];
  packed.columns = table.columns;
  const int64_t panels = ceilDiv(packed.N, table.columns), panelElements = packed.K * table.columns;
  const size_t bytes = static_cast<size_t>(panels * panelElements) * dtypeSize(packed.dtype);
  constexpr size_t hugePage = size_t{2} << 20;
  packed.alignment = std::align_val_t{bytes >= 2 * hugePage ? hugePage : 64};
  packed.bytes = 0;
  packed.data = nullptr;
  try {
    packed.data = ::operator new(std::max<size_t>(bytes, 64), packed.alignment);
  } catch (const std::bad_alloc&) {
    fail(ErrorCode::OutOfMemory, "no memory for a packed weight of %zu bytes", bytes);
  }
  packed.bytes = bytes;
  packedTotal += static_cast<int64_t>(bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Streams through gigabytes of panels miss the address cache on small pages. Advice only: failure changes nothing.
  if (bytes >= 2 * hugePage) madvise(packed.data, bytes / hugePage * hugePage, MADV_HUGEPAGE);
#endif

  const MatrixB source{w.data(), w.dtype, w.strides[0], w.strides[1]};
  parallelFor(panels,
              [&](int64_t panel, int) {
                const int64_t at = panel * panelElements;
                if (packed.dtype == DType::F32) {
                  table.packB(source, packed.N, panel * table.columns, 1, 0, packed.K,
                              static_cast<float*>(packed.data) + at);
                  return;
                }
                constexpr int64_t steps = 64;
                alignas(64) float wide[steps * 32];
                for (int64_t k0 = 0; k0 < packed.K; k0 += steps) {
                  const int64_t kc = std::min(steps, packed.K - k0), count = kc * table.columns;
                  table.packB(source, packed.N, panel * table.columns, 1, k0, kc, wide);
                  uint16_t* to = static_cast<uint16_t*>(packed.data) + at + k0 * table.columns;
                  if (packed.dtype == DType::BF16) {
                    for (int64_t i = 0; i < count; ++i) to[i] = floatToBf16(wide[i]);
                  } else {
                    for (int64_t i = 0; i < count; ++i) to[i] = floatToF16(wide[i]);
                  }
                }
              },
              nullptr);
  // Forward and backward products read the copy from now on: a mapped checkpoint need not stay in memory beside it.
  if (w.storage->evict && packed.N > 0 && packed.K > 0) {
    const int64_t elements = (packed.N - 1) * w.strides[0] + (packed.K - 1) * w.strides[1] + 1;
    w.storage->evict(w.byteOffset, static_cast<size_t>(elements) * dtypeSize(w.dtype));
  }
  return result;
}

// Parts of one weight all share its copy, or all have their own.
bool readsWhole(const Tensor& part) {
  return part.whole && part.whole->packAs == part.packAs &&
         (part.partAxis == 1 || part.shape[0] % kernels().columns == 0);
}

bool packable(const TensorView& w) { return w.tensor && !w.tensor->storage->writable; }

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, const MatrixA& a, const MatrixB& b, const Epilogue& epilogue, float* out,
          int64_t ldOut, const KernelArgs& args) {
  if (M <= 0 || N <= 0) return;
  const float* bias = biasF32(epilogue.bias, epilogue.biasDtype, epilogue.biasStride, N, args);
  if (!b.transposed) {
    Product product{M, N, K, &a, {&b, nullptr}, 1, {bias, nullptr}, &epilogue, nullptr, out, ldOut};
    return Run{product, args}();
  }
  const MatrixB rows{.data = a.data,
                     .dtype = DType::F32,
                     .nStride = a.rowStride,
                     .kStride = a.colStride,
                     .ks = a.cols,
                     .ns = a.rows};
  Product product{N, M, K, nullptr, {&rows, nullptr}, 1, {bias, nullptr}, &epilogue, nullptr, out, ldOut};
  product.transposed = &b;
  Run{product, args}();
}

namespace {

Product productOf(const GemmCall& call, const KernelArgs& args) {
  const bool gated = call.weights == 2;
  Product p{call.M, call.N, call.K, &call.a, {&call.b[0], &call.b[1]}, call.weights, {nullptr, nullptr},
            gated ? nullptr : &call.plain, gated ? &call.gated : nullptr, call.out, call.ldOut};
  for (int i = 0; i < call.weights; ++i) {
    p.bias[i] = gated ? biasF32(call.gated.bias[i], call.gated.biasDtype[i], call.gated.biasStride[i], call.N, args)
                      : biasF32(call.plain.bias, call.plain.biasDtype, call.plain.biasStride, call.N, args);
    if (call.patch[i].u) p.patch[i] = &call.patch[i];
  }
  return p;
}

// Those that compute anything.
std::vector<Product> productsOf(const std::vector<GemmCall>& calls, const KernelArgs& args) {
  std::vector<Product> products;
  for (const GemmCall& call : calls) {
    if (call.M > 0 && call.N > 0) products.push_back(productOf(call, args));
  }
  return products;
}

bool sameRows(const Product& a, const Product& b) {
  return a.a->data == b.a->data && a.a->rows == b.a->rows && a.a->rowStride == b.a->rowStride && a.M == b.M &&
         a.K == b.K;
}

// Products of the same rows: these are packed once. A chunk is some rows of as many products as make up the columns of a
// chunk of one alone, or a chunk of a wide one.
void multiplySharing(const Product* products, size_t count, const KernelArgs& args) {
  const int64_t M = products->M;
  int64_t columns = 0;
  for (size_t i = 0; i < count; ++i) columns += products[i].N * products[i].count;
  const int64_t wanted = threadCount() * kChunksPerThread, groups = std::max<int64_t>(1, columns / kBlockColumns);
  const int64_t rowBlocks =
      std::min(rowTiles(M, kernels().rows).count, std::max(ceilDiv(M, kBlockRows), ceilDiv(wanted, groups)));
  struct Chunk {
    size_t first, last;  // products
    int64_t chunk;       // of each
  };
  std::vector<Chunk> chunks;
  std::vector<Run> runs;
  runs.reserve(count);
  for (size_t i = 0, end; i < count; i = end) {
    int64_t together = products[i].N * products[i].count;
    const int64_t blocks = std::max<int64_t>(1, together / kBlockColumns);
    for (end = i + 1; end < count; ++end) {
      together += products[end].N * products[end].count;
      if (together > kBlockColumns) break;
    }
    for (size_t j = i; j < end; ++j) {
      runs.emplace_back(products[j], args, Run::Threads::Pool, columns).prepare(j == 0, rowBlocks, blocks);
      runs[j].pack(j == 0 ? nullptr : &runs[0]);
    }
    for (int64_t chunk = 0; chunk < rowBlocks * blocks; ++chunk) chunks.push_back({i, end, chunk});
  }
  parallelFor(static_cast<int64_t>(chunks.size()),
              [&](int64_t index, int worker) {
                const Chunk& chunk = chunks[static_cast<size_t>(index)];
                for (size_t i = chunk.first; i < chunk.last; ++i) runs[i].multiplyChunk(chunk.chunk, worker);
              },
              args.abort);
}

// Rows [begin, end) of a product that is there at once, as a product of its own.
struct Slice {
  Product product;
  MatrixA a;
  Epilogue plain;
  GatedEpilogue gated;
  Patch patch[2];

  Slice(const Slice&) = delete;  // it points into itself
  Slice(const Product& p, int64_t begin, int64_t end) : product(p), a(*p.a) {
    product.M = end - begin;
    product.a = &a;
    const auto advance = [](auto*& pointer, int64_t by) {
      if (pointer) pointer += by;
    };
    if (a.rows) {
      a.rows += begin;
    } else {
      a.data += begin * a.rowStride;
    }
    bool scattered = false;
    if (p.gated) {
      gated = *p.gated;
      product.gated = &gated;
      advance(gated.g, begin * p.ldOut);
      advance(gated.u, begin * p.ldOut);
    } else {
      plain = *p.plain;
      product.plain = &plain;
      scattered = plain.rows != nullptr;
      advance(plain.pre, begin * p.ldOut);
      advance(plain.rowScale, begin);
      advance(plain.rows, begin);
    }
    if (!scattered) product.out += begin * p.ldOut;
    for (int i = 0; i < 2; ++i) {
      if (!p.patch[i]) continue;
      patch[i] = *p.patch[i];
      product.patch[i] = &patch[i];
      patch[i].u += begin * patch[i].P;
    }
  }
};

// Products with weights so narrow that one core's caches hold them: a chunk is some rows of one of them, which the worker
// packs itself, so that they do not go from one core to another.
void multiplyNarrow(const std::vector<const Product*>& products, const KernelArgs& args) {
  struct Chunk {
    const Product* product;
    int64_t begin, end;  // rows
  };
  const int64_t tileRows = kernels().rows;
  int64_t tiles = 0;
  for (const Product* p : products) tiles += rowTiles(p->M, tileRows).count;
  const int64_t tilesAtOnce = std::clamp<int64_t>(tiles / (threadCount() * kChunksPerThread),
                                                  ceilDiv(kNarrowRows, tileRows), kBlockRows / tileRows);
  std::vector<Chunk> chunks;
  size_t most = 0;
  for (const Product* p : products) {
    const RowTiles own = rowTiles(p->M, tileRows);
    const int64_t blocks = ceilDiv(own.count, tilesAtOnce);
    for (int64_t i = 0; i < blocks; ++i) {
      const Chunk chunk{p, tileStart(own, i * own.count / blocks), tileStart(own, (i + 1) * own.count / blocks)};
      chunks.push_back(chunk);
      const Slice slice(*p, chunk.begin, chunk.end);
      Bump count;
      KernelArgs counting = args;
      counting.scratchAlloc = Bump::take;
      counting.scratchArena = &count;
      Run(slice.product, counting, Run::Threads::Own).prepare(true);
      most = std::max(most, count.used);
    }
  }
  char* memory = args.scratch<char>(static_cast<int64_t>(most) * threadCount());
  parallelFor(static_cast<int64_t>(chunks.size()),
              [&](int64_t index, int worker) {
                const Chunk& chunk = chunks[static_cast<size_t>(index)];
                const Slice slice(*chunk.product, chunk.begin, chunk.end);
                Bump own{memory + most * static_cast<size_t>(worker)};
                KernelArgs ownArgs = args;
                ownArgs.scratchAlloc = Bump::take;
                ownArgs.scratchArena = &own;
                Run{slice.product, ownArgs, Run::Threads::Own}();
              },
              args.abort);
}

}  // namespace

void gemmTogether(const std::vector<GemmCall>& calls, const KernelArgs& args) {
  const std::vector<Product> products = productsOf(calls, args);
  std::vector<const Product*> narrow;
  for (size_t i = 0; i < products.size();) {
    const Product& p = products[i];
    size_t sharing = 1;
    const auto packsAtOnce = [&](const Product& q) {
      return Run(q, args, Run::Threads::Pool, std::numeric_limits<int64_t>::max()).atOnce();
    };
    while (i + sharing < products.size() && sameRows(p, products[i + sharing]) && packsAtOnce(p) &&
           packsAtOnce(products[i + sharing])) {
      ++sharing;
    }
    if (sharing > 1) {
      multiplySharing(&p, sharing, args);
    } else if (products.size() > 1 && Run(p, args).atOnce() && p.N * p.K * p.count <= kNarrowElements) {
      narrow.push_back(&p);
    } else {
      Run{p, args}();
    }
    i += sharing;
  }
  if (!narrow.empty()) multiplyNarrow(narrow, args);
}

void gemmSum(const std::vector<GemmCall>& calls, const KernelArgs& args) {
  const std::vector<Product> products = productsOf(calls, args);
  const int64_t panels = products.empty() ? 0 : ceilDiv(products[0].N, kernels().columns), threads = threadCount();
  const bool atOnce = std::all_of(products.begin(), products.end(),
                                  [&](const Product& p) { return Run(p, args).atOnce(); });
  const int64_t blocks = threads * kSumBlocksPerThread;
  if (products.size() < 2 || !atOnce || panels < blocks) {
    for (const Product& p : products) Run{p, args}();
    return;
  }
  std::vector<Run> runs;
  runs.reserve(products.size());
  for (const Product& p : products) runs.emplace_back(p, args).prepare(true, 1, blocks);
  for (Run& run : runs) run.pack();
  parallelFor(blocks,
              [&](int64_t block, int worker) {
                for (const Run& run : runs) run.multiplyChunk(block, worker);
              },
              args.abort);
}

MatrixB weightB(const TensorView& w) {
  MatrixB b{w.data, w.dtype, w.strides[0], w.strides[1]};
  if (!packable(w)) return b;
  Tensor* tensor = w.tensor;
  while (readsWhole(*tensor)) {
    (tensor->partAxis == 0 ? b.packedN : b.packedK) += tensor->partIndex * tensor->shape[tensor->partAxis];
    tensor = tensor->whole.get();
  }
  const std::lock_guard<std::mutex> lock(tensor->packMutex);
  if (!tensor->packed) tensor->packed = pack(*tensor);
  b.packed = tensor->packed.get();
  return b;
}

MatrixB weightTransposedB(const TensorView& w) {
  if (!packable(w)) return {w.data, w.dtype, w.strides[1], w.strides[0]};
  MatrixB b = weightB(w);
  b.transposed = true;
  return b;
}

const PackedWeight* packedTable(const TensorView& table) {
  if (!packable(table)) return nullptr;
  Tensor& tensor = *table.tensor;
  // Look-ups round to a narrower type of packing only; panels are rounded to any.
  const bool same = tensor.packAs == DType::F32 || tensor.packAs == tensor.dtype ||
                    dtypeSize(tensor.packAs) < dtypeSize(tensor.dtype);
  const std::lock_guard<std::mutex> lock(tensor.packMutex);
  return same ? tensor.packed.get() : nullptr;
}

void readPackedRow(const PackedWeight& packed, int64_t n, int64_t width, float* to) {
  const int64_t columns = packed.columns, start = n / columns * packed.K * columns + n % columns;
  for (int64_t k = 0; k < width; ++k) to[k] = loadAsFloat(packed.data, packed.dtype, start + k * columns);
}

int64_t packedBytes(const PackedWeight& packed) { return static_cast<int64_t>(packed.bytes); }
int64_t packedBytesTotal() { return packedTotal; }

}  // namespace cpu
}  // namespace elastiform
