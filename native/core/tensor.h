// Tensors that outlive a run (weights, parameters, caches) and the views that kernels get of every operand.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "core/dtype.h"

namespace elastiform {

constexpr int kMaxRank = 4;

// Another device's copy of a writable storage.
struct Mirror {
  virtual ~Mirror() = default;
  // Copies all bytes to the host's memory; waits.
  virtual void download(void* host) = 0;
};

// Bytes somebody owns: heap memory or a mapped file. Shared by tensors; freed with the last of them.
struct Storage {
  uint8_t* data = nullptr;
  size_t bytes = 0;
  bool writable = false;
  std::function<void()> release;  // called once, by the destructor
  // Where set (mapped files): the resident pages of these bytes may go; reading them brings them back.
  std::function<void(size_t offset, size_t bytes)> evict;
  // Runs submitted and not finished that read, or write, this storage (counted for writable ones only).
  std::atomic<int> pendingReaders{0};
  std::atomic<int> pendingWriters{0};
  ~Storage() {
    if (release) release();
  }

  // Where a program has run on another device its copy may be newer, or older. Code that reads or writes `data` of a
  // writable storage says so first; runs are kept apart by the pending counters above.
  void readHost() {
    const std::lock_guard lock(mirrorMutex);
    if (mirrorNewer) mirror->download(data);
    mirrorNewer = false;
  }
  void writeHost() {
    readHost();
    const std::lock_guard lock(mirrorMutex);
    hostNewer = true;
  }
  std::mutex mirrorMutex;
  std::shared_ptr<Mirror> mirror;
  bool mirrorNewer = false, hostNewer = true;
};

struct PackedWeight;  // cpu/gemm: panels made once from a read-only weight
struct DeviceWeight {
  void* data = nullptr;  // device memory
  DType dtype = DType::F32;
  std::function<void(void*)> release;
  ~DeviceWeight() {
    if (release) release(data);
  }
};

// A tensor bound to programs by its owner in JavaScript. Read-only ones (`storage->writable == false`) are weights:
// kernels may keep a packed copy of them in `packed`, made once and shared by every program.
struct Tensor {
  std::shared_ptr<Storage> storage;
  DType dtype = DType::F32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements; weights [out, in] may be transposed or sliced views
  size_t byteOffset = 0;
  DType packAs = DType::F32;  // element type of the packed copy; arithmetic is always f32
  // Where this is one of equal parts of a weight along an axis: it lies in the copies that devices have of the whole.
  std::shared_ptr<Tensor> whole;
  int partAxis = 0;
  int64_t partIndex = 0;

  std::mutex packMutex;
  std::shared_ptr<const PackedWeight> packed;
  // Copies of a read-only tensor in the memory of other devices, contiguous, by DeviceKind; made at first use.
  std::array<std::shared_ptr<const DeviceWeight>, 3> deviceWeights;

  void* data() const { return storage->data + byteOffset; }
};

// What a kernel sees of one operand: current sizes, never bounds. `data` is null for an absent optional operand.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::F32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements; contiguous for everything but weights
  Tensor* tensor = nullptr;                 // the bound tensor of a weight or state operand, else null

  explicit operator bool() const { return data != nullptr; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  float* f32() const { return static_cast<float*>(data); }
  int32_t* i32() const { return static_cast<int32_t*>(data); }
};

}  // namespace elastiform
