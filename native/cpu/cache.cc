// What is written to the pages of key-value caches.
#include "cpu/cache.h"

#include <cstring>
#include <utility>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace elastiform::cpu {

void cacheAppend(const KernelArgs& args) {
  const char* op = "cache_append";
  const TensorView& lengths = args.in[4];
  for (const auto& [name, input] : {std::pair{"offsets", 2}, {"slots", 3}, {"pages", 5}}) {
    checkApart(op, "lengths", lengths.i32(), lengths.elements(), name, args.in[input].i32(), args.in[input].elements());
  }
  const int64_t rows = args.in[0].dim(0), width = args.in[0].dim(1);
  const int64_t segments = checkOffsets(op, args.in[2], rows);
  const int32_t* offsets = args.in[2].i32();
  const TensorView &poolK = args.in[6], &poolV = args.in[7];
  const Slots slots(args, op, 3, poolK, segments);
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t added = offsets[s + 1] - offsets[s];
    slots.checkLength(s, 0, added);
    slots.checkPages(s, slots.length(s), slots.length(s) + added);
  }
  const float *k = args.in[0].f32(), *v = args.in[1].f32();
  forChunks(rows, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    int64_t s = std::upper_bound(offsets, offsets + segments + 1, begin) - offsets - 1;
    for (int64_t row = begin; row < end; ++row) {
      while (row >= offsets[s + 1]) ++s;
      const int64_t position = slots.length(s) + row - offsets[s];
      const int64_t page = slots.pagesOf(s)[position / slots.pageRows];
      const int64_t to = (page * slots.pageRows + position % slots.pageRows) * width;
      std::memcpy(poolK.f32() + to, k + row * width, static_cast<size_t>(width) * sizeof(float));
      std::memcpy(poolV.f32() + to, v + row * width, static_cast<size_t>(width) * sizeof(float));
    }
  });
  // Last, so that an aborted run leaves the cache as it was.
  for (int64_t s = 0; s < segments; ++s) slots.lengths[slots.slots[s]] += offsets[s + 1] - offsets[s];
}

void pageCopy(const KernelArgs& args) {
  const char* op = "page_copy";
  const TensorView &poolK = args.in[2], &poolV = args.in[3];
  const int64_t count = args.in[0].dim(0), pages = poolK.dim(0), size = poolK.dim(1) * poolK.dim(2);
  const int32_t *from = args.in[0].i32(), *to = args.in[1].i32();
  enum : uint8_t { kRead = 1, kWritten = 2 };
  uint8_t* use = args.scratch<uint8_t>(pages);
  std::fill_n(use, pages, uint8_t{0});
  for (const auto& [name, input] : {std::pair{"from", from}, {"to", to}}) {
    for (int64_t i = 0; i < count; ++i) {
      if (input[i] >= 0 && input[i] < pages) continue;
      fail(ErrorCode::InvalidData, "[%s] %s[%lld] must be in [0, %lld), got %d", op, name, static_cast<long long>(i),
           static_cast<long long>(pages), input[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) use[from[i]] = kRead;
  for (int64_t i = 0; i < count; ++i) {
    if (use[to[i]] != 0) {
      fail(ErrorCode::InvalidData, "[%s] to[%lld] must be copied to once, and not from, got %d", op,
           static_cast<long long>(i), to[i]);
    }
    use[to[i]] = kWritten;
  }
  forChunks(count, rowsPerChunk(2 * size), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      for (const TensorView* pool : {&poolK, &poolV}) {
        std::memcpy(pool->f32() + to[i] * size, pool->f32() + from[i] * size, static_cast<size_t>(size) * sizeof(float));
      }
    }
  });
}

}  // namespace elastiform::cpu
