// Blocking, packing and scheduling of the matrix engine; the arithmetic is in kernel_body.h.
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <new>

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
constexpr int64_t kSetStride = 1024;   // elements: rows so far apart share one set of the first-level cache
constexpr int64_t kDepth = 8192;             // steps of k at a time where A and the blocks of C are far larger than caches
constexpr int64_t kPackInParallel = int64_t{1} << 15;  // elements of A
constexpr int64_t kWidenInRegisters = 16;   // rows up to which 16-bit panels are widened in the micro-kernel
constexpr int64_t kChunksPerThread = 6;
constexpr int64_t kChunkFlops = int64_t{1} << 21;

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

class Run {
 public:
  Run(const Product& p, const KernelArgs& args) : p_(p), args_(args), table_(kernels()) {}

  void operator()() {
    packed_ = p_.transposed || (p_.b[0]->packed && (p_.count == 1 || p_.b[1]->packed));
    const bool contiguous = !p_.transposed && p_.a->colStride == 1 && !p_.a->cols && !p_.a->colScale;
    const bool direct = contiguous && p_.M == 1;
    inPlace_ = contiguous && packed_ && p_.M >= kRowsInPlace && !p_.a->rows && p_.a->rowStride % kSetStride != 0;
    const int64_t depth = packed_ && !p_.transposed ? p_.K : std::min(p_.K, kDepth);
    const int64_t rowsAtOnce =
        p_.transposed || inPlace_
            ? p_.M
            : std::min(p_.M, std::max<int64_t>(kBlockRowsUnpacked, kPackedElements / std::max<int64_t>(depth, 1)));
    const int64_t stored = p_.transposed ? ceilDiv(p_.N, table_.columns) * table_.columns : rowsAtOnce;
    float* store = direct || inPlace_ ? nullptr : args_.scratch<float>(stored * depth);
    float* patchRows[2] = {};
    for (int i = 0; i < 2; ++i) {
      if (p_.patch[i]) packedU_[i] = patchRows[i] = args_.scratch<float>(rowsAtOnce * p_.patch[i]->P);
    }

    for (base_ = 0; base_ < p_.M; base_ += rowsAtOnce) {
      const int64_t rows = std::min(rowsAtOnce, p_.M - base_);
      tiles_ = rowTiles(rows, table_.rows);
      plan(rows, depth);
      for (int i = 0; i < 2; ++i) {
        if (p_.patch[i]) packRows({p_.patch[i]->u, p_.patch[i]->P, 1}, rows, 0, p_.patch[i]->P, patchRows[i]);
      }
      begin_ = 0;
      do {
        end_ = std::min(p_.K, begin_ + depth);
        if (p_.transposed) {
          packPanels(store);
          packedB_ = store;
        } else if (direct) {
          packedA_ = p_.a->data + (p_.a->rows ? p_.a->rows[0] : 0) * p_.a->rowStride + begin_;
        } else if (!inPlace_) {
          packRows(*p_.a, rows, begin_, end_ - begin_, store);
          packedA_ = store;
        }
        multiply();
        begin_ = end_;
      } while (begin_ < p_.K);
    }
  }

