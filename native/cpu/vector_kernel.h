// The vector code of vector.h, instantiated by vector_{portable,avx2,avx512}.cc for their instruction sets.
#pragma once

#include <math.h>

#include <utility>

#include "cpu/simd.h"
#include "cpu/vector.h"

namespace elastiform::cpu::ELASTIFORM_ISA {

// ---- elementwise

// y[i] = f(operands[i]) with a partial vector at the end; every output is written after its operands were read.
template <typename F, typename... X>
ELASTIFORM_INLINE void map(int64_t n, float* y, const F& f, const X*... x) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)...));
  if (i < n) storePartial(y + i, f(loadPartial(x + i, n - i)...), n - i);
}

static void addVectors(const float* a, const float* b, float* y, int64_t n) {
  map(n, y, [](Vec p, Vec q) { return p + q; }, a, b);
}

static void multiplyVectors(const float* a, const float* b, float* y, int64_t n) {
  map(n, y, [](Vec p, Vec q) { return p * q; }, a, b);
}

static void scaleVector(const float* x, float factor, float* y, int64_t n) {
  map(n, y, [=](Vec v) { return v * splat(factor); }, x);
}

static void addScaled(float* y, const float* x, float factor, int64_t n) {
  map(n, y, [=](Vec a, Vec b) { return fma(b, splat(factor), a); }, static_cast<const float*>(y), x);
}

static void activationVector(int act, const float* x, float* y, int64_t n) {
  withAct(static_cast<Act>(act), [&]<Act kind>() { map(n, y, [](Vec v) { return activate<kind>(v); }, x); });
}

static void activationGradVector(int act, const float* dy, const float* x, float* dx, int64_t n) {
  withAct(static_cast<Act>(act),
          [&]<Act kind>() { map(n, dx, [](Vec d, Vec v) { return d * activateGrad<kind>(v); }, dy, x); });
}

static void softcapVector(float c, const float* x, float* y, int64_t n) {
  map(n, y, [=](Vec v) { return splat(c) * tanh(v * splat(1.0f / c)); }, x);
}

static void softcapGradVector(float c, const float* dy, const float* x, float* dx, int64_t n) {
  map(n, dx,
      [=](Vec d, Vec v) {
        const Vec t = tanh(v * splat(1.0f / c));
        return d * (splat(1.0f) - t * t);
      },
      dy, x);
}

static void gatedActivationVector(int act, const float* g, const float* u, float* y, int64_t n) {
  withAct(static_cast<Act>(act),
          [&]<Act kind>() { map(n, y, [](Vec a, Vec b) { return activate<kind>(a) * b; }, g, u); });
}

static void gatedActivationGradVector(int act, const float* dy, const float* g, const float* u, float* dg, float* du,
                                      int64_t n) {
  withAct(static_cast<Act>(act), [&]<Act kind>() {
    // dg may be dy's memory: both results are made before either is written.
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t m = n - i < kLanes ? n - i : kLanes;
      const Vec d = loadPartial(dy + i, m), a = loadPartial(g + i, m), b = loadPartial(u + i, m);
      const Vec da = d * b * activateGrad<kind>(a), db = d * activate<kind>(a);
      storePartial(dg + i, da, m);
      storePartial(du + i, db, m);
    }
  });
}

// ---- reductions: lanes and their folding depend on n only

template <int Distance, int... I>
ELASTIFORM_INLINE Vec turned(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
}

// Folds lanes at half the width, a quarter, ... onto each other; the result is in every lane.
template <int Distance, typename F>
ELASTIFORM_INLINE Vec fold(Vec v, const F& f) {
  if constexpr (Distance == 0) {
    return v;
  } else {
    return fold<Distance / 2>(f(v, turned<Distance>(v, std::make_integer_sequence<int, kLanes>{})), f);
  }
}
ELASTIFORM_INLINE Vec sumOfLanes(Vec v) {
  return fold<kLanes / 2>(v, [](Vec a, Vec b) { return a + b; });
}
ELASTIFORM_INLINE Vec maxOfLanes(Vec v) {
  return fold<kLanes / 2>(v, [](Vec a, Vec b) { return max(a, b); });
}

// Sum of f(operands[i]) in four vectors of partial sums. f must give 0 where all its operands are 0.
template <typename F, typename... X>
ELASTIFORM_INLINE float sumOf(int64_t n, const F& f, const X*... x) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += f(load(x + i)...);
    s1 += f(load(x + i + kLanes)...);
    s2 += f(load(x + i + 2 * kLanes)...);
    s3 += f(load(x + i + 3 * kLanes)...);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += f(load(x + i)...);
  if (i < n) s1 += f(loadPartial(x + i, n - i)...);
  return sumOfLanes((s0 + s1) + (s2 + s3))[0];
}

