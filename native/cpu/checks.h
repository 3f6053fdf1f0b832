// Checks of index data and attributes shared by the kernels, and the splitting of a range into chunks of work.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/error.h"
#include "core/pool.h"
#include "ops/attributes.h"
#include "ops/op.h"

namespace elastiform::cpu {

// Attribute i as an integer in [low, high].
inline int64_t intAttribute(const KernelArgs& args, const char* op, int i, const char* name, int64_t low,
                            int64_t high) {
  return checkedInteger(op, name, args.attr[i], low, high);
}

inline double finiteAttribute(const KernelArgs& args, const char* op, int i, const char* name) {
  return checkedFinite(op, name, args.attr[i]);
}

// Row indices: ascending, unique, in [0, limit).
inline void checkRows(const char* op, const int32_t* rows, int64_t count, int64_t limit) {
  int64_t previous = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] <= previous || rows[i] >= limit) {
      fail(ErrorCode::InvalidData, "[%s] rows[%lld] must be in [%lld, %lld) (ascending, unique), got %d", op,
           static_cast<long long>(i), static_cast<long long>(previous + 1), static_cast<long long>(limit), rows[i]);
    }
    previous = rows[i];
  }
}

// Ids in [0, limit), in any order.
inline void checkIds(const char* op, const int32_t* ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      fail(ErrorCode::InvalidData, "[%s] ids[%lld] must be in [0, %lld), got %d", op, static_cast<long long>(i),
           static_cast<long long>(limit), ids[i]);
    }
  }
}

// Segment offsets [segments + 1]: 0 first, never falling, `rows` last. Returns the number of segments.
inline int64_t checkOffsets(const char* op, const TensorView& offsets, int64_t rows, const char* name = "offsets") {
  const int64_t segments = offsets.dim(0) - 1;
  if (segments < 0) fail(ErrorCode::InvalidProgram, "[%s] %s must hold at least one element, got none", op, name);
  const int32_t* o = offsets.i32();
  if (o[0] != 0) fail(ErrorCode::InvalidData, "[%s] %s[0] must be 0, got %d", op, name, o[0]);
  for (int64_t s = 1; s <= segments; ++s) {
    if (o[s] < o[s - 1] || o[s] > rows) {
      fail(ErrorCode::InvalidData, "[%s] %s[%lld] must be in [%d, %lld], got %d", op, name, static_cast<long long>(s),
           o[s - 1], static_cast<long long>(rows), o[s]);
    }
  }
  if (o[segments] != rows) {
    fail(ErrorCode::InvalidData, "[%s] %s[%lld] must be the number of rows %lld, got %d", op, name,
         static_cast<long long>(segments), static_cast<long long>(rows), o[segments]);
  }
  return segments;
}

// Of routers.
inline void checkScores(const char* op, const float* z, int64_t count) {
  int32_t any = 0;  // without a way out, so that it is vectorised
  for (int64_t i = 0; i < count; ++i) any |= z[i] != z[i];
  if (!any) return;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(z[i])) fail(ErrorCode::InvalidData, "[%s] z[%lld] is NaN", op, static_cast<long long>(i));
  }
}

inline void checkPerSegment(const char* op, const TensorView& values, int64_t segments) {
  if (values.dim(0) != segments) {
    fail(ErrorCode::InvalidProgram, "[%s] one value per segment wanted: %lld segments, got %lld values", op,
         static_cast<long long>(segments), static_cast<long long>(values.dim(0)));
  }
}
inline void checkShares(const char* op, const char* name, const float* shares, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(shares[i] >= 0 && shares[i] <= 1)) {
      fail(ErrorCode::InvalidData, "[%s] %s[%lld] must be in [0, 1], got %g", op, name, static_cast<long long>(i),
           static_cast<double>(shares[i]));
    }
  }
}

// The output of a produced dim has room for the bound of that dim, which may be less than all rows.
inline void checkRoom(const char* op, const TensorView& rows, int64_t count) {
  if (count > rows.dim(0)) {
    fail(ErrorCode::InvalidData, "[%s] more rows are selected than the bound %lld of their dim", op,
         static_cast<long long>(rows.dim(0)));
  }
}

// Elements below which waking other threads costs more than it saves.
constexpr int64_t kParallelElements = 32768;

// Calls body(begin, end, worker) on pieces of [0, count), `perChunk` items each: a split by shape only. One piece runs
// on the calling thread without touching the pool.
template <typename Body>
void forChunks(int64_t count, int64_t perChunk, const KernelArgs& args, const Body& body) {
  if (count <= 0) return;
  perChunk = std::max<int64_t>(perChunk, 1);
  if (count <= perChunk) return body(int64_t{0}, count, 0);
  parallelFor((count + perChunk - 1) / perChunk,
              [&](int64_t chunk, int worker) {
                body(chunk * perChunk, std::min(count, (chunk + 1) * perChunk), worker);
              },
              args.abort);
}

// Rows of `width` elements per chunk of about kParallelElements.
inline int64_t rowsPerChunk(int64_t width) {
  return std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, width));
}

// A weight vector [D] as contiguous f32: the operand itself or a converted copy in scratch; null when absent.
inline const float* vectorF32(const KernelArgs& args, const TensorView& w) {
  if (!w) return nullptr;
  if (w.dtype == DType::F32 && (w.strides[0] == 1 || w.dim(0) <= 1)) return w.f32();
  float* copy = args.scratch<float>(w.dim(0));
  for (int64_t i = 0; i < w.dim(0); ++i) copy[i] = loadAsFloat(w.data, w.dtype, i * w.strides[0]);
  return copy;
}

}  // namespace elastiform::cpu
