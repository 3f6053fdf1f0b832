// The matrix engine's kernels, instantiated once per instruction set (see simd.h).
#include <math.h>

#include <utility>

#include "cpu/gemm/kernel.h"
#include "cpu/simd.h"

namespace elastiform::cpu::ELASTIFORM_ISA {
namespace {

constexpr int kVectors = 2;  // per panel row
constexpr int kColumns = kVectors * kLanes;
constexpr int kRows = ELASTIFORM_TILE_ROWS;
static_assert(kRows <= kMaxTileRows);

struct F32 {
  using Stored = float;
  ELASTIFORM_INLINE Vec get(const float* p) { return load(p); }
};
struct Bf16 {
  using Stored = uint16_t;
  ELASTIFORM_INLINE Vec get(const uint16_t* p) { return loadBf16(p); }
};
struct F16 {
  using Stored = uint16_t;
  ELASTIFORM_INLINE Vec get(const uint16_t* p) { return loadF16(p); }
};

// Step k of a tile's rows: packed, or where they lie.
template <int Rows>
struct PackedRows {
  const float* a;
  float at(int64_t k, int i) const { return a[k * Rows + i]; }
};
template <int Rows>
struct RowsInPlace {
  const float* const* rows;
  float at(int64_t k, int i) const { return rows[i][k]; }
};

// One step of k: c += a (column) * b (row of every panel).
template <int Rows, int Panels, typename B, typename A>
ELASTIFORM_INLINE void step(Vec (&c)[Panels][Rows][kVectors], const A& a, int64_t k, const typename B::Stored* b,
                            int64_t panelStride) {
  Vec row[Panels][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) row[p][v] = B::get(b + p * panelStride + v * kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const Vec x = splat(a.at(k, i));
#pragma GCC unroll 16
    for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) c[p][i][v] = fma(x, row[p][v], c[p][i][v]);
    }
  }
}

// c = or goes on from acc [Panels][Rows][columns] over kc steps of k; then finish(c).
template <int Rows, int Panels, typename B, typename A, typename Finish>
ELASTIFORM_INLINE void tileOf(int64_t kc, const A a, const void* panel, int64_t panelStride, const float* acc, bool resume,
                              const void* next, int64_t prefetched, const Finish& finish) {
  const auto* b = static_cast<const typename B::Stored*>(panel);
  Vec c[Panels][Rows][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        c[p][i][v] = resume ? load(acc + (p * Rows + i) * kColumns + v * kLanes) : Vec{};
      }
    }
  }
  int64_t k = 0;
  if constexpr (Panels == 1) {
    const char* ahead = static_cast<const char*>(next);
    for (; k < prefetched; ++k) {
      __builtin_prefetch(ahead, 0, 2);
      if constexpr (kColumns * sizeof(typename B::Stored) > 64) __builtin_prefetch(ahead + 64, 0, 2);
      ahead += kColumns * sizeof(typename B::Stored);
      step<Rows, Panels, B>(c, a, k, b + k * kColumns, panelStride);
    }
  }
  // Streams of narrow panels are used faster than the hardware fetches them by itself.
  constexpr bool kFetch = Panels > 1 && sizeof(typename B::Stored) == 2;
  constexpr int64_t kAhead = 2048 / (kColumns * sizeof(typename B::Stored));
#pragma GCC unroll 4
  for (; k < kc; ++k) {
    if constexpr (kFetch) {
#pragma GCC unroll 16
      for (int p = 0; p < Panels; ++p) __builtin_prefetch(b + p * panelStride + (k + kAhead) * kColumns, 0, 3);
    }
    step<Rows, Panels, B>(c, a, k, b + k * kColumns, panelStride);
  }
  finish(c);
}

template <int Rows, int Panels>
ELASTIFORM_INLINE void keep(const Vec (&c)[Panels][Rows][kVectors], float* acc) {
#pragma GCC unroll 16
  for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) store(acc + (p * Rows + i) * kColumns + v * kLanes, c[p][i][v]);
    }
  }
}

template <int Rows, int Panels, typename B>
void tile(int64_t kc, const float* a, const void* panel, int64_t panelStride, float* acc, bool resume, const void* next,
          int64_t prefetched) {
  tileOf<Rows, Panels, B>(kc, PackedRows<Rows>{a}, panel, panelStride, acc, resume, next, prefetched,
                          [&](const auto& c) { keep(c, acc); });
}