// Products and sums in double, in 16 partial sums whatever the instruction set.
static double dotVectors(const float* a, const float* b, int64_t n) {
  double lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int l = 0; l < 16; ++l) lane[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lane[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  double total = 0;
  for (int l = 0; l < 16; ++l) total += lane[l];
  return total;
}

// ---- norms

static float rmsNormRow(const float* x, const float* weight, float eps, float* y, int64_t n) {
  const float square = sumOf(n, [](Vec v) { return v * v; }, x);
  const float rstd = 1.0f / sqrtf(square / static_cast<float>(n) + eps);
  map(n, y, [=](Vec v, Vec w) { return v * splat(rstd) * w; }, x, weight);
  return rstd;
}

static void layerNormRow(const float* x, const float* weight, const float* bias, float eps, float* y, float* mean,
                         float* rstd, int64_t n) {
  const float mu = sumOf(n, [](Vec v) { return v; }, x) / static_cast<float>(n);
  // Around the mean; lanes past the end would add mu^2 each, so the tail is summed apart.
  const int64_t whole = n - n % kLanes;
  float square = sumOf(whole, [=](Vec v) { return (v - splat(mu)) * (v - splat(mu)); }, x);
  for (int64_t i = whole; i < n; ++i) square += (x[i] - mu) * (x[i] - mu);
  const float r = 1.0f / sqrtf(square / static_cast<float>(n) + eps);
  if (bias) {
    map(n, y, [=](Vec v, Vec w, Vec b) { return (v - splat(mu)) * splat(r) * w + b; }, x, weight, bias);
  } else {
    map(n, y, [=](Vec v, Vec w) { return (v - splat(mu)) * splat(r) * w; }, x, weight);
  }
  *mean = mu;
  *rstd = r;
}

static void rmsNormGradRow(const float* dy, const float* x, const float* weight, float rstd, float* dx, float* dweight,
                           int64_t n) {
  const float inner = sumOf(n, [](Vec d, Vec v, Vec w) { return d * w * v; }, dy, x, weight);
  const float pull = rstd * rstd * inner / static_cast<float>(n);
  if (dweight) {
    map(n, dweight, [=](Vec s, Vec d, Vec v) { return fma(d, v * splat(rstd), s); },
        static_cast<const float*>(dweight), dy, x);
  }
  map(n, dx, [=](Vec d, Vec v, Vec w) { return splat(rstd) * (d * w - v * splat(pull)); }, dy, x, weight);
}

static void layerNormGradRow(const float* dy, const float* x, const float* weight, float mean, float rstd, float* dx,
                             float* dweight, float* dbias, int64_t n) {
  const float count = static_cast<float>(n);
  const float plain = sumOf(n, [](Vec d, Vec w) { return d * w; }, dy, weight) / count;
  const float inner =
      sumOf(n, [=](Vec d, Vec v, Vec w) { return d * w * (v - splat(mean)); }, dy, x, weight) / count;
  const float pull = rstd * rstd * inner;
  if (dweight) {
    map(n, dweight, [=](Vec s, Vec d, Vec v) { return fma(d, (v - splat(mean)) * splat(rstd), s); },
        static_cast<const float*>(dweight), dy, x);
  }
  if (dbias) addVectors(dbias, dy, dbias, n);
  map(n, dx,
      [=](Vec d, Vec v, Vec w) { return splat(rstd) * (d * w - splat(plain) - (v - splat(mean)) * splat(pull)); }, dy,
      x, weight);
}

// ---- rotary positions

static void rotationRow(float position, const float* __restrict frequencies, float sign, float magnitude,
                        float* __restrict cosine, float* __restrict sine, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    // The reference models round the angle to f32; its cosine and sine are taken in double, reduced to +-pi/4.
    const float rounded = position * frequencies[i];
    const double angle = rounded;
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const double turns = (angle * 0.63661977236758134308 + magic) - magic;
    const double r = (angle - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17;
    const double fourth = turns * 0.25;
    const double quadrant = turns - 4.0 * (((fourth - 0.375) + magic) - magic);  // 0..3
    const double s = r * r;
    const double sinR =
        r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 - s * (1.0 / 39916800)))));
    const double cosR =
        1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))));
    const bool odd = quadrant == 1.0 || quadrant == 3.0;
    const double c = odd ? sinR : cosR, t = odd ? cosR : sinR;
    cosine[i] = magnitude * static_cast<float>(quadrant == 1.0 || quadrant == 2.0 ? -c : c);
    sine[i] = magnitude * sign * static_cast<float>(quadrant >= 2.0 ? -t : t);
  }
}

