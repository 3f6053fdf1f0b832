// Runs CUDA kernels on the CPU: fibers and their stacks, the schedules, meetings of warps, barriers and reports.
#include "device/executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "core/error.h"
#include "core/memory.h"
#include "core/pool.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace elastiform::simt {
namespace {

constexpr int kThreadsMax = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedRedZone = 1024;
constexpr size_t kSharedBlock = kSharedBytesMax + kSharedRedZone;
static_assert(kSharedBlock % 1024 == 0);

// ---- Fibers

void fiberMain();

#if defined(__x86_64__)

// Saves the callee-saved registers of the System V ABI on the running stack, and takes up those of another.
[[gnu::naked, gnu::noipa]] void swapStacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbx\n pushq %rbp\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbp\n popq %rbx\n ret");
}

void prepare(Fiber& fiber, unsigned char* low, size_t bytes) {
  // What swapStacks pops: six registers, the entry point; above it a null return address ends backtraces.
  constexpr int kRegisters = 6;
  void** frame = reinterpret_cast<void**>(low + bytes) - (kRegisters + 2);
  for (int i = 0; i < kRegisters; ++i) frame[i] = nullptr;
  frame[kRegisters] = reinterpret_cast<void*>(&fiberMain);
  frame[kRegisters + 1] = nullptr;
  fiber.stackPointer = frame;
}

void swapContexts(Fiber& from, Fiber& to) { swapStacks(&from.stackPointer, to.stackPointer); }

#else

void prepare(Fiber& fiber, unsigned char* low, size_t bytes) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = low;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiberMain, 0);
}

void swapContexts(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

// AddressSanitizer keeps the bounds of the running stack and a second, fake stack per fiber; both switch with it.
void switchFiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fakeStack, to.stackLow, to.stackBytes);
#endif
  swapContexts(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fakeStack, nullptr, nullptr);
#endif
}

// Stacks of one OS thread, each below a page that must not be touched; mapped a warp at a time, freed with the thread.
class Stacks {
 public:
  Stacks() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {}
  Stacks(const Stacks&) = delete;
  ~Stacks() {
    for (unsigned char* chunk : chunks_) munmap(chunk, chunkBytes());
  }

  unsigned char* low(int thread) {
    while (static_cast<int>(chunks_.size()) * kPerChunk <= thread) addChunk();
    return chunks_[thread / kPerChunk] + (thread % kPerChunk) * stride() + page_;
  }

 private:
  static constexpr int kPerChunk = 32;
  size_t stride() const { return page_ + kStackBytes; }
  size_t chunkBytes() const { return stride() * kPerChunk; }

  void addChunk() {
    void* memory = mmap(nullptr, chunkBytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) {
      fail(ErrorCode::OutOfMemory, "[simt] no memory for %d stacks of %zu bytes: %s", kPerChunk, kStackBytes,
           std::strerror(errno));
    }
    unsigned char* chunk = static_cast<unsigned char*>(memory);
    for (int i = 0; i < kPerChunk; ++i) mprotect(chunk + i * stride(), page_, PROT_NONE);
    chunks_.push_back(chunk);
  }

  const size_t page_;
  std::vector<unsigned char*> chunks_;
};

// ---- The executor of one OS thread

struct Executor {
  Stacks stacks;
  std::vector<Fiber> fibers{kThreadsMax * kClusterMax};
  Block blocks[kClusterMax];
  Fiber host;  // the stack that called the launch
  AlignedBuffer memory{kClusterMax * kSharedBlock + 1024, false, "emulated shared memory"};

  unsigned char* shared(unsigned rank) const {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory.data()) + 1023) & ~uintptr_t{1023};
    return reinterpret_cast<unsigned char*>(begin) + rank * kSharedBlock;
  }
};

Executor& executor() {
  thread_local std::unique_ptr<Executor> instance = std::make_unique<Executor>();
  return *instance;
}

int lowestBit(uint32_t bits) { return __builtin_ctz(bits); }
int highestBit(uint32_t bits) { return 31 - __builtin_clz(bits); }

// The first set bit at or after `from`, going round.
int nextBit(uint32_t bits, int from) {
  const uint32_t later = from < 32 ? bits & (~0u << from) : 0;
  return lowestBit(later ? later : bits);
}

