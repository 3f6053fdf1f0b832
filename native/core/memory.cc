// Aligned memory, storages backed by it, and the process-wide counters behind memory().
#include "core/memory.h"

#include <cstdlib>
#include <utility>

#include "core/error.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace elastiform {

// Leaked: engine threads may still free memory while static objects are being destroyed.
MemoryCounters& memoryCounters() {
  static auto& counters = *new MemoryCounters;
  return counters;
}

AlignedBuffer::AlignedBuffer(size_t bytes, bool zeroed, const char* purpose) {
  constexpr size_t kLargest = size_t{1} << 46;  // more than any address space holds
  const size_t padded = bytes + kAlignment;
  if (bytes <= kLargest) raw_ = zeroed ? std::calloc(1, padded) : std::malloc(padded);
  if (!raw_) {
    fail(ErrorCode::OutOfMemory, "[memory] cannot allocate %zu bytes (%.1f MiB) for %s", bytes,
         static_cast<double>(bytes) / (1 << 20), purpose);
  }
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw_) + kAlignment - 1) & ~(kAlignment - 1));
  bytes_ = bytes;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Rows of large operands lie pages apart: on small pages every row of a tile misses the address cache. Advice only.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data_) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data_) + bytes) & ~(kHugePage - 1);
  if (!zeroed && first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // The padding behind the last byte would hide a kernel that writes past its operand.
  __asan_poison_memory_region(data_ + bytes, static_cast<uint8_t*>(raw_) + padded - (data_ + bytes));
#endif
}

AlignedBuffer::~AlignedBuffer() {
#if defined(__SANITIZE_ADDRESS__)
  if (raw_) __asan_unpoison_memory_region(raw_, bytes_ + kAlignment);
#endif
  std::free(raw_);
}

void AlignedBuffer::swap(AlignedBuffer& other) noexcept {
  std::swap(raw_, other.raw_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
}

std::shared_ptr<Storage> heapStorage(size_t bytes, bool writable, std::shared_ptr<std::atomic<int64_t>> owned) {
  auto buffer = std::make_shared<AlignedBuffer>(bytes, true, "a tensor");
  auto storage = std::make_shared<Storage>();
  storage->data = buffer->data();
  storage->bytes = bytes;
  storage->writable = writable;
  const auto size = static_cast<int64_t>(bytes);
  memoryCounters().heapBytes += size;
  if (owned) *owned += size;
  storage->release = [buffer, owned, size] {
    memoryCounters().heapBytes -= size;
    if (owned) *owned -= size;
  };
  return storage;
}

}  // namespace elastiform
