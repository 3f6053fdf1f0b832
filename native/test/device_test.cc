// Tests of the device layer: every wrapper and complete kernels under every schedule of the emulation, every defect
// that it reports, its counters, and its runtime; on a GPU, the wrappers and kernels again.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "device/conformance.h"
#include "test/device_examples.h"
#include "test/test.h"

#ifdef ELASTIFORM_WITH_SIMT
#include "device/array.h"
#include "device/device.h"
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace elastiform {

#ifdef ELASTIFORM_WITH_CUDA
namespace cuda {
int deviceCount();
}
#endif

namespace {

using namespace elastiform::test;

int failures = 0;

void expectPassed(const std::vector<CaseResult>& results, const char* where) {
  CHECK(!results.empty());
  for (const CaseResult& r : results) {
    if (r.passed()) continue;
    std::fprintf(stderr, "%s: %s: error %g (at most %g) %s\n", where, r.name.c_str(), r.error, r.tolerance,
                 r.note.c_str());
    ++failures;
  }
}

// The same with a line that says how many passed, for logs.
void expectAndCount(const char* device, const char* what, const std::vector<CaseResult>& results) {
  expectPassed(results, device);
  const auto passed = std::count_if(results.begin(), results.end(), [](const CaseResult& r) { return r.passed(); });
  std::printf("%s: %s: %td of %zu cases passed\n", device, what, passed, results.size());
}

}  // namespace

#ifdef ELASTIFORM_WITH_SIMT
namespace simt {
namespace {

const char* const kSchedules[] = {"fair", "sprint:1", "sprint:2", "sprint:3", "sprint:4", "random:5"};

void underEverySchedule(const std::function<void(const char*)>& body) {
  for (const char* schedule : kSchedules) {
    setSchedule(parseSchedule(schedule));
    body(schedule);
  }
  setSchedule({});
}

// ---- Defects. One launch of `body` by one block, which must be reported with `text`; the executor goes on working.

void (*defect)();

void runDefect() { defect(); }

void expectReport(int line, const char* text, unsigned blocks, int threads, size_t sharedBytes, void (*body)()) {
  underEverySchedule([&](const char*) {
    defect = body;
    failures += expectError(__FILE__, line, ErrorCode::Internal, text,
                            [&] { LAUNCH_CLUSTERS(runDefect, blocks, blocks, threads, sharedBytes, nullptr); });
  });
}
#define EXPECT_REPORT(text, threads, sharedBytes, body) \
  expectReport(__LINE__, text, 1, threads, sharedBytes, +[]() body)
#define EXPECT_REPORT_OF_PAIR(text, sharedBytes, body) expectReport(__LINE__, text, 2, 32, sharedBytes, +[]() body)

float* device = nullptr;  // 64 floats
TensorMap tensorMap;

struct Scratch {
  alignas(1024) unsigned char bytes[8192];
  Mbarrier barrier;
};

// All of a statement in a macro is at one place, so these two are functions.
void shuffleAtTwoPlaces() {
  const int value = static_cast<int>(threadIdx.x);
  if (value < 16) {
    shflXor(value, 1);
  } else {
    shflXor(value, 2);
  }
}
void syncAtTwoPlaces() {
  if (threadIdx.x < 32) {
    syncThreads();
  } else {
    syncThreads();
  }
}

void testWarpDefects() {
  EXPECT_REPORT("thread 0: deadlock: 32 of 64 threads have not exited: 0-4 at syncWarp (device_test.cc:", 64, 0, {
    if (threadIdx.x < 32 && threadIdx.x != 5) syncWarp();
    if (threadIdx.x == 5) barrierSync(1, 64);
  });
  EXPECT_REPORT("thread 0: deadlock: 1 of 32 threads", 32, 0, {
    if (threadIdx.x == 0) syncWarp();
  });
  EXPECT_REPORT("divergent warp: ", 32, 0, {
    if (threadIdx.x < 16) {
      shflXor(1, 1);
    } else {
      ballot(true);
    }
  });
  EXPECT_REPORT("divergent warp: shflXor", 32, 0, { shuffleAtTwoPlaces(); });
  EXPECT_REPORT("lane 16 is not in its own mask 0000ffff", 64, 0, {
    if (threadIdx.x == 16) syncWarp(0xffff);
  });
  EXPECT_REPORT("shflXor reads lane", 32, 0, {
    if (threadIdx.x < 16) shflXor(1, 16, 0xffff);
  });
}

void testBarrierDefects() {
  EXPECT_REPORT("divergent block: syncThreads", 64, 0, { syncAtTwoPlaces(); });
  EXPECT_REPORT("at syncThreads (device_test.cc:", 64, 0, {
    if (threadIdx.x != 5) syncThreads();
    if (threadIdx.x == 5) barrierSync(1, 64);
  });
  EXPECT_REPORT("barrier 3: ", 64, 0, { barrierSync(3, threadIdx.x < 32 ? 64 : 96); });
  EXPECT_REPORT("named barrier 0: ids are 1 to 15", 32, 0, { barrierSync(0, 32); });
  EXPECT_REPORT("named barrier 1: 40 threads is not a number of warps", 32, 0, { barrierArrive(1, 40); });
}

void testClusterDefects() {
  const size_t shared = sizeof(Scratch);
  EXPECT_REPORT_OF_PAIR("mbarrierArriveAt: block 1 of the cluster has exited", shared, {
    SHARED_MEMORY(Scratch, s);
    if (clusterRank() == 1) return;
    clusterSync();
    mbarrierArriveAt(s.barrier, 1);
  });
  EXPECT_REPORT_OF_PAIR("mbarrierArriveAt: the mbarrier is not initialised", shared, {
    SHARED_MEMORY(Scratch, s);
    if (clusterRank() == 0) mbarrierArriveAt(s.barrier, 1);
    clusterSync();
  });
  EXPECT_REPORT_OF_PAIR("block 2 of a cluster of 2", shared, {
    SHARED_MEMORY(Scratch, s);
    mbarrierArriveAt(s.barrier, 2);
  });
  EXPECT_REPORT_OF_PAIR("block (0,0,0) thread 0: deadlock: 32 of 32 threads have not exited: 0-31 at clusterSync", 0, {
    if (clusterRank() == 0 || threadIdx.x > 0) clusterSync();
    if (clusterRank() == 1 && threadIdx.x == 0) barrierSync(1, 64);
  });
  EXPECT_REPORT_OF_PAIR("block (1,0,0): byte 70 of shared memory was written, the launch gave 64", 64, {
    if (clusterRank() == 1) static_cast<char*>(sharedMemory(64))[70] = 1;
  });
}

void testMemoryDefects() {
  const DeviceArray<float> array(64);
  device = array.data();
  EXPECT_REPORT("is not aligned to 16 bytes", 32, 0, { ldGlobal<uint4>(device + 1); });
  EXPECT_REPORT("ldGlobal: 16 bytes at offset 256 of an allocation of 256 bytes", 32, 0,
                { ldGlobal<uint4>(device + 64); });
  EXPECT_REPORT("stGlobal: 4 bytes at offset -4 of an allocation of 256 bytes", 32, 0, { stGlobal(device - 1, 1.f); });
  EXPECT_REPORT("prefetchGlobal: 1 bytes at offset 256", 32, 0, { prefetchGlobal(device + 64); });
  EXPECT_REPORT("cpAsync: 4 bytes at offset 256", 32, sizeof(Scratch), {
    SHARED_MEMORY(Scratch, s);
    cpAsync4(s.bytes, device + 64);
  });
  EXPECT_REPORT("shared offset 8 is not aligned to 16 bytes", 32, sizeof(Scratch), {
    SHARED_MEMORY(Scratch, s);
    uint32_t r[4];
    ldmatrix(r, s.bytes + 8);
  });
  EXPECT_REPORT("ldmatrix: address", 32, sizeof(Scratch), {
    uint32_t r[1];
    ldmatrix(r, device);
  });
  EXPECT_REPORT("the kernel's shared memory has 9216 bytes, the launch gave 1024", 32, 1024, {
    SHARED_MEMORY(Scratch, s);
    s.bytes[0] = 1;
  });
  EXPECT_REPORT("past the launch's 64 bytes", 32, 64, { stShared(static_cast<char*>(sharedMemory(64)) + 64, 1.f); });
  EXPECT_REPORT("byte 70 of shared memory was written, the launch gave 64", 32, 64,
                { static_cast<char*>(sharedMemory(64))[70] = 1; });
  EXPECT_REPORT("exits with cp.async in flight", 32, sizeof(Scratch), {
    SHARED_MEMORY(Scratch, s);
    cpAsync16(s.bytes + threadIdx.x * 16, device);
    cpAsyncCommit();
    cpAsyncWait<1>();
  });
  if (!kAddressSanitizer) {  // which would see the accesses themselves, and end the process
    EXPECT_REPORT("runDefect: a byte at offset 260 of an allocation of 256 bytes was written", 32, 0,
                  { device[65] = 1; });
    DeviceArray<float> freed(3);
    freed.data()[-1] = 2;
    CHECK_ERROR(Internal, "deviceFree: a byte at offset -4 of an allocation of 12 bytes", freed.free());
  }
}

void testAsyncDefects() {
  const DeviceArray<float> array(64 * 64);
  TensorMapDesc desc;
  desc.base = array.data();
  desc.dtype = DType::F32;
  desc.columns = desc.rows = 64;
  desc.rowBytes = 256;
  desc.boxColumns = 32;
  desc.boxRows = 8;
  tensorMap = encodeTensorMap(desc);
  const size_t shared = sizeof(Scratch);
  EXPECT_REPORT("the mbarrier is not initialised", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    mbarrierWait(s.barrier, 0);
  });
  EXPECT_REPORT("count 0 is not 1 to 2^20-1", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    mbarrierInit(s.barrier, 0);
  });
  EXPECT_REPORT("mbarrierInit: the mbarrier is in use", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    mbarrierInit(s.barrier, 1);
  });
  EXPECT_REPORT("more arrivals at the mbarrier than its count of 2", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    if (threadIdx.x == 0) {
      mbarrierInit(s.barrier, 2);
      mbarrierArriveExpectTx(s.barrier, 16);
      mbarrierArrive(s.barrier);
      mbarrierArrive(s.barrier);
    }
  });
  EXPECT_REPORT("at mbarrierWait (device_test.cc:", 64, shared, {
    SHARED_MEMORY(Scratch, s);
    if (threadIdx.x == 0) mbarrierInit(s.barrier, 65);
    syncThreads();
    mbarrierArrive(s.barrier);
    mbarrierWait(s.barrier, 0);
  });
  EXPECT_REPORT("nobody has waited for TMA or cp.async", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    if (threadIdx.x == 31) {
      mbarrierInit(s.barrier, 1);
      tmaLoad2d(s.bytes, tensorMap, s.barrier, 0, 0);
    }
  });
  EXPECT_REPORT("tmaLoad2d: shared offset 128 is not aligned to 1024 bytes", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    if (threadIdx.x == 0) {
      mbarrierInit(s.barrier, 1);
      tmaLoad2d(s.bytes + 128, tensorMap, s.barrier, 0, 0);
    }
  });
  EXPECT_REPORT("tmaStore2d: not a tensor map", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    tmaStore2d(TensorMap{}, s.bytes, 0, 0);
  });
  EXPECT_REPORT("exits with a TMA store in flight", 32, shared, {
    SHARED_MEMORY(Scratch, s);
    if (threadIdx.x == 0) tmaStore2d(tensorMap, s.bytes, 0, 0);
    bulkCommit();
  });
}

