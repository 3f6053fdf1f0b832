// Runs programs on a CUDA device: memory, weights and states on the device, one recorded graph per program.
//
// Everything a run touches lies in one block of device memory: feeds, a header (the first fault, a ticket, counters,
// current sizes of dims), outputs, the program's arena, and the scratch of one op. A program is recorded once; a run copies
// the feeds and the header to the device, launches the recording, and copies the header and the outputs back, neighbours
// by one copy. Sizes and thresholds change between runs without recording again.
//
// Neighbouring steps of which none touches memory that another writes are branches of the recording, which the device runs
// side by side.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

#include "core/memory.h"
#include "cuda/kernels.h"
#include "runtime/device.h"
#include "runtime/engine.h"
#include "runtime/signature.h"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

using elastiform::Job;  // the emulation has one of its own

#ifdef __CUDACC__
constexpr DeviceKind kKind = DeviceKind::Cuda;
#else
constexpr DeviceKind kKind = DeviceKind::Simt;
#endif
constexpr int kComputeMajorMin = 8;  // mma.sync of bf16, cp.async
constexpr size_t kAlign = 256;
constexpr size_t kStagingBytes = size_t{8} << 20;
// Branches of a recording: as many queues of work as CUDA gives a process that asks for no others
// (CUDA_DEVICE_MAX_CONNECTIONS). Further steps follow on the branches in turn.
constexpr size_t kMostBranches = 8;
constexpr size_t kMostBeside = 64;  // steps side by side; bounds the search for them
constexpr size_t kGap = size_t{64} << 10;  // what is faster copied with its neighbours than skipped: a microsecond or two

using Clock = std::chrono::steady_clock;
double millisecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// ELASTIFORM_CUDA_BRANCHES: fewer branches; 1 records steps one after the other.
size_t branchCount() {
  const char* text = std::getenv("ELASTIFORM_CUDA_BRANCHES");
  if (!text) return kMostBranches;
  char* end = nullptr;
  const unsigned long count = std::strtoul(text, &end, 10);
  if (*end != '\0' || count < 1 || count > kMostBranches) {
    fail(ErrorCode::InvalidArgument, "ELASTIFORM_CUDA_BRANCHES must be 1 to %zu, got %.20s", kMostBranches, text);
  }
  return count;
}

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// For destructors: a device that a kernel's fault has lost answers every call with that fault.
template <typename Call>
void quietly(const Call& call) noexcept {
  try {
    call();
  } catch (const Error&) {
  }
}

