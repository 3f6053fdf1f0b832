// The process-wide thread pool: chunks of work claimed by ticket, joined on chunks and not on workers.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace elastiform {

// Threads that take part, the caller included. Default: min(hardware threads, cgroup CPU quota, ELASTIFORM_THREADS).
int threadCount();
void setThreadCount(int threads);  // 1..kMaxThreads, else Error(InvalidArgument)
constexpr int kMaxThreads = 256;
// CPUs this process may run on.
int hardwareThreads();

// Runs body(chunk, worker) for chunk = 0..chunks-1, on the calling thread and the pool's workers; returns when every
// chunk is done. `worker` is in [0, threadCount()) and unique among bodies running at the same time: index scratch
// with it. When *abort becomes true, chunks not yet claimed are dropped and Error(Aborted) is thrown; an exception
// from a body is rethrown here. The result of an op must not depend on which worker ran a chunk, nor on how many
// workers there are: split work by shape only when partial sums are involved. Not re-entrant.
using ChunkBody = std::function<void(int64_t chunk, int worker)>;
void parallelFor(int64_t chunks, const ChunkBody& body, const std::atomic<bool>* abort);

}  // namespace elastiform