void testWgmmaDefects() {
  const size_t shared = sizeof(Scratch);
  EXPECT_REPORT("wgmma without wgmmaFence", 128, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[32];
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
  });
  EXPECT_REPORT("wgmma without wgmmaFence", 128, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[32];
    wgmmaFence();
    wgmmaWait<0>(d);
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
  });
  EXPECT_REPORT("wgmma needs a warpgroup of four warps", 96, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[32];
    wgmmaFence();
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
  });
  EXPECT_REPORT("wgmma: descriptors or flags differ within the warp", 128, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[32];
    wgmmaFence();
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), laneId() == 3);
  });
  EXPECT_REPORT("exits with wgmma in flight", 128, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[32];
    wgmmaFence();
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
    wgmmaCommit();
    wgmmaWait<1>(d);
  });
  EXPECT_REPORT("wgmma: operand at shared offset 9216, past the end", 128, shared, {
    SHARED_MEMORY(Scratch, s);
    float d[128];
    wgmmaFence();
    wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
    wgmmaCommit();
    wgmmaWait<0>(d);
  });
  EXPECT_REPORT("has no 128-byte swizzle", 128, shared, {
    float d[32];
    wgmmaFence();
    wgmmaBf16(d, 0, 0, false);
    wgmmaCommit();
    wgmmaWait<0>(d);
  });
}

