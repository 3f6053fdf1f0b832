// Runs programs, one after the other, on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/memory.h"
#include "runtime/device.h"
#include "runtime/program.h"

namespace elastiform {

// One run of a program: what goes in, and afterwards what came out. Whoever holds it may read the results once the
// engine has reported it done. While it lives, the program and the bound tensors do.
struct Job {
  // `dims`: the current value of every dim; only those set at run are read. Error(InvalidArgument) when one is out of
  // its bounds. Marks the writable storages of the program as in use until finish().
  Job(std::shared_ptr<const Program> program, const int32_t* dims, size_t dimCount);
  ~Job();

  const std::shared_ptr<const Program> program;
  std::vector<int64_t> dims;  // produced ones: the bound, then the value
  std::vector<AlignedBuffer> feeds, outputs;
  std::vector<Counters> counters;  // per tag
  double milliseconds = 0;
  double hostMilliseconds = 0;    // of these, the engine's thread worked and did not wait for a device
  double deviceMilliseconds = 0;  // of the program's recording, between events on the device; 0 on the CPU
  std::optional<Error> error;
  std::atomic<bool> abort{false};

  int64_t elements(int tensor) const;  // with the current dims
  // Copies one feed, `slot` counting feed tensors in tensor order.
  void setFeed(size_t slot, DType dtype, const void* data, size_t elements);
  void finish();  // the storages are free again

 private:
  bool finished_ = false;
};

// Memory of an engine that outlives a run: the arena of temporaries and the kernels' scratch.
class Workspace {
 public:
  explicit Workspace(std::shared_ptr<std::atomic<int64_t>> owned = {}) : owned_(std::move(owned)) {}
  ~Workspace() { account(-reserved_); }

  uint8_t* arena(int64_t bytes);
  void* scratch(size_t bytes);
  void resetScratch();  // one block as large as all that the last step asked for

 private:
  void account(int64_t bytes);

  AlignedBuffer arena_;
  std::vector<AlignedBuffer> blocks_;
  size_t used_ = 0;  // of the last block
  int64_t reserved_ = 0;
  std::shared_ptr<std::atomic<int64_t>> owned_;  // bytes held by one JavaScript environment
};

// Runs a job on the calling thread. Errors are left in job.error; nothing is thrown.
void runJob(Job& job, Workspace& workspace);

class Engine {
 public:
  // `done` is called with every submitted job, on the engine's thread, or on the caller's for jobs that never ran.
  Engine(std::function<void(std::shared_ptr<Job>)> done, std::unique_ptr<Device> device);
  ~Engine() { stop(); }

  void submit(std::shared_ptr<Job> job);
  // A running job ends at its next chunk or step; a waiting one is reported at once.
  void abort(const std::shared_ptr<Job>& job);
  // Aborts everything and joins the thread. Idempotent; called by one thread only.
  void stop();

 private:
  void loop();

  const std::function<void(std::shared_ptr<Job>)> done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> queue_;
  std::shared_ptr<Job> running_;
  bool stopping_ = false;
  std::unique_ptr<Device> device_;
  std::thread thread_;
};

}  // namespace elastiform
