// Runs CUDA kernels on the CPU, one fiber per CUDA thread, and reports what would be a defect on a GPU.
//
// A block, or a cluster of them, runs on one OS thread; those of a launch are spread over the process's pool. A
// warp-wide operation is done once, by the last lane to arrive, on pointers to every lane's operands. Asynchronous
// effects are as late as they may be, their targets poisoned until then. A defect abandons the block and is thrown by
// the launch as Error(Internal).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "device/types.h"

namespace elastiform::simt {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return size_t{x} * y * z; }
};

// The order in which the threads of a block run. Fair: warp by warp, in turn. Sprint: the warp of the highest random
// priority runs as far as it can, which exposes values overwritten before the others have read them. Random: any
// thread.
enum class Order { Fair, Sprint, Random };
struct Schedule {
  Order order = Order::Fair;
  uint64_t seed = 1;
};
// Of the whole process, for launches that begin later. Default: ELASTIFORM_SIMT_SCHEDULE ("sprint:3"), else fair.
void setSchedule(Schedule schedule);
Schedule currentSchedule();
Schedule parseSchedule(const std::string& text);  // Error(InvalidArgument)

struct Statistics {
  int64_t blocks = 0;
  int64_t switches = 0;  // of fibers
  int64_t warpOps = 0;   // warp-wide operations, tensor cores included
  int64_t barriers = 0;  // completed block-wide and named barriers
  int64_t mma = 0;       // mma.sync of a warp
  int64_t wgmma = 0;     // wgmma, counted once per warp of the warpgroup
  int64_t ldmatrix = 0;  // ldmatrix and stmatrix, in 8x8 matrices
  int64_t cpAsync = 0;
  int64_t tmaBytes = 0;
  // Extra cycles of shared memory because lanes met in a bank: ldmatrix, stmatrix, ldShared, stShared of the launch's
  // first block, which stands for the others. Lanes that reach an access a different number of times between two
  // meetings of the warp are not counted.
  int64_t bankConflicts = 0;

  void add(const Statistics& other);
};
// Of the calling thread's kernels that ended without a defect: the last one, and all since the previous call.
const Statistics& lastLaunch();
Statistics takeStatistics();

// Of the whole process: kernels, lines they prefetched, and copies between host and device.
struct Work {
  std::atomic<int64_t> launches{0}, prefetches{0}, uploads{0}, uploadedBytes{0}, downloads{0};
  std::atomic<int64_t> depth{0};  // operations on the longest path of every recording that was launched
};
Work& work();

// Calls body once per thread of the grid, whose neighbouring blocks run in clusters of so many. `name` is for reports.
void runKernel(const char* name, dim3 grid, dim3 block, unsigned clusterBlocks, size_t sharedBytes,
               const std::function<void()>& body);

constexpr size_t kSharedBytesMax = 232448;  // 227 KiB: what sm_90 lets a block opt in to
constexpr unsigned kClusterMax = 2;         // blocks in a cluster
constexpr size_t kRedZone = 256;            // watched bytes on both sides of every device allocation
constexpr int kPoison = 0xff;               // in every byte: a NaN of all floating types, -1 of the integers

// Live device allocations [begin, end), sorted. Kept by the emulated runtime; a launch takes a snapshot.
using MemoryMap = std::vector<std::pair<uintptr_t, uintptr_t>>;
std::shared_ptr<const MemoryMap> memoryMap();
// Error(Internal) naming `where` when bytes around an allocation have changed.
void checkRedZones(const char* where);

// ---- What the wrappers in emulated.h and emulated.cc build on

using Site = std::source_location;

// Done once for all lanes of `mask`; operands[lane] is what that lane passed.
using WarpOp = void (*)(void* const* operands, uint32_t mask);

struct Block;

struct Fiber {
#if defined(__x86_64__)
  void* stackPointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stackLow = nullptr;
  size_t stackBytes = 0;
  void* fakeStack = nullptr;  // AddressSanitizer's
};

// Work issued and not yet done, in the order of its groups: cp.async, TMA stores and wgmma all count groups.
template <typename T>
struct Groups {
  std::vector<T> items;
  std::vector<size_t> ends;  // one past the last item of every committed group

  bool empty() const { return items.empty(); }
  void commit() { ends.push_back(items.size()); }
  void clear() {
    items.clear();
    ends.clear();
  }
  // Finishes the oldest groups until at most `pending` are left.
  template <typename Finish>
  void finish(int pending, const Finish& finishItem) {
    if (static_cast<int>(ends.size()) <= pending) return;
    const size_t groups = ends.size() - pending, count = ends[groups - 1];
    for (size_t i = 0; i < count; ++i) finishItem(items[i]);
    items.erase(items.begin(), items.begin() + count);
    ends.erase(ends.begin(), ends.begin() + groups);
    for (size_t& end : ends) end -= count;
  }
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  uint32_t bytes;
};

// The contents of a TensorMap made by the emulation.
struct TensorMapFields {
  uint64_t magic;
  unsigned char* base;
  uint64_t columns, rows, rowBytes;
  uint32_t boxColumns, boxRows, elementBytes, swizzled;
};
static_assert(sizeof(TensorMapFields) <= sizeof(TensorMap));
constexpr uint64_t kTensorMapMagic = 0x70616d726f736e65;