void testLaunchDefects() {
  EXPECT_REPORT("exception in a kernel: vector::_M_range_check", 32, 0, { std::vector<int>().at(threadIdx.x); });
  EXPECT_REPORT("launches runDefect from a kernel", 32, 0, { LAUNCH(runDefect, 1, 32, 0, nullptr); });
  EXPECT_REPORT("1 blocks of 33 threads; blocks are whole warps", 33, 0, {});
  EXPECT_REPORT("1 blocks of 1056 threads", 1056, 0, {});
  EXPECT_REPORT("232449 bytes of shared memory, more than", 32, kSharedBytesMax + 1, {});
  CHECK_ERROR(Internal, "clusters of 2 in a grid 3 wide", LAUNCH_CLUSTERS(runDefect, 2, 3, 32, 0, nullptr));
  CHECK_ERROR(Internal, "clusters of 4 in a grid 4 wide", LAUNCH_CLUSTERS(runDefect, 4, 4, 32, 0, nullptr));
  // The place of a report, and the largest block there is.
  defect = [] {
    if (blockIdx.x == 1 && blockIdx.y == 2 && threadIdx.x == 1023) report("here");
  };
  CHECK_ERROR(Internal, "[simt] runDefect block (1,2,0) thread 1023: here",
              LAUNCH(runDefect, dim3(2, 3), 1024, 0, nullptr));
}

