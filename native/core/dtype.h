// Element types, their sizes and their conversions to and from f32.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace elastiform {

enum class DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, I32 = 3 };
constexpr int32_t kDTypeCount = 4;

constexpr size_t dtypeSize(DType t) { return t == DType::BF16 || t == DType::F16 ? 2 : 4; }
constexpr const char* dtypeName(DType t) {
  switch (t) {
    case DType::F32: return "f32";
    case DType::BF16: return "bf16";
    case DType::F16: return "f16";
    case DType::I32: return "i32";
  }
  return "?";
}

inline float bf16ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t floatToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  bits += 0x7fffu + ((bits >> 16) & 1);
  return static_cast<uint16_t>(bits >> 16);
}

inline float f16ToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13));
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; overflow to infinity; NaN stays NaN.
inline uint16_t floatToF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and up; 65520.. rounds up below
  if (magnitude < 0x38800000u) {                        // below 2^-14: a subnormal half
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    return sign | static_cast<uint16_t>(std::lrintf(std::ldexp(absolute, 24)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u;
  return sign | static_cast<uint16_t>(rounded >> 13);
}

// Reads element i of an array of a floating dtype.
inline float loadAsFloat(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::BF16: return bf16ToFloat(static_cast<const uint16_t*>(data)[i]);
    case DType::F16: return f16ToFloat(static_cast<const uint16_t*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

}  // namespace elastiform
