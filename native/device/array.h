// An array in device memory that copies from and to vectors at once; for tests and measurements.
#pragma once

#include <vector>

#include "device/runtime.h"

namespace elastiform::ELASTIFORM_DEVICE {

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size), data_(static_cast<T*>(deviceMalloc(size * sizeof(T)))) {}
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    move(data_, values.data(), CopyKind::HostToDevice);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  // A defect found only here has nobody to be told to: tests that look for one call free().
  ~DeviceArray() {
    try {
      free();
    } catch (const Error&) {
    }
  }

  T* data() const { return data_; }
  std::vector<T> download() const {
    std::vector<T> values(size_);
    move(values.data(), data_, CopyKind::DeviceToHost);
    return values;
  }
  void free() {
    T* data = data_;
    data_ = nullptr;
    deviceFree(data);
  }

 private:
  void move(void* to, const void* from, CopyKind kind) const {
    const Stream stream = streamCreate();
    copyAsync(to, from, size_ * sizeof(T), kind, stream);
    streamDestroy(stream);
  }

  size_t size_;
  T* data_;
};

}  // namespace elastiform::ELASTIFORM_DEVICE