// ---- What asynchrony and schedules show

__global__ void staleCopy(float* out) {
  SHARED_MEMORY(Scratch, s);
  const float* values = reinterpret_cast<const float*>(s.bytes);
  cpAsync4(s.bytes + threadIdx.x * 4, out + threadIdx.x);
  cpAsyncCommit();
  const float early = values[threadIdx.x];
  cpAsyncWait<0>();
  out[threadIdx.x] = early;
}

__global__ void staleSums(float* out) {
  SHARED_MEMORY(Scratch, s);
  for (int i = threadIdx.x; i < 4096; i += 128) reinterpret_cast<bf16*>(s.bytes)[i] = toBf16(1);
  syncThreads();
  float d[32] = {};
  wgmmaFence();
  wgmmaBf16(d, descriptorK(s.bytes), descriptorK(s.bytes), false);
  wgmmaCommit();
  const float early = d[5];
  wgmmaWait<0>(d);
  if (threadIdx.x < 32) out[threadIdx.x] = early;
  if (threadIdx.x < 32) out[32 + threadIdx.x] = d[5];
}

// Reads what the neighbouring warp wrote, without a barrier between two rounds.
__global__ void overwrittenEarly(uint32_t* out) {
  SHARED_MEMORY(Scratch, s);
  uint32_t* values = reinterpret_cast<uint32_t*>(s.bytes);
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 4; ++round) {
    values[threadIdx.x] = round;
    syncThreads();
    sum += values[(threadIdx.x + 32) % 128] == round;
  }
  out[threadIdx.x] = sum;
}

void testAsynchrony() {
  const DeviceArray<float> array(std::vector<float>(64, 3.f));
  LAUNCH(staleCopy, 1, 64, sizeof(Scratch), nullptr, array.data());
  for (float value : array.download()) CHECK(std::isnan(value));
  LAUNCH(staleSums, 1, 128, sizeof(Scratch), nullptr, array.data());
  const std::vector<float> sums = array.download();
  for (int i = 0; i < 64; ++i) CHECK(i < 32 ? std::isnan(sums[i]) : sums[i] == 16);

  int caught = 0;
  const DeviceArray<uint32_t> counts(128);
  underEverySchedule([&](const char*) {
    LAUNCH(overwrittenEarly, 1, 128, sizeof(Scratch), nullptr, counts.data());
    for (uint32_t count : counts.download()) {
      if (count == 4) continue;
      ++caught;
      break;
    }
  });
  CHECK(caught >= 4);
}