int randomBit(Block& block, uint32_t bits) {
  for (uint32_t skip = block.random(__builtin_popcount(bits)); skip > 0; --skip) bits &= bits - 1;
  return lowestBit(bits);
}

int chooseWarp(Block& block) {
  switch (block.schedule.order) {
    case Order::Fair:
      return nextBit(block.readyWarps, block.currentWarp + (block.turnOver ? 1 : 0));
    case Order::Sprint: {
      int best = -1;
      for (uint32_t bits = block.readyWarps; bits; bits &= bits - 1) {
        const int w = lowestBit(bits);
        if (best < 0 || block.warps[w].priority > block.warps[best].priority) best = w;
      }
      // Priorities change now and then, so that two warps meet at different distances, and always when one polls.
      if (block.turnOver || block.random(4096) == 0) block.warps[best].priority = block.random(1u << 30);
      return best;
    }
    case Order::Random:
      break;
  }
  return randomBit(block, block.readyWarps);
}

int chooseLane(Block& block, const Warp& warp, bool sameWarp) {
  if (block.schedule.order == Order::Random || (block.turnOver && block.schedule.order == Order::Sprint)) {
    return randomBit(block, warp.ready);
  }
  if (block.schedule.order == Order::Fair) return nextBit(warp.ready, sameWarp ? block.currentLane + 1 : 0);
  return block.descending ? highestBit(warp.ready) : lowestBit(warp.ready);
}

// The block's next thread to run, or null when none can.
Thread* pickInBlock(Block& block) {
  const bool fair = block.schedule.order == Order::Fair;
  while (!block.jobs.empty() && (block.readyWarps == 0 || block.turnOver || (!fair && block.random(8) == 0))) {
    block.finishJob();
  }
  if (block.readyWarps == 0) return nullptr;
  const int w = chooseWarp(block);
  Warp& warp = block.warps[w];
  const int lane = chooseLane(block, warp, w == block.currentWarp);
  block.turnOver = false;
  block.currentWarp = w;
  block.currentLane = lane;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.readyWarps &= ~(1u << w);
  return &block.threads[w * 32 + lane];
}

// Whether the schedule leaves a block that could go on for another of its cluster.
bool leaves(Block& block) {
  if (block.clusterBlocks == 1) return false;
  return block.turnOver || block.schedule.order == Order::Fair ||
         block.random(block.schedule.order == Order::Sprint ? 4096 : 2) == 0;
}

// The next thread of the cluster to run after one of this block, or null when none can.
Thread* pick(Block& block) {
  const unsigned first = block.rank + (leaves(block) ? 1 : 0);
  for (unsigned i = 0; i < block.clusterBlocks; ++i) {
    if (Thread* next = pickInBlock(block.cluster[(first + i) % block.clusterBlocks])) return next;
  }
  return nullptr;
}

// Threads of the cluster that have not exited.
int liveInCluster(const Block& block) {
  int live = 0;
  for (unsigned i = 0; i < block.clusterBlocks; ++i) live += block.cluster[i].live;
  return live;
}

// Lets those who wait for the cluster go on when all are there.
void settleCluster(Block& block) {
  std::vector<Thread*>& waiting = block.cluster->clusterWaiting;
  if (static_cast<int>(waiting.size()) < liveInCluster(block)) return;
  for (Thread* thread : waiting) thread->block->wake(thread->linear);
  waiting.clear();
}

std::string describe(const Thread& thread) {
  const char* file = std::strrchr(thread.site.file_name(), '/');
  char text[160];
  std::snprintf(text, sizeof text, "%s (%s:%u)", thread.waitsFor, file ? file + 1 : thread.site.file_name(),
                thread.site.line());
  return text;
}

