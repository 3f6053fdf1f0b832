// Checks of a step's attributes, and of operands that a signature cannot say, for the kernels of every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/error.h"

namespace elastiform {

// `value` of attribute `name` as an integer in [low, high].
inline int64_t checkedInteger(const char* op, const char* name, double value, int64_t low, int64_t high) {
  if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high)) || value != std::floor(value)) {
    fail(ErrorCode::InvalidProgram, "[%s] attribute %s must be an integer in [%lld, %lld], got %g", op, name,
         static_cast<long long>(low), static_cast<long long>(high), value);
  }
  return static_cast<int64_t>(value);
}

inline double checkedFinite(const char* op, const char* name, double value) {
  if (!std::isfinite(value)) fail(ErrorCode::InvalidProgram, "[%s] attribute %s must be finite, got %g", op, name, value);
  return value;
}

// As a float, too.
inline float checkedPositive(const char* op, const char* name, double value) {
  const float positive = static_cast<float>(value);
  if (!(std::isnormal(positive) && positive > 0)) {
    fail(ErrorCode::InvalidProgram, "[%s] attribute %s must be a positive number, got %g", op, name, value);
  }
  return positive;
}

// The c of c tanh(x / c); 0: there is none.
inline float checkedSoftcap(const char* op, const char* name, double value) {
  return value == 0 ? 0 : checkedPositive(op, name, value);
}

// Operands of which one alone means nothing.
inline void checkTogether(const char* op, const char* first, bool hasFirst, const char* second, bool hasSecond) {
  if (hasFirst == hasSecond) return;
  fail(ErrorCode::InvalidProgram, "[%s] %s and %s must be given together, got %s alone", op, first, second,
       hasFirst ? first : second);
}

// What an op writes to may share no memory with what it reads once more.
inline void checkApart(const char* op, const char* written, const int32_t* to, int64_t toCount, const char* read,
                       const int32_t* from, int64_t fromCount) {
  if (to + toCount <= from || from + fromCount <= to) return;
  fail(ErrorCode::InvalidProgram, "[%s] %s and %s must not share memory", op, written, read);
}

// Strictly between 0 and 1, as a float too.
inline float checkedShare(const char* op, const char* name, double value) {
  const float share = static_cast<float>(value);
  if (!(std::isnormal(share) && share > 0 && share < 1)) {
    fail(ErrorCode::InvalidProgram, "[%s] attribute %s must be between 0 and 1, got %g", op, name, value);
  }
  return share;
}

}  // namespace elastiform
