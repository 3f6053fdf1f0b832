// The process-wide thread pool: chunks of work claimed by ticket, joined on chunks and not on workers.
//
// One job runs at a time; callers queue fairly for the lane. A job is published by storing its chunk count in
// `remaining`; whoever decrements it owns a chunk, so the job cannot end, nor its fields change, before that chunk is
// done, and a worker that wakes late finds nothing to claim. The caller takes part and then waits for `unfinished`
// to reach zero: a worker that never got a CPU delays nobody. Waits spin for kSpin and then sleep.
#include "core/pool.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace elastiform {
namespace {

constexpr std::chrono::microseconds kSpin{30};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

// Spins until ready() or kSpin has passed; returns the last ready().
template <typename Ready>
bool spinUntil(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

#ifdef __linux__

// CPUs granted by one cgroup folder's quota, rounded up; `unlimited` where there is none.
int folderQuota(const std::string& folder, bool v2, int unlimited) {
  double quota = -1, period = -1;
  if (v2) {
    std::ifstream file(folder + "/cpu.max");
    std::string text;
    if (!(file >> text >> period) || text == "max") return unlimited;
    quota = std::atof(text.c_str());
  } else if (!(std::ifstream(folder + "/cpu.cfs_quota_us") >> quota) ||
             !(std::ifstream(folder + "/cpu.cfs_period_us") >> period)) {
    return unlimited;
  }
  if (quota <= 0 || period <= 0) return unlimited;
  return std::max(1, static_cast<int>((quota + period - 1) / period));
}

// The smallest quota on the way from this process's cgroup to the root, for cgroup v1 and v2.
int cgroupQuota(int unlimited) {
  int cpus = unlimited;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    for (;;) {  // inside a container the path may not exist below the mount; its root then still does
      for (const std::string& mount :
           v2 ? std::vector<std::string>{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
              : std::vector<std::string>{"/sys/fs/cgroup/" + controllers, "/sys/fs/cgroup/cpu"}) {
        cpus = std::min(cpus, folderQuota(mount + path, v2, unlimited));
      }
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return cpus;
}

#endif

int defaultThreads() {
  int threads = hardwareThreads();
#ifdef __linux__
  threads = cgroupQuota(threads);
#endif
  if (const char* text = std::getenv("ELASTIFORM_THREADS")) {
    const int wanted = std::atoi(text);
    if (wanted >= 1) threads = std::min(threads, wanted);
  }
  return std::clamp(threads, 1, kMaxThreads);
}

thread_local bool insideBody = false;

class Pool {
 public:
  Pool() : threads_(defaultThreads()) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    Lane lane(*this);
    if (threads == threads_) return;
    const size_t keep = std::min(workers_.size(), static_cast<size_t>(threads - 1));
    threads_ = threads;
    wake(static_cast<int>(workers_.size()));
    for (size_t i = keep; i < workers_.size(); ++i) workers_[i].join();
    workers_.resize(keep);
  }

  void run(int64_t chunks, const ChunkBody& body, const std::atomic<bool>* abort) {
    Lane lane(*this);
    body_ = &body;
    abort_ = abort;
    total_ = chunks;
    aborted_ = false;
    unfinished_ = chunks;
    const int helpers = static_cast<int>(std::min<int64_t>(chunks, threads_) - 1);
    if (helpers > 0) startWorkers();
    remaining_ = chunks;
    if (helpers > 0) wake(helpers);
    work(0);
    const auto done = [this] { return unfinished_ == 0; };
    if (!spinUntil(done)) {
      for (;;) {
        const uint32_t seen = finished_;
        if (done()) break;
        finished_.wait(seen);
      }
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (aborted_) fail(ErrorCode::Aborted, "[run] aborted");
  }

 private:
  // First come, first served, so that an engine in a tight loop does not starve another.
  struct Lane {
    explicit Lane(Pool& pool) : pool(pool) {
      const uint32_t ticket = pool.nextTicket_.fetch_add(1);
      const auto mine = [&] { return pool.servedTicket_ == ticket; };
      if (mine() || spinUntil(mine)) return;
      for (;;) {
        const uint32_t served = pool.servedTicket_;
        if (served == ticket) return;
        pool.servedTicket_.wait(served);
      }
    }
    ~Lane() {
      pool.servedTicket_.fetch_add(1);
      pool.servedTicket_.notify_all();
    }
    Pool& pool;
  };

  void startWorkers() {
    while (static_cast<int>(workers_.size()) < threads_ - 1) {
      const int index = static_cast<int>(workers_.size()) + 1;
      try {
        workers_.emplace_back([this, index] { workerLoop(index); });
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the ones there are, the caller at least, do the work
      }
    }
  }

  void wake(int sleepers) {
    wakeEpoch_.fetch_add(1);
    if (sleepers >= static_cast<int>(workers_.size())) {
      wakeEpoch_.notify_all();
    } else {
      for (int i = 0; i < sleepers; ++i) wakeEpoch_.notify_one();
    }
  }

  void workerLoop(int index) {
    const auto wanted = [&] { return remaining_ > 0 || index >= threads_; };
    for (;;) {
      while (!spinUntil(wanted)) {
        const uint32_t seen = wakeEpoch_;
        if (wanted()) break;
        wakeEpoch_.wait(seen);
      }
      if (index >= threads_) return;
      work(index);
    }
  }

  // Claims chunks and runs them until none is left.
  void work(int worker) {
    int64_t left = remaining_;
    while (left > 0) {
      if (!remaining_.compare_exchange_weak(left, left - 1)) continue;
      int64_t dropped = 0;
      if (abort_ && abort_->load(std::memory_order_relaxed)) {
        aborted_ = true;
        dropped = remaining_.exchange(0);
      } else {
        insideBody = true;
        try {
          (*body_)(total_ - left, worker);
        } catch (...) {
          const std::lock_guard lock(errorMutex_);
          if (!error_) error_ = std::current_exception();
          dropped = remaining_.exchange(0);
        }
        insideBody = false;
      }
      if (unfinished_.fetch_sub(1 + dropped) == 1 + dropped) {
        // The caller may already be gone and another job here; that job's caller only looks again.
        finished_.fetch_add(1);
        finished_.notify_all();
      }
      left = remaining_;
    }
  }

  std::atomic<int> threads_;
  std::vector<std::thread> workers_;  // changed in the lane only

  std::atomic<uint32_t> nextTicket_{0};
  std::atomic<uint32_t> servedTicket_{0};

  alignas(64) std::atomic<int64_t> remaining_{0};  // chunks nobody has claimed
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> wakeEpoch_{0};
  std::atomic<uint32_t> finished_{0};

  // The job; stable while any of its chunks is unfinished.
  const ChunkBody* body_ = nullptr;
  const std::atomic<bool>* abort_ = nullptr;
  int64_t total_ = 0;
  std::atomic<bool> aborted_{false};
  std::mutex errorMutex_;
  std::exception_ptr error_;
};

// Leaked: workers outlive static destruction.
Pool& pool() {
  static auto& instance = *new Pool;
  return instance;
}

}  // namespace

int hardwareThreads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int threadCount() { return pool().threads(); }

void setThreadCount(int threads) {
  if (threads < 1 || threads > kMaxThreads) {
    fail(ErrorCode::InvalidArgument, "[setThreads] threads must be in [1, %d], got %d", kMaxThreads, threads);
  }
  pool().resize(threads);
}

void parallelFor(int64_t chunks, const ChunkBody& body, const std::atomic<bool>* abort) {
  if (insideBody) fail(ErrorCode::Internal, "[parallelFor] called from inside a chunk");
  if (abort && abort->load(std::memory_order_relaxed)) fail(ErrorCode::Aborted, "[run] aborted");
  if (chunks > 0) pool().run(chunks, body, abort);
}

}  // namespace elastiform
