// Caches of keys and values, which sequences in slots share the pages of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "ops/op.h"

namespace elastiform::cpu {

// Caches of sequences in slots: row t of slot z is row t % pageRows of page pages[z, t / pageRows] of the pools.
struct Slots {
  const char* op;
  const int32_t *slots, *pages;  // slots[s]: of segment s
  int32_t* lengths;              // rows that a slot holds
  int64_t count, pagesPerSlot, poolPages, pageRows;

  // Of the inputs, slots is number `first`, lengths and pages come next. Checks all but lengths and pages.
  Slots(const KernelArgs& args, const char* op, int first, const TensorView& poolK, int64_t segments)
      : op(op), slots(args.in[first].i32()), pages(args.in[first + 2].i32()), lengths(args.in[first + 1].i32()),
        count(args.in[first + 1].dim(0)), pagesPerSlot(args.in[first + 2].dim(1)), poolPages(poolK.dim(0)),
        pageRows(poolK.dim(1)) {
    if (args.in[first].dim(0) != segments) {
      fail(ErrorCode::InvalidProgram, "[%s] one slot per segment wanted: %lld segments, got %lld slots", op,
           static_cast<long long>(segments), static_cast<long long>(args.in[first].dim(0)));
    }
    int32_t* owner = args.scratch<int32_t>(count);
    for (int64_t s = 0; s < segments; ++s) {
      if (slots[s] < 0 || slots[s] >= count) {
        fail(ErrorCode::InvalidData, "[%s] slots[%lld] must be in [0, %lld), got %d", op, static_cast<long long>(s),
             static_cast<long long>(count), slots[s]);
      }
      owner[slots[s]] = static_cast<int32_t>(s);
    }
    for (int64_t s = 0; s < segments; ++s) {
      if (owner[slots[s]] != s) {
        fail(ErrorCode::InvalidData, "[%s] slots[%lld] must be no other segment's, got %d", op,
             static_cast<long long>(s), slots[s]);
      }
    }
  }

  int64_t length(int64_t s) const { return lengths[slots[s]]; }
  const int32_t* pagesOf(int64_t s) const { return pages + slots[s] * pagesPerSlot; }

  // That the slot of segment s holds at least so many rows and may hold so many more.
  void checkLength(int64_t s, int64_t least, int64_t more) const {
    const int64_t room = std::min<int64_t>(pagesPerSlot * pageRows, INT32_MAX) - more;
    if (length(s) >= least && length(s) <= room) return;
    fail(ErrorCode::InvalidData, "[%s] lengths[%d] must be in [%lld, %lld] for the new rows and the cache, got %d", op,
         slots[s], static_cast<long long>(least), static_cast<long long>(room), lengths[slots[s]]);
  }
  // That rows [first, end) of the slot of segment s lie in pages of the pools.
  void checkPages(int64_t s, int64_t first, int64_t end) const {
    for (int64_t row = first; row < end; row = (row / pageRows + 1) * pageRows) {
      const int32_t page = pagesOf(s)[row / pageRows];
      if (page >= 0 && page < poolPages) continue;
      fail(ErrorCode::InvalidData, "[%s] pages: that of row %lld of slot %d must be in [0, %lld), got %d", op,
           static_cast<long long>(row), slots[s], static_cast<long long>(poolPages), page);
    }
  }
};

}  // namespace elastiform::cpu
