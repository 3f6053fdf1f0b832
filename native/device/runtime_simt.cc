// The emulated runtime: device memory between red zones, streams that run when they are waited for, graphs replayed, their
// branches in an order that shows where one should have waited for another.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <queue>
#include <random>
#include <utility>

#include "core/error.h"
#include "device/executor.h"
#include "device/runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace elastiform::simt {

// A recorded or queued piece of work.
using Operation = std::function<void()>;

// Of a recording: an operation, and which of those recorded before it must have run.
struct Node {
  Operation operation;
  std::vector<size_t> after;
};

// A recording under way.
struct Capture {
  std::vector<Node> nodes;
  std::vector<Stream> streams;  // the first one is the origin
};

struct StreamState {
  std::mutex mutex;    // of queue and counters; operations run outside it
  std::mutex running;  // held by whoever runs operations
  std::deque<Operation> queue;
  uint64_t queued = 0, done = 0;
  std::shared_ptr<Capture> capture;  // that the stream is part of
  std::vector<size_t> tail;          // its nodes that the next one comes after
  std::shared_ptr<StreamState> self;  // until streamDestroy; events may outlive that
};

struct EventState {
  std::weak_ptr<Capture> capture;  // that it was recorded in, behind the nodes `tail`
  std::vector<size_t> tail;
  std::shared_ptr<StreamState> stream;
  uint64_t position = 0;  // operations queued on the stream when the event was recorded
  std::shared_ptr<std::chrono::steady_clock::time_point> time;
};

struct GraphState {
  std::vector<Node> nodes;
  std::vector<int> depth;  // of each: how many run one after the other until it has run
};

namespace {

// ---- Memory

constexpr size_t kDeviceAlignment = 256;

struct Allocation {
  unsigned char* block;  // red zone, memory, red zone
  size_t bytes;
};

// ELASTIFORM_SIMT_MEMORY: bytes of the device, for tests of what happens when they are few.
size_t memoryBytes() {
  const char* text = std::getenv("ELASTIFORM_SIMT_MEMORY");
  return text ? std::strtoull(text, nullptr, 10) : size_t{64} << 30;
}

struct Heap {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> allocations;  // by the address handed out
  std::shared_ptr<const MemoryMap> map = std::make_shared<const MemoryMap>();
  size_t limit = memoryBytes(), used = 0;

