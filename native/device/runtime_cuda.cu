// The runtime over CUDA: thin calls whose failures are Errors, and the tensor-map encoder taken from the driver.
#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>

#include "device/device.h"

namespace elastiform::cuda {

namespace {

std::atomic<cudaError_t> lost{cudaSuccess};  // the fault that has lost the device

// Those of which CUDA says that the process must be relaunched to go on.
bool losesDevice(cudaError_t status) {
  switch (status) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak: return true;
    default: return false;
  }
}

ErrorCode codeOf(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation: return ErrorCode::OutOfMemory;
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorInitializationError:
    case cudaErrorNoDevice:
    case cudaErrorDevicesUnavailable: return ErrorCode::DeviceUnavailable;
    default: return losesDevice(status) ? ErrorCode::DeviceUnavailable : ErrorCode::Internal;
  }
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it would otherwise be reported again by the next launch
  if (losesDevice(status)) lost = status;
  fail(codeOf(status), "[cuda] %s: %s (%s)%s", what, cudaGetErrorString(status), cudaGetErrorName(status),
       losesDevice(status) ? kDeviceLost : "");
}

// What the driver supports, as CUDART_VERSION counts; 0 without a driver.
int driverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// One of an older major version than the runtime's is not asked for anything more: it has not what the runtime looks for.
bool isTooOld(int driver) { return driver / 1000 < CUDART_VERSION / 1000; }

