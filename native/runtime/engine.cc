// Runs programs, one after the other, on a thread of its own.
#include "runtime/engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

namespace elastiform {

Job::Job(std::shared_ptr<const Program> wanted, const int32_t* values, size_t count) : program(std::move(wanted)) {
  if (count != program->dims.size()) {
    fail(ErrorCode::InvalidArgument, "[run] %zu dims wanted, got %zu", program->dims.size(), count);
  }
  for (size_t i = 0; i < count; ++i) {
    const Dim& dim = program->dims[i];
    if (dim.kind == DimKind::Set && (values[i] < 1 || values[i] > dim.bound)) {
      fail(ErrorCode::InvalidArgument, "[run] dim %zu must be in [1, %lld], got %d", i,
           static_cast<long long>(dim.bound), values[i]);
    }
    dims.push_back(dim.kind == DimKind::Set ? values[i] : dim.bound);
  }
  feeds.resize(program->feeds.size());
  counters.resize(static_cast<size_t>(program->tags));
  for (const int output : program->outputs) {
    outputs.emplace_back(static_cast<size_t>(program->tensors[output].boundBytes), false, "an output");
  }
  for (const auto& use : program->writableUses) {
    ++(use.written ? use.storage->pendingWriters : use.storage->pendingReaders);
  }
}

Job::~Job() { finish(); }

void Job::finish() {
  if (std::exchange(finished_, true)) return;
  for (const auto& use : program->writableUses) {
    --(use.written ? use.storage->pendingWriters : use.storage->pendingReaders);
  }
}

int64_t Job::elements(int tensor) const {
  const TensorDef& def = program->tensors[tensor];
  int64_t count = 1;
  for (int d = 0; d < def.rank; ++d) count *= dims[def.dims[d]];
  return count;
}

void Job::setFeed(size_t slot, DType dtype, const void* data, size_t count) {
  const int tensor = program->feeds[slot];
  if (dtype != program->tensors[tensor].dtype) {
    fail(ErrorCode::InvalidArgument, "[run] feed %zu must be %s, got %s", slot,
         dtypeName(program->tensors[tensor].dtype), dtypeName(dtype));
  }
  const int64_t wanted = elements(tensor);
  if (static_cast<int64_t>(count) != wanted) {
    fail(ErrorCode::InvalidArgument, "[run] feed %zu must hold %lld elements, got %zu", slot,
         static_cast<long long>(wanted), count);
  }
  feeds[slot] = AlignedBuffer(count * dtypeSize(dtype), false, "a feed");
  std::memcpy(feeds[slot].data(), data, count * dtypeSize(dtype));
}

void Workspace::account(int64_t bytes) {
  reserved_ += bytes;
  memoryCounters().arenaBytes += bytes;
  if (owned_) *owned_ += bytes;
}

uint8_t* Workspace::arena(int64_t bytes) {
  if (!arena_.data() || static_cast<int64_t>(arena_.bytes()) < bytes) {
    account(-static_cast<int64_t>(arena_.bytes()));
    arena_ = AlignedBuffer();  // the old one goes first: both need not fit
    arena_ = AlignedBuffer(static_cast<size_t>(bytes), false, "the temporaries of a program");
    account(bytes);
  }
  return arena_.data();
}

void* Workspace::scratch(size_t bytes) {
  constexpr size_t kSmallest = 1 << 16;
  const size_t available = blocks_.empty() ? 0 : blocks_.back().bytes() - used_;
  if (blocks_.empty() || bytes > available) {
    blocks_.emplace_back(std::max(bytes, kSmallest), false, "the scratch of a kernel");
    account(static_cast<int64_t>(blocks_.back().bytes()));
    used_ = 0;
  }
  void* result = blocks_.back().data() + used_;
  used_ = std::min(blocks_.back().bytes(), (used_ + bytes + kAlignment - 1) & ~(kAlignment - 1));
  return result;
}

void Workspace::resetScratch() {
  used_ = 0;
  if (blocks_.size() <= 1) return;
  size_t total = 0;
  for (const AlignedBuffer& block : blocks_) total += block.bytes();
  blocks_.clear();
  account(-static_cast<int64_t>(total));
  blocks_.emplace_back(total, false, "the scratch of a kernel");
  account(static_cast<int64_t>(total));
}

namespace {

class Runner {
 public:
  Runner(Job& job, Workspace& workspace) : job_(job), program_(*job.program), workspace_(workspace) {}

