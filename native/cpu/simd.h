// Vectors of the instruction set a file is compiled for, and elementary functions on them.
//
// A kernel with one body per instruction set is written once, in a header `x_kernel.h` that includes this file and
// puts everything in `namespace elastiform::cpu::ELASTIFORM_ISA`; three files, compiled with their own flags,
//     #define ELASTIFORM_ISA avx512        // and ELASTIFORM_ISA_LANES 16; avx2 and 8; portable and 4
//     #include "cpu/x_kernel.h"
// instantiate it, and the table of functions of one of them is picked at run time (isa.h). Such headers must not call
// inline functions or templates from elsewhere that the compiler might emit out of line (std::vector, std::function,
// dtype.h): the linker keeps one copy of each, and could keep the one with instructions the machine lacks. Everything
// here is `static` and forced inline.
//
// Element i of every result depends on element i of the operands only, so a tail computed with loadPartial has the
// bits of a full vector. NaN goes through every function; infinities give the mathematical limits.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/act.h"

#if !defined(ELASTIFORM_ISA) || !defined(ELASTIFORM_ISA_LANES)
#error "define ELASTIFORM_ISA and ELASTIFORM_ISA_LANES before including simd.h"
#endif

#define ELASTIFORM_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace elastiform::cpu::ELASTIFORM_ISA {

constexpr int kLanes = ELASTIFORM_ISA_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef double DVec __attribute__((vector_size(kLanes * 4)));

ELASTIFORM_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
ELASTIFORM_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
ELASTIFORM_INLINE IVec loadInt(const int32_t* p) { return *reinterpret_cast<const IVecUnaligned*>(p); }
ELASTIFORM_INLINE Vec splat(float x) { return x - Vec{}; }
ELASTIFORM_INLINE IVec splatInt(int32_t x) { return x - IVec{}; }

ELASTIFORM_INLINE IVec laneIndex() {
  IVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// The first n of kLanes elements (0 <= n <= kLanes); the others are zero and their memory is not touched.
// AddressSanitizer is blind to masked accesses: for it the elements go one by one.
ELASTIFORM_INLINE Vec loadPartial(const float* p, int64_t n) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16 && !defined(__SANITIZE_ADDRESS__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__) && ELASTIFORM_ISA_LANES == 8 && !defined(__SANITIZE_ADDRESS__)
  return (Vec)_mm256_maskload_ps(p, (__m256i)(laneIndex() < splatInt(static_cast<int32_t>(n))));
#else
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
ELASTIFORM_INLINE void storePartial(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16 && !defined(__SANITIZE_ADDRESS__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__) && ELASTIFORM_ISA_LANES == 8 && !defined(__SANITIZE_ADDRESS__)
  _mm256_maskstore_ps(p, (__m256i)(laneIndex() < splatInt(static_cast<int32_t>(n))), (__m256)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// a * b + c, rounded once where the machine can (every AVX2 machine and Arm), else twice: std::fma without hardware
// costs a library call per element.
ELASTIFORM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && ELASTIFORM_ISA_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__) && ELASTIFORM_ISA_LANES == 4
  return (Vec)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON) && ELASTIFORM_ISA_LANES == 4
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

ELASTIFORM_INLINE Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }
ELASTIFORM_INLINE Vec fromBits(IVec v) { return (Vec)v; }
ELASTIFORM_INLINE IVec toBits(Vec v) { return (IVec)v; }
ELASTIFORM_INLINE Vec abs(Vec x) { return (Vec)((IVec)x & 0x7fffffff); }
ELASTIFORM_INLINE Vec copysign(Vec x, Vec sign) {
  return (Vec)(((IVec)x & 0x7fffffff) | ((IVec)sign & static_cast<int32_t>(0x80000000)));
}

