// Aligned memory, storages backed by it, and the process-wide counters behind memory().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/tensor.h"

namespace elastiform {

constexpr size_t kAlignment = 64;

// Live bytes and objects of the process, for memory() and for leak tests.
struct MemoryCounters {
  std::atomic<int64_t> mappedBytes{0};
  std::atomic<int64_t> heapBytes{0};   // tensors, not arenas
  std::atomic<int64_t> arenaBytes{0};  // arenas and scratch of all engines
  std::atomic<int64_t> deviceBytes{0}; // memory of other devices
  std::atomic<int64_t> tensors{0};     // undisposed JavaScript tensors
  std::atomic<int64_t> programs{0};    // undisposed JavaScript programs
};
MemoryCounters& memoryCounters();

// Owns bytes aligned to kAlignment; zeroed pages come from the system and cost nothing until they are touched.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws Error(OutOfMemory) that says what the memory was for and how much was asked.
  AlignedBuffer(size_t bytes, bool zeroed, const char* purpose);
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  ~AlignedBuffer();

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(AlignedBuffer& other) noexcept;

  void* raw_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Heap memory of a tensor, zeroed. `owned` (bytes held by one JavaScript environment) follows its life.
std::shared_ptr<Storage> heapStorage(size_t bytes, bool writable, std::shared_ptr<std::atomic<int64_t>> owned = {});

}  // namespace elastiform