  void run() {
    for (const auto& use : program_.writableUses) use.written ? use.storage->writeHost() : use.storage->readHost();
    arena_ = workspace_.arena(program_.arenaBytes);
    views_.resize(program_.tensors.size());
    for (size_t t = 0; t < views_.size(); ++t) {
      const TensorDef& tensor = program_.tensors[t];
      views_[t].data = address(tensor);
      resize(static_cast<int>(t));
      if (tensor.kind != TensorKind::Bound) continue;
      views_[t].tensor = program_.bound[tensor.slot].get();
      views_[t].strides = views_[t].tensor->strides;
    }
    for (step_ = 0; step_ < program_.steps.size(); step_ += static_cast<size_t>(program_.steps[step_].count)) {
      if (job_.abort.load(std::memory_order_relaxed)) fail(ErrorCode::Aborted, "[run] aborted");
      const Step* step = &program_.steps[step_];
      if (step->count == 1) {
        runStep(*step);
      } else {
        runSteps(step);
      }
    }
  }

  // The step being run, for messages.
  std::string where() const {
    if (step_ >= program_.steps.size()) return "[run] ";
    return "[run] step " + std::to_string(step_) + " (" + opDefs()[program_.steps[step_].op].name + "): ";
  }

 private:
  void* address(const TensorDef& tensor) const {
    switch (tensor.kind) {
      case TensorKind::Temp: return tensor.arenaOffset < 0 ? nullptr : arena_ + tensor.arenaOffset;
      case TensorKind::Bound: return program_.bound[tensor.slot]->data();
      case TensorKind::Feed: return job_.feeds[tensor.slot].data();
      case TensorKind::Output: return job_.outputs[tensor.slot].data();
    }
    return nullptr;
  }

  void resize(int index) {
    const TensorDef& tensor = program_.tensors[index];
    TensorView& view = views_[index];
    view.dtype = tensor.dtype;
    view.rank = tensor.rank;
    int64_t stride = 1;
    for (int d = tensor.rank - 1; d >= 0; --d) {
      view.shape[d] = job_.dims[tensor.dims[d]];
      view.strides[d] = stride;
      stride *= view.shape[d];
    }
  }

  static void* allocateScratch(void* workspace, size_t bytes) {
    return static_cast<Workspace*>(workspace)->scratch(bytes);
  }

  struct Operands {
    TensorView in[kMaxOperands], out[kMaxOperands];
  };

  KernelArgs argsOf(const Step& step, Operands& operands, int64_t* produced) {
    for (size_t i = 0; i < step.in.size(); ++i) {
      if (step.in[i] >= 0) operands.in[i] = views_[step.in[i]];
    }
    for (size_t i = 0; i < step.out.size(); ++i) {
      if (step.out[i] >= 0) operands.out[i] = views_[step.out[i]];
    }
    return {operands.in, operands.out, step.attributes.data(), &job_.counters[step.tag], &job_.abort,
            produced,    allocateScratch, &workspace_};
  }

  // Steps that are run as one produce no dims.
  void runSteps(const Step* steps) {
    const size_t count = static_cast<size_t>(steps->count);
    std::vector<Operands> operands(count);
    std::vector<KernelArgs> args;
    for (size_t i = 0; i < count; ++i) args.push_back(argsOf(steps[i], operands[i], nullptr));
    workspace_.resetScratch();
    steps->several(args.data(), steps->count);
  }