// The larger element; where one is NaN, `b`: a running maximum with the new value second keeps or drops NaN as the
// caller orders them.
ELASTIFORM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && ELASTIFORM_ISA_LANES == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__) && ELASTIFORM_ISA_LANES == 4
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
ELASTIFORM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && ELASTIFORM_ISA_LANES == 8
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__) && ELASTIFORM_ISA_LANES == 4
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Horizontal reductions, halves folded onto each other: an order fixed by the width alone.
ELASTIFORM_INLINE float sum(Vec v) {
  float lane[kLanes];
  memcpy(lane, &v, sizeof lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}
// NaN elements may be ignored.
ELASTIFORM_INLINE float maxElement(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// A sum of f32 vectors kept in double.
struct DoubleSum {
  DVec low{}, high{};
};
ELASTIFORM_INLINE void add(DoubleSum& total, Vec v) {
  typedef float HalfVec __attribute__((vector_size(kLanes * 2)));
  HalfVec halves[2];
  memcpy(halves, &v, sizeof v);
  total.low += __builtin_convertvector(halves[0], DVec);
  total.high += __builtin_convertvector(halves[1], DVec);
}
ELASTIFORM_INLINE double sum(const DoubleSum& total) {
  const DVec both = total.low + total.high;
  double lane[kLanes / 2];
  memcpy(lane, &both, sizeof lane);
  for (int width = kLanes / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HalfUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// kLanes elements of 16 bits, widened exactly.
ELASTIFORM_INLINE Vec loadBf16(const uint16_t* p) {
  const Half h = *reinterpret_cast<const HalfUnaligned*>(p);
  return (Vec)(__builtin_convertvector(h, IVec) << 16);
}
ELASTIFORM_INLINE Vec loadF16(const uint16_t* p) {
#if defined(__AVX512F__) && ELASTIFORM_ISA_LANES == 16
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && ELASTIFORM_ISA_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // The exponent is rebiased by a multiplication, which is exact and makes subnormal halves normal.
  const IVec h = __builtin_convertvector(*reinterpret_cast<const HalfUnaligned*>(p), IVec);
  const Vec magnitude = (Vec)((h & 0x7fff) << 13) * splat(0x1p112f);
  const IVec special = magnitude >= splat(65536.0f);  // exponent 31: infinity or NaN
  return (Vec)((IVec)magnitude | (special & 0x7f800000) | ((h & 0x8000) << 16));
#endif
}

// e^x to about 1 ulp: e^x = 2^n e^r, |r| <= ln2 / 2, a polynomial of our own fit (relative error 3e-9). Overflows to
// infinity, underflows through the subnormals to 0.
ELASTIFORM_INLINE Vec exp(Vec x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  // ln2 in two parts, the first with so few bits that n times it is exact.
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec q = splat(1.381314237e-03f);
  q = fma(q, r, splat(8.369419044e-03f));
  q = fma(q, r, splat(4.166845683e-02f));
  q = fma(q, r, splat(1.666651479e-01f));
  q = fma(q, r, splat(4.999999305e-01f));
  const Vec p = fma(q, r * r, r) + splat(1.0f);
#if ELASTIFORM_ISA_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // 2^n in two factors: n reaches -150 and 128.
  const IVec power = (IVec)shifted - (IVec)magic, half = power >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((power - half + 127) << 23);
#endif
}

// The logarithm of normal numbers: x = 2^n m with m within sqrt(2) of 1, log m = 2 artanh((m - 1) / (m + 1)) by its
// series (relative error 2e-9 before rounding). NaN stays NaN; what is not positive and normal gives no sensible value.
ELASTIFORM_INLINE Vec log(Vec x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;  // sqrt(1/2), in bits
  const IVec n = (toBits(x) - kRootHalf) >> 23;
  const Vec m = fromBits(toBits(x) - (n << 23));
  const Vec s = (m - splat(1.0f)) / (m + splat(1.0f)), z = s * s;
  Vec series = splat(1.0f / 9);
  series = fma(series, z, splat(1.0f / 7));
  series = fma(series, z, splat(1.0f / 5));
  series = fma(series, z, splat(1.0f / 3));
  const Vec logM = fma(splat(2.0f) * s, z * series, splat(2.0f) * s);
  const Vec count = __builtin_convertvector(n, Vec);
  return select(x == x, fma(count, splat(0.693147181f), logM), x);
}

ELASTIFORM_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// Polynomial of our own fit (relative error 4e-9) below 0.625, the exponential above.
ELASTIFORM_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x), square = x * x;
  Vec q = splat(-5.704990372e-03f);
  q = fma(q, square, splat(2.063909062e-02f));
  q = fma(q, square, splat(-5.373971627e-02f));
  q = fma(q, square, splat(1.333144221e-01f));
  q = fma(q, square, splat(-3.333328194e-01f));
  const Vec small = fma(q * square, x, x);
  const Vec large = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  return select(magnitude < splat(0.625f), small, copysign(large, x));
}

// Below 0.92 x + x q(x^2), above 1 - exp(-p(|x|)); polynomials of our own fit (relative errors 2e-8 and 2e-9).
ELASTIFORM_INLINE Vec erf(Vec x) {
  const Vec magnitude = abs(x), square = x * x;
  Vec q = splat(-5.862177026e-04f);
  q = fma(q, square, splat(4.967530562e-03f));
  q = fma(q, square, splat(-2.674888590e-02f));
  q = fma(q, square, splat(1.128132155e-01f));
  q = fma(q, square, splat(-3.761244608e-01f));
  q = fma(q, square, splat(1.283791424e-01f));
  const Vec small = fma(q, x, x);
  const Vec t = magnitude > splat(4.0f) ? splat(4.0f) : magnitude;
  Vec p = splat(-1.982207078e-04f);
  p = fma(p, t, splat(3.065499828e-03f));
  p = fma(p, t, splat(-2.231524806e-02f));
  p = fma(p, t, splat(1.041137456e-01f));
  p = fma(p, t, splat(6.369760131e-01f));
  p = fma(p, t, splat(1.127797281e+00f));
  p = fma(p, t, splat(1.664390700e-04f));
  const Vec large = splat(1.0f) - exp(-p);
  return select(magnitude < splat(0.92f), small, copysign(large, x));
}

// sigmoid(x) and its derivative without cancellation at either end.
ELASTIFORM_INLINE void sigmoidAndSlope(Vec x, Vec* value, Vec* slope) {
  const Vec one = splat(1.0f), e = exp(-abs(x)), inverse = one / (one + e);
  *slope = e * inverse * inverse;
  *value = select(x < splat(0.0f), e * inverse, inverse);
}

// 2 sqrt(2/pi) (x + 0.044715 x^3): gelu in its tanh form is x * sigmoid of this.
ELASTIFORM_INLINE Vec geluTanhArgument(Vec x) {
  return x * fma(splat(0.0713548162726f), x * x, splat(1.59576912161f));
}

// act(x), as docs/ops.md numbers it. Infinities: gelu and silu of minus infinity are NaN (0 times infinity).
template <Act act>
ELASTIFORM_INLINE Vec activate(Vec x) {
  if constexpr (act == Act::GeluTanh) return x * sigmoid(geluTanhArgument(x));
  if constexpr (act == Act::GeluErf) {
    return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.707106781187f)));
  }
  if constexpr (act == Act::Silu) return x * sigmoid(x);
  if constexpr (act == Act::Relu) return x < splat(0.0f) ? splat(0.0f) : x;
  return x;
}