// ---- Counters

template <bool kSwizzled>
__global__ void countConflicts() {
  SHARED_MEMORY(Scratch, s);
  const int row = static_cast<int>(threadIdx.x) % 8;
  const int offset = kSwizzled ? swizzle128(row, 0) : row * 128;
  uint32_t r[1];
  stShared(s.bytes + 1024 * (threadIdx.x / 8) + offset, uint4{1, 2, 3, 4});
  syncWarp();
  ldmatrix(r, s.bytes + offset);
  ldShared<uint32_t>(s.bytes + threadIdx.x * 4);
}

void testStatistics() {
  LAUNCH(countConflicts<true>, 2, 32, sizeof(Scratch), nullptr);
  const Statistics good = lastLaunch();
  CHECK(good.blocks == 2 && good.ldmatrix == 2 && good.warpOps == 4 && good.bankConflicts == 0);
  LAUNCH(countConflicts<false>, 1, 32, sizeof(Scratch), nullptr);
  CHECK(lastLaunch().bankConflicts == 7 * 4 + 7);  // eight rows in one group of banks: four stores' phases, one load
  CHECK(lastLaunch().switches > 0);
}

void testSchedules() {
  CHECK(parseSchedule("sprint:3").order == Order::Sprint && parseSchedule("sprint:3").seed == 3);
  CHECK(parseSchedule("random").order == Order::Random);
  CHECK_ERROR(InvalidArgument, "got \"sprint:x\"", parseSchedule("sprint:x"));
  CHECK_ERROR(InvalidArgument, "got \"slow\"", parseSchedule("slow"));
}

// ---- The runtime

__global__ void increment(int* values, int by) { values[threadIdx.x] += by; }

void testStreams() {
  const DeviceArray<int> array(std::vector<int>(32, 1));
  const Stream stream = streamCreate();
  std::vector<int> host(32, -1);
  int called = 0;
  LAUNCH(increment, 1, 32, 0, stream, array.data(), 2);
  copyAsync(host.data(), array.data(), 128, CopyKind::DeviceToHost, stream);
  hostCallback(stream, [&] { ++called; });
  CHECK(host[0] == -1 && called == 0 && !streamQuery(stream));  // nothing has waited yet
  streamSynchronize(stream);
  CHECK(host[0] == 3 && host[31] == 3 && called == 1 && streamQuery(stream));

  // One stream waits for an event of another.
  const Stream other = streamCreate();
  const Event start = eventCreate(), ready = eventCreate();
  eventRecord(start, other);
  fillAsync(array.data(), 0, 128, other);
  eventRecord(ready, other);
  CHECK(!eventQuery(ready));
  streamWait(stream, ready);
  LAUNCH(increment, 1, 32, 0, stream, array.data(), 5);
  copyAsync(host.data(), array.data(), 128, CopyKind::DeviceToHost, stream);
  streamSynchronize(stream);
  CHECK(host[7] == 5 && eventQuery(ready) && elapsedMilliseconds(start, ready) >= 0);
  streamDestroy(other);
  eventSynchronize(ready);
  eventDestroy(start);
  eventDestroy(ready);

  // A defect surfaces where the stream is waited for, and drops what was queued behind it.
  defect = [] { report("queued"); };
  LAUNCH(runDefect, 1, 32, 0, stream);
  LAUNCH(increment, 1, 32, 0, stream, array.data(), 100);
  CHECK_ERROR(Internal, "queued", streamSynchronize(stream));
  streamSynchronize(stream);
  CHECK(array.download()[0] == 5);
  streamDestroy(stream);
}