// Who waits where, neighbours at one place together.
std::string deadlock(const Block& block) {
  std::string text = "deadlock: " + std::to_string(block.live) + " of " + std::to_string(block.threads.size()) +
                     " threads have not exited";
  int groups = 0;
  for (size_t i = 0; i < block.threads.size();) {
    if (block.threads[i].done) {
      ++i;
      continue;
    }
    const std::string place = describe(block.threads[i]);
    size_t end = i + 1;
    while (end < block.threads.size() && !block.threads[end].done && describe(block.threads[end]) == place) ++end;
    if (++groups > 6) return text + "; ...";
    char lanes[64];
    std::snprintf(lanes, sizeof lanes, end - i > 1 ? "%s%zu-%zu at " : "%s%zu at ", groups == 1 ? ": " : "; ", i,
                  end - 1);
    text += lanes + place;
    i = end;
  }
  return text;
}

// Leaves the block for good, with every fiber of it as it is.
[[noreturn]] void abandon(const Thread& culprit, const char* text) {
  Block& block = *culprit.block;
  char place[160];
  std::snprintf(place, sizeof place, "[simt] %.80s block (%u,%u,%u) thread %d: ", block.kernel, block.index.x,
                block.index.y, block.index.z, culprit.linear);
  block.defect = std::string(place) + text;
  switchFiber(*current->fiber, executor().host);
  __builtin_unreachable();
}

// Gives the OS thread to whoever is next; the caller has said what it waits for, or is done.
void yield() {
  Thread* self = current;
  Block& block = *self->block;
  Thread* next = pick(block);
  if (next == self) return;
  if (!next && liveInCluster(block) > 0) {
    Block& stuck = *std::find_if(block.cluster, block.cluster + block.clusterBlocks,
                                 [](const Block& other) { return other.live > 0; });
    char text[640];  // abandon does not return: nothing on this stack may own memory
    std::snprintf(text, sizeof text, "%s", deadlock(stuck).c_str());
    const auto waits = [](const Thread& thread) { return !thread.done; };
    abandon(*std::find_if(stuck.threads.begin(), stuck.threads.end(), waits), text);
  }
  ++block.statistics.switches;
  current = next;
  switchFiber(*self->fiber, next ? *next->fiber : executor().host);
}

void settleAccesses(Block& block, int w);

void exitThread() {
  Thread& self = *current;
  Block& block = *self.block;
  if (!self.copies.empty()) report("exits with cp.async in flight");
  if (!self.stores.empty()) report("exits with a TMA store in flight");
  if (!block.warps[self.warp].wgmma.empty()) report("exits with wgmma in flight");
  self.done = true;
  --block.live;
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived > 0 && barrier.arrived == block.live) {
    for (int thread : barrier.waiting) block.wake(thread);
    barrier.waiting.clear();
    barrier.arrived = 0;
  }
  settleCluster(block);
  if (block.live == 0 && (!block.jobs.empty() || !block.landed.empty())) {
    report("the block exits and nobody has waited for TMA or cp.async at an mbarrier");
  }
}

void fiberMain() {
#if defined(__SANITIZE_ADDRESS__)
  // Arriving from the host's stack is the only time its bounds are told.
  const void* low = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(current->fiber->fakeStack, &low, &bytes);
  Fiber& host = executor().host;
  if (!host.stackLow) {
    host.stackLow = low;
    host.stackBytes = bytes;
  }
#endif
  char thrown[256] = "";
  try {
    (*current->block->body)();
  } catch (const std::exception& error) {
    std::snprintf(thrown, sizeof thrown, "%s", error.what());
  }
  if (thrown[0]) report("exception in a kernel: %s", thrown);
  exitThread();
  yield();
  __builtin_unreachable();
}

void start(Executor& self, Block& block, int i) {
  Thread& thread = block.threads[i];
  const dim3 dim = block.dim;
  thread.block = &block;
  thread.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
  thread.linear = i;
  thread.lane = i % 32;
  thread.warp = i / 32;
  thread.done = false;
  thread.waitsFor = "start";
  thread.site = {};
  thread.copies.clear();
  thread.stores.clear();
  thread.sharedAccesses = 0;
  // Stacks lie a whole number of pages apart, so the same variable of every thread would fall into one set of the L1
  // cache; offsets of an odd number of cache lines spread them.
  const int place = static_cast<int>(block.rank * block.threads.size()) + i;
  const size_t offset = static_cast<size_t>(place) * 13 % 64 * 64;
  unsigned char* low = self.stacks.low(place);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(low, kStackBytes);
#endif
  Fiber& fiber = self.fibers[place];
  fiber.stackLow = low;
  fiber.stackBytes = kStackBytes;
  prepare(fiber, low, kStackBytes - offset);
  thread.fiber = &fiber;
  block.wake(i);
}

