// The host side of a device: memory, streams, events, graphs and tensor maps, by the same names over CUDA and over the
// emulation. Every failure is an Error: OutOfMemory with the numbers, else with CUDA's own words, DeviceUnavailable where
// the device is not there or lost, Internal otherwise.
//
// A fault in a kernel, or of the hardware, loses the device for this process: CUDA answers every later call with the
// same error, and only cudaDeviceReset would end that. It is not called: it would free, under their feet, what other
// engines of this process, and other libraries in it, hold on the device. So the process has to be restarted; until then
// deviceCount() is 0, and deviceProblem() says why.
//
// Emulated streams are lazy: what is queued runs when something waits for it, so that a forgotten wait shows as wrong
// results. The null stream of the emulation runs at once; on CUDA it is the legacy default stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "core/error.h"
#include "device/types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace elastiform::ELASTIFORM_DEVICE {

#ifdef __CUDACC__
using Stream = cudaStream_t;
using Event = cudaEvent_t;
using Graph = cudaGraphExec_t;
#else
using Stream = struct StreamState*;
using Event = struct EventState*;
using Graph = struct GraphState*;

// Queues an operation; LAUNCH and the copies below go through here.
void enqueue(Stream stream, std::function<void()> operation);
// Bytes that deviceMalloc hands out before it fails, for tests of what happens then. Default: 64 GiB.
void setMemoryLimit(size_t bytes);
#endif

// Ends the message of a fault that has lost the device.
constexpr const char* kDeviceLost =
    "; the device is lost for this process, with all that lay on it: restart the process (the CPU can still be used)";

struct DeviceProperties {
  std::string name;
  int computeMajor = 0, computeMinor = 0;
  int multiprocessors = 0;
  size_t memoryBytes = 0;
  size_t sharedBytesPerBlock = 0;  // dynamic shared memory a kernel may opt in to
};

// 0 where there is no driver or no device, or it is lost; never throws, never prints.
int deviceCount();
// Why there is none, and what to do.
std::string deviceProblem();
DeviceProperties deviceProperties(int device);
// Of the calling thread; every thread that uses a device other than 0 says so first.
void setDevice(int device);

struct MemoryInfo {
  size_t freeBytes = 0, totalBytes = 0;
};
MemoryInfo memoryInfo();

// Device memory, aligned to 256 bytes. The emulation fills it with NaN, and reports writes around it at the end of the
// next kernel or at deviceFree. Freeing null is allowed.
void* deviceMalloc(size_t bytes);
void deviceFree(void* memory);
// Page-locked host memory.
void* hostMalloc(size_t bytes);
void hostFree(void* memory);

enum class CopyKind { HostToDevice, DeviceToHost, DeviceToDevice };
// The host's side must stay as it is until the stream has been waited for.
void copyAsync(void* to, const void* from, size_t bytes, CopyKind kind, Stream stream);
void fillAsync(void* memory, uint8_t value, size_t bytes, Stream stream);

Stream streamCreate();
void streamDestroy(Stream stream);  // waits for what is queued
void streamSynchronize(Stream stream);
bool streamQuery(Stream stream);  // whether everything queued is done; never waits
void streamWait(Stream stream, Event event);
// Runs on a thread of the driver: it must not throw, nor call anything of this header.
void hostCallback(Stream stream, std::function<void()> callback);

Event eventCreate();
void eventDestroy(Event event);
void eventRecord(Event event, Stream stream);
void eventSynchronize(Event event);
bool eventQuery(Event event);
float elapsedMilliseconds(Event start, Event end);

// Between the two calls work queued on the stream is recorded, not run. Waiting, allocating and freeing fail meanwhile.
// A stream that is made to wait (streamWait) for an event recorded on the stream is recorded too, as a branch: what is
// queued on it comes after what was queued before the event, and beside what is queued later. Every branch has to be
// waited for in the same way before the end.
void beginCapture(Stream stream);
Graph endCapture(Stream stream);
void graphLaunch(Graph graph, Stream stream);
void graphDestroy(Graph graph);

// Ends and drops a recording that an error has left unfinished.
void abandonCapture(Stream stream) noexcept;

enum class Swizzle { None, Bytes128 };

// A row-major matrix in device memory and the box that one TMA copy moves: boxColumns x boxRows elements. What lies
// outside the matrix is read as zero and never written.
struct TensorMapDesc {
  const void* base = nullptr;
  DType dtype = DType::BF16;
  uint64_t columns = 0, rows = 0;
  uint64_t rowBytes = 0;  // distance between rows
  uint32_t boxColumns = 0, boxRows = 0;
  Swizzle swizzle = Swizzle::Bytes128;
};
TensorMap encodeTensorMap(const TensorMapDesc& desc);

// The rules of cuTensorMapEncodeTiled for such a map, checked by both sides so that the message names the field.
inline void checkTensorMap(const TensorMapDesc& d) {
  const uint64_t element = dtypeSize(d.dtype), boxBytes = d.boxColumns * element;
  const auto require = [](bool condition, const char* what, uint64_t value) {
    if (!condition) {
      fail(ErrorCode::Internal, "[encodeTensorMap] %s, got %llu", what, static_cast<unsigned long long>(value));
    }
  };
  const uint64_t base = reinterpret_cast<uintptr_t>(d.base);
  require(d.base && base % 16 == 0, "base must be aligned to 16 bytes", base);
  require(d.columns >= 1 && d.columns <= UINT32_MAX, "columns must be 1 to 2^32-1", d.columns);
  require(d.rows >= 1 && d.rows <= UINT32_MAX, "rows must be 1 to 2^32-1", d.rows);
  require(d.rowBytes % 16 == 0 && d.rowBytes < (uint64_t{1} << 40), "rowBytes must be a multiple of 16", d.rowBytes);
  require(d.rowBytes >= d.columns * element, "rowBytes must hold a row", d.rowBytes);
  require(d.boxColumns >= 1 && d.boxColumns <= 256, "boxColumns must be 1 to 256", d.boxColumns);
  require(d.boxRows >= 1 && d.boxRows <= 256, "boxRows must be 1 to 256", d.boxRows);
  require(boxBytes % 16 == 0, "a box row must be a multiple of 16 bytes", boxBytes);
  require(d.swizzle != Swizzle::Bytes128 || boxBytes == 128, "a swizzled box row must be 128 bytes", boxBytes);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