void testGraphs() {
  const DeviceArray<int> array(std::vector<int>(32, 0));
  const Stream stream = streamCreate();
  beginCapture(stream);
  LAUNCH(increment, 1, 32, 0, stream, array.data(), 3);
  LAUNCH(increment, 1, 32, 0, stream, array.data(), 4);
  CHECK_ERROR(Internal, "deviceMalloc while a stream is being captured", deviceMalloc(4));
  CHECK_ERROR(Internal, "streamSynchronize while a stream is being captured", streamSynchronize(stream));
  CHECK_ERROR(Internal, "beginCapture while", beginCapture(stream));
  const Graph graph = endCapture(stream);
  streamSynchronize(stream);
  CHECK(array.download()[0] == 0);  // recorded, not run
  graphLaunch(graph, stream);
  graphLaunch(graph, stream);
  streamSynchronize(stream);
  CHECK(array.download()[31] == 14);
  graphDestroy(graph);
  beginCapture(stream);
  abandonCapture(stream);
  CHECK_ERROR(Internal, "endCapture without beginCapture", endCapture(stream));
  streamDestroy(stream);
}

// What runs after what in a recording of two branches, each of two operations, between two others.
void testBranches() {
  const Stream stream = streamCreate(), branch = streamCreate();
  const Event turn = eventCreate();
  std::string order;
  const auto queue = [&](Stream on, char name) { enqueue(on, [&order, name] { order += name; }); };
  const auto record = [&](bool join) {
    beginCapture(stream);
    queue(stream, 'a');
    eventRecord(turn, stream);
    queue(stream, 'b');
    queue(stream, 'c');
    streamWait(branch, turn);
    queue(branch, 'd');
    queue(branch, 'e');
    eventRecord(turn, branch);
    if (join) streamWait(stream, turn);
    queue(stream, 'f');
    return endCapture(stream);
  };
  const Graph graph = record(true);
  const int64_t depth = work().depth;
  const auto orderUnder = [&](const char* schedule) {
    setSchedule(parseSchedule(schedule));
    order.clear();
    graphLaunch(graph, stream);
    streamSynchronize(stream);
    return order;
  };
  CHECK(orderUnder("fair") == "adbecf");    // branches in turn, the last one first
  CHECK(orderUnder("sprint") == "adebcf");  // one as far as it can
  std::set<std::string> orders;
  for (int seed = 0; seed < 100; ++seed) orders.insert(orderUnder(("random:" + std::to_string(seed)).c_str()));
  CHECK(orders == (std::set<std::string>{"abcdef", "abdcef", "abdecf", "adbcef", "adbecf", "adebcf"}));
  CHECK(work().depth - depth == 102 * 4);
  graphDestroy(graph);
  setSchedule({});

  CHECK_ERROR(Internal, "endCapture: a branch has not been waited for", record(false));
  // Neither stream is recorded any more.
  order.clear();
  queue(branch, 'g');
  eventRecord(turn, branch);
  streamSynchronize(branch);
  CHECK(order == "g");
  beginCapture(stream);
  CHECK_ERROR(Internal, "for an event that is not", streamWait(stream, turn));
  abandonCapture(stream);
  eventDestroy(turn);
  streamDestroy(branch);
  streamDestroy(stream);
}

void testMemory() {
  CHECK(deviceCount() == 1 && deviceProperties(0).computeMajor == 9);
  setenv("ELASTIFORM_SIMT_CAPABILITY", "80", 1);
  CHECK(deviceProperties(0).computeMajor == 8);
  setenv("ELASTIFORM_SIMT_CAPABILITY", "86", 1);
  CHECK_ERROR(InvalidArgument, "must be 75, 80 or 90, got 86", deviceProperties(0));
  unsetenv("ELASTIFORM_SIMT_CAPABILITY");
  CHECK_ERROR(Internal, "device 1 of 1", setDevice(1));
  const MemoryInfo before = memoryInfo();
  setMemoryLimit(before.totalBytes - before.freeBytes + 1000);
  CHECK_ERROR(OutOfMemory, "no memory for 1001 bytes: 1000 of", deviceMalloc(1001));
  void* memory = deviceMalloc(1000);
  CHECK(memoryInfo().freeBytes == 0 && reinterpret_cast<uintptr_t>(memory) % 256 == 0);
  CHECK(std::isnan(*static_cast<float*>(memory)));
  deviceFree(memory);
  setMemoryLimit(before.totalBytes);
  CHECK_ERROR(Internal, "is no allocation", deviceFree(memory));
  CHECK_ERROR(OutOfMemory, "no memory for", deviceMalloc(SIZE_MAX));
  deviceFree(nullptr);

  void* host = hostMalloc(64);
  const DeviceArray<int> array(16);
  CHECK_ERROR(Internal, "copyAsync to: 64 bytes", copyAsync(host, host, 64, CopyKind::HostToDevice, nullptr));
  CHECK_ERROR(Internal, "copyAsync to: 64 bytes", copyAsync(array.data(), host, 64, CopyKind::DeviceToHost, nullptr));
  CHECK_ERROR(Internal, "not within", copyAsync(array.data() + 1, host, 64, CopyKind::HostToDevice, nullptr));
  hostFree(host);
}