template <int Rows>
void tileInPlace(int64_t kc, const float* const* rows, const void* panel, float* acc, bool resume, const void* next,
                 int64_t prefetched) {
  tileOf<Rows, 1, F32>(kc, RowsInPlace<Rows>{rows}, panel, 0, acc, resume, next, prefetched,
                       [&](const auto& c) { keep(c, acc); });
}

template <int Rows>
void addingTile(int64_t kc, const float* const* rows, const void* panel, const float* acc, bool resume,
                const AddedTile& to, const void* next, int64_t prefetched) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    __builtin_prefetch(to.rows[i], 1, 3);
    if constexpr (kColumns * sizeof(float) > 64) __builtin_prefetch(to.rows[i] + 64 / sizeof(float), 1, 3);
  }
  tileOf<Rows, 1, F32>(kc, RowsInPlace<Rows>{rows}, panel, 0, acc, resume, next, prefetched, [&](const auto& c) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* at = to.rows[i] + v * kLanes;
        Vec y = c[0][i][v];
        if (to.bias) y += load(to.bias + v * kLanes);
        if (to.scale) y *= splat(to.scale[i]);
        store(at, y + load(at));
      }
    }
  });
}

template <int Rows>
void transposedTile(int64_t kc, const float* a, int64_t stride, const float* panel, float* acc, bool resume,
                    const char* next, int64_t prefetched) {
  Vec c[1][Rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) c[0][i][v] = resume ? load(acc + i * kColumns + v * kLanes) : Vec{};
  }
  const auto one = [&](const float* from, const float* b) {
    Vec row[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec x = splat(from[i * kColumns]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) c[0][i][v] = fma(x, row[v], c[0][i][v]);
    }
  };
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t k = 0; k < kc; k += kColumns, a += stride, panel += kColumns * kColumns) {
    if (k + kColumns > kc) {
      for (int64_t s = 0; s < kc - k; ++s) one(a + s, panel + s * kColumns);
      break;
    }
    // Of every block of rows the next one, which lies far behind, and a share of the next panel.
    const float* ahead = a + stride;
    for (int64_t s = 0; s < kColumns; ++s) {
      if (s < (Rows * kColumns + kLine - 1) / kLine && k + kColumns < kc) __builtin_prefetch(ahead + s * kLine, 0, 3);
      if (k + s < prefetched) {
        __builtin_prefetch(next, 0, 2);
        if constexpr (kColumns > kLine) __builtin_prefetch(next + 64, 0, 2);
        next += kColumns * sizeof(float);
      }
      one(a + s, panel + s * kColumns);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(acc + i * kColumns + v * kLanes, c[0][i][v]);
  }
}

// Panels a strip of so many rows takes: as many streams as the registers hold accumulators for.
constexpr int stripPanels(int rows) {
  constexpr int accumulators = kLanes == 16 ? 26 : 12;
  return rows * kVectors * 4 <= accumulators ? 4 : rows * kVectors * 2 <= accumulators ? 2 : 1;
}

template <typename B>
ELASTIFORM_INLINE float getOne(const typename B::Stored* p) {
  if constexpr (sizeof(typename B::Stored) == 4) {
    return *p;
  } else {
    typename B::Stored block[kLanes] = {*p};
    return B::get(block)[0];
  }
}

// Lanes L of a whose bit `Half` is set change places with lanes L - Half of b.
template <int Half, int64_t... L>
ELASTIFORM_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int64_t, L...>) {
  const Vec first = __builtin_shufflevector(a, b, ((L & Half) ? kLanes + L - Half : L)...);
  b = __builtin_shufflevector(a, b, ((L & Half) ? kLanes + L : L + Half)...);
  a = first;
}

// Lane i of rows[j] becomes lane j of rows[i].
template <int Half = kLanes / 2>
ELASTIFORM_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & Half)) exchange<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int64_t, kLanes>{});
  }
  if constexpr (Half > 1) transpose<Half / 2>(rows);
}

// dst[k * stride + i] = rows[i][k] for k < count and i < kLanes. Rows may be null: zeros. `room` is how many elements
// may be written: with stride < kLanes every step of k spills into the next, which is written later.
template <typename B>
ELASTIFORM_INLINE void transposeRows(const typename B::Stored* const (&rows)[kLanes], int64_t count, float* dst,
                                     int64_t stride, int64_t room) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = rows[i] ? B::get(rows[i] + k) : Vec{};
    transpose(block);
    if ((k + kLanes - 1) * stride + kLanes <= room) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(dst + (k + i) * stride, block[i]);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t left = room - (k + i) * stride;
        storePartial(dst + (k + i) * stride, block[i], left < kLanes ? left : kLanes);
      }
    }
  }
  for (; k < count; ++k) {
    for (int64_t i = 0; i < kLanes && k * stride + i < room; ++i) {
      dst[k * stride + i] = rows[i] ? getOne<B>(rows[i] + k) : 0.0f;
    }
  }
}