void reset(Executor& self, Block& block) {
  const int threads = static_cast<int>(block.dim.count()), warps = (threads + 31) / 32;
  block.threads.resize(threads);
  block.warps.resize(warps);
  block.readyWarps = 0;
  block.live = threads;
  block.jobs.clear();
  block.barrierWaiters.clear();
  block.landed.clear();
  block.clusterWaiting.clear();
  block.defect.clear();
  block.currentWarp = block.currentLane = 0;
  block.descending = block.schedule.order != Order::Fair && block.random(2) == 1;
  block.turnOver = false;
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  for (Warp& warp : block.warps) {
    warp.ready = 0;
    warp.priority = block.random(1u << 30);
    warp.meetingsUsed = 0;
    warp.fenced = false;
    warp.wgmma.clear();
    warp.accumulators.clear();
    warp.accesses.clear();
  }
  block.shared = self.shared(block.rank);
  std::memset(block.shared, kPoison, block.sharedBytes + kSharedRedZone);
  for (int i = 0; i < threads; ++i) start(self, block, i);
}

// What the threads of a block that has ended cannot have seen.
void inspect(Block& block) {
  for (size_t i = block.sharedBytes; i < block.sharedBytes + kSharedRedZone; ++i) {
    if (block.shared[i] == kPoison) continue;
    fail(ErrorCode::Internal,
         "[simt] %.80s block (%u,%u,%u): byte %zu of shared memory was written, the launch gave %zu", block.kernel,
         block.index.x, block.index.y, block.index.z, i, block.sharedBytes);
  }
  for (size_t w = 0; w < block.warps.size(); ++w) settleAccesses(block, static_cast<int>(w));
}

// Runs the cluster that self.blocks describes; throws what its threads reported.
void runCluster(Executor& self, unsigned blocks) {
  for (unsigned i = 0; i < blocks; ++i) reset(self, self.blocks[i]);
  current = pick(self.blocks[0]);
  switchFiber(self.host, *current->fiber);
  current = nullptr;
  for (unsigned i = 0; i < blocks; ++i) {
    if (!self.blocks[i].defect.empty()) throw Error(ErrorCode::Internal, self.blocks[i].defect);
  }
  for (unsigned i = 0; i < blocks; ++i) inspect(self.blocks[i]);
}

std::atomic<uint64_t> scheduleSeed{0};
std::atomic<int> scheduleOrder{-1};  // -1: not yet read from the environment

thread_local Statistics statisticsOfLastLaunch, statisticsOfLaunches;

// Counts the bank conflicts of the accesses that the lanes of a warp have made since they last met.
void settleAccesses(Block& block, int w) {
  Warp& warp = block.warps[w];
  if (warp.accesses.empty()) return;
  for (const SharedAccess& access : warp.accesses) {
    if (access.mask != ~0u) continue;
    const int lanes = static_cast<int>(128 / access.width);  // served together: 128 bytes of distinct banks
    for (int first = 0; first < 32; first += lanes) {
      block.statistics.bankConflicts += bankConflicts(access.offsets + first, lanes, access.width);
    }
  }
  warp.accesses.clear();
  const size_t end = std::min(block.threads.size(), static_cast<size_t>(w) * 32 + 32);
  for (size_t i = static_cast<size_t>(w) * 32; i < end; ++i) block.threads[i].sharedAccesses = 0;
}

}  // namespace

// ---- What wrappers build on

uint32_t Block::random(uint32_t below) {  // xorshift64*
  randomState ^= randomState >> 12;
  randomState ^= randomState << 25;
  randomState ^= randomState >> 27;
  return static_cast<uint32_t>((randomState * 0x2545f4914f6cdd1dull >> 32) * below >> 32);
}

void Block::wake(int thread) {
  warps[thread / 32].ready |= 1u << (thread % 32);
  readyWarps |= 1u << (thread / 32);
}

void report(const char* format, ...) {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!current) throw Error(ErrorCode::Internal, std::string("[simt] ") + text);
  abandon(*current, text);
}