void testTensorMaps() {
  const DeviceArray<bf16> array(64 * 64);
  TensorMapDesc good;
  good.base = array.data();
  good.columns = good.rows = 64;
  good.rowBytes = 128;
  good.boxColumns = 64;
  good.boxRows = 8;
  encodeTensorMap(good);
  const auto with = [&](auto change) {
    TensorMapDesc desc = good;
    change(desc);
    encodeTensorMap(desc);
  };
  CHECK_ERROR(Internal, "base must be aligned", with([&](auto& d) { d.base = array.data() + 1; }));
  CHECK_ERROR(Internal, "rowBytes must be a multiple of 16", with([](auto& d) { d.rowBytes = 136; }));
  CHECK_ERROR(Internal, "rowBytes must hold a row", with([](auto& d) { d.rowBytes = 112; }));
  CHECK_ERROR(Internal, "boxRows must be 1 to 256", with([](auto& d) { d.boxRows = 257; }));
  CHECK_ERROR(Internal, "a swizzled box row must be 128 bytes", with([](auto& d) { d.boxColumns = 32; }));
  CHECK_ERROR(Internal, "8320 bytes of the matrix", with([](auto& d) { d.rows = 65; }));
}

// Engines run on threads of their own, at the same time, and go away with their executors.
void testThreads() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&wrong, t] {
      for (int i = 0; i < 5; ++i) {
        const DeviceArray<int> array(std::vector<int>(256, t));
        const Stream stream = streamCreate();
        LAUNCH(increment, 1, 256, 0, stream, array.data(), i);
        streamDestroy(stream);
        for (int value : array.download()) wrong += value != t + i;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

}  // namespace

void testEmulation() {
  underEverySchedule([](const char* schedule) {
    expectPassed(runConformance(), schedule);
    takeStatistics();
    expectPassed(runExamples(), schedule);
    const Statistics statistics = takeStatistics();
    CHECK(statistics.mma > 0 && statistics.wgmma > 0 && statistics.bankConflicts == 0);
  });
  testWarpDefects();
  testBarrierDefects();
  testClusterDefects();
  testMemoryDefects();
  testAsyncDefects();
  testWgmmaDefects();
  testLaunchDefects();
  testAsynchrony();
  testStatistics();
  testSchedules();
  testStreams();
  testGraphs();
  testBranches();
  testMemory();
  testTensorMaps();
  testThreads();
  // After all those defects, too.
  expectAndCount("emulated device", "wrappers", runConformance());
  expectAndCount("emulated device", "kernels", runExamples());
}

}  // namespace simt
#endif

}  // namespace elastiform

int testDevice() {
  elastiform::failures = 0;
#ifdef ELASTIFORM_WITH_SIMT
  elastiform::simt::testEmulation();
  return elastiform::failures;
#else
  std::printf("device: this build does not emulate one\n");
  return elastiform::test::kNotRun;
#endif
}

int testGpu() {
  elastiform::failures = 0;
#ifdef ELASTIFORM_WITH_CUDA
  if (elastiform::cuda::deviceCount() > 0) {
    elastiform::expectAndCount("GPU", "wrappers", elastiform::cuda::runConformance());
    elastiform::expectAndCount("GPU", "kernels", elastiform::cuda::runExamples());
    return elastiform::failures;
  }
#endif
  std::printf("gpu: no GPU that this build could use\n");
  return elastiform::test::kNotRun;
}