ELASTIFORM_INLINE int64_t tileStart(RowTiles tiles, int64_t t) {
  return t * tiles.size + (t < tiles.longer ? t : tiles.longer);
}

void packA(const MatrixA& a, RowTiles tiles, int64_t begin, int64_t end, int64_t K, float* dst) {
  constexpr int64_t kBlock = 64;  // steps of k per pass, so that neighbouring tiles find their cache lines again
  const bool alongK = a.colStride == 1 && !a.cols && !a.colScale;
  const bool alongRows = a.rowStride == 1 && !a.rows;
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < K ? k0 + kBlock : K;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m0 = tileStart(tiles, t), rows = tileStart(tiles, t + 1) - m0;
      float* to = dst + m0 * K;
      if (alongK && rows > 1) {
        // From the last rows to the first: what spills is written over.
        for (int64_t first = (rows - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
          const float* source[kLanes];
          for (int64_t j = 0; j < kLanes; ++j) {
            const int64_t m = m0 + first + j;
            source[j] = first + j < rows ? a.data + (a.rows ? a.rows[m] : m) * a.rowStride + k0 : nullptr;
          }
          transposeRows<F32>(source, k1 - k0, to + k0 * rows + first, rows, (K - k0) * rows - first);
        }
      } else if (alongRows) {
        for (int64_t k = k0; k < k1; ++k) {
          const float* from = a.data + (a.cols ? a.cols[k] : k) * a.colStride + m0;
          const Vec factor = splat(a.colScale ? a.colScale[k] : 1.0f);
          for (int64_t i = 0; i < rows; i += kLanes) {
            const int64_t n = rows - i < kLanes ? rows - i : kLanes;
            storePartial(to + k * rows + i, loadPartial(from + i, n) * factor, n);
          }
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          const float* row = a.data + (a.rows ? a.rows[m0 + i] : m0 + i) * a.rowStride;
          for (int64_t k = k0; k < k1; ++k) {
            const float value = row[(a.cols ? a.cols[k] : k) * a.colStride];
            to[k * rows + i] = a.colScale ? value * a.colScale[k] : value;
          }
        }
      }
    }
  }
}

template <typename B>
void packPanels(const MatrixB& b, int64_t N, int64_t n0, int64_t panels, int64_t k0, int64_t kc, float* dst) {
  const auto* data = static_cast<const typename B::Stored*>(b.data);
  const auto at = [&](int64_t n) { return data + (b.ns ? b.ns[n] : n) * b.nStride; };
  if (b.nStride == 1 && !b.ns) {
    for (int64_t k = 0; k < kc; ++k) {
      const auto* row = data + (b.ks ? b.ks[k0 + k] : k0 + k) * b.kStride;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t n = n0 + p * kColumns;
        float* to = dst + (p * kc + k) * kColumns;
        if (n + kColumns <= N) {
          for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, B::get(row + n + v * kLanes));
        } else {
          for (int i = 0; i < kColumns; ++i) to[i] = n + i < N ? getOne<B>(row + n + i) : 0.0f;
        }
      }
    }
    return;
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t n = n0 + p * kColumns;
    float* to = dst + p * kc * kColumns;
    if (b.kStride == 1 && !b.ks) {
      for (int j = 0; j < kColumns; j += kLanes) {
        const typename B::Stored* source[kLanes];
        for (int i = 0; i < kLanes; ++i) source[i] = n + j + i < N ? at(n + j + i) + k0 : nullptr;
        transposeRows<B>(source, kc, to + j, kColumns, kc * kColumns - j);
      }
      continue;
    }
    for (int64_t k = 0; k < kc; ++k) {
      const int64_t from = (b.ks ? b.ks[k0 + k] : k0 + k) * b.kStride;
      for (int i = 0; i < kColumns; ++i) {
        to[k * kColumns + i] = n + i < N ? getOne<B>(at(n + i) + from) : 0.0f;
      }
    }
  }
}