// d act / dx. Arguments are clamped where the derivative is 0 or 1 to the last bit.
template <Act act>
ELASTIFORM_INLINE Vec activateGrad(Vec x) {
  const Vec one = splat(1.0f);
  Vec c = x < splat(-128.0f) ? splat(-128.0f) : x;
  c = c > splat(128.0f) ? splat(128.0f) : c;
  if constexpr (act == Act::GeluTanh) {
    Vec s, slope;
    sigmoidAndSlope(geluTanhArgument(c), &s, &slope);
    return fma(c * fma(splat(3.0f * 0.0713548162726f), c * c, splat(1.59576912161f)), slope, s);
  }
  if constexpr (act == Act::GeluErf) {
    const Vec cdf = fma(splat(0.5f), erf(c * splat(0.707106781187f)), splat(0.5f));
    return fma(c * splat(0.398942280401f), exp(splat(-0.5f) * c * c), cdf);
  }
  if constexpr (act == Act::Silu) {
    Vec s, slope;
    sigmoidAndSlope(c, &s, &slope);
    return fma(c, slope, s);
  }
  if constexpr (act == Act::Relu) return x > splat(0.0f) ? one : x != x ? x : splat(0.0f);
  return one;
}

// Calls body.template operator()<act>() for the run-time value of act.
template <typename Body>
ELASTIFORM_INLINE void withAct(Act act, const Body& body) {
  switch (act) {
    case Act::None: return body.template operator()<Act::None>();
    case Act::GeluTanh: return body.template operator()<Act::GeluTanh>();
    case Act::GeluErf: return body.template operator()<Act::GeluErf>();
    case Act::Silu: return body.template operator()<Act::Silu>();
    case Act::Relu: return body.template operator()<Act::Relu>();
  }
}

}  // namespace elastiform::cpu::ELASTIFORM_ISA