  void refresh() {
    auto next = std::make_shared<MemoryMap>();
    for (const auto& [begin, a] : allocations) next->push_back({begin, begin + a.bytes});
    map = std::move(next);
  }
};

// Never destroyed: engines of other threads may outlive static destruction.
Heap& heap() {
  static Heap& instance = *new Heap;
  return instance;
}

// AddressSanitizer sees every access to a red zone; without it only writes show, later.
void guard([[maybe_unused]] const unsigned char* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}
void unguard([[maybe_unused]] const unsigned char* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

// Offset from the allocation's begin of the first changed byte around it; false when there is none. Mends the zone, so
// that a defect is reported once.
bool damaged(uintptr_t begin, const Allocation& a, long long* offset) {
  unsigned char* zones[] = {reinterpret_cast<unsigned char*>(begin) - kRedZone,
                            reinterpret_cast<unsigned char*>(begin) + a.bytes};
  bool found = false;
  for (unsigned char* zone : zones) {
    unguard(zone, kRedZone);
    for (size_t i = 0; i < kRedZone && !found; ++i) {
      if (zone[i] == kPoison) continue;
      *offset = zone + i - reinterpret_cast<unsigned char*>(begin);
      found = true;
    }
    if (found) std::memset(zone, kPoison, kRedZone);
    guard(zone, kRedZone);
  }
  return found;
}

// ---- Loss of the device

// ELASTIFORM_SIMT_LOST_AFTER: operations of streams after which the device is lost, as by a fault of a kernel on a GPU, for
// tests of what happens then.
int64_t operationsLeft() {
  const char* text = std::getenv("ELASTIFORM_SIMT_LOST_AFTER");
  return text ? std::strtoll(text, nullptr, 10) : INT64_MAX;
}
std::atomic<int64_t> life{operationsLeft()};

bool isLost() { return life.load(std::memory_order_relaxed) <= 0; }

// Every call fails once the device is lost, as on a GPU.
void requireDevice(const char* what) {
  if (isLost()) fail(ErrorCode::DeviceUnavailable, "[simt] %s: a fault, as tests ask for%s", what, kDeviceLost);
}

// ---- Streams

thread_local Stream capturingStream = nullptr;

void notWhileCapturing(const char* what) {
  if (capturingStream) fail(ErrorCode::Internal, "[simt] %s while a stream is being captured", what);
}

void requireStream(Stream stream, const char* what) {
  if (!stream) fail(ErrorCode::Internal, "[simt] %s needs a stream", what);
}

// Runs operations until `position` of them are done. After a failed one the rest of the queue is dropped.
void runUntil(Stream stream, uint64_t position) {
  const std::lock_guard running(stream->running);
  for (;;) {
    Operation operation;
    {
      const std::lock_guard lock(stream->mutex);
      if (stream->done >= position || stream->queue.empty()) return;
      operation = std::move(stream->queue.front());
      stream->queue.pop_front();
      ++stream->done;
    }
    try {
      if (life.load(std::memory_order_relaxed) != INT64_MAX) --life;
      requireDevice("streamSynchronize");
      operation();
    } catch (...) {
      const std::lock_guard lock(stream->mutex);
      stream->queue.clear();
      stream->done = stream->queued;
      throw;
    }
  }
}

bool isDevice(const void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (const auto& [first, last] : *memoryMap()) {
    if (begin >= first && begin + bytes <= last) return true;
  }
  return false;
}

// The device's side of a copy must be device memory as a whole, the host's side none of it.
void checkCopy(const char* what, const void* p, size_t bytes, bool device) {
  if (bytes > 0 && isDevice(p, bytes) != device) {
    fail(ErrorCode::Internal, "[simt] %s: %zu bytes at %p are %s device memory", what, bytes, p,
         device ? "not within" : "");
  }
}

}  // namespace

std::shared_ptr<const MemoryMap> memoryMap() {
  const std::lock_guard lock(heap().mutex);
  return heap().map;
}

void checkRedZones(const char* where) {
  const std::lock_guard lock(heap().mutex);
  for (const auto& [begin, allocation] : heap().allocations) {
    long long offset = 0;
    if (!damaged(begin, allocation, &offset)) continue;
    fail(ErrorCode::Internal, "[simt] %.80s: a byte at offset %lld of an allocation of %zu bytes was written", where,
         offset, allocation.bytes);
  }
}

void setMemoryLimit(size_t bytes) {
  const std::lock_guard lock(heap().mutex);
  heap().limit = bytes;
}

// ---- Device

int deviceCount() { return isLost() ? 0 : 1; }

std::string deviceProblem() { return isLost() ? std::string("a fault, as tests ask for") + kDeviceLost : ""; }

DeviceProperties deviceProperties(int device) {
  setDevice(device);
  const char* text = std::getenv("ELASTIFORM_SIMT_CAPABILITY");
  const std::string capability = text ? text : "90";
  if (capability != "75" && capability != "80" && capability != "90") {
    fail(ErrorCode::InvalidArgument, "[simt] ELASTIFORM_SIMT_CAPABILITY must be 75, 80 or 90, got %.20s", text);
  }
  DeviceProperties properties;
  properties.name = "SIMT emulation";
  properties.computeMajor = capability[0] - '0';
  properties.computeMinor = capability[1] - '0';
  const char* multiprocessors = std::getenv("ELASTIFORM_SIMT_MULTIPROCESSORS");
  properties.multiprocessors = multiprocessors ? std::max(1, std::atoi(multiprocessors)) : 4;
  properties.memoryBytes = memoryInfo().totalBytes;
  properties.sharedBytesPerBlock = kSharedBytesMax;
  return properties;
}

void setDevice(int device) {
  requireDevice("setDevice");
  if (device != 0) fail(ErrorCode::Internal, "[simt] device %d of 1", device);
}

MemoryInfo memoryInfo() {
  const std::lock_guard lock(heap().mutex);
  return {heap().limit - std::min(heap().limit, heap().used), heap().limit};
}

void* deviceMalloc(size_t bytes) {
  requireDevice("deviceMalloc");
  notWhileCapturing("deviceMalloc");
  Heap& h = heap();
  const std::lock_guard lock(h.mutex);
  const size_t free = h.limit - std::min(h.limit, h.used);
  const size_t padded = (kRedZone + bytes + kRedZone + kDeviceAlignment - 1) / kDeviceAlignment * kDeviceAlignment;
  void* block = bytes <= free && padded > bytes ? std::aligned_alloc(kDeviceAlignment, padded) : nullptr;
  if (!block) {
    fail(ErrorCode::OutOfMemory, "[simt] no memory for %zu bytes: %zu of %zu are free", bytes, free, h.limit);
  }
  static_assert(kRedZone % kDeviceAlignment == 0);
  Allocation allocation{static_cast<unsigned char*>(block), bytes};
  std::memset(block, kPoison, padded);
  unsigned char* begin = allocation.block + kRedZone;
  guard(allocation.block, kRedZone);
  guard(begin + bytes, kRedZone);
  h.allocations.emplace(reinterpret_cast<uintptr_t>(begin), allocation);
  h.used += bytes;
  h.refresh();
  return begin;
}

void deviceFree(void* memory) {
  if (!memory) return;
  requireDevice("deviceFree");
  notWhileCapturing("deviceFree");
  Heap& h = heap();
  const std::lock_guard lock(h.mutex);
  const auto found = h.allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == h.allocations.end()) fail(ErrorCode::Internal, "[simt] deviceFree: %p is no allocation", memory);
  const Allocation allocation = found->second;
  long long offset = 0;
  const bool bad = damaged(found->first, allocation, &offset);
  h.allocations.erase(found);
  h.used -= allocation.bytes;
  h.refresh();
  unguard(allocation.block, kRedZone);
  unguard(static_cast<unsigned char*>(memory) + allocation.bytes, kRedZone);
  std::free(allocation.block);
  if (bad) {
    fail(ErrorCode::Internal, "[simt] deviceFree: a byte at offset %lld of an allocation of %zu bytes was written",
         offset, allocation.bytes);
  }
}