void packB(const MatrixB& b, int64_t N, int64_t n0, int64_t panels, int64_t k0, int64_t kc, float* dst) {
  if (b.dtype == DType::BF16) return packPanels<Bf16>(b, N, n0, panels, k0, kc, dst);
  if (b.dtype == DType::F16) return packPanels<F16>(b, N, n0, panels, k0, kc, dst);
  packPanels<F32>(b, N, n0, panels, k0, kc, dst);
}

void widen(const void* src, DType dtype, int64_t count, float* dst) {
  const auto* from = static_cast<const uint16_t*>(src);
  if (dtype == DType::BF16) {
    for (int64_t i = 0; i < count; i += kLanes) store(dst + i, loadBf16(from + i));
  } else {
    for (int64_t i = 0; i < count; i += kLanes) store(dst + i, loadF16(from + i));
  }
}

void transposeTile(const float* acc, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t count = rows - i < kLanes ? rows - i : kLanes;
    for (int64_t j = 0; j < kColumns; j += kLanes) {
      Vec block[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) block[l] = l < count ? load(acc + (i + l) * kColumns + j) : Vec{};
      transpose(block);
      for (int64_t l = 0; l < kLanes; ++l) store(to + (j + l) * kColumns + i, block[l]);
    }
  }
}

void finish(const FinishTile& t, const Epilogue& e, float* out, int64_t ldOut) {
  withAct(e.act, [&]<Act act>() {
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t m = t.m0 + i;
      const float* acc = t.acc[0] + i * kColumns;
      float* to = out + (e.rows ? e.rows[m] : m) * ldOut + t.n0;
      float* pre = e.pre ? e.pre + m * ldOut + t.n0 : nullptr;
      const Vec factor = splat(e.rowScale ? e.rowScale[m] : 1.0f);
      for (int64_t n = 0; n < t.n; n += kLanes) {
        const int64_t width = t.n - n < kLanes ? t.n - n : kLanes;
        Vec y = load(acc + n);
        if (width == kLanes) {
          if (t.bias[0]) y += load(t.bias[0] + t.n0 + n);
          if (pre) store(pre + n, y);
          y = activate<act>(y);
          if (e.rowScale) y *= factor;
          if (e.accumulate) y += load(to + n);
          store(to + n, y);
        } else {
          if (t.bias[0]) y += loadPartial(t.bias[0] + t.n0 + n, width);
          if (pre) storePartial(pre + n, y, width);
          y = activate<act>(y);
          if (e.rowScale) y *= factor;
          if (e.accumulate) y += loadPartial(to + n, width);
          storePartial(to + n, y, width);
        }
      }
    }
  });
}

void finishGated(const FinishTile& t, const GatedEpilogue& e, float* out, int64_t ldOut) {
  withAct(e.act, [&]<Act act>() {
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t at = (t.m0 + i) * ldOut + t.n0;
      for (int64_t n = 0; n < t.n; n += kLanes) {
        const int64_t width = t.n - n < kLanes ? t.n - n : kLanes;
        Vec g = load(t.acc[0] + i * kColumns + n), u = load(t.acc[1] + i * kColumns + n);
        if (t.bias[0]) g += loadPartial(t.bias[0] + t.n0 + n, width);
        if (t.bias[1]) u += loadPartial(t.bias[1] + t.n0 + n, width);
        if (e.g) storePartial(e.g + at + n, g, width);
        if (e.u) storePartial(e.u + at + n, u, width);
        storePartial(out + at + n, activate<act>(g) * u, width);
      }
    }
  });
}

// The largest of x[0..V), and whether any is NaN.
ELASTIFORM_INLINE float largest(const float* x, int64_t V) {
  Vec best = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) best = max(load(x + i), best);
  float result = maxElement(best);
  for (; i < V; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

ELASTIFORM_INLINE int64_t firstIndexOf(const float* x, int64_t V, float value) {
  constexpr int64_t kBlock = 16 * kLanes;
  int64_t i = 0;
  for (; i + kBlock <= V; i += kBlock) {
    IVec found{};
    for (int64_t j = 0; j < kBlock; j += kLanes) found |= load(x + i + j) == splat(value);
    int32_t lane[kLanes], any = 0;
    memcpy(lane, &found, sizeof lane);
    for (int j = 0; j < kLanes; ++j) any |= lane[j];
    if (any) break;
  }
  for (; i < V; ++i) {
    if (x[i] == value) return i;
  }
  return -1;
}

// sum of e^(x - shift)
ELASTIFORM_INLINE double sumExp(const float* x, int64_t V, float shift) {
  DoubleSum total;
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) add(total, exp(load(x + i) - splat(shift)));
  if (i < V) {
    const Vec e = exp(loadPartial(x + i, V - i) - splat(shift));
    add(total, select(laneIndex() < splatInt(static_cast<int32_t>(V - i)), e, Vec{}));
  }
  return sum(total);
}

