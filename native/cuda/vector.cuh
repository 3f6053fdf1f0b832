// Loops over elements and matrices, four floats at a time where pointers and widths permit, one at a time elsewhere.
// Their bodies are templates of the type moved at once, V: float4 or float.
#pragma once

#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

// Whether every operand starts where four of its elements may be moved at once. An absent one does.
template <typename... Operands>
DEVICE bool startsAligned(const Operands&... operands) {
  return (((reinterpret_cast<uintptr_t>(operands.data) & (operands.dtype == DType::F32 ? 15 : 7)) == 0) && ...);
}

// f of the elements of x, one by one.
template <typename F, typename... X>
DEVICE float each(const F& f, float first, const X&... x) {
  return f(first, x...);
}
template <typename F, typename... X>
DEVICE float4 each(const F& f, const float4& first, const X&... x) {
  return float4{f(first.x, x.x...), f(first.y, x.y...), f(first.z, x.z...), f(first.w, x.w...)};
}

struct Times {
  DEVICE float operator()(float a, float b) const { return a * b; }
};
struct Sum {
  DEVICE float operator()(float a, float b) const { return a + b; }
};

DEVICE float sumOf(float x) { return x; }
DEVICE float sumOf(const float4& x) { return (x.x + x.y) + (x.z + x.w); }

// Elements i, ... of an operand of any floating dtype.
template <typename V>
DEVICE V load(const Operand& x, int64_t i) {
  if (x.dtype == DType::F32) return ldGlobal<V>(x.f32() + i);
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + i;
  if constexpr (sizeof(V) == sizeof(float)) {
    const uint16_t bits = ldGlobal(from);
    return x.dtype == DType::BF16 ? toFloat(bf16{bits}) : toFloat(f16{bits});
  } else {
    const uint2 bits = ldGlobal<uint2>(from);
    if (x.dtype == DType::BF16) return float4{lowBf16(bits.x), highBf16(bits.x), lowBf16(bits.y), highBf16(bits.y)};
    const auto half = [](uint32_t word) { return toFloat(f16{static_cast<uint16_t>(word)}); };
    return float4{half(bits.x), half(bits.x >> 16), half(bits.y), half(bits.y >> 16)};
  }
}

// The same of an f32 or bf16 operand, to be written.
template <typename V>
DEVICE void store(const Operand& y, int64_t i, const V& value) {
  if (y.dtype == DType::F32) {
    stGlobal(y.f32() + i, value);
    return;
  }
  bf16* to = static_cast<bf16*>(y.data) + i;
  if constexpr (sizeof(V) == sizeof(float)) {
    stGlobal(to, toBf16(value));
  } else {
    stGlobal(to, uint2{packBf16(value.x, value.y), packBf16(value.z, value.w)});
  }
}

// Calls body.operator()<V>(i) on the elements from i, over the whole grid.
template <typename Body>
DEVICE void forElements(int64_t count, bool vectors, const Body& body) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  const int64_t whole = vectors ? count / 4 : 0;
  for (int64_t i = first; i < whole; i += step) body.template operator()<float4>(i * 4);
  for (int64_t i = whole * 4 + first; i < count; i += step) body.template operator()<float>(i);
}

// Calls body.operator()<V>(row, column) on the elements of [rows, width] from there, over the whole grid. `vectors`
// says that rows start where four elements may be moved at once.
template <typename Body>
DEVICE void forCells(int rows, int width, bool vectors, const Body& body) {
  const auto walk = [&]<typename V>() {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    const int columns = width / kLanes;
    if (columns == 0) return;
    // One division; from there on a step of the grid is so many rows and columns.
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    const int rowStep = static_cast<int>(step / columns), columnStep = static_cast<int>(step % columns);
    int64_t row = first / columns;
    int column = static_cast<int>(first % columns);
    while (row < rows) {
      body.template operator()<V>(static_cast<int>(row), column * kLanes);
      row += rowStep;
      column += columnStep;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
  };
  if (vectors) {
    walk.template operator()<float4>();
  } else {
    walk.template operator()<float>();
  }
}

// Calls body.operator()<V>(column) on the elements of a row, shared among `group` threads of which this is `member`.
template <typename Body>
DEVICE void forColumns(int width, bool vectors, int member, int group, const Body& body) {
  if (vectors) {
    for (int c = member * 4; c < width; c += group * 4) body.template operator()<float4>(c);
  } else {
    for (int c = member; c < width; c += group) body.template operator()<float>(c);
  }
}

}  // namespace elastiform::ELASTIFORM_DEVICE