static void rotateHead(const float* x, const float* cosine, const float* sine, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    const Vec a = loadPartial(x + i, m), b = loadPartial(x + n + i, m);
    const Vec c = loadPartial(cosine + i, m), s = loadPartial(sine + i, m);
    storePartial(y + i, a * c - b * s, m);
    storePartial(y + n + i, b * c + a * s, m);
  }
}

// ---- optimizer

static void adamwStep(float* __restrict p, float* __restrict g, float* __restrict m, float* __restrict v,
                      const AdamStep& step, int64_t n) {
  const AdamStep k = step;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * k.clip;
    const float first = m[i] + (grad - m[i]) * k.beta1Rest;
    const float second = v[i] * k.beta2 + grad * grad * k.beta2Rest;
    m[i] = first;
    v[i] = second;
    p[i] = p[i] * k.shrink - k.rate * (first / (sqrtf(second) / k.rootCorrection + k.eps));
    g[i] = 0.0f;
  }
}

// ---- sampling

static float maximumOf(const float* x, int64_t n, bool* hasNaN) {
  const Vec lowest = splat(-INFINITY);
  Vec best = lowest;
  IVec bad{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    bad |= v != v;
    best = max(v, best);
  }
  float result = maxElement(best);
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) nan |= bad[lane] != 0;
  for (; i < n; ++i) {
    nan |= x[i] != x[i];
    result = x[i] > result ? x[i] : result;
  }
  *hasNaN = nan;
  return result;
}

static double expSumOf(const float* x, float maximum, float factor, float* y, int64_t n) {
  DoubleSum total;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec e = exp((load(x + i) - splat(maximum)) * splat(factor));
    if (y) store(y + i, e);
    add(total, e);
  }
  double result = sum(total);
  if (i < n) {
    const int64_t m = n - i;
    const Vec e = exp((loadPartial(x + i, m) - splat(maximum)) * splat(factor));
    if (y) storePartial(y + i, e, m);
    for (int64_t j = 0; j < m; ++j) result += e[j];
  }
  return result;
}

// ---- attention: small products in registers

constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;  // 24 accumulators of 32 registers, or 12 of 16

// c[M, NV vectors] (+)= a[M, K] b[K, NV vectors]: element (i, k) of a is a[i * aRow + k * aStep]. Every element of c is
// one chain of fused multiply-adds over k ascending, whatever the tile it is computed in.
template <int M, int NV>
ELASTIFORM_INLINE void tile(int64_t K, const float* a, int64_t aRow, int64_t aStep, const float* b, int64_t bStride,
                            float* c, int64_t cStride, bool accumulate) {
  Vec sums[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sums[i][j] = accumulate ? load(c + i * cStride + j * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec left = splat(a[i * aRow]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
    a += aStep;
    b += bStride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + i * cStride + j * kLanes, sums[i][j]);
  }
}

template <int M>
static void tileRows(int64_t vecs, int64_t K, const float* a, int64_t aRow, int64_t aStep, const float* b,
                     int64_t bStride, float* c, int64_t cStride, bool accumulate) {
  int64_t v = 0;
  for (; v + kTileVecs <= vecs; v += kTileVecs) {
    tile<M, kTileVecs>(K, a, aRow, aStep, b + v * kLanes, bStride, c + v * kLanes, cStride, accumulate);
  }
  if constexpr (kTileVecs == 4) {
    if (v + 2 <= vecs) {
      tile<M, 2>(K, a, aRow, aStep, b + v * kLanes, bStride, c + v * kLanes, cStride, accumulate);
      v += 2;
    }
  }
  if (v < vecs) tile<M, 1>(K, a, aRow, aStep, b + v * kLanes, bStride, c + v * kLanes, cStride, accumulate);
}

// At most kTileRows rows.
static void multiply(int64_t rows, int64_t vecs, int64_t K, const float* a, int64_t aRow, int64_t aStep, const float* b,
                     int64_t bStride, float* c, int64_t cStride, bool accumulate) {
  switch (rows) {
    case 1: return tileRows<1>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    case 2: return tileRows<2>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    case 3: return tileRows<3>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    case 4: return tileRows<4>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    case 5: return tileRows<5>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    case 6: return tileRows<6>(vecs, K, a, aRow, aStep, b, bStride, c, cStride, accumulate);
    default: return;
  }
}

// ---- attention: packing

template <int H, int... I>
ELASTIFORM_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec low = __builtin_shufflevector(a, b, ((I & H) == 0 ? I : kLanes + I - H)...);
  const Vec high = __builtin_shufflevector(a, b, ((I & H) == 0 ? I + H : kLanes + I)...);
  a = low;
  b = high;
}

