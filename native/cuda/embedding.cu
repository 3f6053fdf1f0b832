// Table look-up and its gradient.
#include "cuda/collectives.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 6)
    embeddingKernel(Operand table, Operand ids, Operand y, StepState state) {
  if (state.faulted()) return;
  const int width = y.size(1);
  const bool vectors = width % 4 == 0 && table.stride % 4 == 0 && startsAligned(table, y);
  forCells(y.size(0), width, vectors, [&]<typename V>(int r, int c) {
    stGlobal(y.f32() + int64_t{r} * width + c, load<V>(table, ldGlobal(ids.i32() + r) * table.stride + c));
  });
}

// ---- Gradient: rows sorted by id, then a sum over each run of equal ids, in the order of rows

// Two digits do for vocabularies of up to 262144 ids.
constexpr int kDigitBits = 9, kDigits = 1 << kDigitBits;
constexpr int kSortWarps = 32;

struct SortShared {
  int place[kSortWarps][kDigits];  // how many rows of a warp have a digit, then where the next of them goes
  int warpTotal[kDigits / 32];
};

// A stable radix sort of the rows by the digit of their ids at bit `shift`: from `from` (null: rows as they come) to
// `to`. One block: every warp has one run of consecutive rows, and takes 32 of them at a time.
__global__ void __launch_bounds__(kSortWarps * 32, 1)
    sortKernel(Operand ids, const int* from, int* to, int shift, StepState state) {
  SHARED_MEMORY(SortShared, s);
  if (state.faulted()) return;
  const int thread = threadIdx.x, lane = laneId(), warp = warpId(), count = ids.size(0);
  const int run = (count + kSortWarps * 32 - 1) / (kSortWarps * 32) * 32;
  const int64_t begin = int64_t{warp} * run, end = min(begin + run, int64_t{count});
  // Calls body(row, place of its digit, lanes with the same digit) with all lanes; past the end nothing has the digit.
  const auto forRows = [&](const auto& body) {
    for (int64_t first = begin; first < end; first += 32) {
      const bool valid = first + lane < end;
      const int row = !valid ? 0 : from ? ldGlobal(from + first + lane) : static_cast<int>(first + lane);
      const int digit = valid ? ldGlobal(ids.i32() + row) >> shift & (kDigits - 1) : kDigits;
      const uint32_t peers = matchAny(static_cast<uint32_t>(digit));
      body(valid, row, &s.place[warp][valid ? digit : 0], peers);
    }
  };

  for (int i = thread; i < kSortWarps * kDigits; i += kSortWarps * 32) s.place[i / kDigits][i % kDigits] = 0;
  syncThreads();  // counts are zero
  forRows([&](bool valid, int, int* place, uint32_t peers) {
    if (valid && lane == lowestBit(peers)) *place += popCount(peers);
    syncWarp();
  });
  syncThreads();  // counts are complete

  // Places: digits in their order, the rows of one digit by warp. A thread has a digit.
  int total = 0, upTo = 0;
  if (thread < kDigits) {
    for (int w = 0; w < kSortWarps; ++w) total += s.place[w][thread];
    upTo = warpScan(total);
    if (lane == 31) s.warpTotal[warp] = upTo;
  }
  syncThreads();  // warpTotal is complete
  if (thread < kDigits) {
    int place = upTo - total;
    for (int w = 0; w < warp; ++w) place += s.warpTotal[w];
    for (int w = 0; w < kSortWarps; ++w) {
      const int own = s.place[w][thread];
      s.place[w][thread] = place;
      place += own;
    }
  }
  syncThreads();  // places are complete

  forRows([&](bool valid, int row, int* place, uint32_t peers) {
    if (valid) stGlobal(to + *place + popCount(peers & ((1u << lane) - 1)), row);
    syncWarp();  // all lanes have read their places
    if (valid && lane == lowestBit(peers)) *place += popCount(peers);
    syncWarp();
  });
}

constexpr int kAtOnce = 8;  // rows of a long run that are in flight together

// dtable holds zeros. order: the rows by id, then ascending.
__global__ void __launch_bounds__(kThreads, 4)
    embeddingGradKernel(Operand dy, Operand ids, const int* order, Operand dtable, StepState state) {
  if (state.faulted()) return;
  const int count = dy.size(0), width = dy.size(1);
  const auto idAt = [&](int i) { return ldGlobal(ids.i32() + ldGlobal(order + i)); };
  forCells(count, width, width % 4 == 0 && startsAligned(dy, dtable), [&]<typename V>(int i, int c) {
    const int id = idAt(i);
    if (i > 0 && idAt(i - 1) == id) return;
    const auto load = [&](int j) { return ldGlobal<V>(dy.f32() + int64_t{ldGlobal(order + j)} * width + c); };
    V sum{};
    int j = i;
    for (; j + kAtOnce <= count && idAt(j + kAtOnce - 1) == id; j += kAtOnce) {
      V value[kAtOnce];
      UNROLL
      for (int k = 0; k < kAtOnce; ++k) value[k] = load(j + k);
      UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum = each(Sum{}, sum, value[k]);
    }
    for (; j < count && idAt(j) == id; ++j) sum = each(Sum{}, sum, load(j));
    stGlobal(dtable.f32() + int64_t{id} * width + c, sum);
  });
}

}  // namespace

void embedding(const Launch& launch) {
  const Operand &table = launch.in[0], &ids = launch.in[1], &y = launch.out[0];
  checkIds(launch, 1, table, 0);
  LAUNCH(embeddingKernel, launch.blocks(y.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, table, ids, y,
         launch.state);
}

void embeddingGrad(const Launch& launch) {
  const Operand &dy = launch.in[0], &ids = launch.in[1], &dtable = launch.out[0];
  checkIds(launch, 1, dtable, 0);
  zeros(launch);
  int *order = launch.scratch<int>(ids.bound[0]), *other = launch.scratch<int>(ids.bound[0]);
  const int* from = nullptr;
  for (int shift = 0; shift == 0 || (dtable.bound[0] - 1) >> shift > 0; shift += kDigitBits) {
    LAUNCH(sortKernel, 1, kSortWarps * 32, sizeof(SortShared), launch.stream, ids, from, order, shift, launch.state);
    from = order;
    std::swap(order, other);
  }
  LAUNCH(embeddingGradKernel, launch.blocks(dy.boundElements(), 4 * kThreads), kThreads, 0, launch.stream, dy, ids,
         from, dtable, launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