void waitUntilWoken(const char* waitsFor, const Site& site) {
  current->waitsFor = waitsFor;
  current->site = site;
  yield();
}

void pollPause() {
  Block& block = *current->block;
  block.turnOver = true;
  block.wake(current->linear);
  current->waitsFor = "poll";
  yield();
}

namespace {

bool samePlace(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// The meeting of this mask that lanes are arriving at, or a free one. There are never more than lanes.
Meeting& meetingOf(Warp& warp, uint32_t mask) {
  int free = warp.meetingsUsed;
  for (int i = 0; i < warp.meetingsUsed; ++i) {
    if (warp.meetings[i].arrived == 0) {
      free = i;
    } else if (warp.meetings[i].mask == mask) {
      return warp.meetings[i];
    }
  }
  if (free == warp.meetingsUsed) ++warp.meetingsUsed;
  Meeting& meeting = warp.meetings[free];
  meeting.arrived = 0;
  return meeting;
}

}  // namespace

void meet(const char* name, uint32_t mask, WarpOp op, void* operand, const Site& site) {
  Thread& self = *current;
  Block& block = *self.block;
  Warp& warp = block.warps[self.warp];
  if ((mask >> self.lane & 1) == 0) report("%s: lane %d is not in its own mask %08x", name, self.lane, mask);
  Meeting& meeting = meetingOf(warp, mask);
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.op = op;
    meeting.name = name;
    meeting.site = site;
  } else if (meeting.op != op || !samePlace(meeting.site, site)) {
    report("divergent warp: %s (line %u) where another lane of mask %08x is at %s (line %u)", name, site.line(), mask,
           meeting.name, meeting.site.line());
  }
  warp.operands[self.lane] = operand;
  meeting.arrived |= 1u << self.lane;
  if (meeting.arrived != mask) {
    waitUntilWoken(name, site);
    return;
  }
  ++block.statistics.warpOps;
  if (op) op(warp.operands, mask);
  meeting.arrived = 0;
  if (mask == ~0u) settleAccesses(block, self.warp);
  const uint32_t others = mask & ~(1u << self.lane);
  if (block.schedule.order == Order::Fair) {  // go on, the others follow
    warp.ready |= others;
    if (others) block.readyWarps |= 1u << self.warp;
    return;
  }
  warp.ready |= mask;
  block.readyWarps |= 1u << self.warp;
  waitUntilWoken(name, site);
}

namespace {

// One more arrival at a barrier; when it is the last, wakes those that wait. Returns whether it was.
bool arrive(Barrier& barrier, int id, int threads) {
  Block& block = *current->block;
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) {
    report("barrier %d: %d threads expected here, %d by those who arrived before", id, threads, barrier.expected);
  }
  ++barrier.arrived;
  if (barrier.arrived < (threads ? threads : block.live)) return false;
  ++block.statistics.barriers;
  barrier.arrived = 0;
  for (int thread : barrier.waiting) block.wake(thread);
  barrier.waiting.clear();
  for (size_t w = 0; w < block.warps.size(); ++w) settleAccesses(block, static_cast<int>(w));
  return true;
}

void checkNamedBarrier(int id, int threads) {
  if (id < 1 || id > 15) report("named barrier %d: ids are 1 to 15, 0 is syncThreads", id);
  if (threads <= 0 || threads % 32 != 0) report("named barrier %d: %d threads is not a number of warps", id, threads);
}

}  // namespace

void barrierWait(int id, int threads, const Site& site) {
  Thread& self = *current;
  Block& block = *self.block;
  if (threads != 0) checkNamedBarrier(id, threads);
  Barrier& barrier = block.barriers[id];
  if (threads == 0) {
    if (barrier.arrived > 0 && !samePlace(barrier.site, site)) {
      report("divergent block: syncThreads (line %u) where other threads are at syncThreads (line %u)", site.line(),
             barrier.site.line());
    }
    barrier.site = site;
  }
  barrier.waiting.push_back(self.linear);
  // The last to arrive has woken itself too.
  arrive(barrier, id, threads);
  waitUntilWoken(threads ? "barrierSync" : "syncThreads", site);
}

void barrierArrive(int id, int threads) {
  checkNamedBarrier(id, threads);
  arrive(current->block->barriers[id], id, threads);
}