// Device memory that is counted.
class DeviceBlock {
 public:
  DeviceBlock() = default;
  explicit DeviceBlock(size_t bytes) : data_(static_cast<uint8_t*>(deviceMalloc(std::max<size_t>(bytes, 1)))), bytes_(bytes) {
    memoryCounters().deviceBytes += static_cast<int64_t>(bytes_);
  }
  DeviceBlock(DeviceBlock&& other) noexcept { swap(other); }
  DeviceBlock& operator=(DeviceBlock&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBlock() {
    if (!data_) return;
    memoryCounters().deviceBytes -= static_cast<int64_t>(bytes_);
    quietly([&] { deviceFree(data_); });
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(DeviceBlock& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

class StateMirror : public Mirror {
 public:
  explicit StateMirror(size_t bytes) : block_(bytes) {}
  void download(void* host) override {
    const Stream stream = streamCreate();
    copyAsync(host, block_.data(), block_.bytes(), CopyKind::DeviceToHost, stream);
    streamSynchronize(stream);
    streamDestroy(stream);
  }
  uint8_t* data() const { return block_.data(); }

 private:
  DeviceBlock block_;
};

// Page-locked memory that grows.
class HostBlock {
 public:
  HostBlock() = default;
  HostBlock(const HostBlock&) = delete;
  ~HostBlock() {
    quietly([&] { hostFree(data_); });
  }
  uint8_t* atLeast(size_t bytes) {
    if (bytes <= bytes_) return data_;
    hostFree(std::exchange(data_, nullptr));
    bytes_ = 0;
    data_ = static_cast<uint8_t*>(hostMalloc(bytes));
    bytes_ = bytes;
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Part {
  size_t begin, bytes;
};

// Where a program's parts begin in the block. Small feeds and outputs are next to the header.
struct Layout {
  size_t fault, ticket, counters, sizes, headerBytes;  // counters: by branch, which may count at once, then by tag
  std::vector<Part> feeds, outputs;            // by slot, at their bounds
  std::vector<size_t> feedOrder, outputOrder;  // slots in the order of the block
  size_t arena, scratch;

  explicit Layout(const Program& program) {
    size_t end = 0;
    const auto take = [&](size_t bytes) { return std::exchange(end, end + aligned(bytes)); };
    const auto takeAll = [&](const std::vector<int>& tensors, bool falling, std::vector<Part>& parts,
                             std::vector<size_t>& order) {
      for (size_t slot = 0; slot < tensors.size(); ++slot) {
        parts.push_back({0, static_cast<size_t>(program.tensors[tensors[slot]].boundBytes)});
        order.push_back(slot);
      }
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return falling ? parts[a].bytes > parts[b].bytes : parts[a].bytes < parts[b].bytes;
      });
      for (const size_t slot : order) parts[slot].begin = take(parts[slot].bytes);
    };
    takeAll(program.feeds, true, feeds, feedOrder);
    fault = take(sizeof(FaultRecord));
    ticket = take(sizeof(uint32_t));
    counters = take(kMostBranches * program.tags * sizeof(Counters));
    sizes = take(program.dims.size() * sizeof(int32_t));
    headerBytes = end - fault;
    takeAll(program.outputs, false, outputs, outputOrder);
    arena = take(static_cast<size_t>(program.arenaBytes));
    scratch = end;
  }
};

// Device memory that a step touches.
struct Access {
  const uint8_t *begin, *end;
  bool written;
};

// Whether one of two steps writes what the other reads or writes.
bool collide(const std::vector<Access>& a, const std::vector<Access>& b) {
  for (const Access& x : a) {
    for (const Access& y : b) {
      if ((x.written || y.written) && x.begin < y.end && y.begin < x.end) return true;
    }
  }
  return false;
}

struct Recording {
  std::weak_ptr<const Program> program;
  std::optional<Layout> layout;  // the program's
  Graph graph = nullptr;
  // The addresses it was recorded with. Weights have theirs for as long as the program lives.
  const uint8_t* block = nullptr;
  std::vector<const uint8_t*> states;  // by Program::writableUses
  Recording() = default;
  Recording(const Recording&) = delete;
  ~Recording() {
    quietly([&] {
      if (graph) graphDestroy(graph);
    });
  }
};

class Runner : public Device {
 public:
  explicit Runner(std::shared_ptr<std::atomic<int64_t>> owned) : owned_(std::move(owned)) {}
  ~Runner() override {
    recordings_.clear();
    for (const Event event : {started_, ended_, turn_}) {
      if (event) quietly([&] { eventDestroy(event); });
    }
    destroyStreams();
    account(-static_cast<int64_t>(block_.bytes()));
  }

  void run(Job& job) override {
    const auto start = Clock::now();
    step_ = -1;
    waited_ = 0;
    try {
      if (job.abort.load(std::memory_order_relaxed)) fail(ErrorCode::Aborted, "[run] aborted");
      runJob(job);
    } catch (const Error& error) {
      job.error.emplace(error.code, error.code == ErrorCode::Aborted ? error.what() : where(*job.program) + error.what());
    } catch (const std::bad_alloc&) {
      job.error.emplace(ErrorCode::OutOfMemory, where(*job.program) + "out of memory");
    } catch (const std::exception& error) {
      job.error.emplace(ErrorCode::Internal, where(*job.program) + error.what());
    }
    if (job.error && stream_) destroyStreams();
    job.milliseconds = millisecondsSince(start);
    job.hostMilliseconds = job.milliseconds - waited_;
  }

 private:
  std::string where(const Program& program) const {
    if (step_ < 0) return "[run] ";
    return "[run] step " + std::to_string(step_) + " (" + opDefs()[program.steps[step_].op].name + "): ";
  }

  // With what is queued on them, or half recorded.
  void destroyStreams() noexcept {
    abandonCapture(stream_);
    quietly([&] { streamDestroy(std::exchange(stream_, nullptr)); });
    for (const Stream branch : branches_) quietly([&] { streamDestroy(branch); });
    branches_.clear();
  }

  void runJob(Job& job) {
    setDevice(0);
    if (!stream_) stream_ = streamCreate();
    if (!started_) started_ = eventCreate();
    if (!ended_) ended_ = eventCreate();
    if (!turn_) turn_ = eventCreate();
    const Program& program = *job.program;
    const Recording& recording = recordWithRetry(job.program);
    const Layout& layout = *recording.layout;
    step_ = -1;

    uint8_t* staging = staging_.atLeast(layout.arena);
    std::memset(staging + layout.fault, 0, layout.headerBytes);
    auto* sizes = reinterpret_cast<int32_t*>(staging + layout.sizes);
    for (size_t d = 0; d < program.dims.size(); ++d) sizes[d] = static_cast<int32_t>(job.dims[d]);
    std::vector<Part> parts;
    for (const size_t slot : layout.feedOrder) {
      const AlignedBuffer& feed = job.feeds[slot];
      if (feed.bytes() == 0) continue;
      std::memcpy(staging + layout.feeds[slot].begin, feed.data(), feed.bytes());
      parts.push_back({layout.feeds[slot].begin, feed.bytes()});
    }
    parts.push_back({layout.fault, layout.headerBytes});
    copyParts(parts, CopyKind::HostToDevice);
    uploadStates(program);
    eventRecord(started_, stream_);
    if (recording.graph) graphLaunch(recording.graph, stream_);
    eventRecord(ended_, stream_);
    for (const auto& use : program.writableUses) {
      if (!use.written) continue;
      const std::lock_guard lock(use.storage->mirrorMutex);
      use.storage->mirrorNewer = true;
    }

    // Sizes that ops produce are not known yet: the bound of small outputs, the others later.
    const auto later = [&](size_t slot) {
      return layout.outputs[slot].bytes > kGap && producedSize(program, program.outputs[slot]);
    };
    parts = {{layout.fault, layout.headerBytes}};
    for (const size_t slot : layout.outputOrder) {
      if (!later(slot)) parts.push_back({layout.outputs[slot].begin, outputBytes(job, slot)});
    }
    copyParts(parts, CopyKind::DeviceToHost);
    wait();
    if (job.abort.load(std::memory_order_relaxed)) fail(ErrorCode::Aborted, "[run] aborted");
    job.deviceMilliseconds = elapsedMilliseconds(started_, ended_);
    checkFault(program, *reinterpret_cast<const FaultRecord*>(staging + layout.fault));
    const auto* counted = reinterpret_cast<const Counters*>(staging + layout.counters);
    for (size_t i = 0; i < kMostBranches * program.tags; ++i) {
      Counters& sum = job.counters[i % program.tags];  // of whole numbers: in any order the same
      sum.flops += counted[i].flops;
      sum.rows += counted[i].rows;
    }
    for (size_t d = 0; d < program.dims.size(); ++d) {
      if (program.dims[d].kind != DimKind::Produced) continue;
      if (sizes[d] < 0 || sizes[d] > program.dims[d].bound) {
        fail(ErrorCode::Internal, "dim %zu must become a value in [0, %lld], got %d", d,
             static_cast<long long>(program.dims[d].bound), sizes[d]);
      }
      job.dims[d] = sizes[d];
    }
    parts.clear();
    for (const size_t slot : layout.outputOrder) {
      if (later(slot)) parts.push_back({layout.outputs[slot].begin, outputBytes(job, slot)});
    }
    if (copyParts(parts, CopyKind::DeviceToHost)) wait();
    for (size_t i = 0; i < program.outputs.size(); ++i) {
      const size_t bytes = outputBytes(job, i);
      if (bytes) std::memcpy(job.outputs[i].data(), staging + layout.outputs[i].begin, bytes);
    }
  }

  // Between the block and the staging memory; `parts` are ascending. Neighbours go together, with what lies between them
  // where that is little. Whether there was anything.
  bool copyParts(const std::vector<Part>& parts, CopyKind kind) {
    Part run{0, 0};
    const auto copy = [&] {
      uint8_t *device = block_.data() + run.begin, *host = staging_.atLeast(0) + run.begin;
      const bool up = kind == CopyKind::HostToDevice;
      if (run.bytes > 0) copyAsync(up ? device : host, up ? host : device, run.bytes, kind, stream_);
    };
    for (const Part& part : parts) {
      if (part.bytes == 0) continue;
      if (run.bytes == 0 || part.begin - (run.begin + run.bytes) > kGap) {
        copy();
        run = part;
      } else {
        run.bytes = part.begin + part.bytes - run.begin;
      }
    }
    copy();
    return run.bytes > 0;
  }

  void wait() {
    const auto start = Clock::now();
    streamSynchronize(stream_);
    waited_ += millisecondsSince(start);
  }

  static bool producedSize(const Program& program, int tensor) {
    const TensorDef& def = program.tensors[tensor];
    return std::any_of(def.dims.begin(), def.dims.begin() + def.rank,
                       [&](int dim) { return program.dims[dim].kind == DimKind::Produced; });
  }

  static size_t outputBytes(const Job& job, size_t i) {
    const int tensor = job.program->outputs[i];
    return static_cast<size_t>(job.elements(tensor)) * dtypeSize(job.program->tensors[tensor].dtype);
  }

  void checkFault(const Program& program, const FaultRecord& record) {
    if (!record.claimed) return;
    step_ = record.step;
    const int op = program.steps[record.step].op;
    const bool sizes = record.fault == Fault::Rows || record.fault == Fault::Segments;  // which are the program's
    fail(sizes ? ErrorCode::InvalidProgram : ErrorCode::InvalidData, "%s",
         faultMessage(opDefs()[op].name, signatureOf(op).inputs[record.operand].name, record).c_str());
  }

  // ---- States and weights

  void uploadStates(const Program& program) {
    for (const auto& use : program.writableUses) {
      Storage& storage = *use.storage;
      const std::lock_guard lock(storage.mirrorMutex);
      if (!storage.hostNewer) continue;
      copyAsync(static_cast<StateMirror*>(storage.mirror.get())->data(), storage.data, storage.bytes,
                CopyKind::HostToDevice, stream_);
      streamSynchronize(stream_);
      storage.hostNewer = false;
    }
  }

  // The device's copy of a state's storage; another device's goes, after what it holds has come back.
  static uint8_t* mirrorOf(Storage& storage) {
    {
      const std::lock_guard lock(storage.mirrorMutex);
      if (const auto* own = dynamic_cast<StateMirror*>(storage.mirror.get())) return own->data();
    }
    storage.readHost();
    const std::lock_guard lock(storage.mirrorMutex);
    const auto mirror = std::make_shared<StateMirror>(storage.bytes);
    storage.mirror = mirror;
    storage.hostNewer = true;
    return mirror->data();
  }

  struct WeightView {
    uint8_t* data;
    DType dtype;
    int64_t stride;  // elements between rows
  };
  WeightView weightOf(Tensor& tensor) {
    if (tensor.whole) {
      WeightView view = weightOf(*tensor.whole);
      const int64_t step = tensor.partAxis == tensor.rank - 1 ? 1 : view.stride;
      view.data += tensor.partIndex * tensor.shape[tensor.partAxis] * step * static_cast<int64_t>(dtypeSize(view.dtype));
      return view;
    }
    auto& copy = tensor.deviceWeights[static_cast<size_t>(kKind)];
    const std::lock_guard lock(tensor.packMutex);
    if (!copy) copy = upload(tensor);
    return {static_cast<uint8_t*>(copy->data), copy->dtype, tensor.rank > 0 ? tensor.shape[tensor.rank - 1] : 1};
  }

  // Narrower elements are what the weight is asked to be packed as.
  std::shared_ptr<const DeviceWeight> upload(const Tensor& tensor) {
    auto weight = std::make_shared<DeviceWeight>();
    weight->dtype = tensor.dtype != DType::I32 && dtypeSize(tensor.packAs) < 4 ? tensor.packAs : tensor.dtype;
    int64_t rows = 1;
    for (int d = 0; d + 1 < tensor.rank; ++d) rows *= tensor.shape[d];
    const int64_t columns = tensor.rank ? tensor.shape[tensor.rank - 1] : 1;
    const size_t rowBytes = static_cast<size_t>(columns) * dtypeSize(weight->dtype);
    DeviceBlock block(static_cast<size_t>(rows) * rowBytes);
    auto* kept = new DeviceBlock(std::move(block));
    weight->data = kept->data();
    weight->release = [kept](void*) { delete kept; };
    const int64_t rowsAtOnce = std::max<int64_t>(1, static_cast<int64_t>(kStagingBytes / std::max<size_t>(rowBytes, 1)));
    uint8_t* staging = staging_.atLeast(static_cast<size_t>(std::min(rows, rowsAtOnce)) * rowBytes);
    for (int64_t first = 0; first < rows && rowBytes > 0; first += rowsAtOnce) {
      const int64_t count = std::min(rowsAtOnce, rows - first);
      for (int64_t r = 0; r < count; ++r) copyRow(tensor, first + r, columns, weight->dtype, staging + r * rowBytes);
      copyAsync(kept->data() + first * rowBytes, staging, static_cast<size_t>(count) * rowBytes, CopyKind::HostToDevice,
                stream_);
      streamSynchronize(stream_);
    }
    return weight;
  }

  // Row `row`, counted over all dims but the last, as `columns` elements of `dtype`.
  static void copyRow(const Tensor& tensor, int64_t row, int64_t columns, DType dtype, void* to) {
    int64_t at = 0;
    for (int d = tensor.rank - 2; d >= 0; --d) {
      at += row % tensor.shape[d] * tensor.strides[d];
      row /= tensor.shape[d];
    }
    const int64_t step = tensor.rank ? tensor.strides[tensor.rank - 1] : 1;
    if (dtype == tensor.dtype) {
      const size_t size = dtypeSize(dtype);
      const auto* from = static_cast<const uint8_t*>(tensor.data()) + at * static_cast<int64_t>(size);
      if (step == 1) {
        std::memcpy(to, from, static_cast<size_t>(columns) * size);
        return;
      }
      for (int64_t c = 0; c < columns; ++c) {
        std::memcpy(static_cast<uint8_t*>(to) + c * size, from + c * step * static_cast<int64_t>(size), size);
      }
      return;
    }
    for (int64_t c = 0; c < columns; ++c) {
      const float value = loadAsFloat(tensor.data(), tensor.dtype, at + c * step);
      static_cast<uint16_t*>(to)[c] = dtype == DType::BF16 ? floatToBf16(value) : floatToF16(value);
    }
  }

  // ---- Recording

  // Where memory is short, once more without what this engine keeps for later.
  const Recording& recordWithRetry(const std::shared_ptr<const Program>& program) {
    try {
      return record(program);
    } catch (const Error& error) {
      if (error.code != ErrorCode::OutOfMemory) throw;
    }
    destroyStreams();
    stream_ = streamCreate();
    recordings_.clear();
    account(-static_cast<int64_t>(block_.bytes()));
    block_ = DeviceBlock();
    scratchBytes_ = 0;
    return record(program);
  }

  const Recording& record(const std::shared_ptr<const Program>& shared) {
    const Program& program = *shared;
    for (auto it = recordings_.begin(); it != recordings_.end();) {
      it = it->second.program.expired() ? recordings_.erase(it) : std::next(it);
    }
    std::vector<const uint8_t*> states;
    for (const auto& use : program.writableUses) states.push_back(mirrorOf(*use.storage));
    Recording& recording = recordings_[&program];
    const bool sameProgram = recording.program.lock() == shared;
    if (sameProgram && recording.block == block_.data() && recording.states == states) return recording;
    std::vector<const void*> bound;
    for (const auto& tensor : program.bound) {
      bound.push_back(tensor->storage->writable ? mirrorOf(*tensor->storage) + tensor->byteOffset
                                                : weightOf(*tensor).data);
    }
    const Layout& layout = recording.layout.emplace(program);
    alone_.assign(program.steps.size(), false);
    for (size_t s = 0; s < program.steps.size(); ++s) alone_[s] = !program.steps[s].produced.empty();
    for (;;) {
      if (recording.graph) graphDestroy(std::exchange(recording.graph, nullptr));
      recording.block = nullptr;
      grow(layout.scratch + scratchBytes_);
      recording.program = shared;
      recording.states = states;
      recording.graph = capture(program, layout, bound);
      if (recording.graph) break;
      scratchBytes_ = std::max(scratchBytes_, scratchWanted_);
    }
    recording.block = block_.data();
    return recording;
  }

  // The block grows; its address changes, so every recording is made again when it is next needed.
  void grow(size_t bytes) {
    if (bytes <= block_.bytes()) return;
    account(-static_cast<int64_t>(block_.bytes()));
    block_ = DeviceBlock();
    block_ = DeviceBlock(bytes);
    account(static_cast<int64_t>(bytes));
  }

  void account(int64_t bytes) {
    if (owned_) *owned_ += bytes;
  }

  // Without a result where a step turned out to have to run alone, or the block to be too small.
  Graph capture(const Program& program, const Layout& layout, const std::vector<const void*>& bound) {
    const std::vector<Operand> operands = operandsOf(program, layout, bound);
    const size_t branches = branchCount();
    const std::vector<size_t> runs = stepsBeside(program, operands, branches > 1 ? kMostBeside : 1);
    for (size_t i = branches_.size() + 1; i < branches; ++i) branches_.push_back(streamCreate());
    checked_.clear();
    trusted_.clear();  // also of a recording that failed
    scratchWanted_ = 0;
    crowded_ = false;
    beginCapture(stream_);
    step_ = 0;
    for (const size_t count : runs) {
      const size_t width = std::min(count, branches);
      beside_ = count;
      fork(width);
      for (size_t i = 0; i < count; ++i, ++step_) emit(program, layout, operands, i % width);
      join(width);
    }
    step_ = -1;
    if (!crowded_ && layout.scratch + scratchWanted_ <= block_.bytes()) return endCapture(stream_);
    abandonCapture(stream_);
    return nullptr;
  }

  // So many branches, the stream itself one of them, begin where the recording stands.
  void fork(size_t width) {
    if (width > 1) eventRecord(turn_, stream_);
    for (size_t i = 1; i < width; ++i) streamWait(branches_[i - 1], turn_);
  }

  // What is recorded next comes after all of them.
  void join(size_t width) {
    for (size_t i = 1; i < width; ++i) {
      eventRecord(turn_, branches_[i - 1]);
      streamWait(stream_, turn_);
    }
  }

  // Records the kernels of the current step on a branch; branch 0 is the stream itself.
  void emit(const Program& program, const Layout& layout, const std::vector<Operand>& operands, size_t branch) {
    uint8_t* const base = block_.data();
    auto* sizes = reinterpret_cast<int32_t*>(base + layout.sizes);
    const Step& step = program.steps[step_];
    Operand in[kMaxOperands], out[kMaxOperands];
    for (size_t i = 0; i < step.in.size(); ++i) {
      if (step.in[i] >= 0) in[i] = operands[step.in[i]];
    }
    for (size_t i = 0; i < step.out.size(); ++i) {
      if (step.out[i] >= 0) out[i] = operands[step.out[i]];
    }
    int32_t* produced[kMaxOperands] = {};
    for (size_t i = 0; i < step.produced.size(); ++i) produced[i] = sizes + step.produced[i];
    scratch_ = base + layout.scratch;
    scratchUsed_ = 0;
    current_ = &step;
    auto* counters = reinterpret_cast<Counters*>(base + layout.counters) + branch * program.tags + step.tag;
    const StepState state{reinterpret_cast<FaultRecord*>(base + layout.fault), counters, step_};
    const Launch launch{opDefs()[step.op].name, in, out, step.attributes.data(), state, produced,
                        reinterpret_cast<uint32_t*>(base + layout.ticket), branch == 0 ? stream_ : branches_[branch - 1],
                        properties().multiprocessors, properties().computeMajor == 9, allocateScratch, uncheckedInput,
                        runAlone, this};
    findEmitter(launch.op)(launch);
    if (step.produced.empty()) return;
    for (const int tensor : step.out) trusted_.insert(tensor);
  }

  // How many neighbours run side by side, at most `most`, for all steps in turn. Told by addresses: where the plan of the
  // memory lets a step write over what an earlier one reads, they do not. Steps that the CPU joins have memory of their own
  // (program.cc), here too; the plan is the same for all devices.
  std::vector<size_t> stepsBeside(const Program& program, const std::vector<Operand>& operands, size_t most) const {
    std::vector<std::vector<Access>> accesses;
    for (const Step& step : program.steps) accesses.push_back(accessesOf(program, step, operands));
    std::vector<size_t> runs;
    for (size_t begin = 0, end; begin < accesses.size(); begin = end) {
      const auto fits = [&](size_t s) {
        return !alone_[s] && std::none_of(accesses.begin() + static_cast<ptrdiff_t>(begin),
                                          accesses.begin() + static_cast<ptrdiff_t>(s),
                                          [&](const auto& other) { return collide(other, accesses[s]); });
      };
      end = begin + 1;
      while (!alone_[begin] && end < accesses.size() && end - begin < most && fits(end)) ++end;
      runs.push_back(end - begin);
    }
    return runs;
  }

  // Without weights, which nothing writes.
  static std::vector<Access> accessesOf(const Program& program, const Step& step, const std::vector<Operand>& operands) {
    std::vector<Access> accesses;
    const auto touch = [&](int tensor, bool written) {
      if (tensor < 0) return;
      const TensorDef& def = program.tensors[tensor];
      if (def.kind == TensorKind::Bound && !program.bound[def.slot]->storage->writable) return;
      const auto* begin = static_cast<const uint8_t*>(operands[tensor].data);
      accesses.push_back({begin, begin + def.boundBytes, written});
    };
    const Signature& signature = signatureOf(step.op);
    for (size_t i = 0; i < step.in.size(); ++i) touch(step.in[i], signature.inputs[i].writable);
    for (const int tensor : step.out) touch(tensor, true);
    return accesses;
  }

  std::vector<Operand> operandsOf(const Program& program, const Layout& layout, const std::vector<const void*>& bound) {
    uint8_t* const base = block_.data();
    auto* sizes = reinterpret_cast<int32_t*>(base + layout.sizes);
    std::vector<Operand> operands(program.tensors.size());
    for (size_t t = 0; t < operands.size(); ++t) {
      const TensorDef& def = program.tensors[t];
      Operand& operand = operands[t];
      operand.sizes = sizes;
      operand.rank = def.rank;
      operand.dtype = def.dtype;
      operand.stride = 1;
      for (int d = def.rank - 1; d >= 0; --d) {
        operand.dim[d] = def.dims[d];
        operand.bound[d] = program.dims[def.dims[d]].bound;
        if (d > 0) operand.stride *= operand.bound[d];
      }
      switch (def.kind) {
        case TensorKind::Temp: operand.data = def.arenaOffset < 0 ? nullptr : base + layout.arena + def.arenaOffset; break;
        case TensorKind::Feed: operand.data = base + layout.feeds[def.slot].begin; break;
        case TensorKind::Output: operand.data = base + layout.outputs[def.slot].begin; break;
        case TensorKind::Bound: {
          operand.data = const_cast<void*>(bound[def.slot]);
          const Tensor& tensor = *program.bound[def.slot];
          if (tensor.storage->writable) {
            requireContiguous(tensor);
          } else {
            const WeightView view = weightOf(*program.bound[def.slot]);
            operand.dtype = view.dtype;
            if (def.rank == 2) operand.stride = view.stride;
          }
          break;
        }
      }
    }
    return operands;
  }

  static void requireContiguous(const Tensor& tensor) {
    int64_t stride = 1;
    for (int d = tensor.rank - 1; d >= 0; --d) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != stride) {
        fail(ErrorCode::InvalidProgram, "a writable tensor must be contiguous on this device");
      }
      stride *= tensor.shape[d];
    }
  }

  // There is memory, a record of faults and a ticket for one step at a time. A recording in which the step has company is
  // made again.
  static void runAlone(void* self) {
    auto& runner = *static_cast<Runner*>(self);
    runner.crowded_ = runner.crowded_ || runner.beside_ > 1;
    runner.alone_[runner.step_] = true;
  }

  // Beyond the block: the addresses are then never used, because the recording is made again with a larger one.
  static void* allocateScratch(void* self, size_t bytes) {
    auto& runner = *static_cast<Runner*>(self);
    runAlone(self);
    void* result = runner.scratch_ + runner.scratchUsed_;
    runner.scratchUsed_ += aligned(bytes);
    runner.scratchWanted_ = std::max(runner.scratchWanted_, runner.scratchUsed_);
    return result;
  }

  // What routing ops produce is right by construction.
  static bool uncheckedInput(void* self, int input, int kind) {
    auto& runner = *static_cast<Runner*>(self);
    const int tensor = runner.current_->in[input];
    const bool unchecked = !runner.trusted_.count(tensor) && runner.checked_.emplace(tensor, kind).second;
    if (unchecked) runAlone(self);
    return unchecked;
  }

  const DeviceProperties& properties() {
    if (!properties_.multiprocessors) properties_ = deviceProperties(0);
    return properties_;
  }

  std::shared_ptr<std::atomic<int64_t>> owned_;
  Stream stream_ = nullptr;
  std::vector<Stream> branches_;               // of recordings, beside stream_
  Event started_ = nullptr, ended_ = nullptr;  // around the recording's launch
  Event turn_ = nullptr;                       // where branches of a recording part and meet
  double waited_ = 0;                          // for the device in this run, milliseconds
  DeviceBlock block_;
  HostBlock staging_;
  std::unordered_map<const Program*, Recording> recordings_;
  DeviceProperties properties_;
  int step_ = -1;  // being recorded, for messages

  // Of the recording under way.
  uint8_t* scratch_ = nullptr;
  size_t scratchUsed_ = 0, scratchWanted_ = 0, scratchBytes_ = 0;
  const Step* current_ = nullptr;
  size_t beside_ = 1;        // steps side by side, the current one among them
  std::vector<bool> alone_;  // by step; learnt from the op as it is recorded
  bool crowded_ = false;     // a step that has to be alone was not
  std::set<std::pair<int, int>> checked_;
  std::set<int> trusted_;
};

}  // namespace

DeviceInfo describe() {
  try {
    if (deviceCount() == 0) return {kKind, false, deviceProblem()};
    const DeviceProperties p = deviceProperties(0);
    char text[320];
    std::snprintf(text, sizeof text, "%s, compute capability %d.%d, %.1f GiB%s", p.name.c_str(), p.computeMajor,
                  p.computeMinor, static_cast<double>(p.memoryBytes) / (1 << 30),
                  p.computeMajor >= kComputeMajorMin
                      ? ""
                      : ": the kernels need 8.0 or newer; where another GPU has that, CUDA_VISIBLE_DEVICES makes it the first");
    return {kKind, p.computeMajor >= kComputeMajorMin, text};
  } catch (const std::exception& error) {
    return {kKind, false, error.what()};
  }
}

std::unique_ptr<Device> makeRunner(std::shared_ptr<std::atomic<int64_t>> owned) {
  return std::make_unique<Runner>(std::move(owned));
}

}  // namespace elastiform::ELASTIFORM_DEVICE
