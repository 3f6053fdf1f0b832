// What is written to the pages of key-value caches, and what all that read them check.
#include <climits>
#include <utility>

#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

struct Append {
  Operand k, v, offsets, poolK, poolV;
  CacheSlots cache;
  StepState state;

  DEVICE int count() const { return max(offsets.size(0) - 1, 0); }
  DEVICE int first(int s) const { return ldGlobal(offsets.i32() + s); }
  DEVICE int added(int s) const { return first(s + 1) - first(s); }
};

struct ReserveShared {
  bool faulted;
};

// Checks that the new rows fit, and counts them as held. One block.
__global__ void __launch_bounds__(kThreads, 1) reserveKernel(Append t) {
  SHARED_MEMORY(ReserveShared, shared);
  if (blockFaulted(t.state, shared.faulted)) return;
  const int segments = t.count(), tid = threadIdx.x;
  if (tid == 0) {
    const int end = segments > 0 ? t.first(segments) : 0;
    if (end != t.k.size(0)) t.state.report(Fault::OffsetEnd, 2, segments, 0, t.k.size(0), end);
  }
  if (blockFaulted(t.state, shared.faulted)) return;
  t.cache.check<kThreads>(segments, false, [&](int s) { return t.added(s); });
  if (blockFaulted(t.state, shared.faulted)) return;
  for (int s = tid; s < segments; s += kThreads) {
    stGlobal(t.cache.lengths.i32() + t.cache.slot(s), t.cache.length(s) + t.added(s));
  }
}

__global__ void __launch_bounds__(kThreads, 2) appendKernel(Append t) {
  if (t.state.faulted()) return;
  const int width = t.k.size(1), segments = t.count();
  const bool vectors = width % 4 == 0 && startsAligned(t.k, t.v, t.poolK, t.poolV);
  for (int row = blockIdx.x; row < t.k.size(0); row += gridDim.x) {
    const int segment = segmentOf(t.offsets.i32(), segments, row);
    const int position = t.cache.length(segment) + row - t.first(segment + 1);
    const int64_t from = int64_t{row} * width;
    const int64_t to = t.cache.poolRow(t.cache.pagesOf(t.cache.slot(segment)), position) * width;
    forColumns(width, vectors, threadIdx.x, kThreads, [&]<typename V>(int i) {
      store(t.poolK, to + i, load<V>(t.k, from + i));
      store(t.poolV, to + i, load<V>(t.v, from + i));
    });
  }
}

struct PageCopy {
  Operand from, to, poolK, poolV;
  int32_t* writers;  // [pages]: of a page that is copied to, a number of the copy; nothing of others
  StepState state;
};

// Checks that no page is copied to that is copied from or to once more. One block.
__global__ void __launch_bounds__(kThreads, 1) copyCheckKernel(PageCopy t) {
  if (t.state.faulted()) return;
  const int count = t.from.size(0), tid = threadIdx.x;
  for (int i = tid; i < count; i += kThreads) stGlobal(t.writers + ldGlobal(t.from.i32() + i), -1);
  syncThreads();
  for (int i = tid; i < count; i += kThreads) stGlobal(t.writers + ldGlobal(t.to.i32() + i), i);
  syncThreads();
  for (int i = tid; i < count; i += kThreads) {
    const int to = ldGlobal(t.to.i32() + i), from = ldGlobal(t.from.i32() + i), writer = ldGlobal(t.writers + from);
    if (ldGlobal(t.writers + to) != i) t.state.report(Fault::Copy, 1, i, 0, 0, to);
    if (writer >= 0) t.state.report(Fault::Copy, 1, writer, 0, 0, from);
  }
}

// A block copies a page of each pool.
__global__ void __launch_bounds__(kThreads, 2) copyKernel(PageCopy t) {
  if (t.state.faulted()) return;
  const int64_t size = int64_t{t.poolK.size(1)} * t.poolK.size(2);
  const bool vectors = size % 4 == 0 && startsAligned(t.poolK, t.poolV);
  for (int i = blockIdx.x; i < t.from.size(0); i += gridDim.x) {
    const int64_t from = ldGlobal(t.from.i32() + i) * size, to = ldGlobal(t.to.i32() + i) * size;
    forColumns(static_cast<int>(size), vectors, threadIdx.x, kThreads, [&]<typename V>(int column) {
      store(t.poolK, to + column, load<V>(t.poolK, from + column));
      store(t.poolV, to + column, load<V>(t.poolV, from + column));
    });
  }
}

void checkPage(const Launch& launch, const Operand& pool) {
  if (pool.bound[1] * pool.bound[2] <= INT_MAX) return;
  fail(ErrorCode::InvalidProgram, "[%s] a page must have fewer than 2^31 elements, got %lld", launch.op,
       static_cast<long long>(pool.bound[1] * pool.bound[2]));
}

}  // namespace

CacheSlots cacheSlots(const Launch& launch, int input, int poolInput) {
  const Operand &lengths = launch.in[input + 1], &pool = launch.in[poolInput];
  checkPage(launch, pool);
  CacheSlots cache{};
  cache.slots = launch.in[input];
  cache.lengths = lengths;
  cache.pages = launch.in[input + 2];
  cache.pool = pool;
  cache.input = input;
  cache.poolInput = poolInput;
  cache.pageRows = static_cast<int>(pool.bound[1]);
  cache.byPageRows = Divisor(std::max(cache.pageRows, 1));
  cache.owners = launch.scratch<int32_t>(lengths.bound[0]);
  cache.state = launch.state;
  return cache;
}

void cacheAppend(const Launch& launch) {
  const Operand &k = launch.in[0], &v = launch.in[1], &offsets = launch.in[2];
  const Operand& lengths = launch.in[4];
  for (const auto& [name, input] : {std::pair{"offsets", 2}, {"slots", 3}, {"pages", 5}}) {
    const Operand& read = launch.in[input];
    checkApart(launch.op, "lengths", static_cast<const int32_t*>(lengths.data), lengths.boundElements(), name,
               static_cast<const int32_t*>(read.data), read.boundElements());
  }
  checkOffsets(launch, 2, k, 0);
  const Append append{k, v, offsets, launch.in[6], launch.in[7], cacheSlots(launch, 3, 6), launch.state};
  LAUNCH(reserveKernel, 1, kThreads, sizeof(ReserveShared), launch.stream, append);
  LAUNCH(appendKernel, launch.blocks(k.bound[0], 1), kThreads, 0, launch.stream, append);
}

void pageCopy(const Launch& launch) {
  const Operand &from = launch.in[0], &poolK = launch.in[2];
  checkPage(launch, poolK);
  checkIds(launch, 0, poolK, 0);
  checkIds(launch, 1, poolK, 0);
  const PageCopy pages{from, launch.in[1], poolK, launch.in[3], launch.scratch<int32_t>(poolK.bound[0]), launch.state};
  LAUNCH(copyCheckKernel, 1, kThreads, 0, launch.stream, pages);
  LAUNCH(copyKernel, launch.blocks(from.bound[0], 1), kThreads, 0, launch.stream, pages);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