void clusterWait(const Site& site) {
  Block& block = *current->block;
  block.cluster->clusterWaiting.push_back(current);
  // The last to arrive has woken itself too.
  settleCluster(block);
  waitUntilWoken("clusterSync", site);
}

void checkGlobal(const void* p, size_t bytes, const char* what) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  if (begin % bytes != 0) report("%s: address %p is not aligned to %zu bytes", what, p, bytes);
  const MemoryMap& map = *current->block->memory;
  // The first allocation whose red zone ends after `begin`.
  const auto range =
      std::partition_point(map.begin(), map.end(), [&](const auto& r) { return r.second + kRedZone <= begin; });
  if (range == map.end() || begin + bytes <= range->first - kRedZone) return;  // not device memory: a host's array
  if (begin >= range->first && begin + bytes <= range->second) return;
  report("%s: %zu bytes at offset %lld of an allocation of %zu bytes", what, bytes,
         static_cast<long long>(begin) - static_cast<long long>(range->first), range->second - range->first);
}

Block& ownerOf(const void* p, const char* what) {
  const Block& block = *current->block;
  for (unsigned i = 0; i < block.clusterBlocks; ++i) {
    Block& owner = block.cluster[i];
    if (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(owner.shared) < kSharedBytesMax) return owner;
  }
  report("%s: address %p is not in shared memory", what, p);
}

uint32_t checkShared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const Block& block = ownerOf(p, what);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(block.shared);
  if (offset % alignment != 0) report("%s: shared offset %zu is not aligned to %zu bytes", what, offset, alignment);
  if (offset + bytes > block.sharedBytes) {
    report("%s: %zu bytes at shared offset %zu, past the launch's %zu bytes", what, bytes, offset, block.sharedBytes);
  }
  return static_cast<uint32_t>(offset);
}

int bankConflicts(const uint32_t* offsets, int lanes, uint32_t width) {
  // 32 banks of 4 bytes; lanes that read the same word share it.
  uint32_t words[32][32];
  int used[32] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    for (uint32_t byte = 0; byte < width; byte += 4) {
      const uint32_t word = (offsets[lane] + byte) / 4, bank = word % 32;
      if (std::find(words[bank], words[bank] + used[bank], word) == words[bank] + used[bank]) {
        words[bank][used[bank]++] = word;
      }
    }
  }
  return std::max(0, *std::max_element(used, used + 32) - 1);
}

void noteSharedAccess(const void* p, uint32_t bytes, const Site& site) {
  constexpr uint32_t kRemembered = 1024;
  Thread& self = *current;
  Warp& warp = self.block->warps[self.warp];
  const uint32_t offset = checkShared(p, bytes, bytes, "shared memory access");
  if (!self.block->countsConflicts()) return;
  const uint32_t n = self.sharedAccesses++;
  if (n >= kRemembered) return;
  if (n >= warp.accesses.size()) warp.accesses.push_back({site.line(), bytes, 0, {}});
  SharedAccess& access = warp.accesses[n];
  if (access.line != site.line() || access.width != bytes) return;
  access.mask |= 1u << self.lane;
  access.offsets[self.lane] = offset;
}

// ---- Launches

Schedule parseSchedule(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string order = text.substr(0, colon);
  Schedule schedule;
  char* end = nullptr;
  if (colon != std::string::npos) schedule.seed = std::strtoull(text.c_str() + colon + 1, &end, 10);
  const bool seedOk = colon == std::string::npos || (end != text.c_str() + colon + 1 && *end == '\0');
  if (order == "fair") {
    schedule.order = Order::Fair;
  } else if (order == "sprint") {
    schedule.order = Order::Sprint;
  } else if (order == "random") {
    schedule.order = Order::Random;
  }
  if (!seedOk || (order != "fair" && order != "sprint" && order != "random")) {
    fail(ErrorCode::InvalidArgument, "[simt] schedule must be fair, sprint or random and :seed, got \"%s\"",
         text.c_str());
  }
  return schedule;
}

void setSchedule(Schedule schedule) {
  scheduleSeed = schedule.seed;
  scheduleOrder = static_cast<int>(schedule.order);
}

