// What the matrix engine needs from one instruction set: tile shape, packing, micro-kernels, epilogues, loss rows.
//
// Packed A: row tiles [tile][K][rows of the tile]; packed B: panels [panel][K][columns], zero beyond N. A tile of C is
// kept as [rows of the tile][columns] between blocks of K.
#pragma once

#include <cstdint>

#include "cpu/gemm/gemm.h"
#include "cpu/isa.h"

namespace elastiform::cpu {

constexpr int kMaxTileRows = 14;
constexpr int kMaxStripPanels = 4;

// M rows in `count` tiles whose sizes differ by one at most: `longer` tiles of size + 1, then tiles of size.
struct RowTiles {
  int64_t count, size, longer;
};

// acc (+)= A tile * B panel over kc steps of k, continuing the chains in acc when `resume`. `next` (may be null): memory to
// prefetch during the first `prefetched` steps, as many bytes a step as the panel has.
using TileFunction = void (*)(int64_t kc, const float* a, const void* b, int64_t panelStride, float* acc, bool resume,
                              const void* next, int64_t prefetched);

// The same for rows where they lie, and an f32 panel.
using TileInPlaceFunction = void (*)(int64_t kc, const float* const* rows, const void* b, float* acc, bool resume,
                                     const void* next, int64_t prefetched);

// Rows of C and what becomes of a tile's sums y on the way there: y + bias, times a row's scale, is added to what is there.
struct AddedTile {
  float* const* rows;  // at the tile's first column
  const float* bias;   // f32 [columns], or null
  const float* scale;  // f32 [rows], or null
};

// The last steps of k for rows where they lie, which are added to C without going through acc again.
using AddingTileFunction = void (*)(int64_t kc, const float* const* rows, const void* b, const float* acc, bool resume,
                                    const AddedTile& to, const void* next, int64_t prefetched);

// Steps of k for a tile of the transpose of a packed weight, read where it lies: step k of row i is
// a[k / columns * stride + i * columns + k % columns], f32; the panel is f32 too.
using TransposedTileFunction = void (*)(int64_t kc, const float* a, int64_t stride, const float* panel, float* acc,
                                        bool resume, const char* next, int64_t prefetched);

// A finished tile: rows m0.., columns n0..n0+n of C.
struct FinishTile {
  const float* acc[2];   // the second for gated products
  const float* bias[2];  // f32, contiguous, or null
  int64_t m0, rows, n0, n;
};

// Of a student from a teacher, in the order of the op's attribute; docs/ops.md has the equations.
enum class Divergence { Kl, ReverseKl, Jsd };

struct LossRow {
  double lse;    // log-sum-exp of the student's logits
  double value;  // the divergence in nats, or the cross-entropy
  int64_t best;  // first index of the largest logit; -1 when there is none (NaN)
  int64_t bestTeacher;
};

struct KernelTable {
  int rows, columns;  // the largest tile
  // By dtype of the panel (f32, bf16, f16) and rows of the tile. A strip runs several neighbouring panels at once:
  // acc is [panel][rows][columns]. stripPanels[rows] is 1 where there is no strip.
  TileFunction tile[3][kMaxTileRows + 1];
  TileInPlaceFunction tileInPlace[kMaxTileRows + 1];
  AddingTileFunction addingTile[kMaxTileRows + 1];
  TileFunction strip[3][kMaxTileRows + 1];
  int stripPanels[kMaxTileRows + 1];
  TransposedTileFunction transposedTile[kMaxTileRows + 1];
  // to[j * columns + i] = acc[i * columns + j] for i < rows and all columns j.
  void (*transposeTile)(const float* acc, int64_t rows, float* to);

  // Tiles [begin, end), all of K, to dst[first row of the tile * K].
  void (*packA)(const MatrixA& a, RowTiles tiles, int64_t begin, int64_t end, int64_t K, float* dst);
  // Panels of columns n0.. (N is where B ends) and steps [k0, k0 + kc) as f32 [panel][kc][columns].
  void (*packB)(const MatrixB& b, int64_t N, int64_t n0, int64_t panels, int64_t k0, int64_t kc, float* dst);
  // `count` elements of a packed panel as f32; a multiple of the columns.
  void (*widen)(const void* src, DType dtype, int64_t count, float* dst);

  void (*finish)(const FinishTile& tile, const Epilogue& epilogue, float* out, int64_t ldOut);
  void (*finishGated)(const FinishTile& tile, const GatedEpilogue& epilogue, float* out, int64_t ldOut);

  // By Divergence: of softmax(student) from softmax(teacher); `beta` is the teacher's share of the mixture of Jsd. With
  // `gradient` student becomes weight * d value / d student and the teacher's logits are lost.
  LossRow (*divergenceRow[3])(float* student, float* teacher, int64_t V, float beta, float weight, bool gradient);
  // value = -log softmax(logits)[target]; with `gradient` logits become weight * (q - 1 at the target).
  LossRow (*crossEntropyRow)(float* logits, int64_t V, int64_t target, float weight, bool gradient);

  // Fused multiply-adds on registers alone, for benchmarks: runs `steps` of `fmaWidth` floating-point operations.
  float (*fmaPeak)(int64_t steps);
  int64_t fmaWidth;
};

namespace portable {
extern const KernelTable kernelTable;
}
namespace avx2 {
extern const KernelTable kernelTable;
}
namespace avx512 {
extern const KernelTable kernelTable;
}

// The table of the instruction set in use.
const KernelTable& kernels();
// Switches to another instruction set, for tests: false when the machine lacks it. Weights packed before must not be
// used after.
bool useKernels(Isa isa);

}  // namespace elastiform::cpu