int deviceCount() {
  int count = 0;
  if (lost != cudaSuccess || isTooOld(driverVersion())) return 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string deviceProblem() {
  if (lost != cudaSuccess) return cudaGetErrorString(lost) + std::string(kDeviceLost);
  const int driver = driverVersion();
  if (driver == 0) return "no NVIDIA driver is loaded; install one (580 or newer)";
  char text[256];
  if (isTooOld(driver)) {
    std::snprintf(text, sizeof text, "the NVIDIA driver is for CUDA %d.%d, this build wants %d.%d; install a newer one (580 or newer)",
                  driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return text;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  std::snprintf(text, sizeof text, "%s (driver for CUDA %d.%d, this build wants %d.%d); check nvidia-smi and CUDA_VISIBLE_DEVICES",
                status == cudaSuccess ? "no device is visible" : cudaGetErrorString(status), driver / 1000,
                driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  return text;
}

DeviceProperties deviceProperties(int device) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  DeviceProperties properties;
  properties.name = p.name;
  properties.computeMajor = p.major;
  properties.computeMinor = p.minor;
  properties.multiprocessors = p.multiProcessorCount;
  properties.memoryBytes = p.totalGlobalMem;
  properties.sharedBytesPerBlock = p.sharedMemPerBlockOptin;
  return properties;
}

void setDevice(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

MemoryInfo memoryInfo() {
  MemoryInfo info;
  check(cudaMemGetInfo(&info.freeBytes, &info.totalBytes), "cudaMemGetInfo");
  return info;
}

void* deviceMalloc(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const MemoryInfo info = memoryInfo();
    fail(ErrorCode::OutOfMemory, "[cuda] no memory for %zu bytes: %zu of %zu are free", bytes, info.freeBytes,
         info.totalBytes);
  }
  check(status, "cudaMalloc");
  return memory;
}

void deviceFree(void* memory) { check(cudaFree(memory), "cudaFree"); }

void* hostMalloc(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMallocHost(&memory, std::max<size_t>(bytes, 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(ErrorCode::OutOfMemory, "[cuda] no page-locked memory for %zu bytes", bytes);
  }
  check(status, "cudaMallocHost");
  return memory;
}

void hostFree(void* memory) { check(cudaFreeHost(memory), "cudaFreeHost"); }

void copyAsync(void* to, const void* from, size_t bytes, CopyKind kind, Stream stream) {
  const cudaMemcpyKind kinds[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice};
  check(cudaMemcpyAsync(to, from, bytes, kinds[static_cast<int>(kind)], stream), "cudaMemcpyAsync");
}

void fillAsync(void* memory, uint8_t value, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, value, bytes, stream), "cudaMemsetAsync");
}

Stream streamCreate() {
  Stream stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

void streamDestroy(Stream stream) {
  if (!stream) return;
  abandonCapture(stream);
  const cudaError_t status = cudaStreamSynchronize(stream);
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  check(status, "cudaStreamSynchronize");
}

void streamSynchronize(Stream stream) { check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

bool streamQuery(Stream stream) {
  const cudaError_t status = cudaStreamQuery(stream);
  if (status == cudaErrorNotReady) return false;
  check(status, "cudaStreamQuery");
  return true;
}

void streamWait(Stream stream, Event event) { check(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent"); }

void hostCallback(Stream stream, std::function<void()> callback) {
  // A captured callback runs at every launch of its graph, so it is never freed; others free themselves.
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  auto owned = std::make_unique<std::function<void()>>(std::move(callback));
  const auto once = [](void* data) {
    const std::unique_ptr<std::function<void()>> function(static_cast<std::function<void()>*>(data));
    (*function)();
  };
  const auto always = [](void* data) { (*static_cast<std::function<void()>*>(data))(); };
  const cudaHostFn_t call = capture == cudaStreamCaptureStatusNone ? static_cast<cudaHostFn_t>(once) : always;
  check(cudaLaunchHostFunc(stream, call, owned.get()), "cudaLaunchHostFunc");
  owned.release();
}

Event eventCreate() {
  Event event;
  check(cudaEventCreate(&event), "cudaEventCreate");
  return event;
}

void eventDestroy(Event event) { check(cudaEventDestroy(event), "cudaEventDestroy"); }
void eventRecord(Event event, Stream stream) { check(cudaEventRecord(event, stream), "cudaEventRecord"); }
void eventSynchronize(Event event) { check(cudaEventSynchronize(event), "cudaEventSynchronize"); }

bool eventQuery(Event event) {
  const cudaError_t status = cudaEventQuery(event);
  if (status == cudaErrorNotReady) return false;
  check(status, "cudaEventQuery");
  return true;
}

float elapsedMilliseconds(Event start, Event end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
  return milliseconds;
}

void beginCapture(Stream stream) {
  // Relaxed: the first launch of a kernel loads its module, and asks for attributes and occupancy, in the midst of it.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
}

Graph endCapture(Stream stream) {
  cudaGraph_t recorded = nullptr;
  check(cudaStreamEndCapture(stream, &recorded), "cudaStreamEndCapture");
  Graph graph = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&graph, recorded, 0);
  cudaGraphDestroy(recorded);
  check(status, "cudaGraphInstantiate");
  return graph;
}

void abandonCapture(Stream stream) noexcept {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (!stream || cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture == cudaStreamCaptureStatusNone) {
    return;
  }
  cudaGraph_t recorded = nullptr;
  if (cudaStreamEndCapture(stream, &recorded) == cudaSuccess && recorded) cudaGraphDestroy(recorded);
  cudaGetLastError();
}

void graphLaunch(Graph graph, Stream stream) { check(cudaGraphLaunch(graph, stream), "cudaGraphLaunch"); }
void graphDestroy(Graph graph) { check(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy"); }

TensorMap encodeTensorMap(const TensorMapDesc& desc) {
  checkTensorMap(desc);
  // Through the runtime, so that nothing links against the driver's library.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPoint");
  if (found != cudaDriverEntryPointSuccess)
    fail(ErrorCode::Internal, "[cuda] the driver has no cuTensorMapEncodeTiled");
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_INT32};
  const cuuint64_t sizes[] = {desc.columns, desc.rows}, strides[] = {desc.rowBytes};
  const cuuint32_t box[] = {desc.boxColumns, desc.boxRows}, steps[] = {1, 1};
  CUtensorMap encoded;
  const CUresult status = reinterpret_cast<Encode>(entry)(
      &encoded, types[static_cast<int>(desc.dtype)], 2, const_cast<void*>(desc.base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      desc.swizzle == Swizzle::Bytes128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail(ErrorCode::Internal, "[cuda] cuTensorMapEncodeTiled: error %d", int(status));
  TensorMap map;
  std::memcpy(&map, &encoded, sizeof map);
  return map;
}

}  // namespace elastiform::cuda