Schedule currentSchedule() {
  if (scheduleOrder < 0) {
    const char* text = std::getenv("ELASTIFORM_SIMT_SCHEDULE");
    setSchedule(text ? parseSchedule(text) : Schedule{});
  }
  return {static_cast<Order>(scheduleOrder.load()), scheduleSeed.load()};
}

void Statistics::add(const Statistics& o) {
  blocks += o.blocks;
  switches += o.switches;
  warpOps += o.warpOps;
  barriers += o.barriers;
  mma += o.mma;
  wgmma += o.wgmma;
  ldmatrix += o.ldmatrix;
  cpAsync += o.cpAsync;
  tmaBytes += o.tmaBytes;
  bankConflicts += o.bankConflicts;
}

const Statistics& lastLaunch() { return statisticsOfLastLaunch; }
Statistics takeStatistics() { return std::exchange(statisticsOfLaunches, {}); }

Work& work() {
  static Work instance;
  return instance;
}

void runKernel(const char* name, dim3 grid, dim3 dim, unsigned clusterBlocks, size_t sharedBytes,
               const std::function<void()>& body) {
  // LAUNCH((kernel<1, 2>), ...) is how a comma gets through a macro.
  std::string kernel = name;
  if (kernel.size() > 2 && kernel.front() == '(' && kernel.back() == ')') kernel = kernel.substr(1, kernel.size() - 2);
  const char* text = kernel.c_str();
  if (dim.count() == 0 || dim.count() % 32 != 0 || dim.count() > kThreadsMax || grid.count() == 0) {
    fail(ErrorCode::Internal, "[simt] %s: %zu blocks of %zu threads; blocks are whole warps, up to %d threads", text,
         grid.count(), dim.count(), kThreadsMax);
  }
  if (sharedBytes > kSharedBytesMax) {
    fail(ErrorCode::Internal, "[simt] %s: %zu bytes of shared memory, more than the %zu of a block", text, sharedBytes,
         kSharedBytesMax);
  }
  if (clusterBlocks == 0 || clusterBlocks > kClusterMax || grid.x % clusterBlocks != 0) {
    fail(ErrorCode::Internal, "[simt] %s: clusters of %u in a grid %u wide; they have up to %u blocks and divide it",
         text, clusterBlocks, grid.x, kClusterMax);
  }
  const Schedule schedule = currentSchedule();
  const std::shared_ptr<const MemoryMap> memory = memoryMap();
  Statistics total;
  std::mutex totalMutex;
  const auto describe = [&](Executor& self, unsigned rank, uint64_t x) {
    Block& block = self.blocks[rank];
    block.cluster = self.blocks;
    block.clusterBlocks = clusterBlocks;
    block.rank = rank;
    block.kernel = text;
    block.index = {static_cast<unsigned>(x % grid.x), static_cast<unsigned>(x / grid.x % grid.y),
                   static_cast<unsigned>(x / (uint64_t{grid.x} * grid.y))};
    block.dim = dim;
    block.grid = grid;
    block.sharedBytes = sharedBytes;
    block.schedule = schedule;
    block.statistics = {};
    block.statistics.blocks = 1;
    block.memory = memory;
    block.body = &body;
    block.randomState = (schedule.seed * 0x9e3779b97f4a7c15ull ^ (x + 1) * 0xbf58476d1ce4e5b9ull) | 1;
  };
  const auto runOne = [&](int64_t cluster, int) {
    Executor& self = executor();
    for (unsigned i = 0; i < clusterBlocks; ++i) describe(self, i, static_cast<uint64_t>(cluster) * clusterBlocks + i);
    runCluster(self, clusterBlocks);
    const std::lock_guard<std::mutex> lock(totalMutex);
    for (unsigned i = 0; i < clusterBlocks; ++i) total.add(self.blocks[i].statistics);
  };
  const int64_t clusters = static_cast<int64_t>(grid.count() / clusterBlocks);
  if (clusters == 1) {
    runOne(0, 0);
  } else {
    parallelFor(clusters, runOne, nullptr);
  }
  checkRedZones(text);
  ++work().launches;
  statisticsOfLastLaunch = total;
  statisticsOfLaunches.add(total);
}

}  // namespace elastiform::simt