 private:
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
    parallelFor(ceilDiv(tiles_.count, perChunk),
                [&](int64_t chunk, int) {
                  table_.packA(part, tiles_, chunk * perChunk, std::min(tiles_.count, (chunk + 1) * perChunk), depth,
                               store);
                },
                args_.abort);
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
      parallelFor(panels_, body, args_.abort);
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
    const int64_t threads = threadCount();
    const int64_t flops = 2 * rows * p_.N * std::max<int64_t>(depth, 1) * p_.count;
    const int64_t wanted =
        std::clamp<int64_t>(flops / kChunkFlops, 1, threads == 1 ? 1 : threads * kChunksPerThread);
    mBlocks_ = std::min(tiles_.count, ceilDiv(rows, packed_ ? kBlockRows : kBlockRowsUnpacked));
    units_ = ceilDiv(panels_, strip_);
    nBlocks_ = std::clamp<int64_t>(ceilDiv(wanted, mBlocks_),
                                   std::min(units_, ceilDiv(panels_ * table_.columns, kBlockColumns)), units_);
    if (mBlocks_ * nBlocks_ < wanted) {
      mBlocks_ = std::clamp<int64_t>(ceilDiv(wanted, nBlocks_), mBlocks_, tiles_.count);
    }
    const int64_t mostTiles = ceilDiv(tiles_.count, mBlocks_), mostPanels = ceilDiv(units_, nBlocks_) * strip_;
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
    const int64_t accs = kept ? mBlocks_ * nBlocks_ : threads;
    accOfChunk_ = kept;
    const int64_t elements = (accs * accBlock_ + threads * (panelBuffer_ + patchBuffer_)) * p_.count;
    if (workerElements_ < elements) {
      workerElements_ = elements;
      worker_ = args_.scratch<float>(workerElements_);
    }
    panelsAt_ = accs * accBlock_ * p_.count;
    patchesAt_ = panelsAt_ + threads * panelBuffer_ * p_.count;
  }

  void multiply() {
    const auto body = [&](int64_t chunk, int worker) {
      const int64_t n = chunk / mBlocks_, m = chunk % mBlocks_;
      const Block block{m * tiles_.count / mBlocks_, (m + 1) * tiles_.count / mBlocks_,
                        std::min(panels_, n * units_ / nBlocks_ * strip_),
                        std::min(panels_, (n + 1) * units_ / nBlocks_ * strip_)};
      float* patches = worker_ + patchesAt_ + worker * patchBuffer_ * p_.count;
      multiplyBlock(block, {worker_ + (accOfChunk_ ? chunk : worker) * accBlock_ * p_.count,
                            worker_ + panelsAt_ + worker * panelBuffer_ * p_.count,
                            {patches, patches + patchBuffer_}});
    };
    if (mBlocks_ * nBlocks_ == 1) {
      body(0, 0);
    } else {
      parallelFor(mBlocks_ * nBlocks_, body, args_.abort);
    }
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
    function(patch.P, packedU_[i] + m0 * patch.P, 0, source, stride, acc, true, nullptr, 0);
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
      const int64_t rowStride = inPlace_ ? p_.a->rowStride : 0;
      const float* a = p_.transposed ? nullptr
                       : inPlace_    ? p_.a->data + (base_ + m0) * rowStride + k0
                                     : packedA_ + m0 * (end_ - begin_) + (k0 - begin_) * rows;
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
        const TileFunction function =
            inPlace_ ? table_.tileInPlace[rows] : (together > 1 ? table_.strip : table_.tile)[type[i]][rows];
        function(kc, a, rowStride, source[i], panelStride[i], acc, k0 > 0, nextPart, prefetched);
        if (last && p_.patch[i]) multiplyPatch(i, block, buffers, m0, rows, panel, together, acc);
      }
      if (!last) continue;
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
  bool packed_ = false, widen_ = false;
  bool inPlace_ = false;          // tiles read A where it lies
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
          int64_t ldOut, const KernelArgs& args, const Patch& patch) {
  if (M <= 0 || N <= 0) return;
  const float* bias = biasF32(epilogue.bias, epilogue.biasDtype, epilogue.biasStride, N, args);
  if (!b.transposed) {
    Product product{M, N, K, &a, {&b, nullptr}, 1, {bias, nullptr}, &epilogue, nullptr, out, ldOut};
    if (patch.u) product.patch[0] = &patch;
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

void gemmGated(int64_t M, int64_t N, int64_t K, const MatrixA& a, const MatrixB& gate, const MatrixB& up,
               const GatedEpilogue& e, float* out, int64_t ldOut, const KernelArgs& args, const Patch& gatePatch,
               const Patch& upPatch) {
  if (M <= 0 || N <= 0) return;
  Product product{M, N, K, &a, {&gate, &up}, 2, {nullptr, nullptr}, nullptr, &e, out, ldOut};
  const Patch* patches[2] = {&gatePatch, &upPatch};
  for (int i = 0; i < 2; ++i) {
    product.bias[i] = biasF32(e.bias[i], e.biasDtype[i], e.biasStride[i], N, args);
    if (patches[i]->u) product.patch[i] = patches[i];
  }
  Run{product, args}();
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