// p and q: softmax of teacher and student. The logits make room for what a later pass reads.
template <Divergence kind>
LossRow divergenceRow(float* student, float* teacher, int64_t V, float beta, float weight, bool gradient) {
  const float top = largest(student, V), topTeacher = largest(teacher, V);
  LossRow row;
  row.best = firstIndexOf(student, V, top);
  row.bestTeacher = firstIndexOf(teacher, V, topTeacher);
  // With e = e^(t - max t): KL = sum e (t - s) / sum e - (log-sum-exp of t - log-sum-exp of s), which is 0 for equal
  // logits; the reverse is the same with s and t exchanged.
  DoubleSum sumQ, sumP, sumDifference;
  for (int64_t i = 0; i < V; i += kLanes) {
    const int64_t width = V - i < kLanes ? V - i : kLanes;
    const bool whole = width == kLanes;
    const Vec s = whole ? load(student + i) : loadPartial(student + i, width);
    const Vec t = whole ? load(teacher + i) : loadPartial(teacher + i, width);
    Vec q = exp(s - splat(top)), p = exp(t - splat(topTeacher));
    if (!whole) {
      const IVec inside = laneIndex() < splatInt(static_cast<int32_t>(width));
      q = select(inside, q, Vec{});
      p = select(inside, p, Vec{});
    }
    add(sumQ, q);
    add(sumP, p);
    if constexpr (kind == Divergence::Kl) add(sumDifference, select(p == splat(0.0f), Vec{}, p * (t - s)));
    if constexpr (kind == Divergence::ReverseKl) add(sumDifference, select(q == splat(0.0f), Vec{}, q * (s - t)));
    if (gradient && kind != Divergence::Jsd) {
      storePartial(student + i, q, width);
      storePartial(teacher + i, kind == Divergence::Kl ? p : s - t, width);
    }
  }
  const double total = sum(sumQ), totalTeacher = sum(sumP);
  row.lse = top + ::log(total);
  const double lseTeacher = topTeacher + ::log(totalTeacher);
  if (total != total) row.best = -1;
  if (totalTeacher != totalTeacher) row.bestTeacher = -1;
  const Vec scaleQ = splat(static_cast<float>(1.0 / total)), scaleP = splat(static_cast<float>(1.0 / totalTeacher));
  double mean = 0;  // over q, of what the gradient is relative to
  if constexpr (kind == Divergence::Kl) {
    row.value = sum(sumDifference) / totalTeacher - (lseTeacher - row.lse);
  } else if constexpr (kind == Divergence::ReverseKl) {
    mean = sum(sumDifference) / total;
    row.value = mean - (row.lse - lseTeacher);
  } else {
    // log(m / p) and log(m / q) of the mixture m = beta p + (1 - beta) q, from log(p / q) without overflow.
    const Vec share = splat(beta), rest = splat(1.0f - beta), shift = splat(static_cast<float>(lseTeacher - row.lse));
    DoubleSum sumMixedP, sumMixedQ;
    for (int64_t i = 0; i < V; i += kLanes) {
      const int64_t width = V - i < kLanes ? V - i : kLanes;
      const Vec s = loadPartial(student + i, width), t = loadPartial(teacher + i, width);
      const IVec inside = laneIndex() < splatInt(static_cast<int32_t>(width));
      const Vec q = select(inside, exp(s - splat(top)) * scaleQ, Vec{});
      const Vec p = select(inside, exp(t - splat(topTeacher)) * scaleP, Vec{});
      const Vec ratio = (t - s) - shift, e = exp(-abs(ratio));
      const IVec above = ratio >= Vec{};
      const Vec mixed = log(select(above, fma(rest, e, share), fma(share, e, rest)));
      const Vec mixedP = select(above, mixed, mixed - ratio), mixedQ = select(above, mixed + ratio, mixed);
      const Vec logQ = select(q == splat(0.0f), Vec{}, mixedQ);
      add(sumMixedP, select(p == splat(0.0f), Vec{}, p * mixedP));
      add(sumMixedQ, q * logQ);
      if (gradient) {
        storePartial(student + i, q, width);
        storePartial(teacher + i, logQ, width);
      }
    }
    mean = sum(sumMixedQ);
    row.value = 0.0 - beta * sum(sumMixedP) - (1.0f - beta) * mean;
  }
  for (int64_t i = 0; gradient && i < V; i += kLanes) {
    const int64_t width = V - i < kLanes ? V - i : kLanes;
    const Vec q = loadPartial(student + i, width), other = loadPartial(teacher + i, width);
    const Vec relative = other - splat(static_cast<float>(mean));
    Vec g;
    if constexpr (kind == Divergence::Kl) g = splat(weight) * (q * scaleQ - other * scaleP);
    if constexpr (kind == Divergence::ReverseKl) {
      g = splat(weight) * select(q == splat(0.0f), Vec{}, q * scaleQ * relative);
    }
    if constexpr (kind == Divergence::Jsd) g = splat(weight * (beta - 1.0f)) * (q * relative);
    storePartial(student + i, g, width);
  }
  return row;
}

