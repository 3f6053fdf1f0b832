// Four or eight neighbouring elements of a row at a time: one access where they are aligned, else one each.
#pragma once

#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

// Whether the four may be accessed as one.
template <typename T>
DEVICE bool alignedFour(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

// As they are stored: words of f32, or 16-bit elements two to a word in x and y.
using Four = uint4;

// The first `count` of the four elements at `from`, any number; the others are 0.
template <typename T>
DEVICE Four loadFour(const T* from, int count) {
  Four four{};
  if constexpr (sizeof(T) == 4) {
    if (count >= 4 && alignedFour(from)) return ldGlobal<Four>(from);
    if (count > 0) four.x = asUint(ldGlobal(from));
    if (count > 1) four.y = asUint(ldGlobal(from + 1));
    if (count > 2) four.z = asUint(ldGlobal(from + 2));
    if (count > 3) four.w = asUint(ldGlobal(from + 3));
  } else {
    if (count >= 4 && alignedFour(from)) {
      const uint2 pairs = ldGlobal<uint2>(from);
      four.x = pairs.x;
      four.y = pairs.y;
      return four;
    }
    if (count > 0) four.x = ldGlobal(from).bits;
    if (count > 1) four.x |= uint32_t{ldGlobal(from + 1).bits} << 16;
    if (count > 2) four.y = ldGlobal(from + 2).bits;
    if (count > 3) four.y |= uint32_t{ldGlobal(from + 3).bits} << 16;
  }
  return four;
}

// The first `count` to shared memory, asynchronously; the others stay what they are.
DEVICE void copyFour(float* to, const float* from, int count) {
  if (count >= 4 && alignedFour(from)) {
    cpAsync16(to, from);
    return;
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < count) cpAsync4(to + i, from + i);
  }
}

// The first `count` of the eight elements at `from`, any number and aligned to nothing; the others are 0.
DEVICE uint4 loadEight(const bf16* from, int count) {
  uint32_t pair[4] = {};
  UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) pair[i / 2] |= uint32_t{ldGlobal(from + i).bits} << i % 2 * 16;
  }
  return {pair[0], pair[1], pair[2], pair[3]};
}
DEVICE void storeEight(bf16* to, const uint4& eight, int count) {
  const uint32_t pair[4] = {eight.x, eight.y, eight.z, eight.w};
  UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) stGlobal(to + i, bf16{static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16)});
  }
}

// The first `count` of the eight elements at `from`, any number, to shared memory; the others become 0. `any` is some
// aligned address.
DEVICE void copyEight(bf16* to, const bf16* from, int count, const void* any) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    cpAsync16(to, from);
  } else if (count <= 0) {
    cpAsync16(to, any, false);
  } else {
    stShared(to, loadEight(from, count));
  }
}

template <typename T>
DEVICE float4 widened(const Four& four) {
  if constexpr (sizeof(T) == 4) {
    return {asFloat(four.x), asFloat(four.y), asFloat(four.z), asFloat(four.w)};
  } else {
    const auto element = [](uint32_t bits) { return toFloat(T{static_cast<uint16_t>(bits)}); };
    return {element(four.x), element(four.x >> 16), element(four.y), element(four.y >> 16)};
  }
}

DEVICE void storeFour(float* to, const float4& v, int count) {
  if (count >= 4 && alignedFour(to)) {
    stGlobal(to, v);
    return;
  }
  if (count > 0) stGlobal(to, v.x);
  if (count > 1) stGlobal(to + 1, v.y);
  if (count > 2) stGlobal(to + 2, v.z);
  if (count > 3) stGlobal(to + 3, v.w);
}

DEVICE void storeFour(bf16* to, const float4& v, int count) {
  if (count >= 4 && alignedFour(to)) {
    stGlobal(to, uint2{packBf16(v.x, v.y), packBf16(v.z, v.w)});
    return;
  }
  if (count > 0) stGlobal(to, toBf16(v.x));
  if (count > 1) stGlobal(to + 1, toBf16(v.y));
  if (count > 2) stGlobal(to + 2, toBf16(v.z));
  if (count > 3) stGlobal(to + 3, toBf16(v.w));
}

DEVICE void spread(const float4& v, float (&elements)[4]) {
  elements[0] = v.x;
  elements[1] = v.y;
  elements[2] = v.z;
  elements[3] = v.w;
}
DEVICE float4 gathered(const float (&elements)[4]) { return {elements[0], elements[1], elements[2], elements[3]}; }

}  // namespace elastiform::ELASTIFORM_DEVICE