void* hostMalloc(size_t bytes) {
  requireDevice("hostMalloc");
  notWhileCapturing("hostMalloc");
  void* memory = std::malloc(std::max<size_t>(bytes, 1));
  if (!memory) fail(ErrorCode::OutOfMemory, "[simt] no host memory for %zu bytes", bytes);
  std::memset(memory, kPoison, bytes);
  return memory;
}

void hostFree(void* memory) { std::free(memory); }

// ---- Streams

void enqueue(Stream stream, Operation operation) {
  requireDevice("enqueue");
  if (!stream) {
    notWhileCapturing("work on the null stream");
    operation();
    return;
  }
  const std::lock_guard lock(stream->mutex);
  if (stream->capture) {
    std::vector<Node>& nodes = stream->capture->nodes;
    nodes.push_back({std::move(operation), std::exchange(stream->tail, {nodes.size()})});
  } else {
    stream->queue.push_back(std::move(operation));
    ++stream->queued;
  }
}

void copyAsync(void* to, const void* from, size_t bytes, CopyKind kind, Stream stream) {
  checkCopy("copyAsync to", to, bytes, kind != CopyKind::DeviceToHost);
  checkCopy("copyAsync from", from, bytes, kind != CopyKind::HostToDevice);
  enqueue(stream, [=] {
    std::memmove(to, from, bytes);
    if (kind == CopyKind::HostToDevice) {
      ++work().uploads;
      work().uploadedBytes += static_cast<int64_t>(bytes);
    } else if (kind == CopyKind::DeviceToHost) {
      ++work().downloads;
    }
  });
}