LossRow crossEntropyRow(float* logits, int64_t V, int64_t target, float weight, bool gradient) {
  const float top = largest(logits, V);
  const double total = sumExp(logits, V, top);
  LossRow row;
  row.lse = top + ::log(total);
  row.best = total == total ? firstIndexOf(logits, V, top) : -1;
  row.bestTeacher = -1;
  row.value = target < 0 ? 0.0 : row.lse - logits[target];
  if (gradient) {
    const Vec factor = splat(target < 0 ? 0.0f : static_cast<float>(1.0 / total));
    const float atTarget = target < 0 ? 0.0f : logits[target];
    for (int64_t i = 0; i < V; i += kLanes) {
      const int64_t width = V - i < kLanes ? V - i : kLanes;
      const Vec e = exp(loadPartial(logits + i, width) - splat(top));
      storePartial(logits + i, target < 0 ? Vec{} : splat(weight) * (e * factor), width);
    }
    if (target >= 0) {
      const Vec q = exp(splat(atTarget) - splat(top)) * factor;
      logits[target] = weight * (q[0] - 1.0f);
    }
  }
  return row;
}

constexpr int kChains = kLanes == 4 ? 10 : 12;

float fmaPeak(int64_t steps) {
  Vec c[kChains];
  for (int i = 0; i < kChains; ++i) c[i] = splat(static_cast<float>(i));
  Vec x = splat(0.5f), y = splat(1.0f);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) c[i] = fma(c[i], x, y);
  }
  Vec total{};
  for (int i = 0; i < kChains; ++i) total += c[i];
  return sum(total);
}

template <int Rows>
constexpr void fill(KernelTable& t) {
  t.tile[0][Rows] = tile<Rows, 1, F32>;
  t.tile[1][Rows] = tile<Rows, 1, Bf16>;
  t.tile[2][Rows] = tile<Rows, 1, F16>;
  t.tileInPlace[Rows] = tileInPlace<Rows>;
  t.addingTile[Rows] = addingTile<Rows>;
  t.stripPanels[Rows] = stripPanels(Rows);
  t.transposedTile[Rows] = transposedTile<Rows>;
  t.strip[0][Rows] = tile<Rows, stripPanels(Rows), F32>;
  t.strip[1][Rows] = tile<Rows, stripPanels(Rows), Bf16>;
  t.strip[2][Rows] = tile<Rows, stripPanels(Rows), F16>;
  if constexpr (Rows > 1) fill<Rows - 1>(t);
}

constexpr KernelTable makeTable() {
  KernelTable t{};
  t.rows = kRows;
  t.columns = kColumns;
  fill<kRows>(t);
  t.transposeTile = transposeTile;
  t.packA = packA;
  t.packB = packB;
  t.widen = widen;
  t.finish = finish;
  t.finishGated = finishGated;
  t.divergenceRow[0] = divergenceRow<Divergence::Kl>;
  t.divergenceRow[1] = divergenceRow<Divergence::ReverseKl>;
  t.divergenceRow[2] = divergenceRow<Divergence::Jsd>;
  t.crossEntropyRow = crossEntropyRow;
  t.fmaPeak = fmaPeak;
  t.fmaWidth = int64_t{kChains} * kLanes * 2;
  return t;
}

}  // namespace

extern const KernelTable kernelTable;
const KernelTable kernelTable = makeTable();

}  // namespace elastiform::cpu::ELASTIFORM_ISA