// Transposes a square of vectors by exchanging its off-diagonal quarters, then theirs, and so on.
template <int H>
ELASTIFORM_INLINE void transpose(Vec* v) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & H) == 0) exchange<H>(v[i], v[i + H], std::make_integer_sequence<int, kLanes>{});
    }
    transpose<H / 2>(v);
  }
}

constexpr int64_t roundUp(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// out[d, j] = x[rowAt(j) + d] for d < width, j < count <= kKeyTile; rows of kKeyTile, zero to the next whole vector. On the
// way asks for the same elements of the rows at `soonAt` of two arrays (null: none), which are needed a tile later.
template <typename RowAt>
static void packTransposed(const float* x, const RowAt& rowAt, int64_t count, int64_t width, float* out,
                           const float* soonK = nullptr, const float* soonV = nullptr,
                           const int64_t* soonAt = nullptr) {
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < width; d += kLanes) {
      if (soonAt && d % 16 == 0) {
        for (int64_t i = 0; i < kLanes; ++i) {
          __builtin_prefetch(soonK + soonAt[j + i] + d, 0, 2);
          __builtin_prefetch(soonV + soonAt[j + i] + d, 0, 2);
        }
      }
      const int64_t columns = width - d < kLanes ? width - d : kLanes;
      Vec block[kLanes];
      if (columns == kLanes && j + kLanes <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(x + rowAt(j + i) + d);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          block[i] = j + i < count ? loadPartial(x + rowAt(j + i) + d, columns) : Vec{};
        }
      }
      transpose<kLanes / 2>(block);
      if (columns == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kKeyTile + j, block[i]);
      } else {
        for (int i = 0; i < columns; ++i) store(out + (d + i) * kKeyTile + j, block[i]);
      }
    }
  }
}

// One row, times factor, padded with zeros to a whole vector.
ELASTIFORM_INLINE void packRow(const float* x, int64_t width, float factor, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d) * splat(factor));
  if (d < width) store(out + d, loadPartial(x + d, width - d) * splat(factor));
}

// ---- attention: what a query sees

// The last key that query position p sees under causal attention.
template <typename Block>
ELASTIFORM_INLINE int64_t lastKey(const Block& t, int64_t p) {
  return t.shift + (t.stands ? t.stands[p] : p);
}

// The first key that query position p sees.
template <typename Block>
ELASTIFORM_INLINE int64_t firstKey(const Block& t, int64_t p) {
  const int64_t key = t.causal ? lastKey(t, p) + 1 - t.window : 0;
  return key > 0 ? key : 0;
}