void fillAsync(void* memory, uint8_t value, size_t bytes, Stream stream) {
  checkCopy("fillAsync", memory, bytes, true);
  enqueue(stream, [=] { std::memset(memory, value, bytes); });
}

Stream streamCreate() {
  requireDevice("streamCreate");
  auto stream = std::make_shared<StreamState>();
  stream->self = stream;
  return stream.get();
}

void streamDestroy(Stream stream) {
  if (!stream) return;
  const std::shared_ptr<StreamState> last = std::exchange(stream->self, nullptr);
  abandonCapture(stream);
  streamSynchronize(stream);
}

void streamSynchronize(Stream stream) {
  notWhileCapturing("streamSynchronize");
  if (stream) runUntil(stream, UINT64_MAX);
}

bool streamQuery(Stream stream) {
  if (!stream) return true;
  const std::lock_guard lock(stream->mutex);
  return stream->queue.empty();
}

void streamWait(Stream stream, Event event) {
  requireStream(stream, "streamWait");
  const std::shared_ptr<Capture> capture = event->capture.lock();
  if (stream->capture && capture != stream->capture) {
    fail(ErrorCode::Internal, "[simt] streamWait of a stream that is captured for an event that is not");
  }
  if (capture) {
    const std::lock_guard lock(stream->mutex);
    if (!stream->capture) capture->streams.push_back(stream);
    stream->capture = capture;
    stream->tail.insert(stream->tail.end(), event->tail.begin(), event->tail.end());
    return;
  }
  if (!event->stream || event->stream.get() == stream) return;
  enqueue(stream, [other = event->stream, position = event->position] { runUntil(other.get(), position); });
}

void hostCallback(Stream stream, std::function<void()> callback) { enqueue(stream, std::move(callback)); }

// ---- Events

Event eventCreate() {
  requireDevice("eventCreate");
  return new EventState;
}

void eventDestroy(Event event) { delete event; }

void eventRecord(Event event, Stream stream) {
  requireStream(stream, "eventRecord");
  event->capture = stream->capture;
  event->tail = stream->tail;
  if (stream->capture) return;
  event->time = std::make_shared<std::chrono::steady_clock::time_point>();
  enqueue(stream, [time = event->time] { *time = std::chrono::steady_clock::now(); });
  const std::lock_guard lock(stream->mutex);
  event->stream = stream->self;
  event->position = stream->queued;
}

void eventSynchronize(Event event) {
  notWhileCapturing("eventSynchronize");
  if (event->stream) runUntil(event->stream.get(), event->position);
}

bool eventQuery(Event event) {
  if (!event->stream) return true;
  const std::lock_guard lock(event->stream->mutex);
  return event->stream->done >= event->position;
}

float elapsedMilliseconds(Event start, Event end) {
  if (!start->stream || !end->stream || !eventQuery(start) || !eventQuery(end)) {
    fail(ErrorCode::Internal, "[simt] elapsedMilliseconds: an event is not done");
  }
  return std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
}

// ---- Graphs