struct Tile {
  TensorMapFields map;
  unsigned char* shared;
  int x, y;
};

struct Thread {
  Block* block = nullptr;
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waitsFor = nullptr;
  Site site;
  Groups<Copy> copies;
  Groups<Tile> stores;
  uint32_t sharedAccesses = 0;  // since the warp last met
  Fiber* fiber = nullptr;
};

// An operation of the asynchronous engines that ends in an arrival or a transaction count of an mbarrier.
struct Job {
  std::vector<Copy> copies;
  Tile tile{};
  uint32_t tileBytes = 0;  // 0: cp.async copies and an arrival; else a TMA load of so many bytes
  Mbarrier* barrier = nullptr;
};

// Accumulators of one wgmma chain: in flight their registers hold poison and the values are here, [16 rows][n].
struct Accumulators {
  float* registers[32];
  int n;
  int pending;  // wgmma issued on them and not done
  std::vector<float> values;
};
struct Wgmma {
  size_t accumulators;  // index into Warp::accumulators
  uint64_t a, b;
  bool aInRegisters, bTransposed, accumulate;
  uint32_t fragments[32][4];
};

struct SharedAccess {
  unsigned line;  // of the source; lanes at different lines are not compared
  uint32_t width, mask;
  uint32_t offsets[32];
};

// A warp-wide operation that lanes are arriving at.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  WarpOp op = nullptr;
  const char* name = nullptr;
  Site site;
};

struct Warp {
  uint32_t ready = 0;  // lanes that could run
  uint32_t priority = 0;
  Meeting meetings[32];  // of lanes under way; a mask is found by search, halves of a warp may be at different places
  int meetingsUsed = 0;  // free ones have arrived == 0
  void* operands[32];
  bool fenced = false;  // wgmma.fence since registers were last free to be touched
  Groups<Wgmma> wgmma;
  std::vector<Accumulators> accumulators;
  std::vector<SharedAccess> accesses;
};

struct Barrier {
  int arrived = 0, expected = 0;
  Site site;
  std::vector<int> waiting;
};

struct BarrierWaiter {
  Mbarrier* barrier;
  int thread;
};

struct Block {
  const char* kernel = "";
  uint3 index{};
  dim3 dim, grid;
  Block* cluster = nullptr;  // its first block; the others follow
  unsigned clusterBlocks = 1, rank = 0;
  unsigned char* shared = nullptr;
  size_t sharedBytes = 0;
  Schedule schedule;
  Statistics statistics;
  std::shared_ptr<const MemoryMap> memory;
  const std::function<void()>* body = nullptr;

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t readyWarps = 0;
  Barrier barriers[16];
  int live = 0;
  std::vector<Thread*> clusterWaiting;  // of the cluster, in its first block
  std::vector<Job> jobs;
  std::vector<BarrierWaiter> barrierWaiters;
  std::vector<const Mbarrier*> landed;  // asynchronous operations have ended here since somebody last waited
  std::string defect;

  bool countsConflicts() const { return index.x + index.y + index.z == 0; }
  uint32_t random(uint32_t below);
  void wake(int thread);
  // Finishes one asynchronous operation, chosen at random unless the schedule is fair (emulated.cc).
  void finishJob();

  uint64_t randomState = 0;
  int currentWarp = 0, currentLane = 0;
  bool descending = false;  // lanes of a warp run from the highest down
  bool turnOver = false;    // the running thread polls: others first
};

// The CUDA thread that this OS thread is running, or null outside kernels.
inline constinit thread_local Thread* current = nullptr;

// Abandons the running block; outside kernels, throws.
[[noreturn, gnu::format(printf, 1, 2)]] void report(const char* format, ...);

// Waits until every lane of `mask` has called this with the same mask, operation and place, then op is done.
void meet(const char* name, uint32_t mask, WarpOp op, void* operand, const Site& site);
// Barrier `id` of the block for `threads` threads; threads 0 is every thread of the block that has not exited.
void barrierWait(int id, int threads, const Site& site);
void barrierArrive(int id, int threads);
// Until every thread of the cluster is here or has exited.
void clusterWait(const Site& site);
// Lets others run until Block::wake is called for this thread; `waitsFor` is for the deadlock report.
void waitUntilWoken(const char* waitsFor, const Site& site);
// Lets others run; this thread may go on at any time.
void pollPause();

// Reports unless p is aligned to `bytes` and, when near a device allocation, inside it.
void checkGlobal(const void* p, size_t bytes, const char* what);
// The block of the running cluster in whose shared memory p lies.
Block& ownerOf(const void* p, const char* what);
// The same for shared memory; returns the offset in the block's shared memory.
uint32_t checkShared(const void* p, size_t bytes, size_t alignment, const char* what);
// One lane's access to shared memory, for the count of bank conflicts.
void noteSharedAccess(const void* p, uint32_t bytes, const Site& site);
// Extra cycles of `lanes` accesses of `width` bytes that the hardware serves together.
int bankConflicts(const uint32_t* offsets, int lanes, uint32_t width);

}  // namespace elastiform::simt