// The first of `positions` query positions whose last key is the key or a later one; `positions` or more when none is.
template <typename Block>
static int64_t firstPosition(const Block& t, int64_t key, int64_t positions) {
  if (!t.causal) return 0;
  if (!t.stands) return key > t.shift ? key - t.shift : 0;
  int64_t low = 0, high = positions;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (lastKey(t, middle) < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first of `positions` query positions that sees only keys behind the key; at most `positions`.
template <typename Block>
static int64_t endPosition(const Block& t, int64_t key, int64_t positions) {
  if (!t.causal) return positions;
  const int64_t end = firstPosition(t, key + t.window, positions);
  return end < positions ? end : positions;
}

// Scores after soft-capping: the cap times the tanh that the caller needs for the derivative.
ELASTIFORM_INLINE Vec capped(Vec score, float cap, Vec* tanhOf) {
  *tanhOf = tanh(score * splat(1.0f / cap));
  return *tanhOf * splat(cap);
}

// scores[j] += bias[clamp(first + j - stand)], j from `low` to `end`: bias is that of distance 0 and goes `reach` to both sides.
static void addBias(float* scores, int64_t low, int64_t end, int64_t first, int64_t stand, const float* bias,
                    int64_t reach) {
  const auto within = [&](int64_t key) { return key < low ? low : key > end ? end : key; };
  const int64_t near = within(stand - reach - first), far = within(stand + reach - first);
  for (int64_t j = low; j < near; ++j) scores[j] += bias[-reach];
  for (int64_t j = near; j < far; ++j) scores[j] += bias[first + j - stand];
  for (int64_t j = far; j < end; ++j) scores[j] += bias[reach];
}

// ---- attention: forward
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao et al., "FlashAttention". A row's result is
// a function of its query and of the keys it sees: tiles start at fixed keys, scores and weighted sums are chains of
// fused multiply-adds over ascending indices, and keys out of sight enter a sum as exact zeros or not at all.

static int64_t attentionScratchSize(int64_t headDim, int64_t rows) {
  const int64_t padded = roundUp(headDim);
  return rows * 2 * padded + roundUp(rows) * 2 + kQueryRows * kKeyTile + 2 * padded * kKeyTile +
         roundUp(kQueryRows);
}

// The keys [first, first + count) of a segment, and in which pages they lie.
struct TileOfKeys {
  int64_t first = 0, count = 0;
  int64_t at[kKeyTile];   // where the row of a key begins, in elements from page 0 on
  int64_t end[kKeyTile];  // the first key of the tile that is in a later page

  void locate(const AttentionBlock& t, int64_t firstKey, int64_t keys) {
    first = firstKey;
    count = keys;
    int64_t page = first / t.pageRows, row = first % t.pageRows;
    for (int64_t j = 0; j < count; ++page, row = 0) {
      const int64_t start = (t.pages[page] * t.pageRows + row) * t.kvStride;
      const int64_t inPage = t.pageRows - row, stop = inPage < count - j ? j + inPage : count;
      for (int64_t i = j; i < stop; ++i) {
        at[i] = start + (i - j) * t.kvStride;
        end[i] = stop;
      }
      j = stop;
    }
  }
};

// A tile of keys for one kv head, whose part of rows starts at `column`. q and y: [rows, padded], y unnormalised; largest
// and total: the running maximum of a row's scores and the sum of their exponentials around it. soon: the tile whose rows
// are asked for on the way, or null.
static void attentionTile(const AttentionBlock& t, const TileOfKeys& keys, int64_t column, const float* q, float* y,
                          float* largest, float* total, float* work, const TileOfKeys* soon) {
  const int64_t first = keys.first, count = keys.count;
  const int64_t width = t.headDim, padded = roundUp(width), vecs = padded / kLanes;
  float* scores = work;                        // [kQueryRows, kKeyTile]
  float* kt = scores + kQueryRows * kKeyTile;  // [width, kKeyTile]
  float* packedV = kt + padded * kKeyTile;     // [kKeyTile, padded]
  float* factors = packedV + padded * kKeyTile;  // [rows, to whole vectors]
  packTransposed(t.k + column, [&](int64_t j) { return keys.at[j]; }, count, width, kt, t.k + column, t.v + column,
                 soon ? soon->at : nullptr);
  // Values are read once by every register tile of rows: copying them pays from the second tile on.
  const bool packV = t.rows > kTileRows || width != padded;
  if (packV) {
    for (int64_t j = 0; j < count; ++j) packRow(t.v + column + keys.at[j], width, 1.0f, packedV + j * padded);
  }
  const auto visible = [&](int64_t r) {  // keys of this tile that row r sees; more than count means all
    return (t.causal ? lastKey(t, (t.firstRow + r) / t.group) + 1 : t.keys) - first;
  };
  // Rows before `start` or from `stop` on see none of the tile.
  const int64_t positions = (t.firstRow + t.rows - 1) / t.group + 1;
  int64_t start = firstPosition(t, first, positions) * t.group - t.firstRow;
  int64_t stop = endPosition(t, first + count - 1, positions) * t.group - t.firstRow;
  if (start < 0) start = 0;
  if (stop > t.rows) stop = t.rows;
  const auto seenBy = [&](int64_t r) { return visible(r) < count ? visible(r) : count; };
  const auto hiddenFrom = [&](int64_t r) {  // keys of this tile before the first that row r sees
    const int64_t hidden = firstKey(t, (t.firstRow + r) / t.group) - first;
    return hidden > 0 ? hidden : 0;
  };
  const auto wholeVecs = [](int64_t n) { return n / kLanes * kLanes; };
  const auto tileAt = [&](int64_t r) { return stop - r < kTileRows ? stop - r : kTileRows; };
  for (int64_t r = start; r < stop; r += kTileRows) {
    const int64_t rows = tileAt(r), low = wholeVecs(hiddenFrom(r));
    const int64_t seenVecs = (seenBy(r + rows - 1) - low + kLanes - 1) / kLanes;
    multiply(rows, seenVecs, width, q + r * padded, padded, 1, kt + low, kKeyTile, scores + r * kKeyTile + low,
             kKeyTile, false);
  }
  // Row by row over whole tiles: the rows' chains of dependent steps overlap.
  for (int64_t r = start; r < stop; ++r) {
    float* row = scores + r * kKeyTile;
    const int64_t own = seenBy(r), end = (own + kLanes - 1) / kLanes * kLanes, hidden = hiddenFrom(r);
    const int64_t low = wholeVecs(hidden);
    Vec ignored;
    if (t.bias) {
      const int64_t at = t.firstRow + r, head = column / width * t.group + at % t.group;
      addBias(row, low, end, first, lastKey(t, at / t.group), t.bias + head * (2 * t.biasReach + 1) + t.biasReach,
              t.biasReach);
    }
    if (t.softcap > 0) {
      for (int64_t j = low; j < end; j += kLanes) store(row + j, capped(load(row + j), t.softcap, &ignored));
    }
    for (int64_t j = own; j < end; ++j) row[j] = -INFINITY;
    for (int64_t j = low; j < hidden; ++j) row[j] = -INFINITY;
    Vec best = splat(largest[r]);
    for (int64_t j = low; j < end; j += kLanes) best = max(best, load(row + j));
    const float now = maxOfLanes(best)[0];
    factors[r] = largest[r] - now;  // of the old sums: e^(old maximum - new maximum)
    largest[r] = now;
  }
  for (int64_t r = start / kLanes * kLanes; r < stop; r += kLanes) store(factors + r, exp(load(factors + r)));
  for (int64_t r = start; r < stop; ++r) {
    float* row = scores + r * kKeyTile;
    const int64_t firstOfTile = r - (r - start) % kTileRows;
    const int64_t own = seenBy(r), last = seenBy(firstOfTile + tileAt(firstOfTile) - 1);
    const Vec shift = splat(largest[r]);
    Vec sums{};
    // The register tile's first row sees earlier keys, its last row later ones.
    int64_t j = wholeVecs(hiddenFrom(firstOfTile));
    for (; j < wholeVecs(hiddenFrom(r)); j += kLanes) store(row + j, Vec{});
    for (; j < own; j += kLanes) {
      const Vec p = exp(load(row + j) - shift);
      store(row + j, p);
      sums += p;
    }
    for (; j < last; j += kLanes) store(row + j, Vec{});
    total[r] = total[r] * factors[r] + sumOfLanes(sums)[0];
    if (factors[r] != 1.0f) {
      float* to = y + r * padded;
      for (int64_t d = 0; d < padded; d += kLanes) store(to + d, load(to + d) * splat(factors[r]));
    }
  }
  for (int64_t r = start; r < stop; r += kTileRows) {
    const int64_t rows = tileAt(r), last = seenBy(r + rows - 1);
    // Page by page: the chains of sums go on where they were.
    for (int64_t j = wholeVecs(hiddenFrom(r)), next; j < last; j = next) {
      next = !packV && keys.end[j] < last ? keys.end[j] : last;
      multiply(rows, vecs, next - j, scores + r * kKeyTile + j, kKeyTile, 1,
               packV ? packedV + j * padded : t.v + column + keys.at[j], packV ? padded : t.kvStride, y + r * padded,
               padded, true);
    }
  }
}

static void attentionBlock(const AttentionBlock& t) {
  const int64_t width = t.headDim, padded = roundUp(width), rows = t.rows * t.kvHeads;
  float* q = t.scratch;                   // [kvHeads, rows, padded]
  float* y = q + rows * padded;           // [kvHeads, rows, padded]
  float* largest = y + rows * padded;     // [kvHeads, rows]
  float* total = largest + roundUp(rows); // [kvHeads, rows]
  float* work = total + roundUp(rows);
  const auto queryAt = [&](int64_t head, int64_t r) {
    const int64_t row = t.firstRow + r;
    return row / t.group * t.qStride + (head * t.group + row % t.group) * width;
  };
  for (int64_t head = 0; head < t.kvHeads; ++head) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t at = head * t.rows + r;
      packRow(t.q + queryAt(head, r), width, t.scale, q + at * padded);
      for (int64_t d = 0; d < padded; d += kLanes) store(y + at * padded + d, Vec{});
      largest[at] = -INFINITY;
      total[at] = 0;
    }
  }
  const int64_t end = t.causal ? lastKey(t, (t.firstRow + t.rows - 1) / t.group) + 1 : t.keys;
  // Keys outside, heads inside: a long cache is read from end to end.
  TileOfKeys tiles[2];
  const auto locate = [&](TileOfKeys& tile, int64_t first) {
    tile.locate(t, first, end - first < kKeyTile ? end - first : kKeyTile);
  };
  int64_t first = firstKey(t, t.firstRow / t.group) / kKeyTile * kKeyTile;
  if (first < end) locate(tiles[0], first);
  for (int64_t i = 0; first < end; ++i, first += kKeyTile) {
    const TileOfKeys& keys = tiles[i % 2];
    TileOfKeys& next = tiles[(i + 1) % 2];
    if (first + kKeyTile < end) locate(next, first + kKeyTile);
    // Decoding: memory is the limit.
    const bool fetchAhead = t.rows <= kTileRows && first + 2 * kKeyTile <= end;
    for (int64_t head = 0; head < t.kvHeads; ++head) {
      const int64_t at = head * t.rows;
      attentionTile(t, keys, head * width, q + at * padded, y + at * padded, largest + at, total + at, work,
                    fetchAhead ? &next : nullptr);
    }
  }
  for (int64_t head = 0; head < t.kvHeads; ++head) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t at = head * t.rows + r, row = t.firstRow + r;
      scaleVector(y + at * padded, 1.0f / total[at], t.y + queryAt(head, r), width);
      if (t.lse) {
        t.lse[row / t.group * t.lseStride + head * t.group + row % t.group] = largest[at] + logf(total[at]);
      }
    }
  }
}