  void runStep(const Step& step) {
    Operands operands;
    int64_t produced[kMaxOperands];
    std::fill_n(produced, kMaxOperands, -1);
    workspace_.resetScratch();
    step.kernel(argsOf(step, operands, produced));
    for (size_t i = 0; i < step.produced.size(); ++i) {
      const int dim = step.produced[i];
      const int64_t bound = program_.dims[dim].bound;
      if (produced[i] < 0 || produced[i] > bound) {
        fail(ErrorCode::Internal, "dim %d must become a value in [0, %lld], got %lld", dim,
             static_cast<long long>(bound), static_cast<long long>(produced[i]));
      }
      job_.dims[dim] = produced[i];
      for (const int tensor : program_.tensorsOfDim[dim]) resize(tensor);
    }
  }

  Job& job_;
  const Program& program_;
  Workspace& workspace_;
  uint8_t* arena_ = nullptr;
  std::vector<TensorView> views_;
  size_t step_ = 0;
};

}  // namespace

void runJob(Job& job, Workspace& workspace) {
  const auto start = std::chrono::steady_clock::now();
  Runner runner(job, workspace);
  try {
    if (job.program->narrow) fail(ErrorCode::InvalidProgram, "[run] bf16 activations are not for the CPU");
    runner.run();
  } catch (const Error& error) {
    job.error.emplace(error.code, error.code == ErrorCode::Aborted ? error.what() : runner.where() + error.what());
  } catch (const std::bad_alloc&) {
    job.error.emplace(ErrorCode::OutOfMemory, runner.where() + "out of memory");
  } catch (const std::exception& error) {
    job.error.emplace(ErrorCode::Internal, runner.where() + error.what());
  } catch (...) {
    job.error.emplace(ErrorCode::Internal, runner.where() + "unknown exception");
  }
  job.milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  job.hostMilliseconds = job.milliseconds;
}

namespace cpu {

namespace {

class Cpu : public Device {
 public:
  explicit Cpu(std::shared_ptr<std::atomic<int64_t>> owned) : workspace_(std::move(owned)) {}
  void run(Job& job) override { runJob(job, workspace_); }

 private:
  Workspace workspace_;
};

}  // namespace

std::unique_ptr<Device> makeRunner(std::shared_ptr<std::atomic<int64_t>> owned) {
  return std::make_unique<Cpu>(std::move(owned));
}

}  // namespace cpu

Engine::Engine(std::function<void(std::shared_ptr<Job>)> done, std::unique_ptr<Device> device)
    : done_(std::move(done)), device_(std::move(device)), thread_([this] { loop(); }) {}

void Engine::submit(std::shared_ptr<Job> job) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) fail(ErrorCode::Disposed, "[run] the engine is disposed");
    queue_.push_back(std::move(job));
  }
  // Not under the lock, which the thread that wakes wants at once.
  wake_.notify_one();
}

void Engine::abort(const std::shared_ptr<Job>& job) {
  job->abort = true;
  {
    const std::lock_guard lock(mutex_);
    const auto waiting = std::find(queue_.begin(), queue_.end(), job);
    if (waiting == queue_.end()) return;
    queue_.erase(waiting);
  }
  job->error.emplace(ErrorCode::Aborted, "[run] aborted");
  job->finish();
  done_(job);
}

void Engine::stop() {
  std::deque<std::shared_ptr<Job>> dropped;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    if (running_) running_->abort = true;
    dropped.swap(queue_);
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  for (const auto& job : dropped) {
    job->error.emplace(ErrorCode::Disposed, "[run] the engine was disposed");
    job->finish();
    done_(job);
  }
}

void Engine::loop() {
  for (;;) {
    std::shared_ptr<Job> job;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      job = running_ = std::move(queue_.front());
      queue_.pop_front();
    }
    device_->run(*job);
    job->finish();
    {
      const std::lock_guard lock(mutex_);
      running_.reset();  // before it is reported: who hears of it holds the last reference
    }
    done_(std::move(job));
  }
}

}  // namespace elastiform