namespace {

// Takes the streams of a recording out of it.
void release(const Capture& capture) {
  capturingStream = nullptr;
  for (const Stream stream : capture.streams) {
    const std::lock_guard lock(stream->mutex);
    stream->capture.reset();
    stream->tail.clear();
  }
}

// An order that the recording allows, by the schedule of warps: branches in turn, the one recorded last first; one branch as
// far as it can, from the last; or at random.
std::vector<size_t> orderOf(const GraphState& graph) {
  const Schedule schedule = currentSchedule();
  std::mt19937_64 random(schedule.seed);
  const auto priority = [&](size_t node) -> uint64_t {
    switch (schedule.order) {
      case Order::Fair: return UINT64_MAX - static_cast<uint64_t>(graph.depth[node]);
      case Order::Sprint: return 0;
      case Order::Random: return random();
    }
    return 0;
  };
  std::vector<size_t> waitsFor(graph.nodes.size()), order;
  std::vector<std::vector<size_t>> before(graph.nodes.size());
  std::priority_queue<std::pair<uint64_t, size_t>> ready;  // priorities, equal ones by node
  for (size_t node = 0; node < graph.nodes.size(); ++node) {
    waitsFor[node] = graph.nodes[node].after.size();
    for (const size_t other : graph.nodes[node].after) before[other].push_back(node);
    if (waitsFor[node] == 0) ready.emplace(priority(node), node);
  }
  while (!ready.empty()) {
    const size_t node = ready.top().second;
    ready.pop();
    order.push_back(node);
    for (const size_t next : before[node]) {
      if (--waitsFor[next] == 0) ready.emplace(priority(next), next);
    }
  }
  return order;
}

}  // namespace

void beginCapture(Stream stream) {
  requireStream(stream, "beginCapture");
  notWhileCapturing("beginCapture");
  const std::lock_guard lock(stream->mutex);
  stream->capture = std::make_shared<Capture>();
  stream->capture->streams.push_back(stream);
  stream->tail.clear();
  capturingStream = stream;
}

Graph endCapture(Stream stream) {
  if (!stream || capturingStream != stream) fail(ErrorCode::Internal, "[simt] endCapture without beginCapture");
  const std::shared_ptr<Capture> capture = stream->capture;
  std::vector<bool> joined(capture->nodes.size());  // those that the stream's next one would come after
  for (const size_t node : stream->tail) joined[node] = true;
  release(*capture);
  auto graph = std::make_unique<GraphState>();
  graph->nodes = std::move(capture->nodes);
  for (size_t node = joined.size(); node-- > 0;) {
    if (!joined[node]) fail(ErrorCode::Internal, "[simt] endCapture: a branch has not been waited for");
    for (const size_t other : graph->nodes[node].after) joined[other] = true;
  }
  for (const Node& node : graph->nodes) {
    int depth = 0;
    for (const size_t other : node.after) depth = std::max(depth, graph->depth[other]);
    graph->depth.push_back(depth + 1);
  }
  return graph.release();
}

void abandonCapture(Stream stream) noexcept {
  if (!stream || capturingStream != stream) return;
  release(*std::shared_ptr<Capture>(stream->capture));
}

void graphLaunch(Graph graph, Stream stream) {
  requireStream(stream, "graphLaunch");
  for (const size_t node : orderOf(*graph)) enqueue(stream, graph->nodes[node].operation);
  if (!graph->depth.empty()) work().depth += *std::max_element(graph->depth.begin(), graph->depth.end());
}

void graphDestroy(Graph graph) { delete graph; }

// ---- Tensor maps

TensorMap encodeTensorMap(const TensorMapDesc& desc) {
  checkTensorMap(desc);
  const uint32_t element = static_cast<uint32_t>(dtypeSize(desc.dtype));
  const size_t bytes = (desc.rows - 1) * desc.rowBytes + desc.columns * element;
  if (!isDevice(desc.base, bytes)) {
    fail(ErrorCode::Internal, "[encodeTensorMap] the %zu bytes of the matrix are not within an allocation", bytes);
  }
  const TensorMapFields fields{kTensorMapMagic,
                               static_cast<unsigned char*>(const_cast<void*>(desc.base)),
                               desc.columns,
                               desc.rows,
                               desc.rowBytes,
                               desc.boxColumns,
                               desc.boxRows,
                               element,
                               desc.swizzle == Swizzle::Bytes128};
  TensorMap map{};
  std::memcpy(&map, &fields, sizeof fields);
  return map;
}

}  // namespace elastiform::simt