// ---- attention: gradient
//
// With P = exp(S - lse) and D = rowsum(dy . y): dV = P^T dy, dS = P (dy V^T - D), dQ = scale dS K, dK = dS^T (scale Q).

static int64_t attentionGradScratchSize(int64_t headDim, int64_t rows) {
  const int64_t padded = roundUp(headDim);
  return roundUp(rows) + 2 * padded * kKeyTile + 3 * kKeyTile * padded + 3 * kQueryRows * padded +
         2 * kQueryRows * kKeyTile;
}

static void attentionGradBlock(const AttentionGradBlock& t) {
  const int64_t width = t.headDim, padded = roundUp(width), vecs = padded / kLanes, total = t.positions * t.group;
  float* delta = t.scratch;                       // [total]
  float* kt = delta + roundUp(total);             // [width, kKeyTile]
  float* vt = kt + padded * kKeyTile;             // [width, kKeyTile]
  float* k = vt + padded * kKeyTile;              // [kKeyTile, padded]
  float* dk = k + kKeyTile * padded;              // [kKeyTile, padded]
  float* dv = dk + kKeyTile * padded;             // [kKeyTile, padded]
  float* q = dv + kKeyTile * padded;              // [kQueryRows, padded]
  float* dy = q + kQueryRows * padded;            // [kQueryRows, padded]
  float* dq = dy + kQueryRows * padded;           // [kQueryRows, padded]
  float* probs = dq + kQueryRows * padded;        // [kQueryRows, kKeyTile]
  float* ds = probs + kQueryRows * kKeyTile;      // [kQueryRows, kKeyTile]
  const auto queryAt = [&](int64_t row) { return row / t.group * t.qStride + row % t.group * width; };
  for (int64_t row = 0; row < total; ++row) {
    const int64_t at = queryAt(row);
    delta[row] = sumOf(width, [](Vec a, Vec b) { return a * b; }, t.dy + at, t.y + at);
    memset(t.dq + at, 0, width * sizeof(float));
  }
  for (int64_t first = 0; first < t.keys; first += kKeyTile) {
    const int64_t count = t.keys - first < kKeyTile ? t.keys - first : kKeyTile;
    const auto rowAt = [&](int64_t j) { return (first + j) * t.kvStride; };
    packTransposed(t.k, rowAt, count, width, kt);
    packTransposed(t.v, rowAt, count, width, vt);
    for (int64_t j = 0; j < count; ++j) packRow(t.k + (first + j) * t.kvStride, width, 1.0f, k + j * padded);
    memset(dk, 0, count * padded * sizeof(float));
    memset(dv, 0, count * padded * sizeof(float));
    const int64_t stop = endPosition(t, first + count - 1, t.positions) * t.group;  // rows from it on see none
    for (int64_t r0 = firstPosition(t, first, t.positions) * t.group; r0 < stop; r0 += kQueryRows) {
      const int64_t blockRows = stop - r0 < kQueryRows ? stop - r0 : kQueryRows;
      for (int64_t r = 0; r < blockRows; ++r) {
        packRow(t.q + queryAt(r0 + r), width, t.scale, q + r * padded);
        packRow(t.dy + queryAt(r0 + r), width, 1.0f, dy + r * padded);
      }
      for (int64_t r = 0; r < blockRows; r += kTileRows) {
        const int64_t rows = blockRows - r < kTileRows ? blockRows - r : kTileRows;
        int64_t seen = t.causal ? lastKey(t, (r0 + r + rows - 1) / t.group) + 1 - first : count;
        if (seen > count) seen = count;
        const auto hiddenFrom = [&](int64_t row) {  // keys of this tile before the first that the row sees
          const int64_t hidden = firstKey(t, row / t.group) - first;
          return hidden > 0 ? hidden : 0;
        };
        const int64_t low = hiddenFrom(r0 + r) / kLanes * kLanes, at = r * kKeyTile + low;
        const int64_t seenVecs = (seen - low + kLanes - 1) / kLanes;
        multiply(rows, seenVecs, width, q + r * padded, padded, 1, kt + low, kKeyTile, probs + at, kKeyTile, false);
        multiply(rows, seenVecs, width, dy + r * padded, padded, 1, vt + low, kKeyTile, ds + at, kKeyTile, false);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = r0 + r + i, position = row / t.group;
          float *p = probs + (r + i) * kKeyTile, *s = ds + (r + i) * kKeyTile;
          const Vec lse = splat(t.lse[position * t.lseStride + row % t.group]), d = splat(delta[row]);
          if (t.bias) {
            addBias(p, low, low + seenVecs * kLanes, first, lastKey(t, position),
                    t.bias + row % t.group * (2 * t.biasReach + 1) + t.biasReach, t.biasReach);
          }
          for (int64_t j = low; j < low + seenVecs * kLanes; j += kLanes) {
            Vec score = load(p + j), slope = splat(1.0f);
            if (t.softcap > 0) {
              Vec tanhOf;
              score = capped(score, t.softcap, &tanhOf);
              slope = slope - tanhOf * tanhOf;
            }
            const Vec weight = exp(score - lse);
            store(p + j, weight);
            store(s + j, weight * (load(s + j) - d) * slope);
          }
          int64_t own = t.causal ? lastKey(t, position) + 1 - first : count;
          if (own > count) own = count;
          for (int64_t j = own; j < count; ++j) p[j] = s[j] = 0.0f;
          for (int64_t j = 0; j < hiddenFrom(row); ++j) p[j] = s[j] = 0.0f;
        }
        multiply(rows, vecs, seen - low, ds + at, kKeyTile, 1, k + low * padded, padded, dq + r * padded, padded, false);
        for (int64_t i = 0; i < rows; ++i) addScaled(t.dq + queryAt(r0 + r + i), dq + (r + i) * padded, t.scale, width);
      }
      for (int64_t j = 0; j < count; j += kTileRows) {
        const int64_t keys = count - j < kTileRows ? count - j : kTileRows;
        // Rows before `start` or from `end` on see none of these keys.
        int64_t start = firstPosition(t, first + j, t.positions) * t.group - r0;
        int64_t end = endPosition(t, first + j + keys - 1, t.positions) * t.group - r0;
        if (start < 0) start = 0;
        if (end > blockRows) end = blockRows;
        if (start >= end) continue;
        multiply(keys, vecs, end - start, probs + start * kKeyTile + j, 1, kKeyTile, dy + start * padded, padded,
                 dv + j * padded, padded, true);
        multiply(keys, vecs, end - start, ds + start * kKeyTile + j, 1, kKeyTile, q + start * padded, padded,
                 dk + j * padded, padded, true);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      memcpy(t.dk + (first + j) * t.kvStride, dk + j * padded, width * sizeof(float));
      memcpy(t.dv + (first + j) * t.kvStride, dv + j * padded, width * sizeof(float));
    }
  }
}

extern const VectorOps ops;
const VectorOps ops = {
    addVectors,
    multiplyVectors,
    scaleVector,
    addScaled,
    activationVector,
    activationGradVector,
    softcapVector,
    softcapGradVector,
    gatedActivationVector,
    gatedActivationGradVector,
    dotVectors,
    rmsNormRow,
    layerNormRow,
    rmsNormGradRow,
    layerNormGradRow,
    rotationRow,
    rotateHead,
    adamwStep,
    maximumOf,
    expSumOf,
    attentionScratchSize,
    attentionBlock,
    attentionGradScratchSize,
    attentionGradBlock,
};

}  // namespace elastiform::cpu::ELASTIFORM_ISA
